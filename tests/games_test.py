# SPDX-License-Identifier: Apache-2.0
"""Games: closed forms, the fixed point, one-step inequalities and published vectors."""

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.games import matrices, solutions

EXACT = 1e-12
UNIFORM = np.ones(3) / 3
SKEWED = np.array([0.5, 0.3, 0.2])
START = np.array([0.6, 0.3, 0.1])


@pytest.mark.parametrize(
    "bad, said",
    [
        (np.full((2, 3), 0.5), "square"),
        (np.array([[0.5, 1.2], [-0.2, 0.5]]), r"P\[0, 1\] must be in \[0, 1\]"),
        (np.array([[0.5, np.nan], [0.5, 0.5]]), r"P\[0, 1\].*nan"),
        (np.array([[0.5, 0.7], [0.4, 0.5]]), r"P\[0, 1\] \+ P\[1, 0\] must be 1"),
    ],
)
def test_a_matrix_that_is_no_preference_is_refused_by_entry(bad, said):
    with pytest.raises(UserError, match=said):
        matrices.check_preference_matrix(bad)


def test_every_named_game_is_a_preference_matrix():
    rng = np.random.default_rng(0)
    for game in (
        matrices.rock_paper_scissors(),
        matrices.skew(),
        matrices.linear_utility(np.array([0.0, 0.4, 0.9])),
        matrices.bradley_terry(rng.normal(size=4)),
        matrices.random_game(rng, 5),
    ):
        assert (matrices.check_preference_matrix(game) == game).all()


def test_utilities_more_than_one_apart_are_refused():
    with pytest.raises(UserError, match="must be in"):
        matrices.linear_utility(np.array([0.0, 1.5]))


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.05])
def test_two_actions_have_the_logistic_equilibrium(tau):
    reference, p = np.array([0.3, 0.7]), 0.8
    nash = solutions.regularised_nash(
        np.array([[0.5, p], [1 - p, 0.5]]), reference, tau
    )
    # logit pi = logit mu + (p - 1/2) / tau
    logit = np.log(reference[0] / reference[1]) + (p - 0.5) / tau
    assert abs(nash[0] - 1 / (1 + np.exp(-logit))) < EXACT


def test_linear_utilities_have_the_gibbs_equilibrium():
    utility, tau = np.array([0.1, 0.9, 0.4]), 0.07
    nash = solutions.regularised_nash(matrices.linear_utility(utility), SKEWED, tau)
    gibbs = solutions.normalise(np.log(SKEWED) + utility / (2 * tau))
    np.testing.assert_allclose(nash, gibbs, atol=EXACT)


def test_rock_paper_scissors_stays_uniform():
    game = matrices.rock_paper_scissors()
    nash = solutions.regularised_nash(game, UNIFORM, 0.05)
    np.testing.assert_allclose(nash, UNIFORM, atol=EXACT)
    assert abs(solutions.exploitability(game, nash)) < EXACT


# An independent computation's twelve printed decimals (numpy, Newton, float64).
@pytest.mark.parametrize(
    "tau, known",
    [
        (0.1, (0.294436845843, 0.289760512297, 0.415802641861)),
        (0.05, (0.212115509933, 0.366426723096, 0.421457766971)),
        (0.008, (0.168075783824, 0.477848166955, 0.354076049221)),
    ],
)
def test_the_skew_game_has_its_known_equilibrium(tau, known):
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, tau)
    np.testing.assert_allclose(nash, known, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_equilibrium_is_its_own_best_response_and_has_no_gap(seed):
    rng = np.random.default_rng(seed)
    game, reference = matrices.random_game(rng, 6), rng.dirichlet(np.ones(6))
    nash = solutions.regularised_nash(game, reference, 0.05)
    answer = solutions.best_response(game, reference, 0.05, nash)
    np.testing.assert_allclose(answer, nash, atol=1e-13)
    assert abs(solutions.regularised_gap(game, reference, 0.05, nash)) < 1e-13


def test_the_gap_is_what_the_best_response_wins():
    game, tau, policy = matrices.skew(), 0.1, START
    answer = solutions.best_response(game, SKEWED, tau, policy)
    won = answer @ game @ policy - tau * solutions.kl(answer, SKEWED)
    won += tau * solutions.kl(policy, SKEWED) - 0.5
    gap = solutions.regularised_gap(game, SKEWED, tau, policy)
    assert abs(gap - won) < EXACT
    rng = np.random.default_rng(0)
    for other in rng.dirichlet(np.ones(3), size=100):
        value = other @ game @ policy - tau * solutions.kl(other, SKEWED)
        assert value + tau * solutions.kl(policy, SKEWED) - 0.5 <= gap + EXACT


def nash_md(game, reference, tau, policy, steps):
    """Yields Nash-MD iterates with step sizes 2 / (tau (t + 2))."""
    for t in range(steps):
        size = 2 / (tau * (t + 2))
        opponent = solutions.geometric_mixture(policy, reference, size * tau)
        policy = solutions.mirror_step(game, reference, tau, size, policy, opponent)
        yield size, policy


def test_nash_md_forgets_its_start_in_the_first_step():
    game = matrices.skew()
    for start in (START, UNIFORM):
        _, first = next(nash_md(game, SKEWED, 0.1, start, 1))
        answer = solutions.best_response(game, SKEWED, 0.1, SKEWED)
        np.testing.assert_allclose(first, answer, atol=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_nash_md_obeys_its_theorem_with_the_sharper_constant(seed):
    # KL(pi*, pi_{t+1}) <= (1 - eta tau) KL(pi*, pi_t) + eta^2 / 8 (Hoeffding's lemma
    # in place of the paper's 2 eta^2), hence KL <= 1 / (2 tau^2 (t + 1)).
    rng, tau = np.random.default_rng(seed), 0.1
    game, reference = matrices.random_game(rng, 4), rng.dirichlet(np.ones(4))
    nash = solutions.regularised_nash(game, reference, tau)
    before = solutions.kl(nash, reference)
    for t, (size, policy) in enumerate(nash_md(game, reference, tau, reference, 300)):
        after = solutions.kl(nash, policy)
        assert after <= (1 - size * tau) * before + size**2 / 8 + EXACT
        assert after <= 1 / (2 * tau**2 * (t + 2))
        before = after


def test_nash_md_on_linear_utilities_shrinks_by_exactly_one_minus_eta_tau():
    utility, tau, size = np.array([0.1, 0.9, 0.4]), 0.1, 2.0
    game = matrices.linear_utility(utility)
    nash = solutions.regularised_nash(game, SKEWED, tau)

    def distance(policy):
        ratio = np.log(policy / nash)
        return ratio - ratio.mean()

    opponent = solutions.geometric_mixture(START, SKEWED, size * tau)
    after = solutions.mirror_step(game, SKEWED, tau, size, START, opponent)
    np.testing.assert_allclose(
        distance(after), (1 - size * tau) * distance(START), atol=EXACT
    )


def test_a_fixed_beta_stops_at_the_nash_of_another_temperature():
    game, tau, beta, size = matrices.skew(), 0.1, 0.25, 2.5
    policy = START
    for _ in range(500):
        opponent = solutions.geometric_mixture(policy, SKEWED, size * tau)
        policy = solutions.mirror_step(game, SKEWED, tau, size, policy, opponent)
    mixture = solutions.geometric_mixture(policy, SKEWED, beta)
    other = solutions.regularised_nash(game, SKEWED, tau / (1 - beta))
    np.testing.assert_allclose(mixture, other, atol=1e-10)
    assert solutions.regularised_gap(game, SKEWED, tau, policy) > 1e-3


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_tau_must_be_above_zero(tau):
    with pytest.raises(UserError, match="tau must be in"):
        solutions.regularised_nash(matrices.skew(), UNIFORM, tau)


def test_a_reference_with_a_zero_is_refused():
    with pytest.raises(UserError, match="above 0 everywhere"):
        solutions.regularised_nash(matrices.skew(), np.array([0.5, 0.5, 0.0]), 0.1)
