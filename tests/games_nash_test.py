# SPDX-License-Identifier: Apache-2.0
"""Exact equilibria without regularisation, and the path that leads to them."""

import fractions
import functools
import itertools
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from nlhf_jax.checks import UserError
from nlhf_jax.games import central_path, matrices, nash, solutions

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _exact(float64):
    """Everything here is float64 mathematics."""


def game_of(upper_NN):
    """The game whose margins above the diagonal are those given."""
    upper_NN = np.triu(np.asarray(upper_NN, float), 1)
    return 0.5 + upper_NN - upper_NN.T


def by_linear_program(preference_NN):
    """A policy of largest worst preference, and that preference, by SciPy."""
    size = len(preference_NN)
    found = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=np.hstack([-preference_NN.T, np.ones((size, 1))]),
        b_ub=np.zeros(size),
        A_eq=np.append(np.ones(size), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * size + [(None, None)],
    )
    return found.x[:size], -found.fun


def entropy(policy_N):
    held_N = policy_N[policy_N > 0]
    return -float(held_N @ np.log(held_N))


def check_equilibrium(preference_NN, policy_N, tolerance=EXACT):
    assert (policy_N >= 0).all()
    assert abs(policy_N.sum() - 1) < EXACT
    assert solutions.exploitability(preference_NN, policy_N) <= tolerance


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(
    "margins", [(0.5, 0.5, 0.5), (0.2, 0.1, 0.3), (0.5, 1e-3, 0.02), (1e-6, 0.5, 0.5)]
)
def test_a_cycle_is_solved_to_the_last_digit(margins):
    first, second, third = margins
    found = nash.solve_nash(matrices.cyclic(*margins))
    assert found.is_unique
    known = np.array([second, third, first]) / sum(margins)
    np.testing.assert_allclose(found.policy_N, known, rtol=0, atol=1e-15)


def test_one_action_and_two():
    alone = nash.solve_nash(np.array([[0.5]]))
    assert alone.is_unique and alone.policy_N.tolist() == [1.0]
    better = nash.solve_nash(game_of([[0, 1e-3], [0, 0]]))
    assert better.is_unique and better.policy_N.tolist() == [1.0, 0.0]
    even = nash.solve_nash(np.full((2, 2), 0.5))
    assert not even.is_unique and even.policy_N.tolist() == [0.5, 0.5]


def test_dominated_actions_have_no_weight():
    # Two more, each worse than rock by a little against everybody.
    game = np.full((5, 5), 0.5)
    game[:3, :3] = matrices.rock_paper_scissors()
    for loser, less in ((3, 1e-3), (4, 0.2)):
        game[loser] = np.clip(game[0] - less, 0, 1)
        game[:, loser] = 1 - game[loser]
        game[loser, loser] = 0.5
    found = nash.solve_nash(game)
    assert found.is_unique
    np.testing.assert_allclose(found.policy_N, [1 / 3] * 3 + [0, 0], rtol=0, atol=1e-15)


def test_who_beats_all_others_has_all():
    game = matrices.bradley_terry(np.random.default_rng(0).normal(size=30))
    found = nash.solve_nash(game)
    assert found.is_unique
    assert found.policy_N.tolist() == np.eye(30)[game.mean(axis=1).argmax()].tolist()


def wheel(size):
    """Each of an odd number beats the half that follows it on a circle."""
    ahead_NN = (np.arange(size)[None] - np.arange(size)[:, None]) % size
    return 0.5 + 0.5 * np.sign((size / 2 - ahead_NN) * (ahead_NN > 0))


@pytest.mark.parametrize("size", [3, 5, 51])
def test_a_wheel_is_uniform(size):
    found = nash.solve_nash(wheel(size))
    assert found.is_unique
    np.testing.assert_allclose(found.policy_N, 1 / size, rtol=0, atol=1e-15)


def test_a_blown_up_cycle_multiplies():
    # Every action of a cycle is itself a game: weights are products.
    inner, outer = matrices.skew(), matrices.cyclic(0.4, 0.2, 0.1)
    game = np.kron(outer, np.ones((3, 3)))
    for i in range(3):
        game[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] = inner
    found = nash.solve_nash(game)
    assert found.is_unique
    known = np.kron([2 / 7, 1 / 7, 4 / 7], [1 / 6, 1 / 2, 1 / 3])
    np.testing.assert_allclose(found.policy_N, known, rtol=0, atol=1e-14)


# ------------------------------------------------------------ several equilibria


def test_equilibria_of_largest_entropy_in_closed_form():
    # Rock-paper-scissors beside an action that ties with all: x (1/3, 1/3, 1/3) and
    # 1 - x; entropy is largest with x = 3/4.
    game = np.full((4, 4), 0.5)
    game[:3, :3] = matrices.rock_paper_scissors()
    found = nash.solve_nash(game)
    assert not found.is_unique
    np.testing.assert_allclose(found.policy_N, 0.25, rtol=0, atol=1e-14)
    # With the cycle of margins 1 : 2 : 3: x (1/3, 1/2, 1/6) and 1 - x. The entropy is
    # h(x) + x H, so x / (1 - x) = exp(H).
    game[:3, :3] = matrices.cyclic(0.1, 0.2, 0.3)
    cycle = np.array([1 / 3, 1 / 2, 1 / 6])
    odds = np.exp(entropy(cycle))
    known = np.append(cycle * odds, 1) / (1 + odds)
    found = nash.solve_nash(game)
    assert not found.is_unique
    np.testing.assert_allclose(found.policy_N, known, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lever", [0.5, 0.3, 0.21])
def test_a_bound_that_binds(lever):
    # 0 to 2 tie; 3 loses 0.1 to 0 and to 1, and wins the lever of 2. It must not win:
    # lever p2 <= 0.1 (p0 + p1).
    game = np.full((4, 4), 0.5)
    for winner, margin in ((0, 0.1), (1, 0.1), (2, -lever)):
        game[winner, 3], game[3, winner] = 0.5 + margin, 0.5 - margin
    share = min(1 / 3, 0.1 / (0.1 + lever))
    found = nash.solve_nash(game)
    known = [(1 - share) / 2, (1 - share) / 2, share, 0]
    np.testing.assert_allclose(found.policy_N, known, rtol=0, atol=1e-9)
    check_equilibrium(game, found.policy_N)


@pytest.mark.parametrize("seed", range(20))
def test_no_equilibrium_has_more_entropy(seed):
    # A concave function is largest where no direction to another equilibrium rises:
    # the others' entropy, linearised there, is a linear program over all of them.
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 9))
    game = game_of(rng.integers(-1, 2, size=(size, size)) / 2)
    order = rng.integers(0, size, size=size + 2)
    game = game[np.ix_(order, order)]
    found = nash.solve_nash(game)
    check_equilibrium(game, found.policy_N)
    support = found.policy_N > 0
    slope = np.where(support, -np.log(np.where(support, found.policy_N, 1)) - 1, 0)
    best = linprog(
        -slope,
        A_ub=game - 0.5,
        b_ub=np.zeros(len(game)),
        A_eq=np.ones((1, len(game))),
        b_eq=[1.0],
        bounds=[(0, None if held else 0) for held in support],
    )
    assert -best.fun <= slope @ found.policy_N + 1e-7
    # And none has weight elsewhere.
    for other in np.flatnonzero(~support):
        cost = -np.eye(len(game))[other]
        most = linprog(
            cost,
            A_ub=game - 0.5,
            b_ub=np.zeros(len(game)),
            A_eq=np.ones((1, len(game))),
            b_eq=[1.0],
        )
        assert -most.fun < 1e-7


def test_copies_nearly_alike_are_told_apart():
    # The second copy of rock loses to every action a little more than the first, and
    # to the first: it is dominated, however little that is.
    for less in (1e-3, 1e-7, 1e-9):
        game = np.full((4, 4), 0.5)
        game[:3, :3] = matrices.rock_paper_scissors()
        game[3] = [0.5 - less, *game[0, 1:3] * (1 - less), 0.5]
        game[:, 3] = 1 - game[3]
        found = nash.solve_nash(game)
        assert found.is_unique
        np.testing.assert_allclose(
            found.policy_N, [1 / 3] * 3 + [0], rtol=0, atol=EXACT
        )
    order = [0, 1, 2, 0]
    found = nash.solve_nash(matrices.skew()[np.ix_(order, order)])
    assert not found.is_unique
    np.testing.assert_allclose(
        found.policy_N, [1 / 12, 1 / 2, 1 / 3, 1 / 12], rtol=0, atol=EXACT
    )


# ------------------------------------------------------------------ many games


@pytest.mark.parametrize("size", [5, 6, 20, 50, 101, 200])
def test_random_games_have_scipys_value_and_no_exploitability(size):
    game = matrices.random_game(np.random.default_rng(size), size)
    found = nash.solve_nash(game)
    check_equilibrium(game, found.policy_N, 1e-14)
    known, value = by_linear_program(game)
    assert abs(value - 0.5) < 1e-7
    assert found.is_unique and (found.policy_N > 0).sum() % 2 == 1
    np.testing.assert_allclose(found.policy_N, known, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 7).flatmap(
        lambda size: st.lists(
            st.sampled_from([-4, -2, -1, 0, 0, 1, 2, 4]),
            min_size=size * size,
            max_size=size * size,
        )
    ),
    st.sampled_from([2.0**-20, 2.0**-10, 2.0**-4]),  # so that ties are exact
)
def test_any_table_has_an_equilibrium(entries, scale):
    size = round(len(entries) ** 0.5)
    game = game_of(scale * np.reshape(entries, (size, size)))
    found = nash.solve_nash(game)
    check_equilibrium(game, found.policy_N, 1e-15 + 1e-10 * scale)
    known, _ = by_linear_program(game)
    if found.is_unique:
        np.testing.assert_allclose(found.policy_N, known, rtol=0, atol=1e-6)
    # The order of the actions and the scale of the margins mean nothing.
    order = np.random.default_rng(0).permutation(size)
    turned = nash.solve_nash(game[np.ix_(order, order)])
    assert turned.is_unique == found.is_unique
    np.testing.assert_allclose(turned.policy_N, found.policy_N[order], atol=1e-6)
    halved = nash.solve_nash(0.5 + (game - 0.5) / 2)
    np.testing.assert_allclose(halved.policy_N, found.policy_N, rtol=0, atol=1e-6)


def check_at_once(games):
    """Each game's path ends where numpy's does, at an equilibrium."""
    found = nash.nash_many(games)
    for game, policy in zip(games, found, strict=True):
        check_equilibrium(game, policy, 1e-11)
        margin_NN = nash._margins(game)
        points = (p for p in central_path.follow(margin_NN) if p.gap <= 1e-11)
        # Along several equilibria rounding moves the end more than the gap.
        np.testing.assert_allclose(policy, next(points).policy_N, rtol=0, atol=1e-6)


def test_games_at_once_are_each_alone():
    rng = np.random.default_rng(4)
    games = [matrices.random_game(rng, 4) for _ in range(3)]
    check_at_once(np.stack([*games, np.full((4, 4), 0.5), game_of(np.eye(4, k=1) / 2)]))


@pytest.mark.battery
@pytest.mark.parametrize("size", [1, 40, 220])
def test_games_of_any_size_at_once(size):
    rng = np.random.default_rng(size)
    check_at_once(np.stack([matrices.random_game(rng, size) for _ in range(3)]))


def test_games_at_once_are_checked():
    with pytest.raises(UserError, match=r"matrices \[B, N, N\], got shape \(4, 4\)"):
        nash.nash_many(np.full((4, 4), 0.5))
    with pytest.raises(UserError, match="must be 1, got"):
        nash.nash_many(np.full((2, 3, 3), 0.6))


# ------------------------------------------------- margins of very different size


def by_enumeration(preference_NN):
    """The equilibrium in rational numbers: the odd support whose losses are above 0."""
    margin_NN = (preference_NN - preference_NN.T) / 2
    margin_NN = [
        [fractions.Fraction(float(entry)) for entry in row] for row in margin_NN
    ]
    actions = range(len(margin_NN))
    for size in range(1, len(actions) + 1, 2):
        for support in itertools.combinations(actions, size):
            weights = by_pfaffians(margin_NN, support)
            if weights is None:
                continue
            wins = [sum(map(operator.mul, row, weights)) for row in margin_NN]
            if all(wins[i] < 0 for i in actions if i not in support):
                return np.array([float(weight) for weight in weights])
    raise AssertionError("no equilibrium of strict losses")


def by_pfaffians(margin_NN, support):
    """Null vector of an odd support, by the Pfaffians of all but one; None if none."""
    weights = [fractions.Fraction(0)] * len(margin_NN)
    for place, action in enumerate(support):
        others = support[:place] + support[place + 1 :]
        weights[action] = (-1) ** place * pfaffian(margin_NN, others)
    total = sum(weights)
    if not total:
        return None
    weights = [weight / total for weight in weights]
    return weights if all(weights[i] > 0 for i in support) else None


def pfaffian(margin_NN, actions):
    if not actions:
        return fractions.Fraction(1)
    first, *others = actions
    return sum(
        (-1) ** place
        * margin_NN[first][other]
        * pfaffian(margin_NN, (*others[:place], *others[place + 1 :]))
        for place, other in enumerate(others)
    )


def check_against_enumeration(game):
    known_N, found = by_enumeration(game), nash.solve_nash(game)
    assert found.is_unique
    np.testing.assert_array_equal(found.policy_N > 0, known_N > 0)
    np.testing.assert_allclose(found.policy_N, known_N, rtol=0, atol=1e-9)
    check_equilibrium(game, found.policy_N, 1e-11 * np.abs(game - 0.5).max())


def uneven_games(kind, size, number):
    """Margins over five decades, alike in logarithm, or cubes of normal numbers."""
    rng = np.random.default_rng(size)
    for _ in range(number):
        margin_NN = rng.normal(size=(size, size)) ** 3
        if kind == "decades":
            margin_NN = np.sign(margin_NN) * 10 ** (-5 * rng.random((size, size)))
        yield game_of(margin_NN / np.abs(margin_NN).max() / 2)


UNEVEN = {
    "stops at 1e-4": [
        [0, 0.019795, -0.002679, -5.205e-5],
        [0, 0, -1.6179e-4, 1.594e-4],
        [0, 0, 0, -4.3528e-4],
        [0, 0, 0, 0],
    ],
    "stops at a pure one": [
        [0, 8.4121e-4, 1.3971e-5, 8.616e-4, 1.1534e-4],
        [0, 0, 2.3794e-3, -6.472e-5, 0.11088],
        [0, 0, 0, 0.20541, 3.8798e-4],
        [0, 0, 0, 0, 5.4015e-3],
        [0, 0, 0, 0, 0],
    ],
    "loses by 4e-7 of the largest": [
        [0, -8.9089e-10, 2.2802e-3],
        [0, 0, 4.7617e-9],
        [0, 0, 0],
    ],
}


@pytest.mark.parametrize("name", UNEVEN)
def test_games_on_which_the_path_once_ended_too_early(name):
    check_against_enumeration(game_of(UNEVEN[name]))


@pytest.mark.parametrize("kind", ["decades", "cubes"])
@pytest.mark.parametrize("size", [3, 4, 5])
def test_uneven_margins_have_the_equilibrium_of_enumeration(kind, size):
    for game in uneven_games(kind, size, 60):
        check_against_enumeration(game)


@pytest.mark.parametrize("kind", ["decades", "cubes"])
def test_uneven_games_at_once_keep_the_promise(kind):
    games = np.stack(
        [*uneven_games(kind, 5, 200), game_of(UNEVEN["stops at a pure one"])]
    )
    for game, policy in zip(games, nash.nash_many(games), strict=True):
        check_equilibrium(game, policy, 1e-11 * np.abs(game - 0.5).max() + 1e-16)


def test_games_whose_path_ends_too_early_are_solved_again_or_refused(monkeypatch):
    game = game_of([[0, 0.1], [0, 0]])
    point = central_path.begin(nash._margins(game))
    at_start = point._replace(policy_N=point.policy_N[None])
    monkeypatch.setattr(central_path, "follow_many", lambda _: at_start)
    assert nash.nash_many(game[None]).tolist() == [[1, 0]]
    monkeypatch.setattr(central_path, "follow", lambda _: [point])
    with pytest.raises(UserError, match=r"is not found: an action wins 0\.5 of"):
        nash.solve_nash(game)


# --------------------------------------------------------------------- the path


def margins(seed, size):
    entry_NN = matrices.random_game(np.random.default_rng(seed), size) - 0.5
    return entry_NN / np.abs(entry_NN).max()


def somewhere(seed, size):
    """A point inside, off the central path."""
    margin_NN = margins(seed, size)
    policy_N = np.random.default_rng(seed).dirichlet(np.full(size, 3.0))
    gap = 0.2 + (margin_NN @ policy_N).max()
    slack_N = gap - margin_NN @ policy_N
    return margin_NN, central_path.Point(policy_N, slack_N, gap, policy_N > 0, 1.0)


def solver(margin_NN, point):
    system_NN = np.diag(point.slack_N / point.policy_N) - margin_NN
    return functools.partial(np.linalg.solve, system_NN)


@pytest.mark.parametrize("centring", [0.0, 0.3])
@pytest.mark.parametrize("size", [2, 5, 12])
def test_the_series_is_that_of_the_curve(size, centring):
    # Products of the two series are the curve's up to the terms left out: K of them
    # agree to K powers, so the error falls as u^(K + 1).
    margin_NN, point = somewhere(size, size)
    policies, slacks = central_path.series(
        margin_NN, point, centring, solver(margin_NN, point), 5
    )
    for policy_N, slack_N, falls in zip(policies, slacks, [1, 0, 0, 0, 0], strict=True):
        assert abs(policy_N.sum()) < 1e-12  # docs/math.md (61)
        known_N = -falls * (1 - centring) * point.gap - margin_NN @ policy_N
        np.testing.assert_allclose(slack_N, known_N, rtol=0, atol=EXACT)
    start_N, errors = point.policy_N * point.slack_N, []
    shares = np.array([0.04, 0.02])
    for share in shares:
        power_K = share ** np.arange(1, 6)
        policy_N = point.policy_N + power_K @ np.stack(policies)
        slack_N = point.slack_N + power_K @ np.stack(slacks)
        wanted_N = (1 - share) * start_N + share * centring * point.gap / size
        errors.append(np.abs(policy_N * slack_N - wanted_N).max())
        gap = (1 - share * (1 - centring)) * point.gap
        assert abs(policy_N @ slack_N - gap) < EXACT
    assert errors[0] < 1e-6
    assert np.log2(errors[0] / errors[1]) == pytest.approx(6, abs=0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 30, 101])
def test_every_point_is_inside_and_the_gap_only_falls(size):
    margin_NN = margins(1, size) if size > 1 else np.zeros((1, 1))
    points = [central_path.begin(margin_NN), *central_path.follow(margin_NN)]
    gaps = [point.gap for point in points]
    assert gaps[-1] <= central_path.SOLVED and len(points) < 20
    assert (np.diff(gaps) < 0).all()
    for point in points:
        assert point.policy_N.min() > 0 and point.slack_N.min() > 0
        assert point.policy_N.sum() == pytest.approx(1, abs=EXACT)
        products_N = point.policy_N * point.slack_N
        assert products_N.min() >= 0.99 * central_path.CENTRAL * point.gap / size
        slack_N = point.gap - margin_NN @ point.policy_N
        np.testing.assert_allclose(point.slack_N, slack_N, rtol=0, atol=EXACT)
        assert (margin_NN @ point.policy_N).max() <= point.gap + 1e-15


def test_who_is_played_is_known_long_before_the_end():
    margin_NN = margins(7, 41)
    *_, last = central_path.follow(margin_NN)
    support = nash.nash(margin_NN / 2 + 0.5) > 0
    assert (last.is_played_N == support).all()
    settled = [p for p in central_path.follow(margin_NN) if p.gap < nash.SETTLED]
    assert any((p.is_played_N == support).all() and p.gap > 1e-10 for p in settled)


def test_after_a_short_step_the_next_one_aims_at_the_middle():
    margin_NN, point = somewhere(3, 8)
    factorise = functools.partial(central_path._factorise, margin_NN)
    plain = central_path.advance(margin_NN, point, factorise, 4)
    point = point._replace(share=0.05)
    centred = central_path.advance(margin_NN, point, factorise, 4)

    def spread(point):
        products_N = point.policy_N * point.slack_N
        return products_N.max() / products_N.min()

    assert spread(centred) < spread(plain) / 2
    assert centred.gap == pytest.approx((1 - centred.share / 2) * point.gap, rel=EXACT)


def test_far_off_the_path_the_second_step_comes_back():
    margin_NN, point = somewhere(5, 7)
    policy_N = point.policy_N * np.where(np.arange(7) == 2, 1e-7, 1.0)
    policy_N /= policy_N.sum()
    gap = 0.2 + (margin_NN @ policy_N).max()
    point = point._replace(
        policy_N=policy_N, slack_N=gap - margin_NN @ policy_N, gap=gap
    )
    factorise = functools.partial(central_path._factorise, margin_NN)
    stays = central_path.advance(margin_NN, point, factorise, 4)
    assert stays.share == 0 and not central_path._is_stuck(stays, 1.0)
    back = central_path.advance(margin_NN, stays, factorise, 4)
    assert back.share > 0 and not central_path._is_stuck(back, stays.share)
    products_N = back.policy_N * back.slack_N
    assert products_N.min() > central_path.CENTRAL * products_N.mean()


def test_where_no_step_stays_inside_none_is_taken():
    margin_NN, point = somewhere(4, 6)
    # A wrong direction: the curve is left at once.
    away = central_path.advance(
        margin_NN, point, lambda diagonal_N: lambda right_N: 1e6 * right_N, 4
    )
    assert away.share == 0 and away.gap == point.gap
    assert central_path._is_stuck(away, 0.0)
    np.testing.assert_array_equal(away.slack_N, point.slack_N)
    np.testing.assert_allclose(away.policy_N, point.policy_N, rtol=0, atol=EXACT)


def test_more_terms_where_a_factorisation_costs_more():
    assert central_path.num_terms(100) < central_path.num_terms(1000)


@pytest.mark.parametrize("support", [[0, 1, 2], [0, 1], [2], [0, 1, 2, 3, 4]])
def test_only_the_right_support_is_taken(support):
    # Of skew and two dominated actions the first three are played.
    game = np.full((5, 5), 0.0)
    game[:3, :3] = matrices.skew()
    game[:3, 3:], game[3:, 3:] = 1.0, [[0.5, 0.6], [0.4, 0.5]]
    found = nash._only_one(game - 0.5, np.array(support), 1e-11)
    if support != [0, 1, 2]:
        assert found is None
    else:
        np.testing.assert_allclose(found, [1 / 6, 1 / 2, 1 / 3, 0, 0], atol=1e-15)


def test_ties_that_only_rounding_breaks_are_ties():
    # A cycle and an action that ties with it, with margins of which 1/2 leaves ten
    # digits: 0.5 + 4e-6 is not 4e-6 above 0.5.
    game = np.full((4, 4), 0.5)
    game[:3, :3] = matrices.cyclic(4e-6, 1e-6, 2e-6)
    game = 0.5 + (game - game.T) / 2
    game[0, 3] += 1e-16
    found = nash.solve_nash(game)
    assert not found.is_unique
    cycle = np.array([1, 2, 4]) / 7
    odds = np.exp(entropy(cycle))
    known = np.append(cycle * odds, 1) / (1 + odds)
    np.testing.assert_allclose(found.policy_N, known, rtol=0, atol=1e-8)


def test_a_support_with_a_tie_outside_is_not_called_the_only_one():
    # The fourth ties with the whole cycle: it may be played too.
    game = np.full((4, 4), 0.5)
    game[:3, :3] = matrices.rock_paper_scissors()
    assert nash._only_one(game - 0.5, np.arange(3), 1e-11) is None
