# SPDX-License-Identifier: Apache-2.0
"""Group relative policy optimisation: RLHF with rewards scaled within the group."""

import dataclasses

import jax
import jax.numpy as jnp

from nlhf_jax import losses
from nlhf_jax.algorithms.policy_gradients import feedback_metrics
from nlhf_jax.checks import check_integer, check_range
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.sequences import masked_sum
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    Algorithm,
    Feedback,
    LossOutput,
    ScoredSample,
    Speaker,
)

SMALLEST_DEVIATION = 1e-6  # rewards closer than that are called equal


def grpo(
    *, tau: float, num_responses: int = 4, clip_range: float = CLIP_RANGE
) -> Algorithm:
    """Returns GRPO, an RLHF baseline, with sums over tokens.

        y_1 .. y_K ~ pi,  A_i = (r_i - mean of r) / (standard deviation of r)
        descend  1/K sum_i sum_t [-min(w_t A_i, clip(w_t) A_i)
                                  + tau (mu_t / pi_t - log(mu_t / pi_t) - 1)]

    Two things make its fixed point another one than `rloo`'s, and no equilibrium: the
    division by the group's standard deviation weighs prompts by their difficulty and
    leaves of two rewards only which is larger; and the gradient of its KL term is, on
    average, that of the opposite divergence KL(mu, pi) for one token, and biased for
    several. It is here because others train with it.

    Args:
      tau: strength of the KL term, in standard deviations per nat, >= 0.
      num_responses: K >= 2, answers to each prompt.
      clip_range: of the probability ratio, > 0.

    Raises:
      UserError: tau, num_responses or clip_range out of range.

    Source: Shao et al., 2024, arXiv 2402.03300, eq. 3 and 4, there with means over
    tokens; docs/math.md (44), (49).
    """
    check_range("tau", tau, 0.0)
    check_integer("num_responses", num_responses, 2)
    check_range("clip_range", clip_range, 0.0, low_open=True)
    every = tuple(range(num_responses))
    return Algorithm(
        name="grpo",
        speakers=(Speaker({POLICY: 1.0}),) * num_responses,
        comparisons=(),
        ratings=every,
        trained_on=every,
        scored_under=(REFERENCE,),
        loss=_GroupRelative(tau, clip_range),
    )


@dataclasses.dataclass(frozen=True)
class _GroupRelative:
    tau: float
    clip_range: float

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        rewards_KB = jnp.stack(feedback.rewards)
        lead_KB = rewards_KB - rewards_KB.mean(axis=0, keepdims=True)
        deviation_B = jnp.sqrt((lead_KB**2).mean(axis=0))
        lead_KB = lead_KB / jnp.maximum(deviation_B, SMALLEST_DEVIATION)[None, :]
        output = losses.mean_of(
            tuple(
                self._one(sample, jax.lax.stop_gradient(lead_B))
                for sample, lead_B in zip(samples, lead_KB, strict=True)
            )
        )
        return LossOutput(output.loss_B, output.metrics | feedback_metrics(feedback))

    def _one(self, sample: ScoredSample, lead_B) -> LossOutput:
        advantage_BT = jnp.broadcast_to(lead_B[:, None], sample.mask_BT.shape)
        loss_B = losses.clipped_surrogate(
            sample, advantage_BT, clip_range=self.clip_range
        )
        ratio_BT = sample.log_probs[REFERENCE] - sample.log_probs[POLICY]
        ratio_BT = jnp.where(sample.mask_BT, ratio_BT, 0.0)
        divergence_BT = jnp.exp(ratio_BT) - ratio_BT - 1.0
        loss_B += self.tau * masked_sum(divergence_BT, sample.mask_BT)
        return LossOutput(loss_B, losses.sample_metrics(sample))
