# SPDX-License-Identifier: Apache-2.0
"""A language model small enough to enumerate, and exact expectations over it.

Its parameters are one table of logits per position, with a row per prefix. The prompt
is ignored and no token ends a response, so that all V^T responses have length T.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import mixture
from nlhf_jax.train_step import score, scored_samples
from nlhf_jax.types import (
    Algorithm,
    Judge,
    LanguageModel,
    PromptBatch,
    Responses,
)


def tabular_model(vocab_size: int, length: int) -> LanguageModel:
    """Returns the model; `params["table"]` is [T, V^(T-1), V]."""
    num_prefixes = vocab_size ** (length - 1)

    def init(key):
        shape = (length, num_prefixes, vocab_size)
        return {"table": jax.random.normal(key, shape)}

    def logits(params, prompts, tokens_BT, dropout_key=None):
        del prompts, dropout_key
        prefix_B = jnp.zeros(tokens_BT.shape[0], jnp.int32)
        positions = []
        for t in range(tokens_BT.shape[1]):
            positions.append(jnp.asarray(params["table"])[t][prefix_B])
            prefix_B = prefix_B * vocab_size + tokens_BT[:, t]
        return jnp.stack(positions, axis=1)

    def prefill(params, prompts, max_length):
        del params, max_length
        zeros_B = jnp.zeros(prompts.tokens_BS.shape[0], jnp.int32)
        return zeros_B, {"prefix_R": zeros_B}

    def decode_step(params, cache, tokens_R, step):
        prefix_R = jnp.where(step == 0, 0, cache["prefix_R"] * vocab_size + tokens_R)
        return params["table"][step][prefix_R], {"prefix_R": prefix_R}

    axes = {"table": ("length", None, "vocab")}
    return LanguageModel(
        init, axes, logits, prefill, decode_step, vocab_size, pad_id=0, eos_id=-1
    )


def table(*positions) -> dict:
    """Returns parameters from logits per position: [V], [V, V], ... of prefixes."""
    rows = [np.atleast_2d(np.asarray(p, np.float64)) for p in positions]
    size = max(len(row) for row in rows)
    padded = [np.pad(row, ((0, size - len(row)), (0, 0))) for row in rows]
    # Not a device array yet: a float64 test must not find it rounded to float32.
    return {"table": np.stack(padded)}


def prompts(batch: int) -> PromptBatch:
    """Returns prompts that say nothing."""
    return PromptBatch(jnp.ones((batch, 1), jnp.int32), jnp.ones((batch, 1), bool))


def all_responses(model: LanguageModel, length: int) -> Responses:
    """Returns every response, in lexicographic order."""
    rows = list(itertools.product(range(model.vocab_size), repeat=length))
    tokens_BT = jnp.asarray(rows, jnp.int32)
    return Responses(tokens_BT, jnp.ones(tokens_BT.shape, bool))


def response_log_probs(model, param_sets, speaker, responses, step=0):
    """Returns log p(response) under a speaker, token by token, by enumeration."""
    tokens_BT, _ = responses
    weights = mixture.speaker_weights(speaker, step)
    batch, length = tokens_BT.shape
    logits = {
        name: model.logits(param_sets[name], prompts(batch), tokens_BT)
        for name in speaker.weights
    }
    total_B = 0.0
    for t in range(length):
        at_t = {name: values[:, t] for name, values in logits.items()}
        mixed = mixture.process(mixture.mix(at_t, weights), speaker)
        log_probs = jax.nn.log_softmax(mixed, axis=-1)
        total_B += jnp.take_along_axis(log_probs, tokens_BT[:, t : t + 1], axis=1)[:, 0]
    return total_B


def index_of(responses: Responses, vocab_size: int):
    """Returns each response's place in the order of `all_responses`."""
    length = responses.tokens_BT.shape[1]
    return responses.tokens_BT @ (vocab_size ** jnp.arange(length)[::-1])


def table_judge(preference_NN, reward_N, vocab_size: int) -> Judge:
    """Returns the judge that looks responses up in a matrix and a vector."""
    preference_NN, reward_N = jnp.asarray(preference_NN), jnp.asarray(reward_N)

    def preference(frozen, prompts, first, second):
        del frozen, prompts
        row, column = index_of(first, vocab_size), index_of(second, vocab_size)
        return preference_NN[row, column]

    def reward(frozen, prompts, responses):
        del frozen, prompts
        return reward_N[index_of(responses, vocab_size)]

    return Judge(preference, reward)


def expected_gradient(
    model: LanguageModel,
    algorithm: Algorithm,
    judge: Judge,
    param_sets: dict,
    length: int,
):
    """Returns E[gradient of the loss] over all draws of all speakers, exactly.

    Every combination of one response per speaker is one example, weighted by its
    probability, a constant; the loss is the algorithm's own.
    """
    choices = all_responses(model, length)
    size = choices.tokens_BT.shape[0]
    picks = np.array(
        list(itertools.product(range(size), repeat=len(algorithm.speakers)))
    )
    drawn = tuple(
        Responses(choices.tokens_BT[column], choices.mask_BT[column])
        for column in picks.T
    )
    context = prompts(len(picks))

    def weighted_loss(params, constants):
        log_weight_B = sum(
            response_log_probs(model, constants, speaker, responses)
            for speaker, responses in zip(algorithm.speakers, drawn, strict=True)
        )
        feedback = score(algorithm, judge, {}, context, drawn)
        samples = scored_samples(model, algorithm, params, constants, context, drawn)
        loss_B = algorithm.loss(samples, feedback).loss_B
        return jnp.sum(jnp.exp(log_weight_B) * loss_B)

    # The draws' probabilities come from `constants`: no gradient flows through them.
    return jax.jit(jax.grad(weighted_loss))(param_sets["params"], param_sets)
