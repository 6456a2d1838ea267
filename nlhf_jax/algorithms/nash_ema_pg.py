# SPDX-License-Identifier: Apache-2.0
"""Nash-EMA-PG: policy gradient against the average of past parameters."""

from nlhf_jax.algorithms.policy_gradients import against
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.parameter_sets import moving_average
from nlhf_jax.types import Algorithm

AVERAGE = "average"


def nash_ema_pg(
    *, tau: float, decay: float, clip_range: float = CLIP_RANGE
) -> Algorithm:
    """Returns Nash-EMA-PG.

        y ~ pi_theta, y' ~ pi_a; ascend grad log pi(y) (P(y > y') - 1/2 - tau lr(y))
        a <- (1 - decay) theta + decay a   after each step,  a_0 = theta_0

    Its stationary point is the Nash equilibrium at tau, where theta and its average
    agree; a large decay only slows the opponent down. The paper prints a last term
    decay theta_0 where its text says recursive; with theta_0 the opponent would hardly
    leave the first policy.

    The average is kept in the state as the parameter set `average`; `train.write_sets`
    names it to have it written as a model beside the last iterate: the paper's EMA*.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      decay: the paper's beta, in [0, 1]: 0 is self-play, 1 the best response to the
        first policy.
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau, decay or clip_range out of range.

    Source: Munos et al., 2024, arXiv 2312.00886, Appendix F.3; docs/math.md (26), (47).
    """
    return against(
        "nash_ema_pg",
        {AVERAGE: 1.0},
        tau=tau,
        clip_range=clip_range,
        derived_sets=(AVERAGE,),
        update_sets=moving_average(AVERAGE, decay=decay),
    )
