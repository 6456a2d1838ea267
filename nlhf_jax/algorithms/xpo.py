# SPDX-License-Identifier: Apache-2.0
"""Exploratory preference optimisation: online DPO with an optimistic term."""

from nlhf_jax.algorithms.online_dpo import logistic_pairs
from nlhf_jax.types import POLICY, REFERENCE, Algorithm, Speaker


def xpo(*, tau: float, alpha: float = 1e-5) -> Algorithm:
    """Returns XPO.

        y ~ pi, y' ~ mu (constants), h = lr(y) - lr(y')
        descend  (alpha log pi(y')
                  - (P log sigma(tau h) + (1 - P) log sigma(-tau h))) / (2 tau)

    The sign of the first term is plus: what the reference says becomes less likely,
    which pushes the policy where the reference does not go. (A minus, as some code has,
    is a pull towards the reference, the opposite of exploring.) Not a Nash solver: with
    alpha = 0 and Bradley-Terry preferences it ends at RLHF's pi(y) proportional to
    mu(y) exp(r(y) / tau), and alpha has to fall to 0 on the way.

    Args:
      tau: strength of the KL to the reference, in log-odds per nat, > 0.
      alpha: weight of the optimistic term, nats^-1, >= 0.

    Raises:
      UserError: tau or alpha out of range.

    Source: Xie et al., 2024, arXiv 2405.21046, Algorithm 1; docs/math.md (46), (51).
    """
    policy, reference = Speaker({POLICY: 1.0}), Speaker({REFERENCE: 1.0})
    return logistic_pairs("xpo", policy, reference, tau=tau, alpha=alpha)
