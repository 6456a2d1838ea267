# SPDX-License-Identifier: Apache-2.0
"""What holds in every game of preferences, whatever its numbers (docs/math.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.games import matrices, solutions, solvers

EXACT = 1e-12
TAU = 0.1
SKEWED = np.array([0.5, 0.3, 0.2])
START = np.array([0.6, 0.3, 0.1])
DICE = matrices.cyclic(1 / 18, 1 / 18, 1 / 18)
each_seed = pytest.mark.parametrize("seed", range(4))


@pytest.fixture(autouse=True)
def _exact(float64):
    """Everything here is float64 mathematics."""


def random_parts(seed, size=5):
    rng = np.random.default_rng(seed)
    return matrices.random_game(rng, size), *rng.dirichlet(np.ones(size), size=3)


def regularised_preference(game, reference, tau, first, second):
    """P(first > second) - tau KL(first, mu) + tau KL(second, mu)."""
    paid = solutions.kl(first, reference) - solutions.kl(second, reference)
    return first @ game @ second - tau * paid


@each_seed
def test_preferences_of_policies_are_antisymmetric(seed):
    game, reference, first, second = random_parts(seed)
    for tau in (0.0, TAU):
        parts = (game, reference, tau)
        there = regularised_preference(*parts, first, second)
        back = regularised_preference(*parts, second, first)
        assert abs(there + back - 1) < EXACT
        assert abs(regularised_preference(*parts, first, first) - 0.5) < EXACT


@each_seed
def test_at_the_equilibrium_the_worst_opponent_makes_it_even(seed):
    # F(pi) = min over pi' of P(pi > pi') + tau KL(pi', mu) - tau KL(pi, mu) is 1/2 less
    # the gap; the minimum is at mu exp(-P(pi > .) / tau).
    game, reference, policy, _ = random_parts(seed)

    def worst(policy):
        value = policy @ game
        answer = solutions.normalise(np.log(reference) - value / TAU)
        return regularised_preference(game, reference, TAU, policy, answer)

    nash = solutions.regularised_nash(game, reference, TAU)
    assert abs(worst(nash) - 0.5) < EXACT
    gap = solutions.regularised_gap(game, reference, TAU, policy)
    assert abs(worst(policy) - (0.5 - gap)) < EXACT
    assert gap > 1e-4


@pytest.mark.parametrize("tau", [10.0, 1.0, 0.1, 0.01])
def test_dice_stay_uniform_for_every_tau(tau):
    uniform = np.ones(3) / 3
    game = solvers.make_game(DICE, uniform, tau)
    nash = solutions.regularised_nash(DICE, uniform, tau)
    np.testing.assert_allclose(nash, uniform, rtol=0, atol=EXACT)
    found = solvers.solve("nash_mp", game, START, num_steps=int(60 / min(tau, 1)))
    np.testing.assert_allclose(found[-1], uniform, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["self_play", "nash_md", "best_response", "egpo"])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.05])
def test_of_two_actions_every_opponent_says_the_same(method, tau):
    # P12 = .7: P(1 > .) - P(2 > .) = .2 whoever plays, so logit pi = .2 / tau.
    matrix = np.array([[0.5, 0.7], [0.3, 0.5]])
    game = solvers.make_game(matrix, np.array([0.5, 0.5]), tau)
    size = 0.5 / tau
    found = solvers.solve(
        method, game, np.array([0.2, 0.8]), step_size=size, num_steps=80
    )
    known = 1 / (1 + np.exp(-0.2 / tau))
    np.testing.assert_allclose(found[-1], [known, 1 - known], rtol=0, atol=EXACT)


def test_large_tau_is_the_reference_and_small_tau_the_bare_equilibrium():
    taus = np.array([1e3, 1e4, 1e5])
    far = [solutions.regularised_nash(matrices.skew(), SKEWED, tau) for tau in taus]
    moved = [np.abs(policy - SKEWED).max() for policy in far]
    # Ten times the tau, a tenth of the way from the reference.
    np.testing.assert_allclose(np.array(moved[:2]) / moved[1:], 10, rtol=1e-3)
    bare = np.array([1 / 6, 1 / 2, 1 / 3])
    near = [
        solutions.regularised_nash(matrices.skew(), SKEWED, tau)
        for tau in (1e-3, 1e-4, 1e-5)
    ]
    missing = np.array([np.abs(policy - bare).max() for policy in near])
    np.testing.assert_allclose(missing[:2] / missing[1:], 10, rtol=5e-2)


@each_seed
def test_nash_md_forgets_its_start_in_the_first_step(seed):
    matrix, reference, first, second = random_parts(seed)
    game = solvers.make_game(matrix, reference, TAU)
    answer = solutions.best_response(matrix, reference, TAU, reference)
    for start in (first, second):
        found = solvers.solve("nash_md", game, start, num_steps=1)[0]
        np.testing.assert_allclose(found, answer, rtol=0, atol=EXACT)


def minimiser(loss, size):
    """Newton's method on a quadratic of log-ratios: one step is exact, two polish."""
    logits = jnp.zeros(size)
    for _ in range(2):
        slope, curvature = jax.grad(loss)(logits), jax.hessian(loss)(logits)
        # Logits are free up to a constant.
        step = jnp.linalg.lstsq(curvature, slope)[0]
        logits = logits - step
    return np.asarray(jax.nn.softmax(logits))


def distance_to_last(logits, policy, reference, eta):
    """h_t of INPO: log pi - tau/eta log mu - (1 - tau/eta) log pi_t, over pairs."""
    weight = TAU / eta
    ratio_N = logits - weight * np.log(reference) - (1 - weight) * np.log(policy)
    return ratio_N[:, None] - ratio_N[None, :]


@each_seed
def test_the_exact_minimiser_of_inpo_is_the_step_against_its_pairs(seed):
    matrix, reference, policy, others = random_parts(seed)
    eta, game = 0.8, solvers.make_game(matrix, reference, TAU)

    def loss(pairs):
        def of_logits(logits):
            h_NN = distance_to_last(logits, policy, reference, eta)
            half = 1 / (2 * eta)  # the winner's pair is (w, l): its label is +
            square_NN = matrix * (h_NN - half) ** 2 + (1 - matrix) * (h_NN + half) ** 2
            return jnp.sum(pairs[:, None] * pairs[None, :] * square_NN)

        return of_logits

    own = solvers.solve("inpo", game, policy, step_size=1 / eta, num_steps=1)[0]
    np.testing.assert_allclose(minimiser(loss(policy), 5), own, rtol=0, atol=1e-11)
    against = solutions.mirror_step(matrix, reference, TAU, 1 / eta, policy, others)
    np.testing.assert_allclose(minimiser(loss(others), 5), against, rtol=0, atol=1e-11)
    assert np.abs(against - own).max() > 1e-3


@each_seed
def test_with_a_third_sample_the_pairs_may_come_from_anywhere(seed):
    # The label of (y, y') is P(y > z) - P(y' > z) with z from the policy.
    matrix, reference, policy, others = random_parts(seed)
    eta, game = 0.8, solvers.make_game(matrix, reference, TAU)
    value = matrix @ policy / eta

    def loss(logits):
        h_NN = distance_to_last(logits, policy, reference, eta)
        square_NN = (h_NN - (value[:, None] - value[None, :])) ** 2
        return jnp.sum(others[:, None] * others[None, :] * square_NN)

    own = solvers.solve("inpo", game, policy, step_size=1 / eta, num_steps=1)[0]
    np.testing.assert_allclose(minimiser(loss, 5), own, rtol=0, atol=1e-11)


@each_seed
def test_win_rates_within_a_group_average_to_a_half(seed):
    matrix, *_ = random_parts(seed)
    drawn = np.random.default_rng(seed).integers(0, 5, size=7)
    among = matrix[np.ix_(drawn, drawn)]
    rates = (among.sum(axis=1) - 0.5) / 6  # itself left out
    assert abs(rates.mean() - 0.5) < EXACT
    # So a baseline of the others' mean needs no learning: K / (K - 1) (r - 1/2).
    others = (rates.sum() - rates) / 6
    np.testing.assert_allclose(rates - others, 7 / 6 * (rates - 0.5), atol=EXACT)
