# SPDX-License-Identifier: Apache-2.0
"""Algorithms that regress a pair's log-ratio difference to what a judge says of it.

An anchor is a log-linear mixture of parameter sets, written as their weights.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nlhf_jax import losses
from nlhf_jax.algorithms.policy_gradients import feedback_metrics
from nlhf_jax.checks import check_range
from nlhf_jax.selection import Picks, best_and_worst, pick
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    Algorithm,
    Feedback,
    LossOutput,
    ScoredSample,
    Speaker,
)

PREVIOUS = "previous"


class Comparator(NamedTuple):
    """Who both responses of a pair are compared with, and how much that counts."""

    speaker: Speaker
    weight: float


def proximal_anchor(
    tau: float, step_size: float, *, magnet: str = REFERENCE, previous: str = PREVIOUS
) -> dict[str, float]:
    """Returns {magnet: s tau, previous: 1 - s tau}, what a step of rule (U) starts at.

    Sets of weight 0 are left out.

    Raises:
      UserError: tau < 0, or s outside (0, 1 / tau].
    """
    check_range("tau", tau, 0.0)
    largest = 1.0 / tau if tau > 0 else math.inf
    check_range("step_size", step_size, 0.0, largest, low_open=True, high_open=tau == 0)
    weights = {magnet: step_size * tau, previous: 1.0 - step_size * tau}
    return {name: weight for name, weight in weights.items() if weight > 0}


def scored_sets(anchors: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the sets a loss needs: the anchors', and the reference for the KL."""
    return tuple(dict.fromkeys((REFERENCE, *(k for k in anchors if k != POLICY))))


def on_labelled_pairs(
    name: str,
    speaker: Speaker,
    *,
    anchors: Mapping[str, float],
    scale: float,
    **more: Any,
) -> Algorithm:
    """Returns the regression to P(y > y') - 1/2 of pairs from one speaker.

    Its target has the right mean only where y and y' are independent draws from the
    same speaker, which then is the opponent: E[P(y > y') | y] = P(y > speaker).
    """
    return Algorithm(
        name=name,
        speakers=(speaker, speaker),
        comparisons=((0, 1),),
        ratings=(),
        trained_on=(0, 1),
        scored_under=scored_sets(anchors),
        loss=_LabelledPairs(dict(anchors), scale),
        **more,
    )


def with_comparators(
    name: str,
    candidates: Sequence[Speaker],
    comparators: Sequence[Comparator],
    *,
    anchors: Mapping[str, float],
    scale: float,
    alpha: float = 0.0,
    **more: Any,
) -> Algorithm:
    """Returns the regression to sum_k w_k (P(y > z_k) - P(y' > z_k)).

    The same comparators judge both responses, so that the target has the right mean for
    pairs from anywhere: the opponent is who draws z. Of more than two candidates, all
    from one speaker, the best and the worst against one more draw of the first
    comparator's speaker are taken. With alpha > 0 the loss has a term -alpha log pi(y)
    on the first response besides.
    """
    num_candidates, scouts = len(candidates), ()
    if num_candidates > 2:
        scouts = (comparators[0].speaker,)
        more["select"] = best_and_worst(
            num_candidates,
            lambda feedback: feedback.preferences[:num_candidates],
            functools.partial(_answers_of_picks, num_candidates),
        )
    speakers = (*candidates, *scouts, *(one.speaker for one in comparators))
    every = range(num_candidates)
    return Algorithm(
        name=name,
        speakers=speakers,
        comparisons=tuple(
            (i, k) for k in range(num_candidates, len(speakers)) for i in every
        ),
        ratings=(),
        trained_on=(0, 1),
        scored_under=scored_sets(anchors),
        loss=_ComparedPairs(
            dict(anchors), scale, tuple(one.weight for one in comparators), alpha
        ),
        **more,
    )


def _answers_of_picks(
    num_candidates: int, feedback: Feedback, picks: Picks
) -> Feedback:
    """Returns what the comparators after the first, who chose, say of the two."""
    said = feedback.preferences[num_candidates:]
    by_comparator = [
        said[start : start + num_candidates]
        for start in range(0, len(said), num_candidates)
    ]
    return Feedback(
        tuple(pick(one, index_B) for one in by_comparator for index_B in picks), ()
    )


@dataclasses.dataclass(frozen=True)
class _LabelledPairs:
    anchors: Mapping[str, float]
    scale: float

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        (preference_B,) = feedback.preferences
        output = losses.square(
            *samples, preference_B - 0.5, anchors=self.anchors, scale=self.scale
        )
        return LossOutput(output.loss_B, output.metrics | feedback_metrics(feedback))


@dataclasses.dataclass(frozen=True)
class _ComparedPairs:
    anchors: Mapping[str, float]
    scale: float
    weights: tuple[float, ...]
    alpha: float

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        first, second = feedback.preferences[::2], feedback.preferences[1::2]
        target_B = sum(
            weight * (one_B - other_B)
            for weight, one_B, other_B in zip(self.weights, first, second, strict=True)
        )
        output = losses.square(
            *samples, target_B, anchors=self.anchors, scale=self.scale
        )
        log_prob_B = losses.log_ratio(samples[0], {})
        loss_B = output.loss_B - self.alpha / (4 * self.scale) * log_prob_B
        # What the first response's lead over the comparators is.
        asked = Feedback(first, ())
        return LossOutput(loss_B, output.metrics | feedback_metrics(asked))
