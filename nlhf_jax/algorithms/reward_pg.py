# SPDX-License-Identifier: Apache-2.0
"""RLHF: policy gradient on a learned scalar reward, regularised to the reference."""

import dataclasses

from nlhf_jax import losses
from nlhf_jax.checks import check_range
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    Algorithm,
    Feedback,
    LossOutput,
    ScoredSample,
    Speaker,
)


def reward_pg(*, tau: float) -> Algorithm:
    """Returns the RLHF baseline with the sample log-ratio.

        y_1, y_2 ~ pi;  ascend  1/2 sum_i grad log pi(y_i) (r_i - r_j - tau lr(y_i))

    with j the other sample: its reward is a baseline that depends on x but not on y_i,
    so the expected gradient is that of E[r] - tau KL(pi, mu). The paper prints a full
    KL inside the bracket; coded literally it would have no effect, as it is constant
    in y. The fixed point is pi(y) proportional to mu(y) exp(r(y) / tau); it is not
    the Nash equilibrium, even for Bradley-Terry preferences.

    Args:
      tau: strength of the KL to the reference, in rewards per nat, >= 0.

    Raises:
      UserError: tau out of range.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 16; the baseline: Kool et al.,
    2019, "Buy 4 REINFORCE samples, get a baseline for free"; docs/math.md (29).
    """
    check_range("tau", tau, 0.0)
    policy = Speaker({POLICY: 1.0})
    return Algorithm(
        name="reward_pg",
        speakers=(policy, policy),
        comparisons=(),
        ratings=(0, 1),
        trained_on=(0, 1),
        scored_under=(REFERENCE,),
        loss=_RewardGradient(tau),
    )


@dataclasses.dataclass(frozen=True)
class _RewardGradient:
    """The loss: each sample's payoff is its reward minus the other's."""

    tau: float

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        first_B, second_B = feedback.rewards
        payoffs = (first_B - second_B, second_B - first_B)
        output = losses.mean_of(
            tuple(
                losses.policy_gradient(sample, payoff_B, tau=self.tau)
                for sample, payoff_B in zip(samples, payoffs, strict=True)
            )
        )
        metrics = output.metrics | {"reward/mean": 0.5 * (first_B + second_B)}
        return LossOutput(output.loss_B, metrics)
