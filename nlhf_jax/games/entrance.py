# SPDX-License-Identifier: Apache-2.0
"""Games, runs and policies as users give them, checked where they enter."""

import jax.numpy as jnp
import numpy as np

from nlhf_jax.checks import UserError, check_range
from nlhf_jax.games.matrices import check_preference_matrix
from nlhf_jax.games.methods import Game


def make_game(preference_NN: np.ndarray, reference_N: np.ndarray, tau: float) -> Game:
    """Returns the game if its parts are valid.

    Raises:
      UserError: no preference matrix, a reference that is no distribution with full
        support, or tau below 0.
    """
    check_range("tau", tau, 0.0)
    matrix = check_preference_matrix(preference_NN)
    reference_N = check_policy("reference", reference_N, len(matrix))
    return Game(jnp.asarray(matrix), jnp.asarray(reference_N), tau)


def make_games(
    preference_BNN: np.ndarray, reference_N: np.ndarray, tau: float | np.ndarray
) -> Game:
    """Returns B games as one `Game` for `solve_many` if their parts are valid.

    Args:
      preference_BNN: B matrices of one size: different games, or the prompts of a
        contextual game.
      reference_N: one reference for all, or one each, [B, N].
      tau: one tau for all, or one each, [B].

    Raises:
      UserError: as for `make_game`, by the first game that is wrong.
    """
    preference_BNN = np.asarray(preference_BNN, np.float64)
    if preference_BNN.ndim != 3 or not len(preference_BNN):
        raise UserError(
            f"games must be an array of matrices [B, N, N], got shape "
            f"{preference_BNN.shape}"
        )
    num_games, size = preference_BNN.shape[:2]
    reference_BN = broadcast("reference", reference_N, (num_games, size))
    tau_B = broadcast("tau", tau, (num_games,))
    for parts in zip(preference_BNN, reference_BN, tau_B.tolist(), strict=True):
        make_game(*parts)
    return Game(*(jnp.asarray(part) for part in (preference_BNN, reference_BN, tau_B)))


def make_runs(
    preference_NN: np.ndarray, reference_N: np.ndarray, tau: float | np.ndarray
) -> Game:
    """Returns one game, as B runs on it see it, for `solve_runs` if it is valid.

    Args:
      preference_NN: the game of all runs.
      reference_N: one reference for all, or one each, [B, N].
      tau: one tau for all, or one each, [B]; one of the two says what B is.

    Raises:
      UserError: as for `make_game`, by the first run that is wrong; or nothing says B.
    """
    reference_N, tau = np.asarray(reference_N, np.float64), np.asarray(tau, np.float64)
    counts = {*tau.shape, *reference_N.shape[:-1]}
    if len(counts) != 1 or 0 in counts:
        raise UserError(
            "runs must have a reference each or a tau each, as many of one as of the "
            f"other, got shapes {reference_N.shape} and {tau.shape}"
        )
    matrix_NN = check_preference_matrix(preference_NN)
    (num_runs,) = counts
    reference_BN = broadcast("reference", reference_N, (num_runs, len(matrix_NN)))
    for one_N in reference_BN:
        check_policy("reference", one_N, len(matrix_NN))
    tau_B = broadcast("tau", tau, (num_runs,))
    for one in tau_B.tolist():
        check_range("tau", one, 0.0)
    return Game(*(jnp.asarray(part) for part in (matrix_NN, reference_BN, tau_B)))


def broadcast(name: str, given, shape: tuple[int, ...]) -> np.ndarray:
    """Returns what is given in float64, once for each of the first axis.

    Args:
      name: of what is given, for the error.
      given: of this shape, or of the shape less its first axis.
      shape: what comes back.

    Raises:
      UserError: another shape.
    """
    given = np.asarray(given, np.float64)
    if given.shape not in (shape, shape[1:]):
        raise UserError(
            f"{name} must have shape {shape} or {shape[1:]}, got {given.shape}"
        )
    return np.broadcast_to(given, shape)


def check_policy(name: str, policy_N: np.ndarray, size: int) -> np.ndarray:
    """Returns the policy in float64 if it has full support.

    Raises:
      UserError: not `size` probabilities above 0 that sum to 1.
    """
    policy_N = np.asarray(policy_N, np.float64)
    is_good = policy_N.shape == (size,) and (policy_N > 0).all()
    if not is_good or abs(policy_N.sum() - 1) > 1e-6:
        raise UserError(
            f"{name} must be {size} probabilities above 0 that sum to 1, got {policy_N}"
        )
    return policy_N
