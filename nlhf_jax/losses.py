# SPDX-License-Identifier: Apache-2.0
"""Losses per example, minimised; advantages are constants for the gradient.

Notation: lr(y) = log pi(y|x) - log mu(y|x), a sum over tokens, nats; tau >= 0 is the
strength of the KL to the reference mu.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nlhf_jax.sequences import lengths, masked_sum, reward_to_go
from nlhf_jax.types import POLICY, REFERENCE, LossOutput, ScoredSample


def policy_gradient(
    sample: ScoredSample, payoff_B: Float[Array, "B"], *, tau: float
) -> LossOutput:
    """Returns the policy-gradient loss with reward-to-go KL for y ~ pi.

        A_t    = payoff - tau * sum_{m >= t} lr_m          (no gradient)
        loss_B = -sum_t A_t log pi(y_t | x, y_<t)

    Its expected gradient over y ~ pi is minus that of
    E[payoff] - tau KL(pi, mu) with sequence-level KL, for a payoff that is constant
    for the gradient. Only on-policy samples at temperature 1 without truncation have
    this property. Terms of the KL before t have zero expectation and are left out; a
    diagonal that multiplies only lr_t would be biased.

    Args:
      sample: mask and log-probabilities under `params` and `reference`, [B, T].
      payoff_B: preference - 1/2, or reward - baseline; no gradient flows through it.
      tau: strength of the KL, per nat, >= 0.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 13 and Appendix F.2;
    docs/math.md (26), (27).
    """
    log_probs_BT = sample.log_probs[POLICY]
    ratio_BT = jax.lax.stop_gradient(log_probs_BT - sample.log_probs[REFERENCE])
    ratio_BT = jnp.where(sample.mask_BT, ratio_BT, 0.0)
    payoff_B = jax.lax.stop_gradient(payoff_B)
    advantage_BT = payoff_B[:, None] - tau * reward_to_go(ratio_BT)
    loss_B = -masked_sum(advantage_BT * log_probs_BT, sample.mask_BT)
    metrics = {
        "policy/kl": ratio_BT.sum(axis=1),
        "policy/entropy": -jax.lax.stop_gradient(
            masked_sum(log_probs_BT, sample.mask_BT)
        ),
        "response/length": lengths(sample.mask_BT),
    }
    return LossOutput(loss_B, metrics)


def mean_of(outputs: tuple[LossOutput, ...]) -> LossOutput:
    """Returns the mean of several losses of the same examples and of their metrics."""
    return jax.tree.map(lambda *parts: sum(parts) / len(parts), *outputs)
