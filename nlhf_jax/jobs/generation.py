# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: fixed-shape batches around the one decode loop."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from nlhf_jax import global_arrays
from nlhf_jax.data import batches as data_batches
from nlhf_jax.decoding import sample
from nlhf_jax.sequences import sequence_log_probs
from nlhf_jax.settings import SamplingSettings
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    LanguageModel,
    ParamSets,
    PromptBatch,
    Responses,
    Speaker,
)

Batch = TypeVar("Batch", PromptBatch, Responses)


@dataclasses.dataclass(frozen=True)
class Generations:
    """Responses to a list of prompts, N of them, as arrays and as texts.

    Attributes:
      responses: tokens and mask, [N, T], on the host.
      texts: decoded responses.
    """

    responses: Responses
    texts: list[str]


def policy_speaker(
    sampling: SamplingSettings, weights: Mapping[str, float] | None = None
) -> Speaker:
    """Returns the speaker that decodes the mixture `weights` (the policy if None)."""
    return Speaker(
        weights=dict(weights or {POLICY: 1.0}),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )


def batch_slices(num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields row indices in groups of `batch_size`, the last filled with its last row.

    Every group has the same size, so one compiled program serves all of them.
    """
    for start in range(0, num_rows, batch_size):
        rows = np.arange(start, start + batch_size)
        yield np.minimum(rows, num_rows - 1)


def take(batch: Batch, rows: np.ndarray) -> Batch:
    """Returns the given rows of prompts or responses, in host memory.

    A compiled program puts them beside its parameters, on however many devices.
    """
    return type(batch)(*(np.asarray(leaf)[rows] for leaf in batch))


class Generator:
    """Decodes prompts in batches of one shape, so that decoding compiles once."""

    def __init__(
        self,
        model: LanguageModel,
        vocabulary,
        *,
        speaker: Speaker,
        max_decode_length: int,
        batch_size: int,
    ):
        self._vocabulary = vocabulary
        self._batch_size = batch_size
        self._decode = jax.jit(
            functools.partial(
                _decode, model, speaker=speaker, max_length=max_decode_length
            )
        )

    def __call__(
        self, param_sets: ParamSets, prompts: PromptBatch, key: jax.Array
    ) -> Generations:
        """Returns one response per prompt; row i's draw depends on key and i only."""
        num_rows = prompts.tokens_BS.shape[0]
        parts = []
        for index, rows in enumerate(batch_slices(num_rows, self._batch_size)):
            batch_key = jax.random.fold_in(key, index)
            parts.append(
                global_arrays.fetch(
                    self._decode(dict(param_sets), take(prompts, rows), batch_key)
                )
            )
        stacked = (
            np.concatenate(leaves)[:num_rows] for leaves in zip(*parts, strict=True)
        )
        responses = Responses(*stacked)
        texts = data_batches.decode_responses(
            responses.tokens_BT, responses.mask_BT, self._vocabulary
        )
        return Generations(responses, texts)


def _decode(model, param_sets, prompts, key, *, speaker, max_length) -> Responses:
    rollout = sample(
        model,
        param_sets,
        (speaker,),
        prompts,
        key,
        0,
        max_length=max_length,
    )
    return rollout.samples[0].responses


class LogRatio:
    """log pi(y|x) - log mu(y|x) of whole responses, compiled once for one batch size.

    Over y ~ pi its mean estimates the sequence-level KL(pi, mu) without bias
    (Munos et al., 2024, arXiv 2312.00886, Appendix F.2).
    """

    def __init__(self, model: LanguageModel, batch_size: int):
        def score(params, prompts, responses) -> Float[Array, "B"]:
            scores = model.token_scores(params, prompts, responses.tokens_BT, None)
            return sequence_log_probs(scores.log_probs_BT, responses.mask_BT)

        def ratio(params, reference, prompts, responses):
            policy_B = score(params, prompts, responses)
            return policy_B - score(reference, prompts, responses)

        self._ratio = jax.jit(ratio)
        self._batch_size = batch_size

    def __call__(
        self, param_sets: ParamSets, prompts: PromptBatch, responses: Responses
    ) -> Float[np.ndarray, "N"]:
        """Returns the log-ratio of N responses in nats, float32."""
        num_rows = responses.tokens_BT.shape[0]
        parts = []
        for rows in batch_slices(num_rows, self._batch_size):
            batch = take(prompts, rows), take(responses, rows)
            sets = param_sets[POLICY], param_sets[REFERENCE]
            parts.append(global_arrays.fetch(self._ratio(*sets, *batch)))
        return np.concatenate(parts)[:num_rows]
