# SPDX-License-Identifier: Apache-2.0
"""Preference matrices: P[i, j] = P(action i preferred to action j)."""

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError

Matrix = Float[np.ndarray, "N N"]
TOLERANCE = 1e-9  # tables written with a dozen decimals are antisymmetric to this


def check_preference_matrix(preference_NN: np.ndarray) -> Matrix:
    """Returns the matrix in float64 if it is a preference matrix.

    Raises:
      UserError: not square, an entry outside [0, 1] or NaN, or P + P^T is not 1; the
        worst entry is named.
    """
    preference_NN = np.asarray(preference_NN, np.float64)
    shape = preference_NN.shape
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise UserError(f"a preference matrix must be square, got shape {shape}")
    is_bad_NN = ~((preference_NN >= 0) & (preference_NN <= 1))
    if is_bad_NN.any():
        i, j = np.argwhere(is_bad_NN)[0]
        raise UserError(f"P[{i}, {j}] must be in [0, 1], got {preference_NN[i, j]}")
    gap_NN = np.abs(preference_NN + preference_NN.T - 1)
    i, j = np.unravel_index(gap_NN.argmax(), shape)
    if gap_NN[i, j] > TOLERANCE:
        raise UserError(
            f"P[{i}, {j}] + P[{j}, {i}] must be 1, got {preference_NN[i, j]} + "
            f"{preference_NN[j, i]}"
        )
    return preference_NN


def cyclic(first: float, second: float, third: float) -> Matrix:
    """Returns three actions with margins P12 - 1/2, P23 - 1/2 and P31 - 1/2."""
    margin_NN = np.array(
        [[0, first, -third], [-first, 0, second], [third, -second, 0]], np.float64
    )
    return 0.5 + margin_NN


def rock_paper_scissors() -> Matrix:
    """Returns the game in which each action surely beats the next."""
    return cyclic(0.5, 0.5, 0.5)


def skew() -> Matrix:
    """Returns P12 = 0.7, P23 = 0.6, P31 = 0.8: a cycle of unequal strength."""
    return cyclic(0.2, 0.1, 0.3)


def linear_utility(utility_N: Float[np.ndarray, "N"]) -> Matrix:
    """Returns P[i, j] = 1/2 + (u_i - u_j) / 2 for utilities within one of each other.

    Raises:
      UserError: utilities further apart than one.
    """
    utility_N = np.asarray(utility_N, np.float64)
    return check_preference_matrix(0.5 + 0.5 * (utility_N[:, None] - utility_N[None]))


def bradley_terry(reward_N: Float[np.ndarray, "N"]) -> Matrix:
    """Returns P[i, j] = sigmoid(r_i - r_j), a transitive game."""
    reward_N = np.asarray(reward_N, np.float64)
    return 0.5 * (1 + np.tanh((reward_N[:, None] - reward_N[None]) / 2))


def random_game(rng: np.random.Generator, size: int) -> Matrix:
    """Returns independent uniform entries above the diagonal, mirrored below."""
    upper_NN = np.triu(rng.uniform(size=(size, size)), 1)
    return upper_NN + np.tril(1 - upper_NN.T, -1) + 0.5 * np.eye(size)
