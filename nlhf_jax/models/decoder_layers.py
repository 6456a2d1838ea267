# SPDX-License-Identifier: Apache-2.0
"""The pieces of a decoder-only network: norm, grouped attention, gated feed-forward.

Notation besides that of `types.py`: N positions of prompt and response together (the
keys of an attention), Q the positions that ask, G key-value heads, U query heads that
share one of them (H = G U), and J a projection's joined heads. Keys and values keep
heads before positions, as in `models/layers.py`.

Source: grouped queries: Ainslie et al., 2023, arXiv 2305.13245; gated feed-forward:
Shazeer, 2020, arXiv 2002.05202.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nlhf_jax.constraints import constrain
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.models.attention import attention, weights_of
from nlhf_jax.models.layers import PROJECTION, Dense, rows_of
from nlhf_jax.models.rotary import Rotation, rotate
from nlhf_jax.models.shared_prompts import as_queries, as_rows
from nlhf_jax.settings import MemorySettings

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}


class KeysValues(NamedTuple):
    """Turned keys, and values, of one layer."""

    keys_BGNK: Float[Array, "B G N K"]
    values_BGNK: Float[Array, "B G N K"]


def visible(
    query_positions_BQ: Int[Array, "B Q"],
    key_positions_BN: Int[Array, "B N"],
    is_key_BN: Bool[Array, "B N"],
    window: int = 0,
) -> Bool[Array, "B Q N"]:
    """Returns which keys a query reads: those at its own position and before.

    With the query at q and the key at k: k is no padding and 0 <= q - k, and with a
    window also q - k < window.
    """
    distance_BQN = query_positions_BQ[:, :, None] - key_positions_BN[:, None, :]
    is_read_BQN = is_key_BN[:, None, :] & (distance_BQN >= 0)
    return is_read_BQN & (distance_BQN < window) if window else is_read_BQN


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon), times scale or 1 + scale, computed in float32.

    Attributes:
      settings: of the network.
      axis: logical name of what is normalised, "embed" or "kv".
    """

    settings: DecoderOnlySettings
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalised activations in the network's dtype."""
        s = self.settings
        first = nn.initializers.zeros if s.norm_plus_one else nn.initializers.ones
        init = nn.with_logical_partitioning(first, (self.axis,))
        scale_D = self.param("scale", init, (x.shape[-1],), jnp.float32)
        scale_D = scale_D + 1.0 if s.norm_plus_one else scale_D
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + s.norm_epsilon)
        return (x * scale_D.reshape((1,) * (x.ndim - 1) + (-1,))).astype(s.dtype)


def _asked(
    query_BGUQK: Float[Array, "B G U Q K"], keys_BGNK: Float[Array, "P G N K"]
) -> Float[Array, "B G U Q N"]:
    """Returns q k in float32; the keys may have one row for several of the queries'."""
    logits = jnp.einsum(
        "bguqk,bgnk->bguqn",
        as_queries(query_BGUQK, len(keys_BGNK)),
        keys_BGNK,
        preferred_element_type=jnp.promote_types(query_BGUQK.dtype, jnp.float32),
    )
    return as_rows(logits, len(query_BGUQK))


def _weighted(
    weights_BGUQN: Float[Array, "B G U Q N"], values_BGNK: Float[Array, "P G N K"]
) -> Float[Array, "B G U Q K"]:
    """Returns the weighted values, which may have one row for several of weights."""
    read = jnp.einsum(
        "bguqn,bgnk->bguqk", as_queries(weights_BGUQN, len(values_BGNK)), values_BGNK
    )
    return as_rows(read, len(weights_BGUQN))


def _read_both(
    query_BGUQK: Float[Array, "B G U Q K"],
    prompt: KeysValues,
    own: KeysValues,
    visible_BQN: Bool[Array, "B Q N"],
    how: dict[str, float],
) -> Float[Array, "B G U Q K"]:
    """Returns what is read of a prompt's columns and of a row's own, in this order."""
    logits = [_asked(query_BGUQK, part.keys_BGNK) for part in (prompt, own)]
    weights_BGUQN = weights_of(jnp.concatenate(logits, axis=-1), visible_BQN, **how)
    weights_BGUQN = weights_BGUQN.astype(own.values_BGNK.dtype)
    length = prompt.keys_BGNK.shape[2]
    of_prompt = _weighted(weights_BGUQN[..., :length], prompt.values_BGNK)
    return of_prompt + _weighted(weights_BGUQN[..., length:], own.values_BGNK)


class GroupedAttention(nn.Module):
    """Attention whose query heads share keys and values, group by group."""

    settings: DecoderOnlySettings
    memory: MemorySettings

    def setup(self):
        s = self.settings

        def inward(num_heads):
            return Dense(
                num_heads * s.head_dim,
                ("embed", "joined_kv"),
                s.dtype,
                PROJECTION,
                s.query_key_value_bias,
            )

        self.query = inward(s.num_heads)
        self.key = inward(s.num_kv_heads)
        self.value = inward(s.num_kv_heads)
        axes = ("joined_kv", "embed")
        self.out = Dense(s.emb_dim, axes, s.dtype, PROJECTION, s.output_bias)
        if s.query_key_norm:
            self.query_norm = Norm(s, "kv")
            self.key_norm = Norm(s, "kv")

    def _heads(self, x_BNJ):
        batch, length, _ = x_BNJ.shape
        x_BHNK = x_BNJ.reshape(batch, length, -1, self.settings.head_dim).swapaxes(1, 2)
        return constrain(x_BHNK, ("batch", "heads", "length", "kv"))

    def keys_values(self, x_BND: Float[Array, "B N D"], turn: Rotation) -> KeysValues:
        """Returns what later positions read of the positions `x_BND`."""
        keys_BGNK = self._heads(self.key(x_BND))
        if self.settings.query_key_norm:
            keys_BGNK = self.key_norm(keys_BGNK)
        return KeysValues(rotate(keys_BGNK, turn), self._heads(self.value(x_BND)))

    def _queries(self, x_BQD, turn: Rotation):
        s = self.settings
        query_BHQK = self._heads(self.query(x_BQD))
        if s.query_key_norm:
            query_BHQK = self.query_norm(query_BHQK)
        query_BHQK = rotate(query_BHQK, turn)
        batch, heads, length, width = query_BHQK.shape
        groups = (s.num_kv_heads, heads // s.num_kv_heads)
        return query_BHQK.reshape(batch, *groups, length, width)

    def read(
        self,
        x_BQD: Float[Array, "B Q D"],
        turn: Rotation,
        keys_values: KeysValues,
        visible_BQN: Bool[Array, "B Q N"],
        prompt: KeysValues | None = None,
    ) -> Float[Array, "B Q D"]:
        """Returns softmax(cap(q k / sqrt(scalar))) v, projected; softmax in float32.

        With `prompt`, its keys come before the rows' own, and it may have one row for
        several rows of x beside each other.
        """
        s = self.settings
        how = {
            "scale": (s.query_scalar or s.head_dim) ** -0.5,
            "soft_cap": s.attention_soft_cap,
        }
        query_BGUQK = self._queries(x_BQD, turn)
        if prompt is None:
            is_whole = x_BQD.shape[1] == visible_BQN.shape[2]
            read_BGUQK = attention(
                query_BGUQK,
                *keys_values,
                visible_BQN,
                is_causal=is_whole and not s.sliding_window,
                memory=self.memory,
                **how,
            )
        else:
            read_BGUQK = _read_both(query_BGUQK, prompt, keys_values, visible_BQN, how)
        read_BQGUK = jnp.moveaxis(read_BGUQK, 3, 1)
        return self.out(read_BQGUK.reshape(*read_BQGUK.shape[:2], -1))


class GatedFeedForward(nn.Module):
    """wo(activation(wi_0(x)) * wi_1(x))."""

    settings: DecoderOnlySettings

    @nn.compact
    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Returns the block's output."""
        s = self.settings
        dense = functools.partial(Dense, dtype=s.dtype, use_bias=s.mlp_bias)
        gate_BNF = dense(s.mlp_dim, ("embed", "mlp"), name="wi_0")(x_BND)
        up_BNF = dense(s.mlp_dim, ("embed", "mlp"), name="wi_1")(x_BND)
        hidden_BNF = ACTIVATIONS[s.activation](gate_BNF) * up_BNF
        hidden_BNF = constrain(hidden_BNF, ("batch", "length", "mlp"))
        return dense(s.emb_dim, ("mlp", "embed"), name="wo")(hidden_BNF)


class DecoderOnlyLayer(nn.Module):
    """Attention and a feed-forward block, each behind a norm, each added.

    What they add passes another norm where the settings have `post_norms`.
    """

    settings: DecoderOnlySettings
    memory: MemorySettings

    def setup(self):
        s = self.settings
        self.pre_attention_norm = Norm(s)
        self.attention = GroupedAttention(s, self.memory)
        self.pre_mlp_norm = Norm(s)
        self.mlp = GatedFeedForward(s)
        if s.post_norms:
            self.post_attention_norm = Norm(s)
            self.post_mlp_norm = Norm(s)

    def _add(self, x_BND, read_BND):
        """Returns the layer's output, given what attention read."""
        if self.settings.post_norms:
            read_BND = self.post_attention_norm(read_BND)
        x_BND = x_BND + read_BND
        made_BND = self.mlp(self.pre_mlp_norm(x_BND))
        if self.settings.post_norms:
            made_BND = self.post_mlp_norm(made_BND)
        return rows_of(x_BND + made_BND)

    def whole(self, x_BND, turn: Rotation, visible_BNN):
        """Returns (output, keys and values) of a whole sequence."""
        h_BND = self.pre_attention_norm(x_BND)
        keys_values = self.attention.keys_values(h_BND, turn)
        read_BND = self.attention.read(h_BND, turn, keys_values, visible_BNN)
        return self._add(x_BND, read_BND), keys_values

    def __call__(self, x_BND, is_local, turns, visibles, use_dropout: bool):
        """Returns the output of a whole sequence, [B, N, D].

        Args:
          x_BND: the input.
          is_local: which of the two turns and masks is the layer's; it may be traced,
            so that a loop can run over layers of both kinds.
          turns: `Rotation` of global and of local layers.
          visibles: masks of global and of local layers, [B, N, N].
          use_dropout: ignored; these models are trained without.
        """
        del use_dropout
        turn, visible_BNN = jax.tree.map(
            lambda whole, local: jnp.where(is_local, local, whole),
            (turns[0], visibles[0]),
            (turns[1], visibles[1]),
        )
        return self.whole(x_BND, turn, visible_BNN)[0]

    def step(
        self, x_R1D, cache: KeysValues, column, turn: Rotation, visible_R1N, prompt=None
    ):
        """Returns (output of one position, cache with it written at `column`).

        `prompt` is what `GroupedAttention.read` says.
        """
        h_R1D = self.pre_attention_norm(x_R1D)
        write = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=column, axis=2
        )
        new = self.attention.keys_values(h_R1D, turn)
        cache = KeysValues(*map(write, cache, new))
        read_R1D = self.attention.read(h_R1D, turn, cache, visible_R1N, prompt)
        return self._add(x_R1D, read_R1D), cache
