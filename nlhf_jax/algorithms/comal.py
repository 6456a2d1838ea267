# SPDX-License-Identifier: Apache-2.0
"""Convergent meta-alignment: INPO whose reference follows the policy."""

from nlhf_jax.algorithms.regressions import (
    PREVIOUS,
    on_labelled_pairs,
    proximal_anchor,
)
from nlhf_jax.checks import check_integer, check_range
from nlhf_jax.parameter_sets import in_turn, snapshots
from nlhf_jax.types import POLICY, Algorithm, Speaker

MAGNET = "magnet"


def comal(
    *, tau: float, step_size: float, period: int = 10, magnet_period: int = 200
) -> Algorithm:
    """Returns COMAL.

        `inpo` with a magnet in place of the reference,
        and every `magnet_period` steps  magnet <- pi

    Each outer round looks for the Nash equilibrium regularised at tau to the magnet,
    the last round's policy: a proximal point method, whose policies converge to an
    equilibrium of the game **without** regularisation. It starts where the
    policy does, and nothing else holds it there. The rounds must be long enough for
    `inpo` to come close to their equilibria.

    Args:
      tau: strength of the KL to the magnet, per nat, > 0; large values make short,
        safe rounds.
      step_size: s in (0, 1 / tau] of the inner steps.
      period: steps with the same pi_t, >= 1.
      magnet_period: steps with the same magnet, >= 1.

    Raises:
      UserError: an argument out of range.

    Source: Liu et al., 2024, arXiv 2410.23223; docs/math.md (24), (45).
    """
    check_range("tau", tau, 0.0, low_open=True)
    check_integer("magnet_period", magnet_period, 1)
    return on_labelled_pairs(
        "comal",
        Speaker({PREVIOUS: 1.0}),
        anchors=proximal_anchor(tau, step_size, magnet=MAGNET),
        scale=step_size,
        is_regularised=False,
        derived_sets=(PREVIOUS, MAGNET),
        update_sets=in_turn(
            snapshots({PREVIOUS: POLICY}, period=period),
            snapshots({MAGNET: POLICY}, period=magnet_period),
        ),
    )
