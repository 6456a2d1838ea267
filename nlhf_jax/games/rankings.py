# SPDX-License-Identifier: Apache-2.0
"""Rankings of the actions of a game, each blind to something the others see."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import check_integer, check_range
from nlhf_jax.games.cycles import TIE, fit_bradley_terry
from nlhf_jax.games.matrices import Matrix, check_preference_matrix
from nlhf_jax.games.nash import nash
from nlhf_jax.games.solutions import Policy, normalise

Scores = Float[np.ndarray, "N"]
LARGEST_ALPHA = 1e6  # selection is complete long before
ELO_SCALE = 400 / math.log(10)  # 400 points are odds of ten to one


def elo(preference_NN: Matrix, sampling_N: Policy | None = None) -> Scores:
    """Returns Elo ratings with mean 0: a Bradley-Terry fit, 400 points for odds of 10.

    The fit sees a pair as often as two draws from `sampling_N` (uniform if not given)
    make it: for preferences that are not Bradley-Terry the ratings, and even their
    order, depend on it. Someone who always wins has a large, not an infinite rating.

    Source: Elo, 1978, The Rating of Chessplayers; Munos et al., 2024, arXiv
    2312.00886, Proposition 2, on the dependence; docs/math.md (35).
    """
    preference_NN = check_preference_matrix(preference_NN)
    weight_NN = None if sampling_N is None else np.outer(sampling_N, sampling_N)
    scores_BN = fit_bradley_terry(preference_NN[None], weight_NN=weight_NN)
    return ELO_SCALE * scores_BN[0]


def mean_win_rate(preference_NN: Matrix) -> Scores:
    """Returns each action's mean preference over all the others."""
    size = len(preference_NN)
    return (np.asarray(preference_NN).sum(axis=1) - 0.5) / max(size - 1, 1)


class NashAverage(NamedTuple):
    """The equilibrium of largest entropy, and each action's value against it.

    Attributes:
      weight_N: the equilibrium.
      skill_N: P(y > equilibrium) - 1/2, at most 0, and 0 on the support.
    """

    weight_N: Policy
    skill_N: Scores


def nash_averaging(preference_NN: Matrix) -> NashAverage:
    """Returns Nash averaging: copies of an action change nothing.

    Source: Balduzzi et al., 2018, arXiv 1806.02643; docs/math.md (36).
    """
    weight_N = nash(preference_NN)
    return NashAverage(weight_N, preference_NN @ weight_N - 0.5)


def alpha_rank(
    preference_NN: Matrix, *, alpha: float = 10.0, population_size: int = 50
) -> Policy:
    """Returns alpha-Rank: how long a population stays with each action.

    In a population of m that plays s, one that plays r takes over with probability
    rho = (1 - e^-u) / (1 - e^-(m u)), u = alpha (P(r > s) - P(s > r)), 1/m at u = 0.
    The ranking is the stationary distribution of the chain that goes from s to r with
    probability rho / (N - 1); docs/math.md (37).

    Args:
      preference_NN: the game, played by one population.
      alpha: intensity of selection, in (0, 1e6]; the larger, the less a loser spreads.
      population_size: m >= 2.

    Raises:
      UserError: no preference matrix, or a setting out of range.

    Source: Omidshafiei et al., 2019, arXiv 1903.01373.
    """
    preference_NN = check_preference_matrix(preference_NN)
    check_range("alpha", alpha, 0.0, LARGEST_ALPHA, low_open=True)
    check_integer("population_size", population_size, 2)
    size = len(preference_NN)
    if size == 1:
        return np.ones(1)
    # Row s, column r: the newcomer r has the advantage P[r, s] - P[s, r].
    log_rho_NN = _log_fixation(
        alpha * (preference_NN.T - preference_NN), population_size
    )
    return _stationary(log_rho_NN - math.log(size - 1))


def _log_fixation(u_NN: np.ndarray, m: int) -> np.ndarray:
    """Returns log((1 - e^-u) / (1 - e^-(m u))) without overflow on either side."""
    small_NN = np.abs(u_NN) < 1e-9
    u_NN = np.where(small_NN, 1.0, u_NN)
    a_NN = np.abs(u_NN)
    ratio_NN = np.log(-np.expm1(-a_NN)) - np.log(-np.expm1(-m * a_NN))
    # For u < 0 both differences are taken out of e^|u| and e^(m |u|).
    ratio_NN = np.where(u_NN < 0, ratio_NN - (m - 1) * a_NN, ratio_NN)
    return np.where(small_NN, -math.log(m), ratio_NN)


def _stationary(log_rate_NN: np.ndarray) -> np.ndarray:
    """Returns the stationary distribution of a chain, by states taken out in turn.

    Nothing is subtracted, so tiny rates keep their digits (Grassmann, Taksar and
    Heyman, 1985, Operations Research 33); in logarithms none falls to 0. Rates from
    row to column, the diagonal is not read.
    """
    log_rate_NN = log_rate_NN.copy()
    size = len(log_rate_NN)
    log_out_N = np.zeros(size)
    for k in range(size - 1, 0, -1):
        log_out_N[k] = np.logaddexp.reduce(log_rate_NN[k, :k])
        share_K = log_rate_NN[k, :k] - log_out_N[k]
        through_KK = log_rate_NN[:k, k][:, None] + share_K[None]
        log_rate_NN[:k, :k] = np.logaddexp(log_rate_NN[:k, :k], through_KK)
    log_weight_N = np.zeros(size)
    for k in range(1, size):
        into_K = log_weight_N[:k] + log_rate_NN[:k, k]
        log_weight_N[k] = np.logaddexp.reduce(into_K) - log_out_N[k]
    return normalise(log_weight_N)


def condorcet_winner(preference_NN: Matrix) -> int | None:
    """Returns the action that beats every other by majority, or None."""
    beats_NN = np.asarray(preference_NN) > 0.5 + TIE
    winners = np.flatnonzero(beats_NN.sum(axis=1) == len(beats_NN) - 1)
    return int(winners[0]) if len(winners) else None
