# SPDX-License-Identifier: Apache-2.0
"""RLHF: policy gradient on a learned scalar reward, regularised to the reference."""

from nlhf_jax.algorithms.rloo import leave_one_out
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.types import Algorithm


def reward_pg(*, tau: float, clip_range: float = CLIP_RANGE) -> Algorithm:
    """Returns the RLHF baseline with the sample log-ratio.

        y_1, y_2 ~ pi;  ascend  1/2 sum_i grad log pi(y_i) (r_i - r_j - tau lr(y_i))

    with j the other sample: its reward is a baseline that depends on x but not on y_i,
    so the expected gradient is that of E[r] - tau KL(pi, mu). The paper prints a full
    KL inside the bracket; coded literally it would have no effect, as it is constant
    in y. The fixed point is pi(y) proportional to mu(y) exp(r(y) / tau); it is not
    the Nash equilibrium, even for Bradley-Terry preferences. It is `rloo` with two
    responses.

    Args:
      tau: strength of the KL to the reference, in rewards per nat, >= 0.
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau or clip_range out of range.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 16; docs/math.md (29).
    """
    return leave_one_out("reward_pg", 2, tau=tau, clip_range=clip_range)
