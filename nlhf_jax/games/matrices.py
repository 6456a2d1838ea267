# SPDX-License-Identifier: Apache-2.0
"""Preference matrices: P[i, j] = P(action i preferred to action j)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError, check_range

Matrix = Float[np.ndarray, "N N"]
Rows = Sequence[Sequence[int | float]]
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


def random_game(
    rng: np.random.Generator, size: int, cyclic_share: float | None = None
) -> Matrix:
    """Returns a random antisymmetric game.

    Args:
      rng: where the entries come from, independent and uniform above the diagonal.
      size: actions N.
      cyclic_share: share of the squared margins that no difference of scores explains
        (docs/math.md (33)), in [0, 1]; needs N >= 3 unless 0. The parts are rescaled,
        and all margins shrunk where one would pass 1/2. None leaves the share to
        chance.

    Raises:
      UserError: a share out of range, or above 0 with fewer than three actions.
    """
    upper_NN = np.triu(rng.uniform(size=(size, size)), 1)
    game_NN = upper_NN + np.tril(1 - upper_NN.T, -1) + 0.5 * np.eye(size)
    if cyclic_share is None:
        return game_NN
    check_range("cyclic_share", cyclic_share, 0.0, 1.0)
    if cyclic_share and size < 3:
        raise UserError(f"a cycle needs at least 3 actions, got size {size}")
    margin_NN = game_NN - 0.5
    score_N = margin_NN.mean(axis=1)
    transitive_NN = score_N[:, None] - score_N[None]
    cyclic_NN = margin_NN - transitive_NN
    mixed_NN = np.sqrt(1 - cyclic_share) * transitive_NN / np.linalg.norm(transitive_NN)
    if cyclic_share:
        mixed_NN += np.sqrt(cyclic_share) * cyclic_NN / np.linalg.norm(cyclic_NN)
    mixed_NN *= np.linalg.norm(margin_NN)
    return 0.5 + mixed_NN / max(1.0, 2 * np.abs(mixed_NN).max())


def annotators(scores: Rows, weights: Sequence[int | float] | None = None) -> Matrix:
    """Returns what a population prefers whose groups each score the actions.

    P[i, j] = sum_k w_k (1 if score_k(i) > score_k(j), 1/2 if equal, else 0): every
    group is consistent, the population need not be.

    Args:
      scores: of each group, one for each action.
      weights: sizes of the groups, in any unit; equal if not given.

    Raises:
      UserError: a negative weight, or none above 0.
    """
    score_KN = np.asarray(scores, np.float64)
    weight_K = np.ones(len(score_KN)) if weights is None else np.asarray(weights)
    if not ((weight_K >= 0).all() and weight_K.sum() > 0):
        raise UserError(
            f"weights must be at least 0 with a positive sum, got {weight_K}"
        )
    verdict_KNN = np.sign(score_KN[:, :, None] - score_KN[:, None, :])
    return 0.5 + 0.5 * np.tensordot(weight_K / weight_K.sum(), verdict_KNN, axes=1)


def dice(faces: Rows) -> Matrix:
    """Returns P(die i rolls higher than die j), half for a tie, of fair dice."""
    face_NF = np.asarray(faces, np.float64)
    verdict = np.sign(face_NF[:, None, :, None] - face_NF[None, :, None, :])
    return 0.5 + 0.5 * verdict.mean(axis=(2, 3))


# Each beats the next with 5/9 (Munos et al., 2024, Appendix C.1).
INTRANSITIVE_FACES = ((2, 4, 9), (1, 6, 8), (3, 5, 7))


def three_types(epsilon: float = 0.1) -> Matrix:
    """Returns three types of people, each with one strict preference and else even.

    Type 1, of mass 1/3 - epsilon, prefers action 2 to 1; type 2, 1/3 + epsilon/2, 1 to
    3; type 3, as large, 3 to 2. The equilibrium is (1/3 + epsilon/2, 1/3 + epsilon/2,
    1/3 - epsilon), while a Bradley-Terry reward puts all mass on action 1, or 2 where
    epsilon < 0.

    Args:
      epsilon: in [-1/3, 1/3].

    Raises:
      UserError: epsilon out of range.

    Source: Munos et al., 2024, arXiv 2312.00886, section 3.2.
    """
    check_range("epsilon", epsilon, -1 / 3, 1 / 3)
    first, others = 1 / 3 - epsilon, 1 / 3 + epsilon / 2
    return cyclic(-first / 2, -others / 2, -others / 2)
