# SPDX-License-Identifier: Apache-2.0
"""Nash-MD-PG: policy gradient against the geometric mixture with the reference."""

from nlhf_jax.algorithms.policy_gradients import against, mixture_weights
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.types import Algorithm, Schedule


def nash_md_pg(
    *, tau: float, beta: float | Schedule, clip_range: float = CLIP_RANGE
) -> Algorithm:
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
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau, beta or clip_range out of range.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 13 to 15 and Appendix F;
    docs/math.md (21), (26), (28).
    """
    weights = mixture_weights(beta)
    return against("nash_md_pg", weights, tau=tau, clip_range=clip_range)
