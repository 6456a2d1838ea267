# SPDX-License-Identifier: Apache-2.0
"""Equilibria by linear programs, rankings and cycles, on games with known answers."""

import itertools
import math

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.games import (
    catalogue,
    cycles,
    matrices,
    nash,
    published,
    rankings,
    solutions,
)

EXACT = 1e-12
# Linear programs are solved to 1e-10; what they leave moves weights by a little more.
SOLVED = 1e-8


def with_copy(game):
    """The game with its last action once more: a tie between the two."""
    order = [*range(len(game)), len(game) - 1]
    return game[np.ix_(order, order)]


@pytest.mark.parametrize(
    "margins", [(0.5, 0.5, 0.5), (0.2, 0.1, 0.3), (0.01, 0.4, 0.2)]
)
def test_a_cycle_is_solved_by_the_opposite_margins(margins):
    first, second, third = margins
    expected = np.array([second, third, first]) / sum(margins)
    found = nash.solve_nash(matrices.cyclic(*margins))
    assert found.is_unique
    np.testing.assert_allclose(found.policy_N, expected, rtol=0, atol=SOLVED)


@pytest.mark.parametrize("epsilon", [-0.2, 0.0, 0.1])
def test_three_types_of_people_have_the_published_equilibrium(epsilon):
    expected = [1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2, 1 / 3 - epsilon]
    found = nash.nash(matrices.three_types(epsilon))
    np.testing.assert_allclose(found, expected, rtol=0, atol=SOLVED)


@pytest.mark.parametrize("name", ["munos_palm", "munos_own"])
def test_one_policy_of_the_paper_beats_all_others(name):
    table = catalogue.find_game(name)
    found = nash.solve_nash(table.preference_NN)
    assert found.is_unique
    assert table.names[int(found.policy_N.argmax())] == "MD1"
    assert found.policy_N.max() == pytest.approx(1.0, abs=SOLVED)
    assert table.names[rankings.condorcet_winner(table.preference_NN)] == "MD1"


def test_random_games_are_solved():
    for seed in range(10):
        game = matrices.random_game(np.random.default_rng(seed), 7)
        found = nash.solve_nash(game)
        assert solutions.exploitability(game, found.policy_N) < SOLVED
        assert found.is_unique


def test_copies_share_their_weight():
    found = nash.solve_nash(with_copy(matrices.skew()))
    assert not found.is_unique
    # (1/6, 1/2, 1/3) before the third action was copied.
    np.testing.assert_allclose(found.policy_N, [1 / 6, 1 / 2, 1 / 6, 1 / 6], atol=1e-7)


def test_of_several_equilibria_the_one_of_largest_entropy_is_taken():
    # Two rock-paper-scissors that tie with each other: any mixture is an equilibrium.
    game = np.full((6, 6), 0.5)
    game[:3, :3] = game[3:, 3:] = matrices.rock_paper_scissors()
    found = nash.solve_nash(game)
    assert not found.is_unique
    np.testing.assert_allclose(found.policy_N, np.full(6, 1 / 6), rtol=0, atol=1e-7)
    # So does regularisation to the uniform policy as it vanishes.
    limit = solutions.regularised_nash(game, np.full(6, 1 / 6), 1e-3)
    np.testing.assert_allclose(found.policy_N, limit, rtol=0, atol=1e-6)


def test_losing_actions_bound_the_largest_entropy():
    # Actions 0 to 2 tie; 3 loses to 0 and 1, and beats 2.
    game = np.full((4, 4), 0.5)
    for winner, margin in ((0, 0.1), (1, 0.1), (2, -0.1)):
        game[winner, 3], game[3, winner] = 0.5 + margin, 0.5 - margin
    found = nash.solve_nash(game)
    # 3 must not win: 0.1 p2 <= 0.1 (p0 + p1), which uniform weights on 0 to 2 satisfy.
    np.testing.assert_allclose(found.policy_N, [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)
    game[2, 3], game[3, 2] = 0.0, 1.0
    # Now 0.5 p2 <= 0.1 (p0 + p1) binds: p2 = 1/6.
    found = nash.solve_nash(game)
    np.testing.assert_allclose(
        found.policy_N, [5 / 12, 5 / 12, 1 / 6, 0], rtol=0, atol=1e-6
    )


# ------------------------------------------------------------------- rankings


def test_elo_is_the_score_of_bradley_terry_preferences():
    reward = np.array([0.3, -0.4, 1.2, 0.0])
    ratings = rankings.elo(matrices.bradley_terry(reward))
    points = 400 / math.log(10) * (reward - reward.mean())
    # The fit's ridge of 1e-6 moves a score by about as much.
    np.testing.assert_allclose(ratings, points, rtol=0, atol=1e-2)
    ten_to_one = matrices.bradley_terry(np.array([math.log(10), 0.0]))
    assert np.ptp(rankings.elo(ten_to_one)) == pytest.approx(400, abs=1e-2)


# Scores with the first at 0 of fits to the game `skew`, pairs drawn from a policy;
# computed independently (Newton, float64).
SAMPLED_FITS = {
    (1 / 3, 1 / 3, 1 / 3): (0.0, 0.0, 0.40546510810816),
    (0.6, 0.3, 0.1): (0.0, -0.58306406, 0.51217596),
    (0.1, 0.3, 0.6): (0.0, 0.65506043, 0.49347638),
}


@pytest.mark.parametrize("policy", SAMPLED_FITS)
def test_elo_depends_on_who_is_compared(policy):
    ratings = rankings.elo(matrices.skew(), np.array(policy)) / rankings.ELO_SCALE
    expected = SAMPLED_FITS[policy]
    np.testing.assert_allclose(ratings - ratings[0], expected, rtol=0, atol=1e-4)


def test_nash_averaging_is_blind_to_copies_and_elo_is_not():
    game = matrices.skew()
    copied = with_copy(game)
    alone, more = (rankings.nash_averaging(one) for one in (game, copied))
    np.testing.assert_allclose(more.skill_N[:3], alone.skill_N, rtol=0, atol=1e-7)
    assert abs(np.diff(rankings.elo(copied)[:3] - rankings.elo(game))).max() > 1


def test_alpha_rank_of_two_actions_is_the_ratio_of_their_rates():
    p, alpha, m = 0.6, 2.0, 10
    u = alpha * (2 * p - 1)

    def takes_over(u):
        return (1 - math.exp(-u)) / (1 - math.exp(-m * u))

    weight = rankings.alpha_rank(
        np.array([[0.5, p], [1 - p, 0.5]]), alpha=alpha, population_size=m
    )
    # Detailed balance of a chain with two states.
    ratio = takes_over(u) / takes_over(-u)
    assert weight[0] / weight[1] == pytest.approx(ratio, rel=EXACT)


def test_alpha_rank_is_stationary():
    game, alpha, m = matrices.random_game(np.random.default_rng(3), 5), 3.0, 6
    weight = rankings.alpha_rank(game, alpha=alpha, population_size=m)
    chain = np.zeros((5, 5))
    for s, r in itertools.permutations(range(5), 2):
        u = alpha * (game[r, s] - game[s, r])
        chain[s, r] = (1 - math.exp(-u)) / (1 - math.exp(-m * u)) / 4
    chain += np.diag(1 - chain.sum(axis=1))
    np.testing.assert_allclose(weight @ chain, weight, rtol=0, atol=EXACT)
    assert weight.sum() == pytest.approx(1, abs=EXACT)


def test_alpha_rank_of_cycles_ties_and_extremes():
    for game in (matrices.rock_paper_scissors(), np.full((4, 4), 0.5)):
        weight = rankings.alpha_rank(game)
        np.testing.assert_allclose(weight, 1 / len(game), rtol=0, atol=EXACT)
    # Where selection is strong the winner of all has all, though most rates are then
    # below the smallest positive number.
    for alpha in (200.0, 1000.0):
        game = catalogue.find_game("munos_palm").preference_NN
        strong = rankings.alpha_rank(game, alpha=alpha)
        assert strong[published.POLICIES.index("MD1")] == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(UserError, match="alpha must be in"):
        rankings.alpha_rank(matrices.skew(), alpha=0.0)


def test_nobody_beats_all_others_in_a_cycle():
    assert rankings.condorcet_winner(matrices.skew()) is None
    assert rankings.condorcet_winner(np.full((2, 2), 0.5)) is None
    assert (
        rankings.condorcet_winner(matrices.bradley_terry(np.array([0.0, 2.0, 1.0])))
        == 1
    )


def test_mean_win_rates_leave_the_action_itself_out():
    found = rankings.mean_win_rate(matrices.skew())
    np.testing.assert_allclose(found, [0.45, 0.45, 0.6], rtol=0, atol=EXACT)


# ------------------------------------------------------------------- cycles


def test_the_strongest_cycles_come_first_and_once():
    game = np.full((4, 4), 0.5)
    for i, j, margin in (
        (0, 1, 0.3),
        (1, 2, 0.2),
        (2, 0, 0.4),
        (2, 3, 0.1),
        (3, 1, 0.1),
    ):
        game[i, j], game[j, i] = 0.5 + margin, 0.5 - margin
    assert cycles.strongest_cycles(game, 5) == [(0, 1, 2), (1, 2, 3)]
    assert cycles.strongest_cycles(game, 1) == [(0, 1, 2)]
    reward = np.random.default_rng(0).normal(size=6)
    assert cycles.strongest_cycles(matrices.bradley_terry(reward), 5) == []


def test_cycles_are_those_of_a_plain_loop():
    game = matrices.random_game(np.random.default_rng(1), 7)
    expected = {
        cycle
        for cycle in itertools.permutations(range(7), 3)
        if cycle[0] == min(cycle)
        and all(
            game[a, b] > 0.5 for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)
        )
    }
    found = cycles.strongest_cycles(game, 1000)
    assert set(found) == expected
    assert len(found) == int(cycles.count_triples(game[None])[1][0]) > 3


def test_bradley_terry_preferences_have_cyclic_margins_but_no_cycles():
    # Their log-odds are differences of scores, their probabilities are not.
    game = matrices.bradley_terry(np.array([0.0, 2.0, 4.0]))
    assert cycles.cyclic_energy_share(game[None]) > 1e-3
    assert cycles.count_triples(game[None])[1][0] == 0


# ------------------------------------------------------------------- hard games


def test_an_action_of_tiny_weight_is_not_lost():
    # The equilibrium is the opposite margins, normalised: its second weight is 4e-6.
    margins = (0.5, 0.5, 4e-6)
    found = nash.solve_nash(matrices.cyclic(*margins))
    expected = np.array([0.5, 4e-6, 0.5]) / (1 + 4e-6)
    np.testing.assert_allclose(found.policy_N, expected, rtol=0, atol=1e-9)


def test_margins_of_very_different_sizes_are_solved():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        sizes = rng.choice([1e-6, 1e-3, 0.5], size=(6, 6))
        upper = np.triu(sizes * rng.choice([-1, 1], size=(6, 6)), 1)
        game = 0.5 + upper - upper.T
        found = nash.solve_nash(game)
        assert solutions.exploitability(game, found.policy_N) < 1e-7, seed


def test_nearly_flat_games_are_solved_like_steep_ones():
    steep = matrices.random_game(np.random.default_rng(0), 5)
    flat = 0.5 + 1e-7 * (steep - 0.5)
    np.testing.assert_allclose(nash.nash(flat), nash.nash(steep), rtol=0, atol=1e-6)


def test_a_tau_too_small_to_solve_is_refused_and_never_missed():
    game, uniform = matrices.random_game(np.random.default_rng(1), 8), np.full(8, 1 / 8)
    for tau in (1e-300, 1e-8, 1e-7, 1e-5, 1e-3, 0.1, 1.0):
        try:
            policy = solutions.regularised_nash(game, uniform, float(tau))
        except UserError as error:
            assert "too small" in str(error)
            assert tau < 1e-4
            continue
        assert solutions.regularised_gap(game, uniform, tau, policy) < 1e-9
