# SPDX-License-Identifier: Apache-2.0
"""Decoder-only models, Llama, Gemma and Qwen among them, as a `LanguageModel`.

One network; `DecoderOnlySettings` says in what a family differs. Prompt and response
are one sequence of N = S + T columns, in training and in decoding:

    prompt  [5 6 7 .]      column     0 1 2 3 | 4 5 6
    response [8 9 1]       token      5 6 7 . | 7 8 9
                           position   0 1 2 3 | 2 3 4
                           is read    x x     | x x x
                           predicts           | 8 9 1

The prompt's last token, whose successor is the response's first, moves to the
response: it is what a decode starts with, and the prompt's own columns end before it.
A row thus says the same whatever its padding: masked columns are read by nobody, and
positions count the row's own tokens.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nlhf_jax import sequences
from nlhf_jax.constraints import constrain, gather
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.models.decoder_layers import (
    DecoderOnlyLayer,
    KeysValues,
    Norm,
    visible,
)
from nlhf_jax.models.functions import language_model_of
from nlhf_jax.models.layers import Dense, Embedding
from nlhf_jax.models.rotary import Rotation, layer_frequencies, rotation
from nlhf_jax.models.stacking import through_layers
from nlhf_jax.models.unembedding import (
    check_chunks,
    chunked_token_scores,
    soft_capped,
)
from nlhf_jax.settings import MemorySettings
from nlhf_jax.types import LanguageModel, PromptBatch


class Prompt(NamedTuple):
    """A prompt without its last token.

    Attributes:
      tokens_BS: as in the batch.
      mask_BS: True on all tokens but the last.
      last_B: the last token's id; that of the first column where the mask is empty.
      start_B: its position, which is the first of the response's inputs.
    """

    tokens_BS: Int[Array, "B S"]
    mask_BS: Bool[Array, "B S"]
    last_B: Int[Array, "B"]
    start_B: Int[Array, "B"]


class DecoderOnlyCache(NamedTuple):
    """All that decoding keeps; every leaf's first axis is the row.

    Attributes:
      mask_RS: True on the prompt's tokens but the last.
      start_R: position of the prompt's last token.
      layers: turned keys, and values, of S + T columns, one entry a layer.
      prompts: those of the S columns, one row for several rows of the rest; `layers`
        has the T others then. () where no prompt is shared.
    """

    mask_RS: Bool[Array, "R S"]
    start_R: Int[Array, "R"]
    layers: tuple[KeysValues, ...]
    prompts: tuple[KeysValues, ...] = ()


def share(cache: DecoderOnlyCache, each: int) -> DecoderOnlyCache:
    """Returns the cache of `each` responses to a prompt, whose keys stand once."""
    length = cache.mask_RS.shape[1]

    def repeated(leaf):
        return jnp.repeat(leaf, each, axis=0)

    return DecoderOnlyCache(
        repeated(cache.mask_RS),
        repeated(cache.start_R),
        tuple(
            KeysValues(*(repeated(leaf[:, :, length:]) for leaf in layer))
            for layer in cache.layers
        ),
        tuple(
            KeysValues(*(leaf[:, :, :length] for leaf in layer))
            for layer in cache.layers
        ),
    )


def without_last(prompts: PromptBatch) -> Prompt:
    """Returns the prompts, each with its last token apart."""
    lengths_B = prompts.mask_BS.sum(axis=1)
    start_B = jnp.maximum(lengths_B - 1, 0).astype(jnp.int32)
    columns_1S = jnp.arange(prompts.tokens_BS.shape[1])[None, :]
    last_B1 = jnp.take_along_axis(prompts.tokens_BS, start_B[:, None], axis=1)
    mask_BS = columns_1S < start_B[:, None]
    return Prompt(prompts.tokens_BS, mask_BS, last_B1[:, 0], start_B)


def positions_of(
    start_B: Int[Array, "B"], prompt_length: int, response_length: int
) -> Int[Array, "B N"]:
    """Returns the position of every column, N = S + T; see the module's picture."""
    prompt_1S = jnp.arange(prompt_length)[None, :]
    prompt_BS = jnp.broadcast_to(prompt_1S, (len(start_B), prompt_length))
    response_BT = start_B[:, None] + jnp.arange(response_length)[None, :]
    return jnp.concatenate([prompt_BS, response_BT], axis=1)


def _with_response(mask_BS: Bool[Array, "B S"], length: int) -> Bool[Array, "B N"]:
    """Returns which columns may be read, all of the response's among them."""
    return jnp.pad(mask_BS, ((0, 0), (0, length)), constant_values=True)


class DecoderOnly(nn.Module):
    """The network; its methods are what `decoder_only_language_model` hands out."""

    settings: DecoderOnlySettings
    memory: MemorySettings

    def setup(self):
        s = self.settings
        self.token_embedder = Embedding(
            s.vocab_size, s.emb_dim, s.dtype, s.emb_dim**-0.5
        )
        self.layers = [DecoderOnlyLayer(s, self.memory) for _ in range(s.num_layers)]
        self.final_norm = Norm(s)
        if not s.tied_output:
            # Float32 whatever the activations' dtype, as the tied logits are.
            self.logits_dense = Dense(s.vocab_size, ("embed", "vocab"), "float32")

    def _embed(self, tokens_BN):
        x_BND = self.token_embedder(tokens_BN)
        if self.settings.scale_embedding:
            # Rounded to the activations' dtype, as the models were trained.
            scale = jnp.asarray(math.sqrt(self.settings.emb_dim), x_BND.dtype)
            x_BND = x_BND * scale
        return x_BND

    def _turns(self, positions_BN) -> tuple[Rotation, Rotation]:
        """Returns the rotation of global and of local layers."""
        kinds = (layer_frequencies(self.settings, local) for local in (False, True))
        return tuple(rotation(positions_BN, kind_E) for kind_E in kinds)

    def _visibles(self, queries_BQ, keys_BN, is_key_BN) -> tuple:
        """Returns the mask of global and of local layers."""
        windows = (0, self.settings.sliding_window)
        return tuple(visible(queries_BQ, keys_BN, is_key_BN, w) for w in windows)

    def _features(self, prompts: PromptBatch, tokens_BT):
        """Returns what the output layer reads of the response, [B, T, D]."""
        prompt = without_last(prompts)
        prompt_length, length = prompts.tokens_BS.shape[1], tokens_BT.shape[1]
        inputs = (prompt.tokens_BS, prompt.last_B[:, None], tokens_BT[:, :-1])
        positions_BN = positions_of(prompt.start_B, prompt_length, length)
        is_key_BN = _with_response(prompt.mask_BS, length)
        shared = (
            self._turns(positions_BN),
            self._visibles(positions_BN, positions_BN, is_key_BN),
        )
        x_BND = through_layers(
            self,
            DecoderOnlyLayer,
            self._embed(jnp.concatenate(inputs, axis=1)),
            shared,
            False,
            own=(np.array(self.settings.is_local),),
        )
        return self.final_norm(x_BND[:, prompt_length:])

    def _kernel(self) -> Float[Array, "D V"]:
        """Returns the output layer; features times it are the uncapped logits."""
        if self.settings.tied_output:
            return self.token_embedder.embedding.T
        return self.logits_dense.variables["params"]["kernel"]

    def _logits(self, x_BTD):
        if self.settings.tied_output:
            table_VD = gather(self.token_embedder.embedding, ("vocab", "embed"))
            logits_BTV = x_BTD.astype(jnp.float32) @ table_VD.T
        else:
            logits_BTV = self.logits_dense(x_BTD)
        logits_BTV = soft_capped(logits_BTV, self.settings.logit_soft_cap)
        return constrain(logits_BTV, ("batch", "length", "vocab"))

    def __call__(self, prompts: PromptBatch, tokens_BT, use_dropout: bool = False):
        """Returns float32 logits_BTV for teacher-forced responses."""
        del use_dropout
        return self._logits(self._features(prompts, tokens_BT))

    def logits_of(self, prompts: PromptBatch, tokens_BT, token_id: int):
        """Returns the float32 logits of one token at every position, [B, T]."""
        features_BTD = self._features(prompts, tokens_BT).astype(jnp.float32)
        logits_BT = features_BTD @ self._kernel()[:, token_id].astype(jnp.float32)
        return soft_capped(logits_BT, self.settings.logit_soft_cap)

    def token_scores(self, prompts: PromptBatch, tokens_BT, use_dropout: bool = False):
        """Returns the `TokenScores` of teacher-forced responses."""
        del use_dropout
        features_BTD = self._features(prompts, tokens_BT)
        num_chunks = self.memory.num_vocab_chunks
        if num_chunks == 1:
            return sequences.token_scores(self._logits(features_BTD), tokens_BT)
        return chunked_token_scores(
            features_BTD.astype(jnp.float32),
            self._kernel().astype(jnp.float32),
            tokens_BT,
            num_chunks,
            self.settings.logit_soft_cap,
        )

    def prefill(self, prompts: PromptBatch, max_length: int):
        """Returns (the prompts' last tokens, cache of a response not yet begun)."""
        prompt = without_last(prompts)
        positions_BS = positions_of(prompt.start_B, prompt.tokens_BS.shape[1], 0)
        turns = self._turns(positions_BS)
        visibles = self._visibles(positions_BS, positions_BS, prompt.mask_BS)
        x_BSD, layers = self._embed(prompt.tokens_BS), []
        room = ((0, 0), (0, 0), (0, max_length), (0, 0))
        for layer, local in zip(self.layers, self.settings.is_local, strict=True):
            x_BSD, read = layer.whole(x_BSD, turns[local], visibles[local])
            layers.append(KeysValues(*(jnp.pad(leaf, room) for leaf in read)))
        cache = DecoderOnlyCache(prompt.mask_BS, prompt.start_B, tuple(layers))
        return prompt.last_B, cache

    def decode_step(self, cache: DecoderOnlyCache, tokens_R, step):
        """Returns (logits_RV, cache) after feeding the token before `step`."""
        prompt_length = cache.mask_RS.shape[1]
        first = 0 if cache.prompts else prompt_length  # column of the response's own
        length = cache.layers[0].keys_BGNK.shape[2] - first
        keys_RN = positions_of(cache.start_R, prompt_length, length)
        # What is not yet written lies in the future, and is not read.
        is_key_RN = _with_response(cache.mask_RS, length)
        position_R1 = (cache.start_R + step)[:, None]
        turns = self._turns(position_R1)
        visibles = self._visibles(position_R1, keys_RN, is_key_RN)
        x_R1D, layers = self._embed(tokens_R[:, None]), []
        prompts = cache.prompts or (None,) * len(cache.layers)
        for layer, local, kept, prompt in zip(
            self.layers, self.settings.is_local, cache.layers, prompts, strict=True
        ):
            x_R1D, kept = layer.step(
                x_R1D, kept, first + step, turns[local], visibles[local], prompt
            )
            layers.append(kept)
        logits_R1V = self._logits(self.final_norm(x_R1D))
        return logits_R1V[:, 0], cache._replace(layers=tuple(layers))


def decoder_only_language_model(
    settings: DecoderOnlySettings,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> LanguageModel:
    """Returns the network as pure functions; equal settings give equal functions.

    The parameters are plain nested dicts of float32 arrays. Dropout keys are ignored.
    A prompt without any token counts as one of its first column's token.

    Args:
      settings: the network.
      memory: what its passes keep; the parameters do not depend on it.

    Raises:
      UserError: the chunks of the vocabulary do not divide it.
    """
    check_chunks(settings.vocab_size, memory.num_vocab_chunks)
    if memory.compute_dtype:
        settings = dataclasses.replace(settings, dtype=memory.compute_dtype)
    return _decoder_only_language_model(settings, memory)


@functools.cache
def _decoder_only_language_model(
    settings: DecoderOnlySettings, memory: MemorySettings
) -> LanguageModel:
    return language_model_of(
        DecoderOnly(settings, memory),
        pad_id=settings.pad_id,
        eos_id=settings.eos_id,
        share=share,
    )
