# SPDX-License-Identifier: Apache-2.0
"""One device's part of a network, as a network of its own."""

import dataclasses

from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings
from nlhf_jax.settings import MemorySettings


@dataclasses.dataclass(frozen=True)
class Share:
    """One device's part of a program.

    Attributes:
      rows: parts that the batch is split into.
      tensor: parts that heads, hidden units and vocabulary are split into.
    """

    rows: int = 1
    tensor: int = 1

    def of(self, settings: ModelSettings, memory: MemorySettings) -> ModelSettings:
        """Returns the part of a network; what does not divide is rounded up."""
        parts = self.tensor
        chunks = memory.num_vocab_chunks
        heads = {"num_heads": -(-settings.num_heads // parts)}
        if isinstance(settings, DecoderOnlySettings):
            # Heads that share keys lie together; a key that is read by several devices
            # is on each of them.
            shared = -(-settings.num_kv_heads // parts)
            each = -(-heads["num_heads"] // shared)
            heads = {"num_heads": each * shared, "num_kv_heads": shared}
        return dataclasses.replace(
            settings,
            **heads,
            mlp_dim=-(-settings.mlp_dim // parts),
            vocab_size=-(-settings.vocab_size // (parts * chunks)) * chunks,
        )


WHOLE = Share()
