# SPDX-License-Identifier: Apache-2.0
"""Online DPO: the logistic loss on the policy's own pairs."""

import dataclasses
import functools

import jax.numpy as jnp

from nlhf_jax import losses
from nlhf_jax.algorithms.policy_gradients import feedback_metrics, pairs
from nlhf_jax.checks import check_integer, check_range
from nlhf_jax.selection import Picks, best_and_worst
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    Algorithm,
    Feedback,
    LossOutput,
    ScoredSample,
    Speaker,
)


def online_dpo(*, tau: float, num_candidates: int = 2) -> Algorithm:
    """Returns online DPO with soft labels.

        y_1 .. y_K ~ pi (constants), y, y' = those that win most and least often against
        the others, h = lr(y) - lr(y'), P = P(y > y')
        descend  -(P log sigma(tau h) + (1 - P) log sigma(-tau h)) / (2 tau)

    It is **not** a Nash solver, not even with two responses unless P = 1/2: there it
    reaches h = logit(P) / tau, the equilibrium h = (P - 1/2) / tau. For Bradley-Terry
    preferences its stationary point is that of RLHF, pi(y) proportional to mu(y)
    exp(r(y) / tau); for others the Bradley-Terry fit to the policy's own pairs.

    Args:
      tau: strength of the KL to the reference, in log-odds per nat, > 0.
      num_candidates: K >= 2; with 2 both are taken.

    Raises:
      UserError: tau or num_candidates out of range.

    Source: Rafailov et al., 2023, arXiv 2305.18290, eq. 7; Guo et al., 2024, arXiv
    2402.04792; Calandriello et al., 2024, arXiv 2403.08635, Appendix F;
    docs/math.md (46).
    """
    check_integer("num_candidates", num_candidates, 2)
    policy = Speaker({POLICY: 1.0})
    pair = logistic_pairs("online_dpo", policy, policy, tau=tau, alpha=0.0)
    if num_candidates == 2:
        return pair
    met = pairs(num_candidates)
    return dataclasses.replace(
        pair,
        speakers=(policy,) * num_candidates,
        comparisons=met,
        select=best_and_worst(
            num_candidates,
            lambda feedback: losses.group_win_rates(
                feedback.preferences, met, num_candidates
            ),
            functools.partial(_answer_of_picks, met),
        ),
    )


def _answer_of_picks(
    met: tuple[tuple[int, int], ...], feedback: Feedback, picks: Picks
) -> Feedback:
    """Returns P(first pick > second pick)."""
    best_B, worst_B = picks
    answer_B = sum(
        jnp.where((best_B == i) & (worst_B == j), said_B, 0.0)
        + jnp.where((best_B == j) & (worst_B == i), 1.0 - said_B, 0.0)
        for said_B, (i, j) in zip(feedback.preferences, met, strict=True)
    )
    return Feedback((answer_B,), ())


def logistic_pairs(
    name: str, first: Speaker, second: Speaker, *, tau: float, alpha: float
) -> Algorithm:
    """Returns the logistic loss, plus alpha log pi(y') of the second response."""
    check_range("tau", tau, 0.0, low_open=True)
    check_range("alpha", alpha, 0.0)
    return Algorithm(
        name=name,
        speakers=(first, second),
        comparisons=((0, 1),),
        ratings=(),
        trained_on=(0, 1),
        scored_under=(REFERENCE,),
        loss=_LogisticPairs(tau, alpha),
    )


@dataclasses.dataclass(frozen=True)
class _LogisticPairs:
    tau: float
    alpha: float

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        first, second = samples
        loss_B = losses.logistic(
            first,
            second,
            feedback.preferences[0],
            anchors={REFERENCE: 1.0},
            tau=self.tau,
        )
        loss_B += self.alpha / (2 * self.tau) * losses.log_ratio(second, {})
        metrics = losses.pair_metrics(first, second) | feedback_metrics(feedback)
        return LossOutput(loss_B, metrics)
