# SPDX-License-Identifier: Apache-2.0
"""Iterative Nash policy optimisation: mirror descent by regression on pairs."""

from nlhf_jax.algorithms.regressions import (
    PREVIOUS,
    on_labelled_pairs,
    proximal_anchor,
)
from nlhf_jax.parameter_sets import snapshots
from nlhf_jax.types import POLICY, Algorithm, Speaker


def inpo(*, tau: float, step_size: float, period: int = 10) -> Algorithm:
    """Returns INPO.

        y, y' ~ pi_t independent
        h = log pi(y)/a(y) - log pi(y')/a(y')
        log a = s tau log mu + (1 - s tau) log pi_t
        descend  (h - s (P(y > y') - 1/2))^2 / (4 s)

    and every `period` steps pi_t <- pi. The exact minimiser is the step of online
    mirror descent, pi_{t+1}(y) proportional to mu(y)^{s tau} pi_t(y)^{1 - s tau}
    exp(s P(y > pi_t)), because both responses come from pi_t: pairs from elsewhere, or
    the best and the worst of several, would make it a step against another opponent. It
    converges to the Nash equilibrium at tau while s is small against tau.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      step_size: s in (0, 1 / tau], one over the paper's eta.
      period: steps with the same pi_t, >= 1.

    Raises:
      UserError: tau, step_size or period out of range.

    Source: Zhang et al., 2024, arXiv 2407.00617; docs/math.md (16), (18), (45).
    """
    return on_labelled_pairs(
        "inpo",
        Speaker({PREVIOUS: 1.0}),
        anchors=proximal_anchor(tau, step_size),
        scale=step_size,
        derived_sets=(PREVIOUS,),
        update_sets=snapshots({PREVIOUS: POLICY}, period=period),
    )
