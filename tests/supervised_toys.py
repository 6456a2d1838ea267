# SPDX-License-Identifier: Apache-2.0
"""Toy models and batches shared by the tests of training: linear in few parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax.sequences import from_all_logits
from nlhf_jax.types import (
    ComparisonBatch,
    LanguageModel,
    PreferenceModel,
    PromptBatch,
    Responses,
    RewardModel,
    SupervisedBatch,
)

VOCAB, WIDTH, SOURCE, TARGET = 11, 8, 5, 4


def _prompt_mean_BD(params, prompts):
    mask_BS1 = prompts.mask_BS[:, :, None]
    embedded_BSD = jnp.where(mask_BS1, params["embed"][prompts.tokens_BS], 0.0)
    return embedded_BSD.sum(axis=1) / jnp.maximum(mask_BS1.sum(axis=1), 1)


def toy_language_model(dropout_rate=0.0, dtype=jnp.float32):
    """A bigram model with the prompt's mean added: (embed[previous] + mean) @ out."""

    def init(key):
        embed_key, out_key = jax.random.split(key)
        return {
            "embed": jax.random.normal(embed_key, (VOCAB, WIDTH), dtype),
            "out": jax.random.normal(out_key, (WIDTH, VOCAB), dtype),
        }

    def logits(params, prompts, tokens_BT, dropout_key=None):
        previous_BT = jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)))
        hidden_BTD = params["embed"][previous_BT]
        hidden_BTD = hidden_BTD + _prompt_mean_BD(params, prompts)[:, None, :]
        if dropout_key is not None and dropout_rate:
            keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, hidden_BTD.shape)
            hidden_BTD = jnp.where(keep, hidden_BTD / (1 - dropout_rate), 0.0)
        return jnp.einsum("BTD,DV->BTV", hidden_BTD, params["out"])

    def prefill(params, prompts, max_length):
        del max_length
        start_tokens_B = jnp.zeros(prompts.tokens_BS.shape[0], jnp.int32)
        return start_tokens_B, _prompt_mean_BD(params, prompts)

    def decode_step(params, cache, tokens_R, step):
        del step
        return (params["embed"][tokens_R] + cache) @ params["out"], cache

    axes = {"embed": ("vocab", "embed"), "out": ("embed", "vocab")}
    return LanguageModel(
        init=init,
        logical_axes=axes,
        logits=logits,
        prefill=prefill,
        decode_step=decode_step,
        vocab_size=VOCAB,
        pad_id=0,
        eos_id=1,
        **from_all_logits(logits),
    )


def _responses_mean_BD(params, responses):
    mask_BT1 = responses.mask_BT[:, :, None]
    return jnp.where(mask_BT1, params["embed"][responses.tokens_BT], 0.0).sum(axis=1)


def toy_reward_model():
    """The reward is linear in the sum of the response's token embeddings."""

    def init(key):
        return {
            "embed": jax.random.normal(key, (VOCAB, WIDTH)),
            "out": jnp.ones(WIDTH) / 3.0,
        }

    def rewards(params, prompts, responses):
        del prompts
        return _responses_mean_BD(params, responses) @ params["out"]

    return RewardModel(init, {"embed": ("vocab", "embed"), "out": ("embed",)}, rewards)


def toy_preference_model():
    """The logit is the difference of the toy reward model's rewards."""
    reward = toy_reward_model()

    def logits(params, prompts, first, second):
        return reward.rewards(params, prompts, first) - reward.rewards(
            params, prompts, second
        )

    return PreferenceModel(reward.init, reward.logical_axes, logits)


def _masked(random, rows, length):
    lengths = random.integers(1, length + 1, size=rows)
    mask = np.arange(length)[None, :] < lengths[:, None]
    tokens = np.where(mask, random.integers(2, VOCAB, size=(rows, length)), 0)
    return tokens.astype(np.int32), mask


def supervised_batch(seed, rows=8):
    """Random prompts and targets of unequal lengths."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        jnp.asarray,
        SupervisedBatch(
            PromptBatch(*_masked(random, rows, SOURCE)),
            Responses(*_masked(random, rows, TARGET)),
        ),
    )


def comparison_batch(seed, rows=8):
    """Random comparisons with labels 0, 1/4, 1/2, 3/4 and 1 in turn."""
    random = np.random.default_rng(seed)
    labels = np.resize([0.0, 0.25, 0.5, 0.75, 1.0], rows).astype(np.float32)
    return jax.tree.map(
        jnp.asarray,
        ComparisonBatch(
            PromptBatch(*_masked(random, rows, SOURCE)),
            Responses(*_masked(random, rows, TARGET)),
            Responses(*_masked(random, rows, TARGET)),
            labels,
        ),
    )
