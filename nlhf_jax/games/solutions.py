# SPDX-License-Identifier: Apache-2.0
"""Equilibria of preference games regularised to a reference, and distances to them.

Notation: pi a policy, mu the reference with full support, tau > 0 the strength of the
KL, P(y > pi) = sum_y' P(y, y') pi(y'). The regularised game is
P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu)
(Munos et al., 2024, arXiv 2312.00886, eq. 2; docs/math.md (5)).
"""

import math

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError, check_range
from nlhf_jax.games.matrices import Matrix

Policy = Float[np.ndarray, "N"]
NEWTON_STEPS, CONTINUATION_POINTS = 200, 60
STEP_TOLERANCE = 1e-14  # the last Newton step, in nats
LEAST_TAU = 1e-7
LARGEST_GAP = 1e-9  # of what is called an equilibrium


def normalise(logits_N: Policy) -> Policy:
    """Returns softmax(logits)."""
    weights_N = np.exp(logits_N - logits_N.max())
    return weights_N / weights_N.sum()


def kl(first_N: Policy, second_N: Policy) -> float:
    """Returns KL(first, second) in nats; entries of 0 in `first` count nothing."""
    held = first_N > 0
    ratio_N = np.log(first_N[held]) - np.log(second_N[held])
    return float(np.sum(first_N[held] * ratio_N))


def geometric_mixture(policy_N: Policy, reference_N: Policy, beta: float) -> Policy:
    """Returns pi^(1 - beta) mu^beta, normalised; docs/math.md (11)."""
    check_range("beta", beta, 0.0, 1.0)
    return normalise((1 - beta) * np.log(policy_N) + beta * np.log(reference_N))


def best_response(
    preference_NN: Matrix, reference_N: Policy, tau: float, opponent_N: Policy
) -> Policy:
    """Returns argmax over pi of P(pi > opponent) - tau KL(pi, mu).

    It is proportional to mu exp(P(. > opponent) / tau); docs/math.md (8).
    """
    return normalise(np.log(reference_N) + preference_NN @ opponent_N / tau)


def mirror_step(
    preference_NN: Matrix,
    reference_N: Policy,
    tau: float,
    step_size: float,
    policy_N: Policy,
    opponent_N: Policy,
) -> Policy:
    """Returns one step of the rule all tabular algorithms share.

    log pi' = (1 - s tau) log pi + s tau log mu + s P(. > opponent) + const. With the
    opponent geo(pi, mu; s tau) it is Nash-MD (Munos et al., 2024, eq. 5);
    docs/math.md (16).

    Raises:
      UserError: s tau is not in [0, 1].
    """
    weight = check_range("step_size * tau", step_size * tau, 0.0, 1.0)
    return normalise(
        (1 - weight) * np.log(policy_N)
        + weight * np.log(reference_N)
        + step_size * preference_NN @ opponent_N
    )


def regularised_gap(
    preference_NN: Matrix, reference_N: Policy, tau: float, policy_N: Policy
) -> float:
    """Returns max over pi' of P_tau(pi' > pi) - 1/2, which is 0 at the Nash only.

    In closed form tau log sum_y mu(y) exp(P(y > pi) / tau) + tau KL(pi, mu) - 1/2;
    the duality gap of the two-player game is twice this; docs/math.md (9).
    """
    value_N = preference_NN @ policy_N / tau
    top = value_N.max()
    log_sum = top + np.log(np.sum(reference_N * np.exp(value_N - top)))
    return float(tau * log_sum + tau * kl(policy_N, reference_N) - 0.5)


def exploitability(preference_NN: Matrix, policy_N: Policy) -> float:
    """Returns max over y of P(y > pi) - 1/2, what one answer wins: docs/math.md (10).

    It is `regularised_gap` without regularisation.
    """
    return float((preference_NN @ policy_N).max() - 0.5)


def regularised_nash(preference_NN: Matrix, reference_N: Policy, tau: float) -> Policy:
    """Returns the unique Nash equilibrium at tau, to about 1e-13.

    Solves pi = softmax(log mu + P pi / tau) by Newton steps on the logits, following
    the solution from a large tau down to the one asked for; docs/math.md (7).

    Raises:
      UserError: tau is not above 0 and finite, or so small that the gap stays above
        1e-9; or the reference has a zero.
    """
    check_range("tau", tau, 0.0, math.inf, low_open=True, high_open=True)
    if not (np.asarray(reference_N) > 0).all():
        raise UserError(f"the reference must be above 0 everywhere, got {reference_N}")
    logits_N = np.log(reference_N)
    if tau < LEAST_TAU:
        raise UserError(f"tau {tau:g} is too small to solve a game at: at least 1e-7")
    decades = math.log10(max(10.0, tau)) - math.log10(tau)
    num_points = math.ceil(CONTINUATION_POINTS * max(1.0, decades / 2))
    path = np.geomspace(max(10.0, tau), tau, num_points)
    try:
        # Far too small a tau overflows; the gap then says so.
        with np.errstate(all="ignore"):
            for current in (*path, tau):
                logits_N = _newton(preference_NN, reference_N, current, logits_N)
            policy_N = normalise(logits_N)
            gap = regularised_gap(preference_NN, reference_N, tau, policy_N)
    except np.linalg.LinAlgError:
        gap = math.inf
    if not gap <= LARGEST_GAP:
        raise UserError(
            f"tau {tau:g} is too small to solve this game at: gap {gap:.1g}"
        )
    return policy_N


def _newton(preference_NN, reference_N, tau, logits_N):
    identity_NN, payoff_NN = np.eye(len(reference_N)), (preference_NN - 0.5) / tau
    for _ in range(NEWTON_STEPS):
        policy_N = normalise(logits_N)
        residual_N = np.log(reference_N) + payoff_NN @ policy_N - logits_N
        covariance_NN = np.diag(policy_N) - np.outer(policy_N, policy_N)
        # Never singular: P - 1/2 is antisymmetric and the covariance is not negative.
        step_N = np.linalg.solve(identity_NN - payoff_NN @ covariance_NN, residual_N)
        largest = np.abs(step_N).max()
        # Far from the solution a full step overshoots the curvature of the softmax.
        logits_N = logits_N + min(1.0, 5 / max(largest, STEP_TOLERANCE)) * step_N
        if largest < STEP_TOLERANCE * max(1.0, np.abs(logits_N).max()):
            break
    return logits_N
