# SPDX-License-Identifier: Apache-2.0
"""Tabular algorithms: published iterates, their rates, and where they fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.games import matrices, solutions, solvers

EXACT = 1e-12
UNIFORM = np.ones(3) / 3
SKEWED = np.array([0.5, 0.3, 0.2])
START = np.array([0.6, 0.3, 0.1])
TAU = 0.1
# Three intransitive dice: each beats the next with probability 5/9.
DICE = matrices.cyclic(1 / 18, 1 / 18, 1 / 18)


@pytest.fixture(autouse=True)
def _exact(float64):
    """Everything here is float64 mathematics."""


def skew(tau=TAU):
    return solvers.make_game(matrices.skew(), SKEWED, tau)


def last(method, game, step_size, num_steps, start=START):
    policies = solvers.solve(
        method, game, start, step_size=step_size, num_steps=num_steps
    )
    return np.asarray(policies[-1])


def test_falling_steps_converge_at_the_second_power():
    # The theorem promises 1 / T; on this game KL falls as 1 / T^2: fit the slope.
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, TAU)
    policies = solvers.solve(
        "nash_md", skew(), START, step_size=solvers.decreasing(TAU), num_steps=4000
    )
    steps = np.array([500, 1000, 2000, 4000])
    distances = [solutions.kl(nash, np.asarray(policies[t - 1])) for t in steps]
    slope = np.polyfit(np.log(steps), np.log(distances), 1)[0]
    assert abs(slope + 2) < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_one_step_is_the_rule_written_in_numpy(seed):
    rng = np.random.default_rng(seed)
    matrix, size = matrices.random_game(rng, 5), 1.7
    reference, policy = rng.dirichlet(np.ones(5), size=2)
    mixture = solutions.geometric_mixture(policy, reference, size * TAU)
    game = solvers.make_game(matrix, reference, TAU)
    for method, opponent in (("mirror_descent", policy), ("nash_md", mixture)):
        found = last(method, game, size, 1, policy)
        known = solutions.mirror_step(matrix, reference, TAU, size, policy, opponent)
        np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_a_nash_md_step_solves_its_own_argmax(seed):
    # The gradient of s P(pi > mix) - KL(pi, mix) by the logits is 0 at what is returned
    # and at no other opponent.
    rng = np.random.default_rng(seed)
    matrix, size = matrices.random_game(rng, 4), 2.0
    reference, policy = rng.dirichlet(np.ones(4), size=2)
    after = last("nash_md", solvers.make_game(matrix, reference, TAU), size, 1, policy)
    mixture = solutions.geometric_mixture(policy, reference, size * TAU)

    def slope(opponent):
        def objective(logits):
            log_probs = jax.nn.log_softmax(logits)
            gain = jnp.exp(log_probs) @ jnp.asarray(matrix @ opponent)
            ratio = log_probs - jnp.log(jnp.asarray(mixture))
            return size * gain - jnp.exp(log_probs) @ ratio

        return np.abs(jax.grad(objective)(jnp.log(jnp.asarray(after)))).max()

    assert slope(mixture) < EXACT
    assert slope(policy) > 1e-6


def test_constant_steps_miss_the_equilibrium_by_their_square():
    # Halve the step and the gap of the limit falls to a quarter.
    sizes = np.array([0.4, 0.2, 0.1, 0.05])
    gaps = []
    for size in sizes:
        limit = last("nash_md", skew(), size, int(2000 / size))
        gaps.append(
            solutions.regularised_gap(matrices.skew(), SKEWED, TAU, limit.astype(float))
        )
    slope = np.polyfit(np.log(sizes), np.log(gaps), 1)[0]
    assert abs(slope - 2) < 0.05
    assert gaps[-1] > 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_mirror_prox_shrinks_the_divergence_at_its_rate(seed):
    rng = np.random.default_rng(seed)
    matrix, reference = matrices.random_game(rng, 5), rng.dirichlet(np.ones(5))
    nash = solutions.regularised_nash(matrix, reference, TAU)
    game = solvers.make_game(matrix, reference, TAU)
    policies = solvers.solve(
        "extragradient",
        game,
        reference,
        step_size=2 / (1 + 2 * TAU),
        num_steps=40,
    )
    path = [reference, *np.asarray(policies)]
    distances = np.array([solutions.kl(nash, policy) for policy in path])
    assert (distances[1:] <= distances[:-1] / (1 + 2 * TAU) + 1e-14).all()


@pytest.mark.parametrize(
    "method, size, known",
    [
        ("mirror_descent", 0.5, 223),
        ("extragradient", 0.5, 209),
        ("mirror_descent", 1.0, 114),
        ("extragradient", 1.0, 98),
        ("mirror_descent", 4.0, 38),
        ("extragradient", 4.0, 16),
    ],
)
def test_steps_until_the_divergence_is_tiny(method, size, known):
    # Steps to KL(pi*, pi) < 1e-10, counted by an independent computation.
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, TAU)
    policies = solvers.solve(method, skew(), START, step_size=size, num_steps=300)
    distances = np.array(
        [solutions.kl(nash, policy) for policy in np.asarray(policies)]
    )
    assert np.flatnonzero(distances < 1e-10)[0] + 1 == known


@pytest.mark.parametrize(
    "method, size, converges",
    [
        ("mirror_descent", 0.775, True),
        ("nash_md", 0.775, True),
        ("extragradient", 0.775, True),
        ("mirror_descent", 2.325, False),
        ("nash_md", 2.325, False),
        ("extragradient", 2.325, True),
    ],
)
def test_at_small_tau_large_steps_cycle_but_for_the_extragradient(
    method, size, converges
):
    # Linear theory: mirror descent is stable for s < 2 tau / (tau^2 + lambda^2), here
    # 1.55, with lambda^2 = sum over i < j of (P_ij - 1/2)^2 pi_i pi_j.
    game = skew(tau=0.008)
    policies = np.asarray(
        solvers.solve(method, game, START, step_size=size, num_steps=20_000)
    )
    changes = np.abs(np.diff(policies[-500:], axis=0)).max(axis=1)
    gaps = [
        solutions.regularised_gap(matrices.skew(), SKEWED, 0.008, policy)
        for policy in policies[-500:]
    ]
    if converges:
        assert changes.max() < 1e-12
        assert max(gaps) < (1e-5 if method == "nash_md" else 1e-12)
    else:
        # Somewhere on its limit cycle, never near the equilibrium.
        assert changes.min() > 0.01 and min(gaps) > 0.02


def test_multiplicative_weights_spiral_out_but_their_average_converges():
    game = solvers.make_game(DICE, UNIFORM, 0.0)
    policies = np.asarray(
        solvers.solve("mirror_descent", game, START, step_size=1.0, num_steps=1000)
    )
    exploitability = [
        solutions.exploitability(DICE, policy) for policy in policies[[0, 99, 999]]
    ]
    # Last iterates get worse: .0175, .0297, .0368 of an independent computation.
    np.testing.assert_allclose(exploitability, [0.0175, 0.0297, 0.0368], atol=6e-5)
    average = np.vstack([START, policies])[:1000].mean(axis=0)
    assert solutions.exploitability(DICE, average) < 1e-3


def test_optimistic_weights_find_the_equilibrium_without_regularisation():
    game = solvers.make_game(DICE, UNIFORM, 0.0)
    policy = last("optimistic", game, 2.0, 10_000)
    assert solutions.exploitability(DICE, policy) < 1e-10


def test_moving_the_reference_ends_at_the_unregularised_equilibrium():
    # Of a cyclic game of three: the margins of the opposite pairs, normalised.
    path = solvers.proximal_point(matrices.skew(), SKEWED, TAU, 60)
    np.testing.assert_allclose(path[-1], [1 / 6, 1 / 2, 1 / 3], rtol=0, atol=1e-6)
    first = solutions.regularised_nash(matrices.skew(), SKEWED, TAU)
    np.testing.assert_array_equal(path[0], first)


# Those whose resting point is another: of their mixture, of tau = 0, of the reference.
RESTLESS = {
    "nash_md",
    "nash_md_constant",
    "fixed_mixture",
    "mwu",
    "omwu",
    "best_response",
}


@pytest.mark.parametrize("method", solvers.METHODS)
def test_the_equilibrium_is_left_by_those_alone_that_seek_another(method):
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, TAU)
    moved = np.abs(last(method, skew(), None, 1, nash) - nash).max()
    if method in RESTLESS:
        assert moved > 1e-3
    else:
        assert moved < EXACT


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'nash_md'"):
        last("nash_mdd", skew(), 1.0, 1)


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), 10.1])
def test_a_step_size_out_of_range_is_refused(size):
    with pytest.raises(UserError, match="step_size must be above 0"):
        last("nash_md", skew(), size, 1)


@pytest.mark.parametrize(
    "start", [[0.5, 0.5, 0.0], [0.5, 0.5], [0.5, 0.4, 0.3], [0.5, 0.5, float("nan")]]
)
def test_a_start_that_is_no_distribution_with_full_support_is_refused(start):
    with pytest.raises(UserError, match="start must be 3 probabilities above 0"):
        last("nash_md", skew(), 1.0, 1, np.array(start))


def test_games_check_their_parts():
    with pytest.raises(UserError, match="tau must be in"):
        solvers.make_game(matrices.skew(), SKEWED, -0.1)
    with pytest.raises(UserError, match="reference must be 3 probabilities"):
        solvers.make_game(matrices.skew(), np.array([0.5, 0.5, 0.0]), TAU)
    with pytest.raises(UserError, match="must be 1, got"):
        solvers.make_game(np.full((2, 2), 0.6), np.array([0.5, 0.5]), TAU)
    with pytest.raises(UserError, match="tau must be in"):
        solvers.decreasing(0.0)
