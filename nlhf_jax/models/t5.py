# SPDX-License-Identifier: Apache-2.0
"""The T5 encoder-decoder, versions 1.0 and 1.1, as a `LanguageModel`.

Parameter names, shapes and logical axes are T5X's (layers unscanned), so its
checkpoints fit without a mapping. Response position t is predicted from the prompt's
encoding and the response shifted right by one, starting with id 0.

Source: Raffel et al., 2020, arXiv 1910.10683; gated activations of version 1.1:
Shazeer, 2020, arXiv 2002.05202.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nlhf_jax import sequences
from nlhf_jax.checks import UserError
from nlhf_jax.constraints import constrain
from nlhf_jax.models.functions import language_model_of
from nlhf_jax.models.layers import (
    MASKED,
    Attention,
    Dense,
    Embedding,
    FeedForward,
    RelativeBias,
    RMSNorm,
    dropout_module,
    key_bias,
    rows_of,
)
from nlhf_jax.models.stacking import through_layers
from nlhf_jax.models.unembedding import check_chunks, chunked_token_scores
from nlhf_jax.settings import MemorySettings
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import LanguageModel, PromptBatch

PAD_ID, EOS_ID, START_ID = 0, 1, 0


class LayerCache(NamedTuple):
    """Keys and values of one decoder layer, one row per response being decoded."""

    self_keys_RHTK: Float[Array, "R H T K"]
    self_values_RHTK: Float[Array, "R H T K"]
    cross_keys_RHSK: Float[Array, "R H S K"]
    cross_values_RHSK: Float[Array, "R H S K"]


class T5Cache(NamedTuple):
    """All that decoding keeps; every leaf's first axis is the row.

    Mask and cross-attention may have one row for several rows of the rest, see `share`.
    """

    mask_RS: Bool[Array, "R S"]
    layers: tuple[LayerCache, ...]


def share(cache: T5Cache, each: int) -> T5Cache:
    """Returns the cache of `each` responses to a prompt; they read one encoding."""

    def one(layer: LayerCache) -> LayerCache:
        return layer._replace(
            self_keys_RHTK=jnp.repeat(layer.self_keys_RHTK, each, axis=0),
            self_values_RHTK=jnp.repeat(layer.self_values_RHTK, each, axis=0),
        )

    return cache._replace(layers=tuple(map(one, cache.layers)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each behind a norm, each added."""

    settings: T5Settings
    memory: MemorySettings

    def setup(self):
        dtype = self.settings.dtype
        self.pre_attention_layer_norm = RMSNorm(dtype)
        self.attention = Attention(self.settings)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = FeedForward(self.settings)
        self.drop = dropout_module(self.settings)
        if self.settings.bias_in_each_layer:
            self.relpos_bias = RelativeBias(self.settings.num_heads, bidirectional=True)

    def __call__(self, x_BSD, bias, use_dropout: bool):
        """Returns the layer's output, [B, S, D]."""
        dropout = functools.partial(self.drop, deterministic=not use_dropout)
        if self.settings.bias_in_each_layer:
            positions_S = jnp.arange(x_BSD.shape[1])
            bias = bias + self.relpos_bias(positions_S, positions_S)
        h_BSD = self.pre_attention_layer_norm(x_BSD)
        x_BSD = x_BSD + dropout(self.attention(h_BSD, bias, dropout))
        h_BSD = self.pre_mlp_layer_norm(x_BSD)
        return rows_of(x_BSD + dropout(self.mlp(h_BSD, dropout)))


class DecoderLayer(nn.Module):
    """Self-attention, attention to the prompt, and a feed-forward block."""

    settings: T5Settings
    memory: MemorySettings

    def setup(self):
        dtype = self.settings.dtype
        self.pre_self_attention_layer_norm = RMSNorm(dtype)
        self.self_attention = Attention(self.settings)
        self.pre_cross_attention_layer_norm = RMSNorm(dtype)
        self.encoder_decoder_attention = Attention(self.settings)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = FeedForward(self.settings)
        self.drop = dropout_module(self.settings)
        if self.settings.bias_in_each_layer:
            self.relpos_bias = RelativeBias(
                self.settings.num_heads, bidirectional=False
            )

    def _biased(self, bias, query_positions_Q, key_positions_S):
        """Returns self-attention's bias with the layer's own, if it has one."""
        if not self.settings.bias_in_each_layer:
            return bias
        return bias + self.relpos_bias(query_positions_Q, key_positions_S)

    def _rest(self, x_BTD, cross, cross_bias, dropout):
        h_BTD = self.pre_cross_attention_layer_norm(x_BTD)
        read_BTD = self.encoder_decoder_attention.read(
            h_BTD, cross, cross_bias, dropout
        )
        x_BTD = x_BTD + dropout(read_BTD)
        h_BTD = self.pre_mlp_layer_norm(x_BTD)
        return rows_of(x_BTD + dropout(self.mlp(h_BTD, dropout)))

    def __call__(self, x_BTD, encoded_BSD, self_bias, cross_bias, use_dropout: bool):
        """Returns the layer's output on a whole response, [B, T, D]."""
        dropout = functools.partial(self.drop, deterministic=not use_dropout)
        positions_T = jnp.arange(x_BTD.shape[1])
        self_bias = self._biased(self_bias, positions_T, positions_T)
        h_BTD = self.pre_self_attention_layer_norm(x_BTD)
        x_BTD = x_BTD + dropout(self.self_attention(h_BTD, self_bias, dropout))
        cross = self.encoder_decoder_attention.keys_values(encoded_BSD)
        return self._rest(x_BTD, cross, cross_bias, dropout)

    def start(self, encoded_BSD, max_length: int) -> LayerCache:
        """Returns the cache before the first token."""
        cross_keys, cross_values = self.encoder_decoder_attention.keys_values(
            encoded_BSD
        )
        batch, heads, _, width = cross_keys.shape
        empty = jnp.zeros((batch, heads, max_length, width), cross_keys.dtype)
        return LayerCache(empty, empty, cross_keys, cross_values)

    def step(self, x_R1D, cache: LayerCache, step, self_bias, cross_bias):
        """Returns (output of one position, cache with that position written)."""
        h_R1D = self.pre_self_attention_layer_norm(x_R1D)
        keys_T = jnp.arange(cache.self_keys_RHTK.shape[2])
        self_bias = self._biased(self_bias, step[None], keys_T)
        write = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=2
        )
        new_keys, new_values = self.self_attention.keys_values(h_R1D)
        keys = write(cache.self_keys_RHTK, new_keys)
        values = write(cache.self_values_RHTK, new_values)
        x_R1D = x_R1D + self.self_attention.read(h_R1D, (keys, values), self_bias)
        cross = (cache.cross_keys_RHSK, cache.cross_values_RHSK)
        x_R1D = self._rest(x_R1D, cross, cross_bias, lambda x: x)
        return x_R1D, LayerCache(keys, values, *cross)


class Encoder(nn.Module):
    """Reads the prompt."""

    settings: T5Settings
    memory: MemorySettings

    def setup(self):
        s = self.settings
        if not s.bias_in_each_layer:
            self.relpos_bias = RelativeBias(s.num_heads, bidirectional=True)
        self.layers = [
            EncoderLayer(s, self.memory) for _ in range(s.num_encoder_layers)
        ]
        self.encoder_norm = RMSNorm(s.dtype)
        self.drop = dropout_module(s)

    def __call__(self, x_BSD, mask_BS, use_dropout: bool):
        """Returns the prompt's encoding, [B, S, D]."""
        dropout = functools.partial(self.drop, deterministic=not use_dropout)
        bias = key_bias(mask_BS)
        if not self.settings.bias_in_each_layer:
            positions_S = jnp.arange(x_BSD.shape[1])
            bias = self.relpos_bias(positions_S, positions_S) + bias
        x_BSD = dropout(x_BSD)
        x_BSD = through_layers(self, EncoderLayer, x_BSD, (bias,), use_dropout)
        return dropout(self.encoder_norm(x_BSD))


class Decoder(nn.Module):
    """Writes the response, a whole one (training) or one position at a time."""

    settings: T5Settings
    memory: MemorySettings

    def setup(self):
        s = self.settings
        if not s.bias_in_each_layer:
            self.relpos_bias = RelativeBias(s.num_heads, bidirectional=False)
        self.layers = [
            DecoderLayer(s, self.memory) for _ in range(s.num_decoder_layers)
        ]
        self.decoder_norm = RMSNorm(s.dtype)
        if not s.logits_via_embedding:
            # Float32 whatever the activations' dtype, as the tied logits are.
            self.logits_dense = Dense(s.vocab_size, ("embed", "vocab"), "float32")
        self.drop = dropout_module(s)

    def logits(self, x_BTD, embedding: Embedding):
        """Returns the float32 logits of features, [B, T, V]."""
        if self.settings.logits_via_embedding:
            logits_BTV = embedding.attend(x_BTD)
        else:
            logits_BTV = self.logits_dense(x_BTD)
        return constrain(logits_BTV, ("batch", "length", "vocab"))

    def output_kernel(self, embedding: Embedding) -> Float[Array, "D V"]:
        """Returns the matrix whose product with features `logits` is."""
        if self.settings.logits_via_embedding:
            table_VD = embedding.embedding
            return table_VD.T / math.sqrt(table_VD.shape[1])
        return self.logits_dense.variables["params"]["kernel"]

    def __call__(self, x_BTD, encoded_BSD, mask_BS, use_dropout: bool):
        """Returns what the output layer reads at every position, [B, T, D]."""
        dropout = functools.partial(self.drop, deterministic=not use_dropout)
        positions_T = jnp.arange(x_BTD.shape[1])
        is_future_TT = positions_T[None, :] > positions_T[:, None]
        self_bias = jnp.where(is_future_TT, MASKED, 0.0)[None, None]
        if not self.settings.bias_in_each_layer:
            self_bias = self.relpos_bias(positions_T, positions_T) + self_bias
        cross_bias = key_bias(mask_BS)
        shared = (encoded_BSD, self_bias, cross_bias)
        x_BTD = through_layers(self, DecoderLayer, dropout(x_BTD), shared, use_dropout)
        return dropout(self.decoder_norm(x_BTD))

    def start(self, encoded_BSD, mask_BS, max_length: int) -> T5Cache:
        """Returns the cache before the first token."""
        layers = tuple(layer.start(encoded_BSD, max_length) for layer in self.layers)
        return T5Cache(mask_BS, layers)

    def step(self, x_R1D, cache: T5Cache, step, embedding):
        """Returns (logits_RV of position `step`, cache)."""
        keys_T = jnp.arange(cache.layers[0].self_keys_RHTK.shape[2])
        self_bias = jnp.where(keys_T > step, MASKED, 0.0)[None, None, None, :]
        if not self.settings.bias_in_each_layer:
            self_bias = self.relpos_bias(step[None], keys_T) + self_bias
        cross_bias = key_bias(cache.mask_RS)
        layers = []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_R1D, layer_cache = layer.step(
                x_R1D, layer_cache, step, self_bias, cross_bias
            )
            layers.append(layer_cache)
        logits_R1V = self.logits(self.decoder_norm(x_R1D), embedding)
        return logits_R1V[:, 0], T5Cache(cache.mask_RS, tuple(layers))


class T5(nn.Module):
    """The network; its methods are what `t5_language_model` hands out."""

    settings: T5Settings
    memory: MemorySettings

    def setup(self):
        s = self.settings
        self.token_embedder = Embedding(s.vocab_size, s.emb_dim, s.dtype)
        self.encoder = Encoder(s, self.memory)
        self.decoder = Decoder(s, self.memory)

    def _encode(self, prompts: PromptBatch, use_dropout: bool):
        x_BSD = self.token_embedder(prompts.tokens_BS)
        return self.encoder(x_BSD, prompts.mask_BS, use_dropout)

    def _features(self, prompts: PromptBatch, tokens_BT, use_dropout: bool):
        encoded_BSD = self._encode(prompts, use_dropout)
        shifted_BT = jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)))
        x_BTD = self.token_embedder(shifted_BT)
        return self.decoder(x_BTD, encoded_BSD, prompts.mask_BS, use_dropout)

    def __call__(self, prompts: PromptBatch, tokens_BT, use_dropout: bool = False):
        """Returns float32 logits_BTV for teacher-forced responses."""
        features_BTD = self._features(prompts, tokens_BT, use_dropout)
        return self.decoder.logits(features_BTD, self.token_embedder)

    def logits_of(self, prompts: PromptBatch, tokens_BT, token_id: int):
        """Returns the float32 logits of one token at every position, [B, T]."""
        features_BTD = self._features(prompts, tokens_BT, False).astype(jnp.float32)
        kernel_DV = self.decoder.output_kernel(self.token_embedder)
        return features_BTD @ kernel_DV[:, token_id].astype(jnp.float32)

    def token_scores(self, prompts: PromptBatch, tokens_BT, use_dropout: bool = False):
        """Returns the `TokenScores` of teacher-forced responses."""
        features_BTD = self._features(prompts, tokens_BT, use_dropout)
        num_chunks = self.memory.num_vocab_chunks
        if num_chunks == 1:
            logits_BTV = self.decoder.logits(features_BTD, self.token_embedder)
            return sequences.token_scores(logits_BTV, tokens_BT)
        return chunked_token_scores(
            features_BTD.astype(jnp.float32),
            self.decoder.output_kernel(self.token_embedder).astype(jnp.float32),
            tokens_BT,
            num_chunks,
        )

    def prefill(self, prompts: PromptBatch, max_length: int):
        """Returns (start_tokens_B, cache) of a response not yet begun."""
        encoded_BSD = self._encode(prompts, False)
        cache = self.decoder.start(encoded_BSD, prompts.mask_BS, max_length)
        return jnp.full(prompts.tokens_BS.shape[:1], START_ID, jnp.int32), cache

    def decode_step(self, cache: T5Cache, tokens_R, step):
        """Returns (logits_RV, cache) after feeding the token before `step`."""
        x_R1D = self.token_embedder(tokens_R[:, None])
        return self.decoder.step(x_R1D, cache, jnp.asarray(step), self.token_embedder)


def t5_language_model(
    settings: T5Settings,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> LanguageModel:
    """Returns a T5 network as pure functions; equal settings give equal functions.

    The parameters are plain nested dicts of float32 arrays with T5X's names, the
    logical axes a tree of the same shape. Padding is id 0, the end token id 1.

    Args:
      settings: the network.
      memory: what its passes keep; the parameters do not depend on it.

    Raises:
      UserError: the chunks of the vocabulary do not divide it, or `memory` asks for
        another attention than "plain".
    """
    check_chunks(settings.vocab_size, memory.num_vocab_chunks)
    if memory.attention != "plain":
        raise UserError(
            "attention must be 'plain' for T5, which has no other (remat='full' "
            f"computes it again), got {memory.attention!r}"
        )
    if memory.compute_dtype:
        settings = dataclasses.replace(settings, dtype=memory.compute_dtype)
    return _t5_language_model(settings, memory)


@functools.cache
def _t5_language_model(settings: T5Settings, memory: MemorySettings) -> LanguageModel:
    return language_model_of(
        T5(settings, memory),
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        dropout_rate=settings.dropout_rate,
        share=share,
        reads_prompts_once=True,
    )
