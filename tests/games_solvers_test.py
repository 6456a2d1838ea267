# SPDX-License-Identifier: Apache-2.0
"""Tabular algorithms: published iterates, their rates, and where they fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.games import matrices, methods, solutions, solvers

EXACT = 1e-12
UNIFORM, UNIFORM_4 = np.ones(3) / 3, np.ones(4) / 4
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
        ("mirror_descent", 2.0, 60),
        ("extragradient", 2.0, 43),
        ("mirror_descent", 4.0, 38),
        ("extragradient", 4.0, 16),
        ("mirror_descent", 8.0, 133),
        ("extragradient", 8.0, 24),
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


@pytest.mark.parametrize("method", solvers.METHODS)
def test_on_dice_only_plain_weights_move_away(method):
    game = solvers.make_game(DICE, UNIFORM, TAU)
    path = solvers.solve(method, game, START, num_steps=10_000)
    start, end = (
        solutions.exploitability(DICE, p) for p in (START, np.asarray(path[-1]))
    )
    assert end > 2 * start if method == "mwu" else end < start / 10


def test_an_optimistic_step_that_is_too_large_diverges():
    path = solvers.solve("oomd", skew(), START, step_size=8.0, num_steps=2000)
    gaps = jax.vmap(solvers.gap, in_axes=(None, 0))(skew(), path[-100:])
    assert gaps.min() > 0.05


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


def random_games(seed, num_games, size, tau=TAU):
    rng = np.random.default_rng(seed)
    matrix = np.stack([matrices.random_game(rng, size) for _ in range(num_games)])
    return matrix, rng.dirichlet(np.ones(size), size=num_games), tau


@pytest.mark.parametrize("method", solvers.METHODS)
def test_many_games_at_once_are_each_game_alone(method):
    matrix, reference, tau = random_games(0, 5, 4, np.linspace(0.05, 0.5, 5))
    starts = np.random.default_rng(1).dirichlet(np.ones(4), size=5)
    games = solvers.make_games(matrix, reference, tau)
    found = solvers.solve_many(method, games, starts, num_steps=40)
    for b in range(5):
        game = solvers.make_game(matrix[b], reference[b], tau[b])
        path = np.asarray(solvers.solve(method, game, starts[b], num_steps=40))
        np.testing.assert_allclose(found.last_BN[b], path[-1], rtol=0, atol=EXACT)
        played = np.vstack([starts[b], path[:-1]])
        np.testing.assert_allclose(
            found.average_BN[b], played.mean(axis=0), rtol=0, atol=EXACT
        )


def test_one_program_runs_taus_steps_references_and_betas_side_by_side():
    taus, sizes = np.array([0.05, 0.1, 0.3]), np.array([2.0, 0.5, 3.0])
    references = np.random.default_rng(0).dirichlet(np.ones(3), size=3)
    betas = np.array([0.0, 0.1, 0.2])

    @jax.jit
    @jax.vmap
    def together(tau, size, reference, beta):
        game = solvers.Game(jnp.asarray(matrices.skew()), reference, tau)
        sizes_T = jnp.full(20, size)
        start = jnp.asarray(START)
        return solvers.path(methods.fixed_mixture, game, start, sizes_T, beta)

    found = together(*(jnp.asarray(a) for a in (taus, sizes, references, betas)))
    for b in range(3):
        game = solvers.make_game(matrices.skew(), references[b], taus[b])
        alone = solvers.solve(
            "fixed_mixture",
            game,
            START,
            step_size=sizes[b],
            num_steps=20,
            beta=float(betas[b]),
        )
        np.testing.assert_allclose(found[b], alone, rtol=0, atol=EXACT)


def test_a_step_size_for_each_game():
    games = solvers.make_games(np.stack([matrices.skew()] * 3), SKEWED, TAU)
    sizes = np.array([0.5, 1.0, 2.0])
    found = solvers.solve_many("omd", games, START, step_size=sizes, num_steps=30)
    alone = [last("omd", skew(), size, 30) for size in sizes]
    np.testing.assert_allclose(found.last_BN, alone, rtol=0, atol=EXACT)


@pytest.mark.parametrize("method", ["nash_md", "mpo", "ema", "fictitious_play"])
def test_runs_on_one_game_at_once_are_each_alone(method):
    # Taus, references, starts and steps of their own.
    rng, taus = np.random.default_rng(3), np.array([0.05, 0.1, 0.3])
    references, starts = rng.dirichlet(np.ones(4), size=(2, 3))
    matrix, sizes = matrices.random_game(rng, 4), np.array([0.4, 0.2, 0.3])
    runs = solvers.make_runs(matrix, references, taus)
    found = solvers.solve_runs(method, runs, starts, step_size=sizes, num_steps=120)
    for b in range(3):
        game = solvers.make_game(matrix, references[b], taus[b])
        path = solvers.solve(method, game, starts[b], step_size=sizes[b], num_steps=120)
        np.testing.assert_allclose(found[b], path[-1], rtol=0, atol=EXACT)
    gaps = solvers.gaps(runs, found)
    alone = [
        solutions.regularised_gap(matrix, *parts)
        for parts in zip(references, taus.tolist(), np.asarray(found), strict=True)
    ]
    np.testing.assert_allclose(gaps, alone, rtol=0, atol=EXACT)


def test_runs_with_a_beta_each():
    betas, runs = (
        [0.0, 0.1, 0.2],
        solvers.make_runs(matrices.skew(), SKEWED, np.full(3, TAU)),
    )
    found = solvers.solve_runs(
        "fixed_mixture", runs, START, step_size=1.0, num_steps=20, beta=np.array(betas)
    )
    for b, beta in enumerate(betas):
        run = {"step_size": 1.0, "num_steps": 20, "beta": beta}
        alone = solvers.solve("fixed_mixture", skew(), START, **run)
        np.testing.assert_allclose(found[b], alone[-1], rtol=0, atol=EXACT)
    # One tau says how many they are, and so do references; without tau they are plain.
    runs = solvers.make_runs(matrices.skew(), np.stack([SKEWED, UNIFORM]), TAU)
    found = solvers.solve_runs("mwu", runs, START, num_steps=9)
    known = last("mwu", skew(), None, 9)
    np.testing.assert_allclose(found, [known, known], rtol=0, atol=EXACT)


def test_a_step_of_many_runs_is_one_product():
    runs = solvers.make_runs(games_100(), np.ones(100) / 100, np.full(16, TAU))
    sizes = jnp.ones((16, 5))
    text = solvers._jitted_lasts.lower(
        methods.nash_md, runs, runs.reference_N, sizes, jnp.zeros(16), 0
    ).as_text()
    # Without a batch axis: the matrix is read once for all sixteen.
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("batching_dims" not in line for line in products)
    assert any("100x100xf64" in line and "16x100xf64" in line for line in products)


def games_100():
    return matrices.random_game(np.random.default_rng(0), 100)


@pytest.mark.parametrize(
    "parts, said",
    [
        ((SKEWED, TAU), r"a reference each or a tau each.*got shapes \(3,\) and \(\)"),
        ((np.ones((2, 3)) / 3, np.full(3, TAU)), "as many of one as of the other"),
        ((SKEWED, np.array([TAU, -1.0])), "tau must be in"),
        ((np.ones((2, 4)) / 4, TAU), "reference must have shape"),
        ((np.ones((2, 3)), TAU), "reference must be 3 probabilities"),
    ],
)
def test_runs_check_their_parts(parts, said):
    with pytest.raises(UserError, match=said):
        solvers.make_runs(matrices.skew(), *parts)


def test_runs_refuse_betas_that_are_not_one_each():
    runs = solvers.make_runs(matrices.skew(), SKEWED, np.full(3, TAU))
    run = {"step_size": 1.0, "num_steps": 1}
    for betas, said in (([0.1, 0.2], "shape"), ([0.1, 0.2, 1.5], "beta must be in")):
        with pytest.raises(UserError, match=said):
            solvers.solve_runs("ema", runs, START, beta=np.array(betas), **run)
    with pytest.raises(UserError, match="reads no beta"):
        solvers.solve_runs("nash_md", runs, START, beta=0.1, **run)


def test_nothing_is_compiled_twice_for_one_shape(monkeypatch):
    traced = []

    def counted(game, iterate, knobs):
        traced.append(game.reference_N.shape)
        return methods.mirror_descent(game, iterate, knobs)

    recipe = solvers.METHODS["mmd"]._replace(advance=counted)
    monkeypatch.setitem(solvers.METHODS, "mmd", recipe)

    def traces(run, *cases):
        counts = []
        for case in cases:
            run(*case)
            counts.append(len(traced))
        assert counts[0] and len({*counts}) == 1
        traced.clear()

    def alone(tau, size, start):
        last("mmd", skew(tau), size, 7, start)

    def together(seed, tau):
        games = solvers.make_games(*random_games(seed, 2, 3, tau))
        solvers.solve_many("mmd", games, START, num_steps=7)

    traces(alone, (0.1, 1.0, START), (0.2, 2.0, UNIFORM), (0.0, 0.5, START))
    traces(together, (0, 0.1), (1, 0.2), (2, np.array([0.0, 0.3])))


# Where each method's usual run ends on every game, and how near in the gap there:
# "tau" the Nash at tau, "zero" that of tau = 0, "average" the same on average,
# "mixture" the best response to its own mixture, "answer" that to the reference.
ENDS = {
    "nash_md": ("tau", 1e-6),
    "nash_md_constant": ("mixture", 1e-10),
    "fixed_mixture": ("mixture", 1e-10),
    "ema": ("tau", EXACT),
    "mirror_descent": ("tau", EXACT),
    "inpo": ("tau", EXACT),
    "mmd": ("tau", EXACT),
    "mpo": ("zero", 1e-4),
    "extragradient": ("tau", EXACT),
    "nash_mp": ("tau", EXACT),
    "comal": ("zero", 1e-4),
    "optimistic": ("tau", EXACT),
    "mwu": ("average", 5e-3),
    "omwu": ("zero", 1e-4),
    "best_response": ("answer", 1e-10),
    "fictitious_play": ("tau", 1e-4),
}


def test_every_method_has_a_known_end():
    assert {*ENDS} == {*solvers.METHODS}


@pytest.mark.parametrize("method", ENDS)
def test_usual_runs_end_where_they_say(method):
    matrix, reference, tau = random_games(0, 6, 3)
    games = solvers.make_games(matrix, reference, tau)
    found = solvers.solve_many(method, games, UNIFORM, num_steps=4000)
    end, tolerance = ENDS[method]
    if end in ("tau", "zero", "average"):
        played = games if end == "tau" else games._replace(tau=jnp.zeros(6))
        policy = found.average_BN if end == "average" else found.last_BN
        assert solvers.gaps(played, policy).max() < tolerance
        return
    for b in range(6):
        opponent = reference[b]
        if end == "mixture":  # of weight 1/8
            opponent = solutions.regularised_nash(matrix[b], reference[b], tau / 0.875)
        answer = solutions.best_response(matrix[b], reference[b], tau, opponent)
        np.testing.assert_allclose(found.last_BN[b], answer, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size, tau", [(3, 1.0), (5, 0.1), (40, 0.02)])
def test_mirror_prox_alone_finds_what_newton_finds(size, tau):
    matrix, reference, _ = random_games(size, 1, size)
    game = solvers.make_game(matrix[0], reference[0], tau)
    known = solutions.regularised_nash(matrix[0], reference[0], tau)
    found = np.asarray(solvers.equilibrium(game, tolerance=1e-13))
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)
    rough = np.asarray(solvers.equilibrium(game, tolerance=1e-4))
    answer = solutions.best_response(matrix[0], reference[0], tau, rough)
    assert 1e-9 < np.abs(answer - rough).max() <= 1e-4


def test_an_equilibrium_out_of_reach_is_an_error():
    with pytest.raises(UserError, match=r"10 steps in float64 came within 0\.0"):
        solvers.equilibrium(skew(), max_steps=10)
    with pytest.raises(UserError, match="tau must be in"):
        solvers.equilibrium(skew()._replace(tau=-0.1))


def test_without_regularisation_the_equilibrium_is_exact():
    known = [1 / 6, 1 / 2, 1 / 3]
    found = solvers.equilibrium(skew(0.0))
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)
    # As a run in float32 gives it, where P and 1 - P are rounded apart.
    rough = solvers.Game(jnp.float32(matrices.skew()), jnp.float32(SKEWED), 0.0)
    found = solvers.equilibrium(rough)
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-6)


def test_gaps_under_vmap_are_those_of_numpy():
    tau = np.array([0.0, 0.01, 0.1, 1, 5, 0])
    matrix, reference, _ = random_games(3, 6, 4)
    policies = np.random.default_rng(4).dirichlet(np.ones(4), size=6)
    policies[4] = policies[5] = [0, 1, 0, 0]  # 0 log 0 = 0
    games = solvers.make_games(matrix, reference, tau)
    found = solvers.gaps(games, jnp.asarray(policies))
    for b in range(6):
        if tau[b]:
            known = solutions.regularised_gap(
                matrix[b], reference[b], float(tau[b]), policies[b]
            )
        else:
            known = solutions.exploitability(matrix[b], policies[b])
        assert abs(found[b] - known) < EXACT


def test_the_gap_of_a_contextual_policy_is_what_its_best_response_wins():
    matrix, reference, tau = random_games(5, 2, 3)
    policies = np.random.default_rng(6).dirichlet(np.ones(3), size=2)
    rho = np.array([0.3, 0.7])
    games = solvers.make_games(matrix, reference, tau)
    found = solvers.averaged_gap(games, jnp.asarray(policies), rho)

    def wins(answers):
        total = -0.5
        for x in range(2):
            payoff = answers[x] @ matrix[x] @ policies[x]
            payoff -= tau * solutions.kl(answers[x], reference[x])
            payoff += tau * solutions.kl(policies[x], reference[x])
            total += rho[x] * payoff
        return total

    best = [
        solutions.best_response(matrix[x], reference[x], tau, policies[x])
        for x in range(2)
    ]
    assert abs(found - wins(best)) < EXACT
    for others in np.random.default_rng(7).dirichlet(np.ones(3), size=(50, 2)):
        assert wins(others) <= found + EXACT
    nash = solvers.solve_many("nash_mp", games, UNIFORM, num_steps=400).last_BN
    assert abs(solvers.averaged_gap(games, nash, rho)) < EXACT


@pytest.mark.parametrize("alias", solvers.ALIASES)
def test_other_names_run_the_same_method(alias):
    assert alias not in solvers.METHODS
    assert solvers.find_method(alias) is solvers.METHODS[solvers.ALIASES[alias]]


@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_steps_in_the_letters_of_their_papers(eta):
    value = matrices.skew() @ START
    # INPO, where eta is an inverse step: exp(P / eta) mu^(tau/eta) pi^(1 - tau/eta).
    weight = TAU / eta
    inpo = value / eta + weight * np.log(SKEWED) + (1 - weight) * np.log(START)
    found = last("inpo", skew(), 1 / eta, 1)
    np.testing.assert_allclose(found, solutions.normalise(inpo), rtol=0, atol=EXACT)
    # Magnetic mirror descent: (pi mu^(eta tau) exp(eta P))^(1 / (1 + eta tau)).
    magnetic = np.log(START) + eta * TAU * np.log(SKEWED) + eta * value
    found = last("mmd", skew(), eta / (1 + eta * TAU), 1)
    known = solutions.normalise(magnetic / (1 + eta * TAU))
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)


def test_a_moving_magnet_is_the_proximal_point():
    # 200 steps within an interval solve the inner game to rounding.
    path = solvers.solve("comal", skew(), START, num_steps=1000, interval=200)
    known = solvers.proximal_point(matrices.skew(), SKEWED, TAU, 5)
    np.testing.assert_allclose(path[199::200], known, rtol=0, atol=1e-11)
    # KL(Nash, mu_k) of an independent computation, four digits.
    nash = np.array([1 / 6, 1 / 2, 1 / 3])
    distances = [solutions.kl(nash, mu) for mu in [SKEWED, *known[:3]]]
    np.testing.assert_allclose(distances, [0.2426, 0.1042, 0.0484, 0.0266], atol=6e-5)
    far = solvers.proximal_point(matrices.skew(), SKEWED, TAU, 20)
    distances = [solutions.kl(nash, far[k - 1]) for k in (10, 20)]
    np.testing.assert_allclose(distances, [2.4e-4, 2.3e-7], rtol=0.03)


def test_a_schedule_begins_again_with_each_magnet():
    path = solvers.solve("nash_md", skew(), START, num_steps=60, interval=30)
    inner = solvers.solve("nash_md", skew(), START, num_steps=30)
    np.testing.assert_allclose(path[:30], inner, rtol=0, atol=EXACT)
    moved = solvers.make_game(matrices.skew(), np.asarray(inner[-1]), TAU)
    outer = solvers.solve("nash_md", moved, START, num_steps=30)
    np.testing.assert_allclose(path[30:], outer, rtol=0, atol=EXACT)


def test_a_moving_average_is_self_play_at_decay_0_and_answers_its_start_at_1():
    plain = solvers.solve("omd", skew(), START, step_size=1.0, num_steps=20)
    found = solvers.solve("ema", skew(), START, step_size=1.0, num_steps=20, beta=0.0)
    np.testing.assert_allclose(found, plain, rtol=0, atol=EXACT)
    end = solvers.solve("ema", skew(), START, step_size=5.0, num_steps=60, beta=1.0)
    answer = solutions.best_response(matrices.skew(), SKEWED, TAU, START)
    np.testing.assert_allclose(end[-1], answer, rtol=0, atol=EXACT)


def test_the_moving_average_is_the_recursion():
    # The second step meets (1 - beta) logits_1 + beta logits_0.
    beta, size = 0.7, 1.3
    found = solvers.solve("ema", skew(), START, step_size=size, num_steps=3, beta=beta)
    policy, average = START, START
    for step in range(3):
        policy = solutions.mirror_step(
            matrices.skew(), SKEWED, TAU, size, policy, average
        )
        average = solutions.geometric_mixture(policy, average, beta)
        np.testing.assert_allclose(found[step], policy, rtol=0, atol=EXACT)


def test_fictitious_play_without_regularisation_is_the_textbooks():
    game, average, known = matrices.skew(), START, []
    for t in range(200):
        answer = np.eye(3)[np.argmax(game @ average)]
        average = average + (answer - average) / (t + 2)
        known.append(average)
    found = solvers.solve("fp", skew(0.0), START, num_steps=200)
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)
    assert solutions.exploitability(game, known[-1]) < 0.05


@pytest.mark.parametrize("share, converges", [(0.95, True), (1.05, False)])
def test_mirror_descent_cycles_above_its_critical_step(share, converges):
    tau = 0.008
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, tau)
    critical = methods.critical_step(matrices.skew(), tau, nash)
    # 1.550 with the covariance's diagonal alone, by an independent computation.
    assert abs(critical - 1.55) < 0.01
    path = solvers.solve(
        "mirror_descent",
        skew(tau),
        START,
        step_size=share * critical,
        num_steps=20_000,
    )
    gaps = jax.vmap(solvers.gap, in_axes=(None, 0))(skew(tau), path[-300:])
    if converges:  # the squared distance shrinks by 1 - 2 s tau (1 - share) a step
        assert gaps.max() < 1e-9
    else:
        assert gaps.min() > 1e-3


def test_mirror_descents_usual_step_is_stable_in_every_game():
    # No game turns faster than 1 / 8 in square; rock-paper-scissors does at 1 / 12.
    critical = methods.critical_step(matrices.rock_paper_scissors(), TAU, UNIFORM)
    assert abs(critical - 2 * TAU / (TAU**2 + 1 / 12)) < EXACT
    for seed in range(20):
        matrix, reference, _ = random_games(seed, 1, 3 + seed % 3)
        for tau in (0.3, 0.05, 0.01):
            nash = solutions.regularised_nash(matrix[0], reference[0], tau)
            critical = methods.critical_step(matrix[0], tau, nash)
            assert methods.stable_step(tau) <= critical / 2


def test_nash_md_by_its_square_law_constant():
    # KL(pi*, pi_T) T^2 -> 0.479 on skew, by an independent computation.
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, TAU)
    path = np.asarray(solvers.solve("nash_md", skew(), START, num_steps=20_000))
    early, late = (t**2 * solutions.kl(nash, path[t - 1]) for t in (2_000, 20_000))
    # The next term falls as 1 / T: take it out.
    assert abs((10 * late - early) / 9 - 0.479) < 5e-4


@pytest.mark.parametrize("seed", range(3))
def test_nash_md_obeys_its_theorem_with_the_sharper_constant(seed):
    # KL(pi*, pi_{t+1}) <= (1 - s tau) KL(pi*, pi_t) + s^2 / 8 for any s tau in [0, 1],
    # and KL(pi*, pi_T) <= 1 / (2 tau^2 (T + 1)) with the falling steps.
    matrix, reference, tau = random_games(seed, 10, 4)
    nash = [
        solutions.regularised_nash(*parts, tau)
        for parts in zip(matrix, reference, strict=True)
    ]
    weights = np.random.default_rng(seed).uniform(0.01, 1, size=50)
    for b in range(10):
        game = solvers.make_game(matrix[b], reference[b], tau)
        run = {"num_steps": 50, "step_size": lambda t: weights[t] / tau}
        path = np.asarray(solvers.solve("nash_md", game, UNIFORM_4, **run))
        kls = np.array([solutions.kl(nash[b], p) for p in [UNIFORM_4, *path]])
        allowed = (1 - weights) * kls[:-1] + (weights / tau) ** 2 / 8
        assert (kls[1:] <= allowed + EXACT).all()
        path = np.asarray(solvers.solve("nash_md", game, UNIFORM_4, num_steps=200))
        kls = np.array([solutions.kl(nash[b], p) for p in path])
        assert (kls <= 1 / (2 * tau**2 * (np.arange(1, 201) + 1))).all()


def test_the_extragradient_converges_linearly():
    # The fit over four decades is straight: the rate does not fade.
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, TAU)
    path = np.asarray(solvers.solve("extragradient", skew(), START, num_steps=120))
    distances = np.log([solutions.kl(nash, policy) for policy in path[20:]])
    early = np.polyfit(np.arange(50), distances[:50], 1)[0]
    late = np.polyfit(np.arange(50), distances[50:], 1)[0]
    # KL falls as the square of the distance: 2 log(1 - s tau) at best.
    assert abs(early / late - 1) < 0.05
    assert late < 2 * np.log(1 - TAU / (1 + TAU)) + 0.02


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


@pytest.mark.parametrize(
    "parts, said",
    [
        ((np.full((2, 2), 0.5), SKEWED, TAU), r"matrices \[B, N, N\], got shape"),
        ((np.full((2, 3, 3), 0.5), UNIFORM_4, TAU), "reference must have shape"),
        ((np.full((2, 3, 3), 0.5), SKEWED, np.ones(3)), "tau must have shape"),
        ((np.full((2, 3, 3), 0.5), SKEWED, np.array([0.1, -1])), "tau must be in"),
        ((np.full((2, 3, 3), 0.6), SKEWED, TAU), "must be 1, got"),
    ],
)
def test_many_games_check_their_parts(parts, said):
    with pytest.raises(UserError, match=said):
        solvers.make_games(*parts)


def test_knobs_that_a_method_does_not_have_are_refused():
    with pytest.raises(UserError, match=r"'nash_md' reads no beta, got 0\.5"):
        solvers.solve("nash_md", skew(), START, num_steps=1, beta=0.5)
    with pytest.raises(UserError, match="beta must be in"):
        solvers.solve("ema", skew(), START, num_steps=1, beta=1.5)
    with pytest.raises(UserError, match="interval must be an integer"):
        solvers.solve("mpo", skew(), START, num_steps=1, interval=-1)
    with pytest.raises(UserError, match="tau must be in"):
        solvers.solve("best_response", skew(0.0), START, num_steps=1)
    games = solvers.make_games(np.stack([matrices.skew()] * 2), SKEWED, TAU)
    sizes = np.array([1.0, 10.1])
    with pytest.raises(UserError, match="step_size must be above 0 and at most 10"):
        solvers.solve_many("omd", games, START, step_size=sizes, num_steps=1)
    with pytest.raises(UserError, match="start must be 3 probabilities"):
        solvers.solve_many("omd", games, np.array([1.0, 0, 0]), num_steps=1)
    with pytest.raises(UserError, match="rho must be 2 weights"):
        solvers.averaged_gap(games, games.reference_N, np.array([0.5, 0.6]))
