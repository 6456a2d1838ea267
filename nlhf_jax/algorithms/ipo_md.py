# SPDX-License-Identifier: Apache-2.0
"""IPO-MD: the identity preference loss on pairs from the geometric mixture."""

from nlhf_jax.algorithms.policy_gradients import mixture_weights, speaker_of
from nlhf_jax.algorithms.regressions import on_labelled_pairs
from nlhf_jax.checks import check_range
from nlhf_jax.types import REFERENCE, Algorithm, Schedule, Speaker


def ipo_md(*, tau: float, beta: float | Schedule) -> Algorithm:
    """Returns IPO-MD.

        y, y' ~ m = geo(pi, mu; beta) (constants)
        descend  tau/4 (h - (P(y > y') - 1/2) / tau)^2,  h = lr(y) - lr(y')

    The expected descent direction is

        E_{y ~ m}[grad log pi(y) (P(y > m) - 1/2 - tau (lr(y) - E_m lr))]

    whose centring E_m lr matters for beta > 0, as E_m grad log pi is not 0 then. For
    one-token responses the stationary point is that of `nash_md_pg`: with a fixed
    beta > 0 **not** the Nash equilibrium at tau but the best response at tau to its own
    mixture, which is the equilibrium at tau / (1 - beta).

    Args:
      tau: strength of the KL to the reference, per nat, > 0.
      beta: weight of the reference in the sampled mixture, in [0, 1], or step ->
        weight; 0 is `online_ipo`.

    Raises:
      UserError: tau or beta out of range.

    Source: Calandriello et al., 2024, arXiv 2403.08635, section 5, whose Proposition
    5.1 leaves the centring out; docs/math.md (21), (45), (50).
    """
    return identity_loss("ipo_md", speaker_of(mixture_weights(beta)), tau=tau)


def identity_loss(name: str, speaker: Speaker, *, tau: float) -> Algorithm:
    """Returns the regression of lr(y) - lr(y') to (P(y > y') - 1/2) / tau."""
    check_range("tau", tau, 0.0, low_open=True)
    return on_labelled_pairs(name, speaker, anchors={REFERENCE: 1.0}, scale=1.0 / tau)
