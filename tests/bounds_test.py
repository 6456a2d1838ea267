# SPDX-License-Identifier: Apache-2.0
"""The lower bound of the duality gap: unbiased, below the truth, above nothing."""

import itertools

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.evaluation.bounds import gain_of_the_best
from nlhf_jax.games import matrices, solutions

GAME, POLICY = matrices.skew(), np.array([0.5, 0.3, 0.2])


def expected(num_candidates, num_opponents):
    """Returns E[gain] over all draws of candidates and opponents, by enumeration."""
    draws = list(itertools.product(range(3), repeat=num_candidates + num_opponents))
    picks = np.array(draws)
    weight = POLICY[picks].prod(axis=1)
    y, z = picks[:, :num_candidates], picks[:, num_candidates:]
    return weight @ gain_of_the_best(GAME[y[:, :, None], z[:, None, :]])


def best_of(num_candidates, num_opponents):
    """P(best > policy) - 1/2 where half of the opponents choose the best."""
    half, total = num_opponents // 2, 0.0
    shape = num_candidates + half
    for pick in itertools.product(range(3), repeat=shape):
        y, z = pick[:num_candidates], pick[num_candidates:]
        best = y[np.argmax([GAME[one, list(z)].mean() for one in y])]
        total += POLICY[list(pick)].prod() * (GAME[best] @ POLICY - 0.5)
    return total


@pytest.mark.parametrize("num_candidates", [1, 2, 4])
def test_it_is_an_unbiased_estimate_of_what_the_best_wins(num_candidates):
    found, known = expected(num_candidates, 2), best_of(num_candidates, 2)
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-12)


def test_it_grows_with_the_candidates_and_stays_below_the_exploitability():
    gains = [expected(n, 2) for n in (1, 2, 4)]
    truth = solutions.exploitability(GAME, POLICY)
    np.testing.assert_allclose(gains[0], 0.0, atol=1e-12)
    assert 0 < gains[1] < gains[2] < truth


def test_judging_by_the_opponents_it_was_chosen_with_would_exceed_the_truth():
    # What the halves are for: at a policy nobody can exploit the naive figure is not 0.
    rng = np.random.default_rng(0)
    dice, uniform = matrices.cyclic(0.4, 0.4, 0.4), np.full(3, 1 / 3)
    y, z = rng.choice(3, p=uniform, size=(2, 4000, 4))
    preference = dice[y[:, :, None], z[:, None, :]]
    naive = preference.mean(axis=2).max(axis=1).mean() - 0.5
    honest = gain_of_the_best(preference)
    assert naive > 0.1
    # Four standard errors.
    assert abs(honest.mean()) < 4 * honest.std() / np.sqrt(len(honest))


def test_one_opponent_cannot_both_choose_and_judge():
    with pytest.raises(UserError, match="at least 2, got 1"):
        gain_of_the_best(np.full((3, 4, 1), 0.5))
