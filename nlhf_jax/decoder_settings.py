# SPDX-License-Identifier: Apache-2.0
"""Shape and switches of decoder-only models: Llama, Gemma, Qwen and their like."""

import dataclasses

from nlhf_jax.checks import UserError, check_choice, check_integer, check_range
from nlhf_jax.t5_settings import LARGEST_LAYERS, T5Settings

ACTIVATIONS = ("gelu", "gelu_exact", "silu")
ROPE_SCALINGS = ("none", "linear", "llama3")
LAYER_KINDS = ("global", "local")


@dataclasses.dataclass(frozen=True)
class DecoderOnlySettings:
    """Shape of a decoder-only network, and the switches in which the families differ.

    Attributes:
      vocab_size: rows of the embedding; at least the vocabulary's size.
      emb_dim: model width D.
      num_heads: query heads H.
      num_kv_heads: heads of keys and values; divides `num_heads`, and each is read by
        as many query heads as the other.
      head_dim: width K of a head, even.
      mlp_dim: hidden width F of the feed-forward block.
      num_layers: blocks.
      activation: of the gate: "silu" (Llama, Qwen), "gelu" (Gemma; by tanh) or
        "gelu_exact".
      tied_output: the embedding is the output layer too.
      query_key_value_bias: biases of the three projections (Qwen 2).
      output_bias: a bias of attention's last projection.
      mlp_bias: biases of the feed-forward block.
      query_key_norm: queries and keys are normalised head by head (Qwen 3, Gemma 3).
      post_norms: what a block adds is normalised too (Gemma 2 and 3).
      norm_plus_one: norms multiply by 1 + scale (Gemma), not by scale.
      norm_epsilon: added to the mean square, > 0.
      scale_embedding: embeddings are multiplied by sqrt(D) (Gemma).
      query_scalar: attention logits are divided by its root; 0 is `head_dim`.
      attention_soft_cap: cap of the attention logits, see `unembedding.soft_capped`;
        0 caps nothing.
      logit_soft_cap: cap of the output's logits; 0 caps nothing.
      attention_pattern: kinds of the layers, repeated until there are `num_layers`:
        "global" reads every position before its own, "local" the last ones.
      sliding_window: positions that a local layer reads, its own included.
      rope_base: of the rotary positions' wave lengths.
      local_rope_base: of local layers, without scaling (Gemma 3); 0 makes them as the
        global ones.
      rope_scaling: how wave lengths are stretched: "none", "linear" (all, by
        `rope_factor`) or "llama3" (the long ones only).
      rope_factor: of the stretching, >= 1.
      rope_low_frequency_factor: waves longer than `rope_original_length` divided by it
        are stretched by the whole factor ("llama3").
      rope_high_frequency_factor: waves shorter than `rope_original_length` divided by
        it stay as they are ("llama3"); between the two, by degrees.
      rope_original_length: tokens that the model was pretrained with ("llama3").
      pad_id: fills the padding.
      eos_id: ends a response.
      dtype: dtype of the activations; parameters and logits stay float32.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    num_layers: int
    activation: str = "silu"
    tied_output: bool = False
    query_key_value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    norm_epsilon: float = 1e-6
    scale_embedding: bool = False
    query_scalar: float = 0.0
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    attention_pattern: tuple[str, ...] = ("global",)
    sliding_window: int = 0
    rope_base: float = 10_000.0
    local_rope_base: float = 0.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_length: int = 8192
    pad_id: int = 0
    eos_id: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        for name in (
            "vocab_size",
            "emb_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "num_layers",
            "rope_original_length",
        ):
            check_integer(name, getattr(self, name), 1)
        check_range("num_layers", self.num_layers, 1, LARGEST_LAYERS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_range("norm_epsilon", self.norm_epsilon, 0.0, low_open=True)
        for name in ("query_scalar", "attention_soft_cap", "logit_soft_cap"):
            check_range(name, getattr(self, name), 0.0, high_open=True)
        for name in ("pad_id", "eos_id"):
            check_integer(name, getattr(self, name))
            check_range(name, getattr(self, name), 0, self.vocab_size - 1)
        self._check_heads()
        self._check_pattern()
        self._check_rope()

    def _check_heads(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads must divide num_heads {self.num_heads}, got "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even, got {self.head_dim}")

    def _check_pattern(self):
        if not self.attention_pattern:
            raise UserError("attention_pattern must name at least one layer, got ()")
        for kind in self.attention_pattern:
            check_choice("attention_pattern", kind, LAYER_KINDS)
        check_integer("sliding_window", self.sliding_window)
        if any(self.is_local) != (self.sliding_window > 0):
            raise UserError(
                "sliding_window must be at least 1 where a layer is local and 0 where "
                f"none is, got {self.sliding_window} with attention_pattern "
                f"{self.attention_pattern}"
            )

    def _check_rope(self):
        check_range("rope_base", self.rope_base, 1.0, low_open=True)
        check_range("local_rope_base", self.local_rope_base, 0.0)
        check_choice("rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        check_range("rope_factor", self.rope_factor, 1.0)
        low, high = self.rope_low_frequency_factor, self.rope_high_frequency_factor
        check_range("rope_low_frequency_factor", low, 0.0, low_open=True)
        check_range("rope_high_frequency_factor", high, low, low_open=True)

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Whether each layer reads the last positions only."""
        pattern = self.attention_pattern
        kinds = (pattern[i % len(pattern)] for i in range(self.num_layers))
        return tuple(kind == "local" for kind in kinds)


ModelSettings = T5Settings | DecoderOnlySettings
