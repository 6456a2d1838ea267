# SPDX-License-Identifier: Apache-2.0
"""Equilibria without regularisation, exactly.

A preference game is symmetric and its value is 1/2, so p is an equilibrium if and only
if P(y > p) <= 1/2 for every action y: a polytope, which may be a single point. The
central path ends inside it, where it tells which actions any equilibrium plays. A
single point then solves one linear system; of several `nash` returns the one of largest
entropy, as tau -> 0 does with a uniform reference.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy.linalg import lapack

from nlhf_jax.checks import UserError
from nlhf_jax.games import central_path
from nlhf_jax.games.matrices import Matrix, check_preference_matrix
from nlhf_jax.games.solutions import Policy

# All in units of the largest margin.
SETTLED = 1e-5  # gap from which on it is worth asking who is played
RESOLUTION = 1e-12  # singular values below it are 0, unless digits say less
CERTAIN = 10  # weights and losses of fewer resolutions may be 0
CONDITION = 1e-13  # reciprocal, below which ties do not say which policy
MOST_STEPS = 200  # towards the largest entropy
LAST_RATE = 1e-7  # of the last of them; what is left after it is its square
LEAST_PRODUCT = 1e-11  # of a loss and its multiplier; rounding rules below
SHRINKS = 0.1  # what a step towards the largest entropy leaves of the bounds' products


class Equilibrium(NamedTuple):
    """An equilibrium without regularisation, and whether it is proved the only one."""

    policy_N: Policy
    is_unique: bool


def solve_nash(preference_NN: Matrix) -> Equilibrium:
    """Returns the Nash equilibrium, of largest entropy where there are several.

    max over p of -sum_y p(y) log p(y)  subject to  P(y > p) <= 1/2 for all y;
    docs/math.md (3), (38), (58) to (63). No action wins more than 1e-11 times the
    game's largest margin against it, or what its digits leave where that is more.

    Raises:
      UserError: no preference matrix, or a game whose equilibrium is not found.
    """
    margin_NN, size = _margins(preference_NN), len(preference_NN)
    # The digits that 1/2 leaves to small margins.
    digits = np.finfo(float).eps / np.abs(preference_NN - 0.5).max(initial=1e-300)
    resolution = max(RESOLUTION, 4 * digits)
    if not margin_NN.any():
        return Equilibrium(np.full(size, 1 / size), size == 1)
    for point in central_path.follow(margin_NN):
        if point.gap < SETTLED:
            support_K = np.flatnonzero(point.is_played_N)
            policy_N = _only_one(margin_NN, support_K, CERTAIN * resolution)
            if policy_N is not None:
                return Equilibrium(policy_N, True)
    policy_N = _of_several(margin_NN, point, resolution)
    if _wins(margin_NN, policy_N) > CERTAIN * resolution:
        policy_N = np.array(point.policy_N)
    wins = _wins(margin_NN, policy_N)
    if not wins <= CERTAIN * resolution:
        raise UserError(
            f"this game's equilibrium is not found: an action wins {wins:.1g} of the "
            f"largest margin against the policy where the path ends, at most "
            f"{CERTAIN * resolution:.1g} is allowed"
        )
    return Equilibrium(policy_N, False)


def nash(preference_NN: Matrix) -> Policy:
    """Returns the policy of `solve_nash`."""
    return solve_nash(preference_NN).policy_N


def nash_many(
    preference_BNN: np.ndarray,
) -> Float[np.ndarray, "B N"]:
    """Returns an equilibrium of each of B games of one size, in one jitted program.

    No action wins more than 1e-11 times the game's largest margin against it. Of
    several equilibria it is one inside them, which plays all that any of them plays.
    A game on which the program ends too early is solved by `nash`.

    Raises:
      UserError: not B matrices, one that is no preference matrix, or one whose
        equilibrium is not found.
    """
    preference_BNN = np.asarray(preference_BNN, np.float64)
    if preference_BNN.ndim != 3 or not len(preference_BNN):
        raise UserError(
            f"games must be an array of matrices [B, N, N], got shape "
            f"{preference_BNN.shape}"
        )
    margin_BNN = np.stack([_margins(one_NN) for one_NN in preference_BNN])
    with jax.enable_x64(True):
        policy_BN = np.array(central_path.follow_many(margin_BNN).policy_N)
    for index, margin_NN in enumerate(margin_BNN):
        if not _wins(margin_NN, policy_BN[index]) <= CERTAIN * RESOLUTION:
            policy_BN[index] = nash(preference_BNN[index])
    return policy_BN


def _wins(margin_NN: Matrix, policy_N: Policy) -> float:
    """Returns the most that an action wins against the policy."""
    return float((margin_NN @ policy_N).max())


def _margins(preference_NN: Matrix) -> Matrix:
    """Returns P - 1/2, antisymmetric to the last digit, the largest entry 1 (or 0).

    Equilibria do not depend on the scale of the margins, digits do.
    """
    preference_NN = check_preference_matrix(preference_NN)
    margin_NN = (preference_NN - preference_NN.T) / 2
    largest = np.abs(margin_NN).max()
    return margin_NN / largest if largest else margin_NN


def _only_one(
    margin_NN: Matrix, support_K: np.ndarray, certain: float
) -> Policy | None:
    """Returns the equilibrium of this support if it is the only equilibrium there is.

    All of the support tie: one bordered system; docs/math.md (62). It has a solution
    only for an odd support. If all its weights and all losses of the other actions are
    above `certain`, no other policy is an equilibrium.
    """
    size = len(support_K)
    if size % 2 == 0:
        return None
    # Antisymmetric, so its transpose, which LAPACK reads, is its negative.
    system_MM = np.ones((size + 1, size + 1))
    system_MM[:size, :size] = margin_NN[np.ix_(support_K, support_K)]
    system_MM[size, :size], system_MM[size, size] = -1, 0
    norm = np.abs(system_MM).sum(axis=1).max()
    factors_MM, pivot_M, is_singular = lapack.dgetrf(system_MM.T)
    if is_singular or lapack.dgecon(factors_MM, norm)[0] < CONDITION:
        return None
    weight_K = lapack.dgetrs(factors_MM, pivot_M, np.eye(size + 1)[size])[0][:size]
    policy_N = np.zeros(len(margin_NN))
    policy_N[support_K] = weight_K / weight_K.sum()
    loss_N = -margin_NN @ policy_N
    loss_N[support_K] = np.inf
    is_only = weight_K.min() > certain and loss_N.min() > certain
    return policy_N if is_only else None


def _of_several(
    margin_NN: Matrix, point: central_path.Point, resolution: float
) -> Policy:
    """Returns the equilibrium of largest entropy with the support of `point`.

    Equilibria have weights on the support alone and let all of it tie, so they differ
    by the null space of its margins; docs/math.md (63).
    """
    is_played_N = point.is_played_N | (point.slack_N < CERTAIN * resolution)
    inner_KK = margin_NN[np.ix_(is_played_N, is_played_N)]
    _, singular_K, row_KK = np.linalg.svd(inner_KK)
    basis_DK = row_KK[singular_K <= resolution]
    wins_LD = margin_NN[np.ix_(~is_played_N, is_played_N)] @ basis_DK.T
    centre_D = basis_DK @ point.policy_N[is_played_N]
    policy_N = np.array(point.policy_N)
    # Else the margins' last digits decide who is played, and this is an equilibrium.
    if (basis_DK.T @ centre_D > 0).all() and (wins_LD @ centre_D < 0).all():
        policy_N[~is_played_N] = 0.0
        policy_N[is_played_N] = _most_entropy(basis_DK, wins_LD, centre_D)
    return policy_N


def _most_entropy(
    basis_DK: Float[np.ndarray, "D K"],
    wins_LD: Float[np.ndarray, "L D"],
    start_D: Float[np.ndarray, "D"],
) -> Float[np.ndarray, "K"]:
    """Maximises entropy over p = basis^T c > 0 of sum 1 with wins c <= 0.

    A primal-dual interior point method: m are the multipliers of the L bounds, and m_l
    times the loss -(wins c)_l goes to 0 for each.

    Args:
      basis_DK: orthonormal rows.
      wins_LD: what each action outside the support wins against each row.
      start_D: c of an equilibrium that all these lose to, up to its scale.
    """
    size, total_D = len(basis_DK), basis_DK.sum(axis=1)
    start_D = start_D / (total_D @ start_D)
    weight_K, loss_L = basis_DK.T @ start_D, -wins_LD @ start_D
    multiplier_L = np.ones(len(loss_L))
    system = np.zeros((size + 1, size + 1))
    system[:size, size] = system[size, :size] = total_D
    for _ in range(MOST_STEPS):
        product = (multiplier_L @ loss_L) / max(len(loss_L), 1)
        target = max(SHRINKS * product, LEAST_PRODUCT)
        system[:size, :size] = (basis_DK / weight_K) @ basis_DK.T
        system[:size, :size] += (wins_LD.T * (multiplier_L / loss_L)) @ wins_LD
        slope_D = -basis_DK @ np.log(weight_K) - wins_LD.T @ (target / loss_L)
        step_D = np.linalg.lstsq(system, np.append(slope_D, 0.0), rcond=None)[0][:-1]
        rate_K, rate_L = basis_DK.T @ step_D / weight_K, -wins_LD @ step_D / loss_L
        rise_L = target / multiplier_L / loss_L - 1 - rate_L
        share = min(_inside(rate_K), _inside(rate_L))
        # By factors, so that rounding keeps them above 0.
        weight_K, loss_L = (
            weight_K * (1 + share * rate_K),
            loss_L * (1 + share * rate_L),
        )
        multiplier_L = multiplier_L * (1 + _inside(rise_L) * rise_L)
        if np.abs(rate_K).max() < LAST_RATE and target <= LEAST_PRODUCT:
            break
    return weight_K / weight_K.sum()


def _inside(rate: np.ndarray) -> float:
    """Returns the largest share of a step, up to 1, that leaves a tenth of each."""
    return min(1.0, 0.9 / max(-rate.min(initial=0.0), 0.9))
