# SPDX-License-Identifier: Apache-2.0
"""Cycles, the Hodge split and Bradley-Terry fits on games with known answers."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.evaluation import cyclicity


def _antisymmetric(upper):
    """Builds one [1, N, N] game from {(i, j): P(i > j)}; other pairs are ties."""
    size = 1 + max(max(pair) for pair in upper)
    preference = np.full((1, size, size), 0.5)
    for (i, j), p in upper.items():
        preference[0, i, j], preference[0, j, i] = p, 1 - p
    return preference


ROCK_PAPER_SCISSORS = _antisymmetric({(0, 1): 0.0, (1, 2): 0.0, (2, 0): 0.0})


def _win_probability(a, b):
    """P(a draw of die a is above a draw of die b), by enumeration."""
    pairs = list(itertools.product(a, b))
    return sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs)


def _random_game(rng, size):
    upper = {
        pair: float(rng.uniform()) for pair in itertools.combinations(range(size), 2)
    }
    return _antisymmetric(upper)


def _utilities(rng, size):
    utility = rng.uniform(size=size)
    return 0.5 + 0.5 * (utility[:, None] - utility[None, :])[None]


def test_rock_paper_scissors_is_all_cycle():
    found = cyclicity.measure(ROCK_PAPER_SCISSORS)
    assert (found.num_triples, found.num_cyclic_triples) == (1, 1)
    assert found.cyclic_share == found.cyclic_prompt_share == 1
    assert found.no_winner_share == 1
    assert found.cyclic_energy_share == pytest.approx(1, abs=1e-12)
    # Equal rewards are the best fit: every pair is called a tie, off by one half.
    assert found.bradley_terry_error == pytest.approx(0.5, abs=1e-12)
    assert found.bradley_terry_wrong_share == 1


def test_linear_utilities_have_no_cycle():
    rng = np.random.default_rng(0)
    found = cyclicity.measure(np.concatenate([_utilities(rng, 6) for _ in range(5)]))
    assert found.num_triples == found.num_strict_triples == 5 * 20
    assert found.num_cyclic_triples == 0 and found.no_winner_share == 0
    assert found.cyclic_energy_share == pytest.approx(0, abs=1e-12)
    # The best reward ranks them rightly, though P is not of Bradley-Terry form.
    assert found.bradley_terry_wrong_share == 0 < found.bradley_terry_error


def test_bradley_terry_games_are_fitted_exactly():
    rng = np.random.default_rng(1)
    score_BN = rng.normal(size=(4, 5))
    score_BN -= score_BN.mean(axis=1, keepdims=True)
    odds_BNN = np.exp(score_BN[:, :, None] - score_BN[:, None, :])
    game_BNN = odds_BNN / (1 + odds_BNN)
    fitted_BN = cyclicity.fit_bradley_terry(game_BNN, ridge=0.0)
    np.testing.assert_allclose(fitted_BN, score_BN, atol=1e-12)
    found = cyclicity.measure(game_BNN)
    assert found.num_cyclic_triples == 0 and found.bradley_terry_error < 1e-6


def test_non_transitive_dice():
    # Munos et al. (2024), Appendix C.1: each die beats the next with 5/9.
    dice = [(2, 4, 9), (1, 6, 8), (3, 5, 7)]
    game = np.array([[[_win_probability(a, b) for b in dice] for a in dice]])
    assert game[0, 0, 1] == game[0, 1, 2] == game[0, 2, 0] == 5 / 9
    found = cyclicity.measure(game)
    assert found.cyclic_share == 1
    assert found.cyclic_energy_share == pytest.approx(1, abs=1e-12)
    assert found.bradley_terry_error == pytest.approx(5 / 9 - 1 / 2, abs=1e-12)


def test_transitive_raters_with_a_cyclic_population():
    # Munos et al. (2024), Appendix C.2: three raters score three responses.
    scores = np.array([(2, 4, 9), (1, 6, 8), (3, 5, 7)])
    raters = (scores[:, None, :] > scores[None, :, :]).astype(float)
    raters += 0.5 * (scores[:, None, :] == scores[None, :, :])
    each = cyclicity.measure(np.moveaxis(raters, -1, 0))
    assert each.num_cyclic_triples == 0 and each.no_winner_share == 0
    population = raters.mean(axis=-1)[None]
    np.testing.assert_allclose(population[0, [0, 1, 2], [1, 2, 0]], 2 / 3, atol=1e-15)
    found = cyclicity.measure(population)
    assert found.cyclic_share == 1
    assert found.bradley_terry_error == pytest.approx(1 / 6, abs=1e-12)


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_three_types_of_people(shift):
    # Munos et al. (2024), Section 3.2, with group sizes 1/3 - e, 1/3 + e/2, 1/3 + e/2.
    e = shift
    game = _antisymmetric(
        {(1, 0): 2 / 3 - e / 2, (2, 0): 1 / 3 - e / 4, (2, 1): 2 / 3 + e / 4}
    )
    assert cyclicity.measure(game).cyclic_share == 1
    fitted = cyclicity.fit_bradley_terry(game, ridge=0.0)[0]
    # The fit matches each response's mean win rate: that is its first-order condition.
    model = 1 / (1 + np.exp(fitted[None, :] - fitted[:, None]))
    np.testing.assert_allclose(model.sum(axis=1), game[0].sum(axis=1), atol=1e-12)
    assert np.argmax(fitted) == (0 if e > 0 else 1)


def test_fit_is_stationary_on_random_and_deterministic_games():
    rng = np.random.default_rng(2)
    games = np.concatenate([_random_game(rng, 6) for _ in range(8)])
    decided = np.where(games == 0.5, 0.5, games.round())
    order = np.concatenate([decided, games])
    chain = np.triu(np.ones((6, 6)), 1)[None] + 0.5 * np.eye(6)[None]
    ridge = 1e-6
    for game_BNN in (order, chain):
        score_BN = cyclicity.fit_bradley_terry(game_BNN, ridge=ridge)
        model_BNN = 1 / (1 + np.exp(score_BN[:, None, :] - score_BN[:, :, None]))
        slope_BN = (game_BNN - model_BNN).sum(axis=2) - ridge * score_BN
        np.testing.assert_allclose(slope_BN, 0, atol=1e-12)


def test_a_strict_order_is_a_reward():
    chain = np.triu(np.ones((6, 6)), 1)[None] + 0.5 * np.eye(6)[None]
    found = cyclicity.measure(chain)
    assert found.bradley_terry_error < 1e-3
    assert found.bradley_terry_wrong_share == found.num_cyclic_triples == 0


def test_triples_against_enumeration():
    rng = np.random.default_rng(3)
    # Thirds make ties frequent.
    upper = {
        pair: float(rng.choice([0, 1 / 2, 1]))
        for pair in itertools.combinations(range(7), 2)
    }
    game = _antisymmetric(upper)
    strict = cyclic = 0
    for i, j, k in itertools.combinations(range(7), 3):
        margins = np.array([game[0, i, j], game[0, j, k], game[0, k, i]]) - 0.5
        strict += (margins != 0).all()
        cyclic += (margins > 0).all() or (margins < 0).all()
    found = cyclicity.measure(game)
    assert 0 < cyclic < strict < 35
    assert (found.num_strict_triples, found.num_cyclic_triples) == (strict, cyclic)


def test_a_tie_breaks_a_cycle_and_rounding_does_not_make_one():
    game = _antisymmetric({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 0.5 + 5e-17 + 2e-16})
    found = cyclicity.measure(game)
    assert found.num_cyclic_triples == found.num_strict_triples == 0


def test_energy_mixes_by_squares():
    # Orthogonal parts: scores (a, 0, -a) and a cycle of strength c.
    a, c = 0.1, 0.05
    game = _antisymmetric({(0, 1): 0.5 + a + c, (1, 2): 0.5 + a + c})
    game += _antisymmetric({(0, 2): 0.5 + 2 * a - c}) - 0.5
    expected = 3 * c**2 / (3 * c**2 + (1 + 1 + 4) * a**2)
    found = cyclicity.cyclic_energy_share(game)
    assert found == pytest.approx(expected, abs=1e-12)


def test_all_ties_and_two_candidates():
    ties = cyclicity.measure(np.full((2, 4, 4), 0.5))
    assert ties.cyclic_energy_share == ties.bradley_terry_wrong_share == 0
    assert ties.bradley_terry_error == pytest.approx(0, abs=1e-12)
    pair = cyclicity.measure(_antisymmetric({(0, 1): 0.7}))
    assert pair.num_triples == 0 and pair.cyclic_share == 0
    assert pair.bradley_terry_error < 1e-5


def test_measure_survives_json():
    found = cyclicity.measure(ROCK_PAPER_SCISSORS)
    text = json.dumps(dataclasses.asdict(found))
    assert cyclicity.Cyclicity(**json.loads(text)) == found


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (np.full((1, 3, 3), 0.6), "must be 1"),
        (np.full((1, 3, 3), np.nan), r"in \[0, 1\]"),
        (np.full((1, 1, 1), 0.5), "two candidates"),
        (np.full((0, 3, 3), 0.5), "at least one prompt"),
    ],
)
def test_what_is_no_preference_is_refused(matrices, message):
    with pytest.raises(UserError, match=message):
        cyclicity.measure(matrices)


@pytest.mark.parametrize(("p_fourth", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_no_winner_means_that_everyone_loses_to_someone(p_fourth, share):
    # A fourth candidate below (above) all three of a cycle.
    cycle = {(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0}
    fourth = {(3, other): p_fourth for other in range(3)}
    assert cyclicity.measure(_antisymmetric(cycle | fourth)).no_winner_share == share
