# SPDX-License-Identifier: Apache-2.0
"""Online IPO: the identity preference loss on the policy's own pairs."""

from nlhf_jax.algorithms.ipo_md import identity_loss
from nlhf_jax.types import POLICY, Algorithm, Speaker


def online_ipo(*, tau: float) -> Algorithm:
    """Returns online IPO.

        y, y' ~ pi (constants);  descend  tau/4 (h - (P(y > y') - 1/2) / tau)^2
        h = lr(y) - lr(y')

    The expected gradient is that of `self_play` exactly, so the stationary point is the
    Nash equilibrium at tau. A sampled label in place of P has the same mean and more
    variance.

    Args:
      tau: strength of the KL to the reference, per nat, > 0.

    Raises:
      UserError: tau out of range.

    Source: Calandriello et al., 2024, arXiv 2403.08635, eq. 11 and Proposition 4.2;
    docs/math.md (7), (45), (50).
    """
    return identity_loss("online_ipo", Speaker({POLICY: 1.0}), tau=tau)
