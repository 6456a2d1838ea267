# SPDX-License-Identifier: Apache-2.0
"""Self-play preference optimisation: multiplicative weights by regression."""

import dataclasses

import jax

from nlhf_jax import losses
from nlhf_jax.algorithms.policy_gradients import feedback_metrics, pairs
from nlhf_jax.algorithms.regressions import PREVIOUS
from nlhf_jax.checks import check_integer, check_range
from nlhf_jax.parameter_sets import snapshots
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    Algorithm,
    Feedback,
    LossOutput,
    ScoredSample,
    Speaker,
)


def sppo(*, step_size: float, num_responses: int = 5, period: int = 10) -> Algorithm:
    """Returns SPPO.

        y_1 .. y_K ~ pi_t,  w_i = mean over j (i too) of P(y_i > y_j)
        descend  1/K sum_i (log pi(y_i) / pi_t(y_i) - s (w_i - 1/2))^2 / (2 s)

    and every `period` steps pi_t <- pi. The exact step is pi_{t+1}(y) proportional to
    pi_t(y) exp(s P(y > pi_t)), multiplicative weights without a reference, where log Z
    is taken to be s / 2, right only to first order in s; counting the pair (i, i)
    shrinks the lead by (K - 1) / K. The *average* of its policies approaches the
    equilibrium of the unregularised game; the last one circles around it, outwards,
    where preferences are cyclic.

    Args:
      step_size: s > 0, one over the `beta` of the authors' code (theirs is 1000).
      num_responses: K >= 2, answers to each prompt. All of them are trained on; the
        authors keep the best and the worst, which changes what is estimated.
      period: steps with the same pi_t, >= 1.

    Raises:
      UserError: step_size, num_responses or period out of range.

    Source: Wu et al., 2024, arXiv 2405.00675, eq. 3.6; docs/math.md (17), (18), (48).
    """
    check_range("step_size", step_size, 0.0, low_open=True)
    check_integer("num_responses", num_responses, 2)
    return Algorithm(
        name="sppo",
        speakers=(Speaker({PREVIOUS: 1.0}),) * num_responses,
        comparisons=pairs(num_responses),
        ratings=(),
        trained_on=tuple(range(num_responses)),
        scored_under=(REFERENCE, PREVIOUS),
        loss=_LogRatios(step_size, num_responses),
        is_regularised=False,
        derived_sets=(PREVIOUS,),
        update_sets=snapshots({PREVIOUS: POLICY}, period=period),
    )


@dataclasses.dataclass(frozen=True)
class _LogRatios:
    step_size: float
    num_responses: int

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        wins = losses.group_win_rates(
            feedback.preferences,
            pairs(self.num_responses),
            self.num_responses,
            with_itself=True,
        )
        output = losses.mean_of(
            tuple(
                self._one(sample, jax.lax.stop_gradient(win_B))
                for sample, win_B in zip(samples, wins, strict=True)
            )
        )
        return LossOutput(output.loss_B, output.metrics | feedback_metrics(feedback))

    def _one(self, sample: ScoredSample, win_B) -> LossOutput:
        residual_B = losses.log_ratio(sample, {PREVIOUS: 1.0})
        residual_B = residual_B - self.step_size * (win_B - 0.5)
        loss_B = residual_B**2 / (2 * self.step_size)
        return LossOutput(loss_B, losses.sample_metrics(sample))
