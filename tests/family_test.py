# SPDX-License-Identifier: Apache-2.0
"""What is particular to members of the family: exact steps, half-steps, adversaries."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import loss_gradient, losses, selection, train_step
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import UserError
from nlhf_jax.evaluation import exact
from nlhf_jax.games import matrices, methods, solutions
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    Feedback,
    Responses,
    Samples,
    ScoredSample,
    Speaker,
)
from tests.battery import all_but

pytestmark = pytest.mark.usefixtures("compiled_quickly")
EXACT = 1e-12
MU, START = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1])
TAU, STEP = 0.1, 1.0
MODEL = tabular.tabular_model(3, 1)


def logits_of(policy):
    return tabular.table(np.log(policy))


def minimiser(algorithm, game, sets):
    """Where the expected gradient over the policy alone vanishes, by Newton's method.

    The loss is a square of something linear in the logits: one step gets there.
    """
    judge = table_judge(MODEL, game, np.zeros(3))
    flat, restore = jax.flatten_util.ravel_pytree(
        jax.tree.map(jnp.asarray, sets[POLICY])
    )

    def slope(flat):
        now = sets | {POLICY: restore(flat)}
        found = exact.expected_gradient(MODEL, algorithm, judge, now, 1)
        return np.asarray(jax.flatten_util.ravel_pytree(found)[0])

    start = np.asarray(flat)
    moves = np.eye(3)
    hessian = np.stack([slope(jnp.asarray(start + m)) - slope(start) for m in moves], 1)
    found = start + np.linalg.lstsq(hessian, -slope(start), rcond=1e-9)[0]
    return solutions.normalise(found)


def descended(algorithm, game, sets, rate, num_steps):
    """Returns the policy after steps along the expected gradient."""
    judge = table_judge(MODEL, game, np.zeros(3))
    sets = jax.tree.map(jnp.asarray, sets)

    @jax.jit
    def run(params):
        def one(params, _):
            now = sets | {POLICY: params}
            slope = exact.expected_gradient(MODEL, algorithm, judge, now, 1)
            return jax.tree.map(lambda x, g: x - rate * g, params, slope), None

        return jax.lax.scan(one, params, length=num_steps)[0]

    return np.asarray(tabular.response_policy(MODEL, run(sets[POLICY]), 1))


def exact_step(game, opponent, previous=START, step=STEP):
    """Rule (U) written out: mu^{s tau} pi^{1 - s tau} exp(s P(y > opponent))."""
    logits = step * TAU * np.log(MU) + (1 - step * TAU) * np.log(previous)
    return solutions.normalise(logits + step * game @ opponent)


def sets_at(**named):
    given = {POLICY: START, REFERENCE: MU, "previous": START} | named
    return {name: logits_of(policy) for name, policy in given.items()}


def test_inpos_minimiser_is_the_step_of_mirror_descent(float64):
    algorithm = ALGORITHMS["inpo"](tau=TAU, step_size=STEP)
    found = minimiser(algorithm, matrices.skew(), sets_at())
    known = exact_step(matrices.skew(), START)
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)
    # Computed independently (numpy, float64), fourteen decimals.
    np.testing.assert_allclose(
        known, [0.6068748571281, 0.26864950610567, 0.12447563676623], atol=1e-13
    )


def test_inpo_on_other_pairs_is_a_step_against_who_says_them(float64):
    others = np.array([0.2, 0.2, 0.6])
    algorithm = dataclasses.replace(
        ALGORITHMS["inpo"](tau=TAU, step_size=STEP),
        speakers=(Speaker({"others": 1.0}),) * 2,
    )
    found = minimiser(algorithm, matrices.skew(), sets_at(others=others))
    known = exact_step(matrices.skew(), others)
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)
    assert np.abs(found - exact_step(matrices.skew(), START)).max() > 0.05
    # Computed independently (numpy, float64), five decimals.
    np.testing.assert_allclose(found, [0.55086, 0.32917, 0.11997], atol=1e-5)


@pytest.mark.parametrize("adversary", [START, [0.1, 0.1, 0.8], [0.98, 0.01, 0.01]])
@pytest.mark.parametrize("seed", all_but([0], range(3)))
def test_enpo_without_its_bonus_is_mirror_descent_whoever_proposes(
    adversary, seed, float64
):
    rng = np.random.default_rng(seed)
    game, previous = matrices.random_game(rng, 3), rng.dirichlet(np.ones(3))
    algorithm = ALGORITHMS["enpo"](
        tau=TAU, step_size=STEP, alpha=0.0, num_comparators=1
    )
    sets = sets_at(adversary=np.array(adversary), previous=previous)
    found = minimiser(algorithm, game, sets)
    known = exact_step(game, previous, previous)
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-10)
    # The search ends with an error of its own; at the step itself nothing is left.
    judge = table_judge(MODEL, game, np.zeros(3))
    at_the_step = sets | {POLICY: logits_of(known)}
    left = exact.expected_gradient(MODEL, algorithm, judge, at_the_step, 1)
    np.testing.assert_allclose(left["table"], 0.0, rtol=0, atol=EXACT)
    tabular_step = methods.mirror_descent(
        methods.Game(jnp.asarray(game), jnp.asarray(MU), TAU),
        methods.begin(
            methods.Game(jnp.asarray(game), jnp.asarray(MU), TAU), jnp.asarray(previous)
        ),
        methods.Knobs(STEP),
    )
    np.testing.assert_allclose(
        solutions.normalise(np.asarray(tabular_step.logits_N)), known, atol=EXACT
    )


def test_enpos_bonus_holds_the_policy_at_the_snapshot(float64):
    moved = []
    for alpha in (0.0, 1.0, 30.0):
        algorithm = ALGORITHMS["enpo"](
            tau=TAU, step_size=STEP, alpha=alpha, num_comparators=1
        )
        policy = descended(
            algorithm,
            matrices.skew(),
            sets_at(adversary=START),
            2 / (1 + alpha),
            400,
        )
        moved.append(float(np.abs(policy - START).sum()))
    assert moved[0] > 1.2 * moved[1] > 1.2 * moved[2] > 0


def test_onpo_takes_twice_the_new_payoff_less_the_old(float64):
    older = np.array([0.2, 0.2, 0.6])
    algorithm = ALGORITHMS["onpo"](tau=TAU, step_size=STEP)
    found = minimiser(algorithm, matrices.skew(), sets_at(older=older))
    known = exact_step(matrices.skew(), 2 * START - older)
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)


def test_sppo_is_multiplicative_weights_up_to_its_constant(float64):
    game, num_responses = matrices.skew(), 3
    algorithm = ALGORITHMS["sppo"](step_size=STEP, num_responses=num_responses)
    found = descended(algorithm, game, sets_at(), 1.0, 600)
    # Its log Z is s / 2, so what it fits is no distribution; least squares over the
    # simplex, weighted by pi_t, found by scipy from the formula.
    from scipy.optimize import minimize

    lead = (1 - 1 / num_responses) * (game @ START - 0.5)

    def loss(logits):
        log_policy = np.log(solutions.normalise(logits))
        return START @ (log_policy - np.log(START) - STEP * lead) ** 2

    known = solutions.normalise(minimize(loss, np.log(START), tol=1e-14).x)
    np.testing.assert_allclose(found, known, atol=1e-6)


def test_egpo_with_uniform_pairs_is_mirror_prox(float64):
    # (y, y') uniform: the gradient is s/(rate) times theta - (theta_ref + P z / tau),
    # up to a constant of the logits, so a rate is a step size s: s tau = rate tau / 3.
    game, tau, size = matrices.skew(), 0.008, 2.325
    algorithm = ALGORITHMS["egpo"](tau=tau, temperature=1e9)
    judge, sets = table_judge(MODEL, game, np.zeros(3)), sets_at()
    rate = 3 * size
    half = dict(sets)
    for name, part in algorithm.lookaheads.items():
        slope = exact.expected_gradient(MODEL, part, judge, sets, 1)
        half[name] = jax.tree.map(lambda x, g: x - rate * g, sets[POLICY], slope)
    slope = exact.expected_gradient(MODEL, algorithm, judge, half, 1)
    after = jax.tree.map(lambda x, g: x - rate * g, sets[POLICY], slope)
    found = np.asarray(tabular.response_policy(MODEL, after, 1))
    world = methods.Game(jnp.asarray(game), jnp.asarray(MU), tau)
    step = methods.extragradient(
        world, methods.begin(world, jnp.asarray(START)), methods.Knobs(size)
    )
    known = solutions.normalise(np.asarray(step.logits_N))
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-8)


# --- which pairs a loss sees


def sample_of(tokens_B):
    tokens_BT = jnp.asarray(tokens_B)[:, None]
    responses = Responses(tokens_BT, jnp.ones(tokens_BT.shape, bool))
    return Samples(responses, {POLICY: -1.0 * tokens_BT}, -2.0 * tokens_BT)


def test_the_best_and_the_worst_are_picked_prompt_by_prompt():
    scores = np.array(
        [[0.2, 0.5, 0.1, 0.7], [0.9, 0.5, 0.1, 0.7], [0.3, 0.5, 0.6, 0.8]]
    )
    select = selection.best_and_worst(
        3,
        lambda feedback: feedback.rewards,
        lambda feedback, picks: Feedback(feedback.preferences, picks),
    )
    candidates = [sample_of([10 * i + b for b in range(4)]) for i in range(1, 4)]
    comparator = sample_of([0, 0, 0, 0])
    told = Feedback((), tuple(jnp.asarray(scores)))
    (best, worst), feedback = select((*candidates, comparator), told)
    # Of equal scores the first is the best and the last the worst.
    assert best.responses.tokens_BT[:, 0].tolist() == [20, 11, 32, 33]
    assert worst.responses.tokens_BT[:, 0].tolist() == [10, 31, 22, 23]
    assert [pick.tolist() for pick in feedback.rewards] == [[1, 0, 2, 2], [0, 2, 1, 1]]
    # Everything known of a sample goes with it.
    for one in (best, worst):
        tokens_BT = one.responses.tokens_BT
        np.testing.assert_array_equal(one.log_probs[POLICY], -1.0 * tokens_BT)
        np.testing.assert_array_equal(one.sampling_log_probs_BT, -2.0 * tokens_BT)


@pytest.mark.parametrize("num_candidates", [2, 3, 4])
def test_best_of_several_is_still_a_step_of_mirror_descent(num_candidates, float64):
    algorithm = ALGORITHMS["iterative_nlhf"](
        tau=TAU, step_size=STEP, num_candidates=num_candidates
    )
    found = minimiser(algorithm, matrices.skew(), sets_at())
    known = exact_step(matrices.skew(), START)
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-11)


def test_inpo_on_the_best_and_the_worst_is_another_step(float64):
    # What is documented to break: the answers that choose the pair also label it.
    best = ALGORITHMS["online_dpo"](tau=TAU, num_candidates=3)
    inpo = ALGORITHMS["inpo"](tau=TAU, step_size=STEP)
    algorithm = dataclasses.replace(
        inpo,
        speakers=inpo.speakers[:1] * 3,
        comparisons=best.comparisons,
        select=best.select,
    )
    found = minimiser(algorithm, matrices.skew(), sets_at())
    assert np.abs(found - exact_step(matrices.skew(), START)).max() > 0.005


# --- COMAL's rounds


def payoff_of(policy, magnet):
    """P(y > pi) - tau log pi/magnet, what a response brings in the round's game."""
    return matrices.skew() @ policy - TAU * np.log(policy / magnet)


def measured_inner_gap(policy, previous, step):
    """E over pairs from `previous` of what the loss reports."""
    algorithm = ALGORITHMS["comal"](tau=TAU, step_size=step)
    first, second = np.divmod(np.arange(9), 3)

    def one(tokens):
        log_probs = {
            name: jnp.log(jnp.asarray(p))[tokens][:, None]
            for name, p in {
                POLICY: policy,
                REFERENCE: MU,
                "previous": previous,
                "magnet": MU,
            }.items()
        }
        return ScoredSample(jnp.ones((9, 1), bool), log_probs, log_probs["previous"])

    answers = Feedback((jnp.asarray(matrices.skew()[first, second]),), ())
    output = algorithm.loss((one(first), one(second)), answers)
    return (previous[first] * previous[second]) @ output.metrics["comal/inner_gap"]


@pytest.mark.parametrize("step", [0.5, 1.0, 1 / TAU])
def test_the_inner_gap_is_the_variance_of_what_responses_bring(step, float64):
    # By (U) log pi_{t+1} - log pi_t is s times that, up to a constant.
    after = exact_step(matrices.skew(), START, step=step)
    brought = payoff_of(START, MU)
    variance = START @ (brought - START @ brought) ** 2
    found = measured_inner_gap(after, START, step)
    assert found == pytest.approx(variance / (2 * TAU), rel=1e-11)


def test_near_the_equilibrium_it_is_the_gap_itself(float64):
    nash = solutions.regularised_nash(matrices.skew(), MU, TAU)
    ratios = []
    for size in (0.1, 0.01, 0.001):
        near = solutions.normalise(np.log(nash) + size * np.array([1.0, -0.5, 0.2]))
        gap = solutions.regularised_gap(matrices.skew(), MU, TAU, near)
        after = exact_step(matrices.skew(), near, near)
        ratios.append(measured_inner_gap(after, near, STEP) / gap)
    # The error is of first order in the distance.
    errors = np.abs(np.array(ratios) - 1)
    assert errors[-1] < 1e-3
    np.testing.assert_allclose(errors[:-1] / errors[1:], 10, rtol=0.2)


@pytest.mark.parametrize(
    "step, gap, is_over",
    [(10, 0.01, True), (10, 0.1, False), (7, 0.01, False), (40, 0.1, True)],
)
def test_a_round_ends_with_a_small_gap_or_after_its_longest_time(step, gap, is_over):
    algorithm = ALGORITHMS["comal"](
        tau=TAU, step_size=STEP, period=10, magnet_period=40, inner_gap=0.05
    )
    sets = {
        name: {"w": jnp.full(1, i)} for i, name in enumerate(("previous", "magnet"))
    }
    sets[POLICY] = {"w": jnp.full(1, 9)}
    metrics = {"comal/inner_gap": jnp.array(gap)}
    after = algorithm.update_sets(sets, jnp.array(step), metrics)
    assert int(after["magnet"]["w"][0]) == (9 if is_over else 1)
    assert int(after["previous"]["w"][0]) == (9 if step % 10 == 0 else 0)


def test_a_gap_needs_a_policy_that_has_left_its_snapshot():
    with pytest.raises(UserError, match="inner_gap must be 0 where period is 1"):
        ALGORITHMS["comal"](tau=TAU, step_size=STEP, period=1, inner_gap=0.1)
    ALGORITHMS["comal"](tau=TAU, step_size=STEP, period=1)


@pytest.mark.parametrize("inner_gap, rounds", [(0.0, 0), (1e6, 3)])
def test_the_step_hands_its_measurement_to_the_rounds(inner_gap, rounds):
    algorithm = ALGORITHMS["comal"](
        tau=TAU, step_size=STEP, period=2, magnet_period=1000, inner_gap=inner_gap
    )
    step, state, frozen = tiny_step(algorithm)
    moved = 0
    for _ in range(6):
        before = np.asarray(state.param_sets["magnet"]["table"])
        state, metrics = step(
            state, frozen, tabular.empty_prompts(16), jax.random.key(0)
        )
        moved += np.abs(before - state.param_sets["magnet"]["table"]).max() > 0
        assert float(metrics["comal/inner_gap"]) >= 0
    assert moved == rounds


# --- half-steps, followers and several updates in the train step


def tiny_step(algorithm, game=None, optimizer=None, **more):
    judge = table_judge(MODEL, matrices.skew() if game is None else game, np.zeros(3))
    optimizer = optimizer or optax.adam(0.1)
    state = train_step.init_state(
        jax.tree.map(jnp.asarray, logits_of(START)), algorithm, optimizer
    )
    step = train_step.make_train_step(
        MODEL, algorithm, judge, optimizer, max_length=1, **more
    )
    frozen = {REFERENCE: jax.tree.map(jnp.asarray, logits_of(MU))}
    return jax.jit(step), state, frozen


def test_a_lookahead_leaves_neither_parameters_nor_moments_behind(float64):
    # The look ahead is a whole step of self-play; only its opponent's role remains.
    algorithm = ALGORITHMS["nash_mirror_prox"](tau=TAU)
    step, state, frozen = tiny_step(algorithm)
    after, _ = step(state, frozen, tabular.empty_prompts(64), jax.random.key(0))
    moments = after.opt_states[POLICY][0]
    assert int(moments.count) == 1
    assert set(after.param_sets) == {POLICY} == set(after.opt_states)
    # By hand: the first of two keys plays ahead, the second answers it.
    key = jax.random.fold_in(jax.random.key(0), 0)
    keys = jax.random.split(key, 2)
    (part,) = algorithm.lookaheads.values()
    judge, optimizer = table_judge(MODEL, matrices.skew(), np.zeros(3)), optax.adam(0.1)
    sets = frozen | state.param_sets
    for number, one in enumerate((part, algorithm)):
        drawn = train_step.rollout(
            MODEL,
            one,
            sets,
            tabular.empty_prompts(64),
            keys[number],
            jnp.zeros((), jnp.int32),
            max_length=1,
        )
        answers = tuple(samples.responses for samples in drawn.samples)
        feedback = train_step.score(
            one, judge, frozen, tabular.empty_prompts(64), answers
        )
        learned, _ = train_step.update(
            MODEL,
            one,
            optimizer,
            state,
            sets,
            (tabular.empty_prompts(64), drawn.samples, feedback),
        )
        sets = sets | {"ahead": learned.param_sets[POLICY]}
    np.testing.assert_allclose(
        after.param_sets[POLICY]["table"],
        learned.param_sets[POLICY]["table"],
        rtol=0,
        atol=EXACT,
    )


def test_the_adversary_learns_beside_the_policy_with_moments_of_its_own():
    algorithm = ALGORITHMS["enpo"](tau=TAU, step_size=STEP, period=1000)
    step, state, frozen = tiny_step(algorithm)
    assert set(state.opt_states) == {POLICY, "adversary"}
    for _ in range(60):
        state, metrics = step(
            state, frozen, tabular.empty_prompts(256), jax.random.key(0)
        )
    policy, adversary, previous = (
        np.asarray(tabular.response_policy(MODEL, state.param_sets[name], 1))
        for name in (POLICY, "adversary", "previous")
    )
    np.testing.assert_allclose(previous, START, atol=1e-6)
    # What the policy says more often than pi_t, the adversary does too, and less less.
    gained, proposed = np.log(policy / previous), np.log(adversary / previous)
    assert np.abs(gained).max() > 0.01
    np.testing.assert_array_equal(np.argsort(gained), np.argsort(proposed))
    assert float(metrics["adversary/kl"]) > 0
    assert int(state.opt_states["adversary"][0].count) == 60


@pytest.mark.parametrize("sign", [1, -1])
def test_the_adversarys_expected_gradient_is_its_formula(sign, float64):
    # Two proposals from pi_t: the one the policy has moved to further is the best.
    after, b = np.array([0.5, 0.38, 0.12]), 0.3
    algorithm = ALGORITHMS["enpo"](tau=TAU, step_size=STEP, adversary_tau=b, sign=sign)
    (follower,) = algorithm.followers
    adversary = np.array([0.2, 0.5, 0.3])
    sets = sets_at(adversary=adversary) | {POLICY: logits_of(after)}
    judge = table_judge(MODEL, matrices.skew(), np.zeros(3))
    found = exact.expected_gradient(MODEL, follower, judge, sets, 1)["table"][0, 0]
    moved = sign * np.log(after / START)

    def value(logits):
        ratio = jax.nn.log_softmax(logits) - np.log(START)
        total = 0.0
        for i in range(3):
            for j in range(3):
                if i != j:
                    best, worst = (i, j) if moved[i] > moved[j] else (j, i)
                    lead = b * (ratio[best] - ratio[worst])
                    total += START[i] * START[j] * jax.nn.log_sigmoid(lead)
        return -total / (2 * b)

    known = jax.grad(value)(jnp.log(adversary))
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)
    assert np.abs(known).max() > 0.01


def test_the_adversary_has_nothing_to_follow_where_the_policy_has_not_moved():
    algorithm = ALGORITHMS["enpo"](tau=TAU, step_size=STEP)
    (follower,) = algorithm.followers
    log_probs = jnp.log(jnp.array([[0.3], [0.2]]))

    def loss(x):
        one = ScoredSample(
            jnp.ones((2, 1), bool),
            {"adversary": x, "previous": log_probs, POLICY: log_probs},
            log_probs,
        )
        return follower.loss((one, one), Feedback((), ())).loss_B.sum()

    assert float(loss(log_probs)) == 0
    np.testing.assert_array_equal(jax.grad(loss)(log_probs), 0.0)


def test_the_closed_form_adversary_is_the_argmax(float64):
    # q = pi (pi' / pi)^(1/b) maximises E_q[log pi' - log pi] - b KL(q, pi): no other
    # policy does better. Vector: skew after one step from START, b = 0.05.
    after, b = exact_step(matrices.skew(), START), 0.05
    algorithm = ALGORITHMS["enpo_closed_form"](tau=TAU, step_size=STEP, adversary_tau=b)
    sets = {"previous": logits_of(after), "older": logits_of(START)}
    log_adversary = tabular.response_log_probs(
        MODEL, sets, algorithm.speakers[1], tabular.all_responses(MODEL, 1)
    )
    adversary = np.exp(np.asarray(log_adversary))
    # Computed independently (numpy, float64), four decimals.
    np.testing.assert_allclose(adversary, [0.0860, 0.0038, 0.9102], atol=1e-4)

    def value(q):
        return q @ np.log(after / START) - b * solutions.kl(q, START)

    others = np.random.default_rng(0).dirichlet(np.ones(3), size=300)
    assert max(value(q) for q in others) < value(adversary)


@functools.cache
def updates_of(count, clip_range):
    algorithm = ALGORITHMS["self_play"](tau=TAU, clip_range=clip_range)
    step, state, frozen = tiny_step(
        algorithm, optimizer=optax.sgd(3.0), num_updates_per_rollout=count
    )
    after, metrics = step(state, frozen, tabular.empty_prompts(64), jax.random.key(0))
    return np.asarray(after.param_sets[POLICY]["table"])[0, 0], metrics, after


def test_several_updates_go_further_and_are_clipped():
    start = np.log(START)
    once, twice = updates_of(1, 10.0)[0], updates_of(6, 10.0)[0]
    clipped = updates_of(6, 0.01)[0]
    lengths = [np.abs(one - start).max() for one in (once, twice, clipped)]
    assert lengths[1] > 2 * lengths[0]
    assert lengths[2] < 0.9 * lengths[1]
    # One step has been done, however many updates it had.
    assert int(updates_of(6, 10.0)[2].step) == 1


def test_samples_of_an_older_policy_count_for_less():
    _, fresh, _ = updates_of(1, 10.0)
    _, stale, _ = updates_of(6, 10.0)
    assert float(fresh["policy/effective_share"]) == pytest.approx(1.0, abs=1e-5)
    assert float(stale["policy/effective_share"]) < 0.999


def test_the_effective_share_is_the_formula(float64):
    # Two responses with weights 2 and 1/2: (5/4)^2 / (17/8).
    sample = ScoredSample(
        jnp.ones((2, 1), bool),
        {POLICY: jnp.log(jnp.array([[0.4], [0.1]]))},
        jnp.log(jnp.array([[0.2], [0.2]])),
    )
    moments = loss_gradient._weight_moments((sample,), POLICY)
    found = loss_gradient._with_effective_share(
        {k: v.mean() for k, v in moments.items()}
    )
    assert float(found["policy/effective_share"]) == pytest.approx(25 / 34, abs=EXACT)


def test_the_ratio_reweighs_samples_of_another_policy(float64):
    # Inside the clipping range E_p[w A grad log pi] = E_pi[A grad log pi].
    old, new = START, np.array([0.55, 0.33, 0.12])
    payoff = jnp.array([0.2, -0.1, 0.3])

    def direction(drawn_from):
        def loss(logits):
            log_probs = jax.nn.log_softmax(logits)[:, None]
            sample = ScoredSample(
                jnp.ones((3, 1), bool),
                {POLICY: log_probs, REFERENCE: jnp.log(MU)[:, None]},
                jnp.log(drawn_from)[:, None],
            )
            output = losses.policy_gradient(sample, payoff, tau=TAU, clip_range=0.5)
            return jnp.asarray(drawn_from) @ output.loss_B

        return jax.grad(loss)(jnp.log(new))

    np.testing.assert_allclose(direction(old), direction(new), rtol=0, atol=EXACT)


def test_clipping_stops_what_has_gone_far_enough(float64):
    # Weights 1.5 and 0.5, beyond 1 +- 0.2: a gain is not pushed further up nor a loss
    # further down, but both may come back.
    drawn = jnp.log(jnp.array([[0.2], [0.2], [0.2], [0.2]]))
    now = jnp.log(jnp.array([[0.3], [0.3], [0.1], [0.1]]))
    advantage = jnp.array([[1.0], [-1.0], [1.0], [-1.0]])

    def loss(x):
        sample = ScoredSample(jnp.ones((4, 1), bool), {POLICY: x}, drawn)
        return losses.clipped_surrogate(sample, advantage, clip_range=0.2).sum()

    np.testing.assert_allclose(
        jax.grad(loss)(now)[:, 0], [0.0, 1.5, -0.5, 0.0], rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("num_responses", [2, 3, 5])
def test_win_rates_of_a_group_average_to_one_half(num_responses, float64):
    from nlhf_jax.algorithms.policy_gradients import pairs

    rng = np.random.default_rng(num_responses)
    met = pairs(num_responses)
    said = tuple(jnp.asarray(rng.uniform(size=4)) for _ in met)
    for with_itself in (False, True):
        wins = losses.group_win_rates(said, met, num_responses, with_itself=with_itself)
        np.testing.assert_allclose(np.mean(wins, axis=0), 0.5, rtol=0, atol=EXACT)
    # The first response's, by hand.
    alone = [p for p, (i, _) in zip(said, met, strict=True) if i == 0]
    plain = losses.group_win_rates(said, met, num_responses)
    np.testing.assert_allclose(plain[0], np.mean(alone, axis=0), atol=EXACT)
