# SPDX-License-Identifier: Apache-2.0
"""A language model small enough to enumerate: its responses are actions of a game.

Its parameters are one table of logits per position, with a row per prefix, so that it
can represent every distribution over its responses. It has the functions of every other
`LanguageModel`; the loops and losses that train a large one run on it unchanged. N is
the number of responses, in lexicographic order of their tokens. Prompts are not read:
it plays one game.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nlhf_jax import mixture
from nlhf_jax.checks import UserError, check_integer, check_range
from nlhf_jax.sequences import (
    from_all_logits,
    response_mask,
    sequence_log_probs,
    token_log_probs,
)
from nlhf_jax.types import (
    POLICY,
    Adapted,
    LanguageModel,
    Params,
    ParamSets,
    PromptBatch,
    Responses,
    Speaker,
)

LARGEST = 4096  # responses; a game of that many actions has 16 million entries
NO_END = -1


def tabular_model(
    vocab_size: int, length: int, *, eos_id: int = NO_END
) -> LanguageModel:
    """Returns the model of responses of at most `length` tokens, padded with id 0.

    `params["table"]` is [T, V^(T-1), V]: row p of position t holds the logits after the
    prefix whose tokens, read as digits in base V, are the number p. Of position t only
    the first V^t rows are ever read.

    Args:
      vocab_size: V, >= 2.
      length: T, tokens, >= 1; `sample` is called with `max_length=length`.
      eos_id: token that ends a response, in [0, V); -1: none does, and all V^T
        responses have length T.

    Raises:
      UserError: a size out of range, or V^T above 4096, the most that is enumerated.
    """
    check_integer("vocab_size", vocab_size, 2)
    check_integer("length", length, 1)
    check_range("eos_id", eos_id, NO_END, vocab_size - 1)
    # Long before the power is too long to print.
    if length * np.log(vocab_size) > np.log(LARGEST) + 1e-9:
        raise UserError(
            f"vocab_size ** length must be at most {LARGEST} to enumerate all "
            f"responses, got {vocab_size} ** {length}"
        )

    def init(key):
        shape = (length, vocab_size ** (length - 1), vocab_size)
        return {"table": jax.random.normal(key, shape)}

    def logits(params, prompts, tokens_BT, dropout_key=None):
        del prompts, dropout_key
        prefix_B = jnp.zeros(tokens_BT.shape[0], jnp.int32)
        table_TPV = _table(params)
        positions = []
        for t in range(tokens_BT.shape[1]):
            positions.append(table_TPV[t][prefix_B])
            prefix_B = prefix_B * vocab_size + tokens_BT[:, t]
        return jnp.stack(positions, axis=1)

    def prefill(params, prompts, max_length):
        del params, max_length
        zeros_B = jnp.zeros(prompts.tokens_BS.shape[0], jnp.int32)
        return zeros_B, {"prefix_R": zeros_B}

    def decode_step(params, cache, tokens_R, step):
        prefix_R = jnp.where(step == 0, 0, cache["prefix_R"] * vocab_size + tokens_R)
        table = _table(params)
        if table.ndim == 4:  # one for each of the sets that are joined
            set_R = jnp.arange(len(tokens_R)) % len(table)
            return table[set_R, step, prefix_R], {"prefix_R": prefix_R}
        return table[step][prefix_R], {"prefix_R": prefix_R}

    axes = {"table": ("length", None, "vocab")}
    return LanguageModel(
        init=init,
        logical_axes=axes,
        logits=logits,
        prefill=prefill,
        decode_step=decode_step,
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=eos_id,
        **from_all_logits(logits),
    )


def _table(params: Params) -> jax.Array:
    """Returns the logits [.., T, P, V], what adapters add included."""
    if not isinstance(params, Adapted):
        return jnp.asarray(params["table"])
    table = jnp.asarray(params.base["table"])
    if not params.adapters:
        return table
    added = params.adapters["table"]["lora_a"] @ params.adapters["table"]["lora_b"]
    return added + table.reshape((1,) * (added.ndim - 3) + table.shape)


def table(*positions: np.ndarray | Sequence) -> Params:
    """Returns parameters from logits per position: [V], then [V, V], ... by prefix.

    The rows are numpy arrays in float64, rounded only by what uses them.
    """
    rows = [np.atleast_2d(np.asarray(p, np.float64)) for p in positions]
    size = max(len(row) for row in rows)
    padded = [np.pad(row, ((0, size - len(row)), (0, 0))) for row in rows]
    return {"table": np.stack(padded)}


def empty_prompts(batch: int) -> PromptBatch:
    """Returns prompts that say nothing."""
    return PromptBatch(jnp.ones((batch, 1), jnp.int32), jnp.ones((batch, 1), bool))


def all_responses(model: LanguageModel, length: int) -> Responses:
    """Returns the N responses of at most `length` tokens, in lexicographic order.

    Example, V = 2 and length 2, the end token 1 (padding 0):

      tokens  [[0, 0], [0, 1], [1, 0]]
      mask    [[1, 1], [1, 1], [1, 0]]
    """
    rows = np.array(
        list(itertools.product(range(model.vocab_size), repeat=length)), np.int32
    )
    with jax.ensure_compile_time_eval():
        mask = np.asarray(response_mask(jnp.asarray(rows), model.eos_id))
    # One of the runs that share a response has nothing but padding behind its end.
    is_first = (mask | (rows == model.pad_id)).all(axis=1)
    return Responses(jnp.asarray(rows[is_first]), jnp.asarray(mask[is_first]))


def index_of(model: LanguageModel, responses: Responses) -> Int[Array, "B"]:
    """Returns each response's place in the order of `all_responses`."""
    tokens_BT, mask_BT = responses
    length = tokens_BT.shape[1]
    digits = model.vocab_size ** np.arange(length)[::-1]
    code_B = jnp.where(mask_BT, tokens_BT, model.pad_id) @ jnp.asarray(digits)
    if model.eos_id == NO_END:
        return code_B
    with jax.ensure_compile_time_eval():
        codes_N = np.asarray(all_responses(model, length).tokens_BT) @ digits
    places = np.zeros(model.vocab_size**length, np.int32)
    places[codes_N] = np.arange(len(codes_N))
    return jnp.asarray(places)[code_B]


def sampling_log_probs(
    model: LanguageModel,
    param_sets: ParamSets,
    speaker: Speaker,
    responses: Responses,
    step: jax.Array | int = 0,
) -> Float[Array, "B T"]:
    """Returns log p of each token under a speaker, nats, 0 where the mask is False.

    It is the distribution that `sample` draws from, mixed, tempered and truncated one
    token at a time, and differentiable by the parameters.
    """
    tokens_BT, mask_BT = responses
    weights = mixture.speaker_weights(speaker, step)
    batch, length = tokens_BT.shape
    logits = {
        name: model.logits(param_sets[name], empty_prompts(batch), tokens_BT)
        for name in speaker.weights
    }
    mixed = [
        mixture.process(
            mixture.mix({k: values[:, t] for k, values in logits.items()}, weights),
            speaker,
        )
        for t in range(length)
    ]
    return token_log_probs(jnp.stack(mixed, axis=1), tokens_BT, mask_BT)


def response_log_probs(
    model: LanguageModel,
    param_sets: ParamSets,
    speaker: Speaker,
    responses: Responses,
    step: jax.Array | int = 0,
) -> Float[Array, "B"]:
    """Returns log p(response), nats, the sum of `sampling_log_probs`."""
    log_probs_BT = sampling_log_probs(model, param_sets, speaker, responses, step)
    return sequence_log_probs(log_probs_BT, responses.mask_BT)


def response_policy(
    model: LanguageModel, params: Params, length: int
) -> Float[Array, "N"]:
    """Returns the probability of each of `all_responses`: the policy of the game."""
    log_probs_N = response_log_probs(
        model,
        {POLICY: params},
        Speaker({POLICY: 1.0}),
        all_responses(model, length),
    )
    return jnp.exp(log_probs_N)
