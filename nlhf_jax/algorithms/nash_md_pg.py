# SPDX-License-Identifier: Apache-2.0
"""Nash-MD-PG: policy gradient against the geometric mixture with the reference."""

import dataclasses
from collections.abc import Mapping

from nlhf_jax import losses
from nlhf_jax.checks import check_range
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


def nash_md_pg(*, tau: float, beta: float | Schedule) -> Algorithm:
    """Returns Nash-MD-PG.

        y ~ pi,  y' ~ geo(pi, mu; beta),  both given x, independent
        ascend   grad log pi(y) (P(y > y') - 1/2 - tau lr(y))

    where log geo = (1 - beta) log pi + beta log mu + const, taken one token at a time;
    this is not the sequence-level mixture of the tabular theorem unless responses have
    one token. The opponent is a constant for the gradient.

    With a fixed beta > 0 the stationary point is **not** the Nash equilibrium at tau:
    it is the policy that best-responds at tau to its own mixture, and that mixture is
    the Nash equilibrium at tau / (1 - beta) (for one-token responses). Deploy the
    mixture, or let beta fall to 0 by a schedule of the step.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      beta: weight of the reference in the opponent, in [0, 1], or step -> weight.
        0 is self-play, 1 the best response to the reference.

    Raises:
      UserError: tau or beta out of range.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 13 to 15 and Appendix F;
    docs/math.md (21), (26), (28).
    """
    return against("nash_md_pg", mixture_weights(beta), tau=tau)


def mixture_weights(beta: float | Schedule) -> dict[str, float | Schedule]:
    """Returns the opponent's weights {policy: 1 - beta, reference: beta}."""
    if callable(beta):
        return {POLICY: lambda step: 1.0 - beta(step), REFERENCE: beta}
    check_range("beta", beta, 0.0, 1.0)
    return {POLICY: 1.0 - beta, REFERENCE: beta}


def against(
    name: str, opponent: Mapping[str, float | Schedule], *, tau: float
) -> Algorithm:
    """Returns the policy gradient against an opponent made of parameter sets.

    Sets of weight 0 are left out, so that they cost nothing.
    """
    check_range("tau", tau, 0.0)
    weights = {k: w for k, w in opponent.items() if callable(w) or w > 0}
    return Algorithm(
        name=name,
        speakers=(Speaker({POLICY: 1.0}), Speaker(weights)),
        comparisons=((0, 1),),
        ratings=(),
        trained_on=(0,),
        scored_under=(REFERENCE,),
        loss=_PreferenceGradient(tau),
    )


@dataclasses.dataclass(frozen=True)
class _PreferenceGradient:
    """The loss: the payoff is P(y > y') - 1/2, where 1/2 = P(y > y) is a baseline."""

    tau: float

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        (sample,), (preference_B,) = samples, feedback.preferences
        output = losses.policy_gradient(sample, preference_B - 0.5, tau=self.tau)
        metrics = output.metrics | {"preference/mean": preference_B}
        return LossOutput(output.loss_B, metrics)
