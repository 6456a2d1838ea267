# SPDX-License-Identifier: Apache-2.0
"""Extragradient preference optimisation: the opponent is a step ahead."""

from nlhf_jax.algorithms.regressions import Comparator, with_comparators
from nlhf_jax.checks import check_range
from nlhf_jax.types import POLICY, REFERENCE, Algorithm, Speaker

AHEAD = "ahead"


def egpo(*, tau: float, temperature: float = 2.0) -> Algorithm:
    """Returns EGPO: two half-steps from the same parameters and optimiser state.

        y, y' ~ pi at `temperature` (constants), h = lr(y) - lr(y')
        1. theta' from theta, with z ~ pi:
           descend  tau/4 (h - (P(y > z) - P(y' > z)) / tau)^2
        2. theta+ from theta:  the same with z ~ pi_theta'

    Its fixed point is the Nash equilibrium at tau. With exact steps and uniform pairs
    it is mirror prox, which reaches that point at step sizes where self-play and
    mirror descent cycle. Log-probabilities are sums over tokens; the authors' code
    divides them by the length, which is another objective.

    Args:
      tau: strength of the KL to the reference, per nat, > 0.
      temperature: of the pairs, > 0; large is near uniform. The comparators have 1.

    Raises:
      UserError: tau or temperature out of range.

    Source: Zhou, Fazel and Du, 2025, arXiv 2503.08942; docs/math.md (20), (45), (52).
    """
    check_range("tau", tau, 0.0, low_open=True)
    check_range("temperature", temperature, 0.0, low_open=True)

    def half_step(comparator: str, **more) -> Algorithm:
        pair = Speaker({POLICY: 1.0}, temperature)
        return with_comparators(
            "egpo",
            (pair, pair),
            [Comparator(Speaker({comparator: 1.0}), 1.0)],
            anchors={REFERENCE: 1.0},
            scale=1.0 / tau,
            **more,
        )

    return half_step(AHEAD, lookaheads={AHEAD: half_step(POLICY)})
