# SPDX-License-Identifier: Apache-2.0
"""Self-play: policy gradient against the policy itself."""

from nlhf_jax.algorithms.policy_gradients import against
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.types import POLICY, Algorithm


def self_play(*, tau: float, clip_range: float = CLIP_RANGE) -> Algorithm:
    """Returns self-play, Nash-MD-PG with beta = 0.

        y, y' ~ pi independent; ascend grad log pi(y) (P(y > y') - 1/2 - tau lr(y))

    Its stationary point is the Nash equilibrium at tau,
    pi(y) proportional to mu(y) exp(P(y > pi) / tau). Exact steps reach it only where
    they are small against tau; without regularisation (tau = 0) the last iterate
    cycles in cyclic games.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau or clip_range out of range.

    Source: Munos et al., 2024, arXiv 2312.00886, section 7 (beta = 0);
    docs/math.md (7), (26).
    """
    return against("self_play", {POLICY: 1.0}, tau=tau, clip_range=clip_range)
