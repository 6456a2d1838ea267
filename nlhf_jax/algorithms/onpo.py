# SPDX-License-Identifier: Apache-2.0
"""Optimistic Nash policy optimisation: mirror descent that leans forward."""

from nlhf_jax.algorithms.regressions import (
    PREVIOUS,
    Comparator,
    proximal_anchor,
    with_comparators,
)
from nlhf_jax.parameter_sets import snapshots
from nlhf_jax.types import POLICY, Algorithm, Speaker

OLDER = "older"


def onpo(*, step_size: float, tau: float = 0.0, period: int = 10) -> Algorithm:
    """Returns ONPO in one sequence of policies.

        y, y', z ~ pi_t, z' ~ pi_{t-1}
        h as in `inpo`, target d = 2 (P(y > z) - P(y' > z)) - (P(y > z') - P(y' > z'))
        descend  (h - s d)^2 / (4 s)

    and every `period` steps pi_{t-1} <- pi_t, pi_t <- pi. The exact step is pi_{t+1}(y)
    proportional to a(y) exp(s (2 P(y > pi_t) - P(y > pi_{t-1}))). With tau = 0, the
    paper's case, the average policy approaches the equilibrium of the unregularised
    game at rate 1 / T; with tau > 0 the last one converges to the Nash equilibrium at
    tau.

    Args:
      step_size: s > 0, at most 1 / tau; one over the paper's eta.
      tau: strength of the KL to the reference, per nat, >= 0.
      period: steps with the same pi_t, >= 1.

    Raises:
      UserError: an argument out of range.

    Source: Zhang et al., 2025, arXiv 2502.16852; docs/math.md (22), (45), (52).
    """
    previous, older = Speaker({PREVIOUS: 1.0}), Speaker({OLDER: 1.0})
    return with_comparators(
        "onpo",
        (previous, previous),
        [Comparator(previous, 2.0), Comparator(older, -1.0)],
        anchors=proximal_anchor(tau, step_size),
        scale=step_size,
        is_regularised=tau > 0,
        derived_sets=(PREVIOUS, OLDER),
        update_sets=snapshots({PREVIOUS: POLICY, OLDER: PREVIOUS}, period=period),
    )
