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


# Iterates of the skew game from START, computed independently (numpy, float64).
KNOWN_ITERATES = {
    ("mirror_descent", TAU, 1.0): {
        1: (0.6068748571281, 0.26864950610567, 0.12447563676623),
        10: (0.42512021482244, 0.17965505923369, 0.39522472594387),
        100: (0.29445214784699, 0.28976987306079, 0.41577797909222),
    },
    ("nash_md", TAU, 1.0): {
        1: (0.60618328718922, 0.26956517193927, 0.12425154087152),
        10: (0.43401046933792, 0.17636361124817, 0.3896259194139),
        100: (0.29097842960733, 0.2738133655387, 0.43520820485397),
    },
    ("extragradient", TAU, 1.0): {
        1: (0.60305275982758, 0.27090685292368, 0.12604038724875),
        10: (0.41688633361605, 0.19658329679985, 0.3865303695841),
        100: (0.2944353245209, 0.28976548647667, 0.41579918900243),
    },
    # Mirror prox.
    ("extragradient", TAU, 2 / (1 + 2 * TAU)): {
        1: (0.59727760893386, 0.25457366603879, 0.14814872502735),
        10: (0.31039451126038, 0.24002774820163, 0.449577740538),
        100: (0.29443684627222, 0.28976051217784, 0.41580264154994),
    },
    # Magnetic mirror descent with eta = 1.
    ("mirror_descent", TAU, 1 / (1 + TAU)): {
        1: (0.60647225490705, 0.27145971805613, 0.12206802703683),
        10: (0.4486437106676, 0.17933873218136, 0.37201755715104),
        100: (0.29441025007378, 0.289814548896, 0.41577520103021),
    },
    # Multiplicative weights, plain and optimistic.
    ("mirror_descent", 0.0, 1.0): {
        1: (0.61629663593894, 0.26789127795105, 0.11581208611002),
        10: (0.43162466416671, 0.11149170937517, 0.45688362645811),
        100: (0.69082406860432, 0.12096907646252, 0.18820685493316),
    },
    ("optimistic", 0.0, 1.0): {
        2: (0.6229254831074, 0.23990769006512, 0.13716682682748),
        10: (0.40931610548902, 0.1313199290995, 0.45936396541149),
        100: (0.10908121686786, 0.22738660590005, 0.66353217723209),
    },
    ("optimistic", TAU, 1.0): {
        2: (0.60050521559613, 0.2453377926002, 0.15415699180367),
        10: (0.41697643490742, 0.19630271497467, 0.38672085011791),
        100: (0.29443497632103, 0.28976476420794, 0.41580025947103),
    },
}


@pytest.mark.parametrize("method, tau, size", KNOWN_ITERATES)
def test_iterates_are_the_known_ones(method, tau, size):
    known = KNOWN_ITERATES[method, tau, size]
    policies = solvers.solve(method, skew(tau), START, step_size=size, num_steps=100)
    for step, policy in known.items():
        np.testing.assert_allclose(policies[step - 1], policy, rtol=0, atol=EXACT)


def test_nash_md_with_falling_steps_walks_the_known_path():
    # KL(pi*, pi_T) of an independent computation, ten digits.
    known = {
        1: 0.13264633353301,
        2: 0.10635050150067,
        10: 0.0077836977508063,
        100: 5.0317463819439e-05,
        1000: 4.7766186801084e-07,
    }
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, TAU)
    policies = solvers.solve(
        "nash_md", skew(), START, step_size=solvers.decreasing(TAU), num_steps=1000
    )
    for step, divergence in known.items():
        found = solutions.kl(nash, np.asarray(policies[step - 1]))
        np.testing.assert_allclose(found, divergence, rtol=1e-7)


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


def test_an_equilibrium_is_left_by_no_method_but_constant_nash_md():
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, TAU)
    for method in solvers.METHODS:
        moved = np.abs(last(method, skew(), 2.0, 1, nash) - nash).max()
        if method == "nash_md":
            assert moved > 1e-3
        else:
            assert moved < EXACT


def test_runs_batch_with_vmap():
    starts = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    game = skew()

    def run(start):
        iterate = solvers.Iterate(jnp.log(start), jnp.zeros(3))
        return solvers.nash_md(game, iterate, jnp.asarray(1.0)).logits_N

    together = np.exp(jax.vmap(run)(jnp.asarray(starts)))
    alone = [last("nash_md", game, 1.0, 1, start) for start in starts]
    np.testing.assert_allclose(together, alone, rtol=0, atol=EXACT)


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
