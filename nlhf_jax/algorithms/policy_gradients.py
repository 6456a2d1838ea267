# SPDX-License-Identifier: Apache-2.0
"""Algorithms that follow the gradient of a payoff less the KL to an anchor."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float

from nlhf_jax import losses
from nlhf_jax.checks import check_integer, check_range
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    Algorithm,
    Feedback,
    LossOutput,
    Schedule,
    ScoredSample,
    Speaker,
)

Payoffs = Callable[[Feedback], tuple[Float[Array, "B"], ...]]


def mixture_weights(beta: float | Schedule) -> dict[str, float | Schedule]:
    """Returns the opponent's weights {policy: 1 - beta, reference: beta}."""
    if callable(beta):
        return {POLICY: lambda step: 1.0 - beta(step), REFERENCE: beta}
    check_range("beta", beta, 0.0, 1.0)
    return {POLICY: 1.0 - beta, REFERENCE: beta}


def speaker_of(weights: Mapping[str, float | Schedule]) -> Speaker:
    """Returns the mixture; sets of weight 0 are left out, so that they cost nothing."""
    return Speaker({k: w for k, w in weights.items() if callable(w) or w > 0})


def against(
    name: str,
    opponent: Mapping[str, float | Schedule],
    *,
    tau: float,
    clip_range: float,
    anchor: str = REFERENCE,
    **more: Any,
) -> Algorithm:
    """Returns the policy gradient against an opponent made of parameter sets.

    The payoff is P(y > y') - 1/2, where 1/2 = P(y > y) is a baseline.
    """
    _check(tau, clip_range)
    return Algorithm(
        name=name,
        speakers=(Speaker({POLICY: 1.0}), speaker_of(opponent)),
        comparisons=((0, 1),),
        ratings=(),
        trained_on=(0,),
        scored_under=tuple(dict.fromkeys((REFERENCE, anchor))),
        loss=_PayoffGradient(_lead, tau, anchor, clip_range),
        **more,
    )


def in_group(
    name: str,
    num_responses: int,
    payoffs: Payoffs,
    *,
    tau: float,
    clip_range: float,
    is_rated: bool,
) -> Algorithm:
    """Returns the policy gradient whose payoffs come from the group of responses.

    Every response of a prompt is compared with every other, or rated by itself.
    """
    _check(tau, clip_range)
    check_integer("num_responses", num_responses, 2)
    every = tuple(range(num_responses))
    return Algorithm(
        name=name,
        speakers=(Speaker({POLICY: 1.0}),) * num_responses,
        comparisons=() if is_rated else pairs(num_responses),
        ratings=every if is_rated else (),
        trained_on=every,
        scored_under=(REFERENCE,),
        loss=_PayoffGradient(payoffs, tau, REFERENCE, clip_range),
    )


def pairs(num_responses: int) -> tuple[tuple[int, int], ...]:
    """Returns every pair (i, j) with i < j."""
    return tuple(itertools.combinations(range(num_responses), 2))


def _check(tau: float, clip_range: float) -> None:
    check_range("tau", tau, 0.0)
    check_range("clip_range", clip_range, 0.0, low_open=True)


def _lead(feedback: Feedback) -> tuple[Float[Array, "B"], ...]:
    return tuple(preference_B - 0.5 for preference_B in feedback.preferences)


def feedback_metrics(feedback: Feedback) -> dict[str, Float[Array, "B"]]:
    """Returns the mean answer of each kind that was asked for."""
    asked = {
        "preference/mean": feedback.preferences,
        "reward/mean": feedback.rewards,
    }
    return {name: sum(said) / len(said) for name, said in asked.items() if said}


@dataclasses.dataclass(frozen=True)
class _PayoffGradient:
    """The loss: the mean over the trained samples of their policy gradients."""

    payoffs: Payoffs
    tau: float
    anchor: str
    clip_range: float

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        output = losses.mean_of(
            tuple(
                losses.policy_gradient(
                    sample,
                    payoff_B,
                    tau=self.tau,
                    anchor=self.anchor,
                    clip_range=self.clip_range,
                )
                for sample, payoff_B in zip(
                    samples, self.payoffs(feedback), strict=True
                )
            )
        )
        return LossOutput(output.loss_B, output.metrics | feedback_metrics(feedback))
