# SPDX-License-Identifier: Apache-2.0
"""Magnetic preference optimisation: self-play tied to a policy of its own past."""

from nlhf_jax.algorithms.policy_gradients import against
from nlhf_jax.checks import check_integer
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.parameter_sets import snapshots
from nlhf_jax.types import POLICY, Algorithm

MAGNET = "magnet"


def mpo(
    *, tau: float, magnet_period: int = 200, clip_range: float = CLIP_RANGE
) -> Algorithm:
    """Returns MPO.

        y, y' ~ pi;  ascend grad log pi(y) (P(y > y') - 1/2 - tau log pi(y)/magnet(y))
        every `magnet_period` steps  magnet <- pi

    Between two refreshments it pursues the Nash equilibrium regularised to the magnet;
    with them, an equilibrium of the game **without** regularisation. It starts
    where the policy does, and nothing else holds it there.

    Args:
      tau: strength of the KL to the magnet, per nat, > 0 or the last iterate cycles.
      magnet_period: steps with the same magnet, >= 1.
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau, magnet_period or clip_range out of range.

    Source: Wang et al., 2024, arXiv 2410.16714; docs/math.md (24), (26).
    """
    check_integer("magnet_period", magnet_period, 1)
    return against(
        "mpo",
        {POLICY: 1.0},
        tau=tau,
        clip_range=clip_range,
        anchor=MAGNET,
        is_regularised=False,
        derived_sets=(MAGNET,),
        update_sets=snapshots({MAGNET: POLICY}, period=magnet_period),
    )
