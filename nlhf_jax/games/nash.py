# SPDX-License-Identifier: Apache-2.0
"""Equilibria without regularisation, by linear programs.

A preference game is symmetric and its value is 1/2, so p is an equilibrium if and only
if P(y > p) <= 1/2 for every action y: a polytope, which may be a single point. Of all
equilibria `nash` returns the one of largest entropy, as tau -> 0 does with a uniform
reference.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog, minimize

from nlhf_jax.games.matrices import Matrix, check_preference_matrix
from nlhf_jax.games.solutions import Policy, normalise

FEASIBILITY = 1e-10  # what the linear programs and the entropy's dual are solved to
SAME_WEIGHT = 1e-5  # weights that differ by less are the same
# A weight that no equilibrium passes is 0. Where a matrix has margins of very different
# sizes true weights can be tiny: then less is taken for 0.
SUPPORTS = (1e-5, 1e-7, 1e-9)
EXPLOITABILITY = 1e-7  # in units of the largest margin


class Equilibrium(NamedTuple):
    """An equilibrium without regularisation, and whether it is the only one."""

    policy_N: Policy
    is_unique: bool


def solve_nash(preference_NN: Matrix) -> Equilibrium:
    """Returns the Nash equilibrium, of largest entropy where there are several.

    max over p of -sum_y p(y) log p(y)  subject to  P(y > p) <= 1/2 for all y;
    docs/math.md (3), (38).

    Raises:
      UserError: no preference matrix.
    """
    margin_NN = check_preference_matrix(preference_NN) - 0.5
    largest = np.abs(margin_NN).max()
    # Equilibria do not depend on the scale of the margins, the programs' digits do.
    margin_NN = margin_NN / largest if largest else margin_NN
    bound_N2 = _opposite_ends(margin_NN)
    is_unique = bool(np.ptp(bound_N2, axis=1).max() <= SAME_WEIGHT)
    centre_N = bound_N2.mean(axis=1)
    if not is_unique:
        bound_N2, centre_N = _extremes(margin_NN)
    solve = _unique if is_unique else _most_entropy
    for least in SUPPORTS:
        policy_N = solve(margin_NN, np.flatnonzero(bound_N2[:, 1] > least))
        if (margin_NN @ policy_N).max() <= EXPLOITABILITY:
            return Equilibrium(policy_N, is_unique)
    return Equilibrium(centre_N, is_unique)


def nash(preference_NN: Matrix) -> Policy:
    """Returns the policy of `solve_nash`."""
    return solve_nash(preference_NN).policy_N


def _opposite_ends(margin_NN: np.ndarray) -> np.ndarray:
    """Returns the equilibria of least and largest random cost, [N, 2].

    They are the same one if and only if there is no other, for almost every cost.
    """
    cost_N = np.random.default_rng(0).normal(size=len(margin_NN))
    ends = [_program(sign * cost_N, margin_NN) for sign in (1.0, -1.0)]
    return np.maximum(np.stack(ends, axis=1), 0.0)


def _extremes(margin_NN: np.ndarray) -> tuple[np.ndarray, Policy]:
    """Returns each action's least and largest weight in any equilibrium, and a centre.

    Two linear programs an action; the mean of what they find is an equilibrium as well.
    """
    size = len(margin_NN)
    bound_N2, total_N = np.empty((size, 2)), np.zeros(size)
    for i in range(size):
        for side, sign in enumerate((1.0, -1.0)):
            cost_N = np.zeros(size)
            cost_N[i] = sign
            found = _program(cost_N, margin_NN)
            bound_N2[i, side] = found[i]
            total_N += np.maximum(found, 0)
    return bound_N2, total_N / total_N.sum()


def _program(cost_N: np.ndarray, margin_NN: np.ndarray) -> np.ndarray:
    """Returns the equilibrium of least cost, to fewer digits where need be."""
    tight = {
        f"{side}_feasibility_tolerance": FEASIBILITY for side in ("primal", "dual")
    }
    for method, options in (("highs", tight), ("highs", {}), ("highs-ipm", {})):
        found = linprog(
            cost_N,
            A_ub=margin_NN,
            b_ub=np.zeros(len(cost_N)),
            A_eq=np.ones((1, len(cost_N))),
            b_eq=[1.0],
            bounds=(0, 1),
            method=method,
            options=options,
        )
        if found.x is not None:
            return found.x
    raise RuntimeError(f"a linear program failed: {found.message}")


def _unique(margin_NN: np.ndarray, support_K: np.ndarray) -> Policy:
    """Solves the ties of the support, which hold exactly at an equilibrium."""
    system = np.vstack(
        [margin_NN[np.ix_(support_K, support_K)], np.ones(len(support_K))]
    )
    right = np.append(np.zeros(len(support_K)), 1.0)
    policy_N = np.zeros(len(margin_NN))
    policy_N[support_K] = np.maximum(np.linalg.lstsq(system, right, rcond=None)[0], 0)
    return policy_N / policy_N.sum()


def _most_entropy(margin_NN: np.ndarray, support_K: np.ndarray) -> Policy:
    """Maximises entropy over the equilibria, by its dual.

    Every action of the support ties with every equilibrium (complementary slackness),
    the others may lose. With one multiplier an action, p = softmax(-margins^T l), and
    the dual log sum exp(-margins^T l) is smooth and convex.
    """
    margin_NK = margin_NN[:, support_K]
    is_tie_N = np.isin(np.arange(len(margin_NN)), support_K)

    def dual(multiplier_N):
        logits_K = -multiplier_N @ margin_NK
        top = logits_K.max()
        value = top + np.log(np.exp(logits_K - top).sum())
        return value, -margin_NK @ normalise(logits_K)

    found = minimize(
        dual,
        np.zeros(len(margin_NK)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, None) if tie else (0, None) for tie in is_tie_N],
        options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 0, "gtol": FEASIBILITY},
    )
    policy_N = np.zeros(len(margin_NN))
    policy_N[support_K] = normalise(-found.x @ margin_NK)
    return policy_N
