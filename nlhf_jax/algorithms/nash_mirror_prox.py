# SPDX-License-Identifier: Apache-2.0
"""Nash mirror prox: policy gradient against where self-play would be next."""

from nlhf_jax.algorithms.policy_gradients import against
from nlhf_jax.algorithms.self_play import self_play
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.types import Algorithm

AHEAD = "ahead"


def nash_mirror_prox(*, tau: float, clip_range: float = CLIP_RANGE) -> Algorithm:
    """Returns Nash mirror prox: two half-steps from the same parameters and optimiser.

        1. theta' from theta:  a step of `self_play`
        2. theta+ from theta:  y ~ pi, y' ~ pi_theta';
                               ascend grad log pi(y) (P(y > y') - 1/2 - tau lr(y))

    The proximal terms of the exact method, KL(pi, pi_theta), have no gradient at theta:
    the optimiser's step size stands for them. The fixed point is the Nash equilibrium
    at tau; the exact method's rate does not depend on the number of responses.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau or clip_range out of range.

    Source: Tiapkin et al., 2025, arXiv 2505.19731; docs/math.md (20), (26).
    """
    return against(
        "nash_mirror_prox",
        {AHEAD: 1.0},
        tau=tau,
        clip_range=clip_range,
        lookaheads={AHEAD: self_play(tau=tau, clip_range=clip_range)},
    )
