# SPDX-License-Identifier: Apache-2.0
"""The shape of an encoder-decoder network."""

import dataclasses

from nlhf_jax.checks import check_choice, check_integer, check_range

LARGEST_LAYERS = 1000  # of a stack; the largest public models have a tenth of it


@dataclasses.dataclass(frozen=True)
class T5Settings:
    """Shape of a T5 encoder-decoder.

    Attributes:
      vocab_size: rows of the embedding; at least the vocabulary's size.
      emb_dim: model width D.
      num_heads: attention heads H.
      head_dim: width K of a head.
      mlp_dim: hidden width F of the feed-forward block.
      num_encoder_layers: encoder blocks.
      num_decoder_layers: decoder blocks.
      mlp_activations: ("relu",) for T5 1.0, ("gelu", "linear") for T5 1.1.
      logits_via_embedding: tied output (1.0) or a dense layer of its own (1.1).
      dropout_rate: probability of dropping, in [0, 1); used in supervised steps only.
      dtype: dtype of the activations; parameters and logits stay float32.
      bias_in_each_layer: a relative bias in each layer (umT5), not one for a stack.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    dropout_rate: float = 0.0
    dtype: str = "float32"
    bias_in_each_layer: bool = False

    def __post_init__(self):
        for name in (
            "vocab_size",
            "emb_dim",
            "num_heads",
            "head_dim",
            "mlp_dim",
            "num_encoder_layers",
            "num_decoder_layers",
        ):
            check_integer(name, getattr(self, name), 1)
        for name in ("num_encoder_layers", "num_decoder_layers"):
            check_range(name, getattr(self, name), 1, LARGEST_LAYERS)
        check_range("dropout_rate", self.dropout_rate, 0.0, 1.0, high_open=True)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        for activation in self.mlp_activations:
            check_choice("mlp_activations", activation, ("relu", "gelu", "linear"))
