# SPDX-License-Identifier: Apache-2.0
"""The only generation loop: every speaker's responses in one cached decode.

Each parameter set reads the prompts once and steps once per token, on the rows of the
speakers that use it. A speaker's logits are mixed, tempered and truncated, one uniform
number per row picks the token, and the loop ends as soon as every row has ended. What
is sampled is docs/math.md (28).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nlhf_jax import mixture
from nlhf_jax.constraints import platform
from nlhf_jax.sequences import response_mask
from nlhf_jax.types import (
    Cache,
    LanguageModel,
    Params,
    ParamSets,
    PromptBatch,
    Responses,
    Rollout,
    Samples,
    Speaker,
)

DRAW_BLOCK = 128  # ids summed together; near the root of common vocabulary sizes


class _Row(NamedTuple):
    """What the loop writes for one speaker."""

    tokens_BT: Int[Array, "B T"]
    log_probs: dict[str, Float[Array, "B T"]]
    sampling_log_probs_BT: Float[Array, "B T"]
    has_ended_B: jax.Array
    last_B: Int[Array, "B"]


class _Carry(NamedTuple):
    step: jax.Array
    caches: tuple[Cache, ...]
    rows: tuple[_Row, ...]


class _Reader(NamedTuple):
    """Parameters that step together, and what their rows are of each prompt.

    Attributes:
      params: under which the prompts are read, once for each of `num_sets`.
      stepping: under which tokens are, one row for each of `slots`.
      num_sets: parameter sets in it; 1 unless the model can join several.
      slots: (parameter set, its number in this reader, speaker) of a prompt's rows.
    """

    params: Params
    stepping: Params
    num_sets: int
    slots: tuple[tuple[str, int, int], ...]


def draw(
    key: jax.Array, logits_RV: Float[Array, "R V"], temperature: float = 1.0
) -> Int[Array, "R"]:
    """Draws one id per row by inverting the cumulative distribution.

    One uniform number per row instead of one per logit: the same distribution as
    `jax.random.categorical` at a fraction of its cost on a CPU. The vocabulary is
    summed in blocks; only the block the number falls into is looked at id by id:
    docs/math.md (39).
    Temperature 0 takes the most likely id.
    """
    if temperature == 0:
        return jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
    weights_RV = jnp.exp(logits_RV - jnp.max(logits_RV, axis=-1, keepdims=True))
    vocab_size = weights_RV.shape[1]
    block = min(DRAW_BLOCK, vocab_size)
    num_blocks = -(-vocab_size // block)
    missing = num_blocks * block - vocab_size
    blocks_RGW = jnp.pad(weights_RV, ((0, 0), (0, missing))).reshape(
        -1, num_blocks, block
    )
    sums_RG = blocks_RGW.sum(axis=-1)
    uniform_R1 = jax.random.uniform(key, (len(sums_RG), 1), logits_RV.dtype)
    block_R1, rest_R1 = _invert(sums_RG, uniform_R1 * sums_RG.sum(-1, keepdims=True))
    chosen_RW = jnp.take_along_axis(blocks_RGW, block_R1[..., None], axis=1)[:, 0]
    id_R1, _ = _invert(chosen_RW, rest_R1)
    return (block_R1 * block + id_R1)[:, 0].astype(jnp.int32)


def _invert(
    weights_RN: Float[Array, "R N"], target_R1: Float[Array, "R 1"]
) -> tuple[Int[Array, "R 1"], Float[Array, "R 1"]]:
    """Returns where the running sum passes the target, and what is left of it there.

    Rounding can neither pick a weight of 0 nor pass the last weight above 0.
    """
    cumulative_RN = jnp.cumsum(weights_RN, axis=-1)
    is_open_RN = weights_RN > 0
    reached_RN = jnp.where(is_open_RN, cumulative_RN, 0)
    top_R1 = reached_RN.max(axis=-1, keepdims=True)
    below_R1 = jnp.nextafter(top_R1, jnp.zeros_like(top_R1))
    target_R1 = jnp.minimum(target_R1, below_R1)
    index_R1 = jnp.argmax(reached_RN > target_R1, axis=-1, keepdims=True)
    before_R1 = jnp.take_along_axis(cumulative_RN - weights_RN, index_R1, axis=-1)
    return index_R1, jnp.maximum(target_R1 - before_R1, 0)


def sample(
    model: LanguageModel,
    param_sets: ParamSets,
    speakers: Sequence[Speaker],
    prompts: PromptBatch,
    key: jax.Array,
    step: jax.Array | int = 0,
    *,
    max_length: int,
) -> Rollout:
    """Draws one response per speaker and prompt.

    Args:
      model: the language model shared by all parameter sets.
      param_sets: parameters by name; those no speaker names are not read.
      speakers: mixtures of parameter sets. Naming a speaker twice draws twice.
      prompts: prompts of the batch, [B, S].
      key: random key; speakers draw independently of each other.
      step: at which scheduled weights are evaluated.
      max_length: longest response in tokens, the end token included.

    Returns:
      One `Samples` per speaker. Tokens after the end are `model.pad_id` with mask
      False. A response cut at `max_length` has no end token.

    Raises:
      UserError: a speaker's fixed weights do not sum to one.
    """
    readers = _readers(model, param_sets, _users(speakers))
    weights = [mixture.speaker_weights(speaker, step) for speaker in speakers]
    keys = jax.random.split(key, len(speakers))
    rows, caches = _begin(model, readers, speakers, prompts, max_length)
    ready = [model.for_decoding(reader.stepping) for reader in readers]

    def is_running(carry: _Carry) -> jax.Array:
        ended = [row.has_ended_B.all() for row in carry.rows]
        return (carry.step < max_length) & ~jnp.all(jnp.stack(ended))

    def advance(carry: _Carry) -> _Carry:
        logits, caches = _step_sets(model, ready, readers, carry)
        rows = tuple(
            _write(
                model,
                speaker,
                {name: logits[name][index] for name in speaker.weights},
                weights[index],
                jax.random.fold_in(keys[index], carry.step),
                row,
                carry.step,
            )
            for index, (speaker, row) in enumerate(
                zip(speakers, carry.rows, strict=True)
            )
        )
        return _Carry(carry.step + 1, caches, rows)

    start = _Carry(jnp.zeros((), jnp.int32), caches, rows)
    end = jax.lax.while_loop(is_running, advance, start)
    return Rollout(
        tuple(_samples(row, model.eos_id, end.step) for row in end.rows), end.step
    )


def _users(speakers: Sequence[Speaker]) -> dict[str, list[int]]:
    """Returns parameter set name -> the speakers that use it, in order."""
    users: dict[str, list[int]] = {}
    for index, speaker in enumerate(speakers):
        for name in speaker.weights:
            users.setdefault(name, []).append(index)
    return users


def _readers(model, param_sets, users: dict[str, list[int]]) -> list[_Reader]:
    """Returns one reader per parameter set, or one for all if the model joins them."""

    def slots(number: int, name: str) -> tuple[tuple[str, int, int], ...]:
        return tuple((name, number, index) for index in users[name])

    if model.join is None:
        return [
            _Reader(param_sets[name], param_sets[name], 1, slots(0, name))
            for name in users
        ]
    rows = sum((slots(number, name) for number, name in enumerate(users)), ())
    return [
        _Reader(
            model.join([param_sets[name] for name in users]),
            model.join([param_sets[name] for name, _, _ in rows]),
            len(users),
            rows,
        )
    ]


def _begin(model, readers, speakers, prompts, max_length):
    batch, shape = prompts.tokens_BS.shape[0], (prompts.tokens_BS.shape[0], max_length)
    caches, start_B = [], None
    for reader in readers:
        # The prompt is read once per set; its speakers share what was read.
        read = _gather(prompts, [0] * reader.num_sets, 1)
        start_R, cache = model.prefill(reader.params, read, max_length)
        start_B = start_R.reshape(batch, -1)[:, 0]
        numbers = [number for _, number, _ in reader.slots]
        if _shares(model) and reader.num_sets == 1 < len(numbers):
            caches.append(model.share(cache, len(numbers)))
        else:
            caches.append(_gather(cache, numbers, reader.num_sets))
    dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
    rows = tuple(
        _Row(
            tokens_BT=jnp.full(shape, model.pad_id, jnp.int32),
            log_probs={name: jnp.zeros(shape, dtype) for name in speaker.weights},
            sampling_log_probs_BT=jnp.zeros(shape, dtype),
            has_ended_B=jnp.zeros(batch, bool),
            last_B=start_B,
        )
        for speaker in speakers
    )
    return rows, tuple(caches)


def _shares(model: LanguageModel) -> bool:
    """Whether a prompt's rows read one cache of it: where reading is what takes time.

    A CPU has its caches for that: there one copy took as long as one for each row.
    """
    return model.share is not None and platform() != "cpu"


def _gather(rows: Cache, numbers: Sequence[int], each: int) -> Cache:
    """Returns some of the `each` rows that a prompt has, in the order of `numbers`.

    A prompt's rows stay beside each other, so that a batch split over devices by rows
    stays where it is; copies laid end to end would send every cache to every device.
    """
    if list(numbers) == list(range(each)):
        return rows
    if each == 1:
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, len(numbers), axis=0), rows)

    def one(leaf):
        leaf = leaf.reshape(-1, each, *leaf.shape[1:])[:, np.array(numbers)]
        return leaf.reshape(-1, *leaf.shape[2:])

    return jax.tree.map(one, rows)


def _step_sets(model, ready, readers, carry):
    """Steps every parameter set once; returns its logits by speaker, and caches."""
    logits: dict[str, dict[int, jax.Array]] = {}
    caches = []
    for params, reader, cache in zip(ready, readers, carry.caches, strict=True):
        last_BN = jnp.stack([carry.rows[i].last_B for _, _, i in reader.slots], axis=1)
        logits_RV, cache = model.decode_step(
            params, cache, last_BN.reshape(-1), carry.step
        )
        caches.append(cache)
        logits_BNV = logits_RV.reshape(*last_BN.shape, -1)
        for place, (name, _, index) in enumerate(reader.slots):
            logits.setdefault(name, {})[index] = logits_BNV[:, place]
    return logits, tuple(caches)


def _write(model, speaker, logits, weights, key, row: _Row, step) -> _Row:
    """Draws the token of position `step` and writes it where the row still runs."""
    processed_BV = mixture.process(mixture.mix(logits, weights), speaker)
    drawn_B = draw(key, processed_BV, speaker.temperature)
    token_B = jnp.where(row.has_ended_B, model.pad_id, drawn_B)

    def put(buffer_BT, value_B):
        value_B = jnp.where(row.has_ended_B, 0, value_B).astype(buffer_BT.dtype)
        return jax.lax.dynamic_update_slice_in_dim(
            buffer_BT, value_B[:, None], step, axis=1
        )

    log_probs = {
        name: put(row.log_probs[name], _log_prob(logits[name], drawn_B))
        for name in logits
    }
    is_plain = len(logits) == 1 and processed_BV is next(iter(logits.values()))
    if is_plain:
        sampling_BT = next(iter(log_probs.values()))
    else:
        sampling_BT = put(row.sampling_log_probs_BT, _log_prob(processed_BV, drawn_B))
    return _Row(
        tokens_BT=jax.lax.dynamic_update_slice_in_dim(
            row.tokens_BT, token_B[:, None], step, axis=1
        ),
        log_probs=log_probs,
        sampling_log_probs_BT=sampling_BT,
        has_ended_B=row.has_ended_B | (drawn_B == model.eos_id),
        last_B=token_B,
    )


def _log_prob(logits_BV: Float[Array, "B V"], ids_B: Int[Array, "B"]) -> jax.Array:
    chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _samples(row: _Row, eos_id: int, num_steps: jax.Array) -> Samples:
    is_written_T = jnp.arange(row.tokens_BT.shape[1]) < num_steps
    mask_BT = response_mask(row.tokens_BT, eos_id) & is_written_T[None, :]
    return Samples(
        Responses(row.tokens_BT, mask_BT), row.log_probs, row.sampling_log_probs_BT
    )
