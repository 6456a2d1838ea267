# SPDX-License-Identifier: Apache-2.0
"""Every registered algorithm against exact games, through its own loss.

A new algorithm is one row of `TABLE`; all tests below then guard it.
"""

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import UserError
from nlhf_jax.evaluation import exact
from nlhf_jax.games import matrices, solutions
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    Feedback,
    LanguageModel,
    Responses,
    Samples,
    ScoredSample,
    Speaker,
)
from tests.battery import all_but

pytestmark = pytest.mark.usefixtures("compiled_quickly")
TAU, EXACT = 0.05, 1e-12
SKEWED = np.array([0.5, 0.3, 0.2])


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """What is known of an algorithm.

    Attributes:
      name: in the registry.
      settings: arguments of its factory.
      claim: `World` -> a scalar whose gradient by the policy is what the algorithm
        claims to ascend, written with whole responses.
      fixed_point: (preference_NN, reward_N, reference_N) -> policy_N of a game of
        one-token responses.
      game: (rng, reward_N) -> a game for which that is known.
    """

    name: str
    settings: dict
    claim: Callable
    fixed_point: Callable
    game: Callable = lambda rng, reward: matrices.random_game(rng, len(reward))

    def make(self):
        """Returns the algorithm."""
        return ALGORITHMS[self.name](**self.settings)


class World(NamedTuple):
    """A game, parameter sets (the policy's carry the gradient), and where they live."""

    model: LanguageModel
    length: int
    game: np.ndarray
    reward: np.ndarray
    sets: dict
    held: dict

    def log_probs(self, *speaker):
        """Returns log p of every response under a speaker that is a constant."""
        choices = tabular.all_responses(self.model, self.length)
        speaker = Speaker(*speaker)
        return tabular.response_log_probs(self.model, self.held, speaker, choices)

    def probs(self, *speaker):
        return jnp.exp(self.log_probs(*speaker))

    def value(self, *speaker):
        """Returns P(y > speaker)."""
        return jnp.asarray(self.game) @ self.probs(*speaker)

    def log_policy(self):
        """Returns log pi of every response, with its gradient."""
        choices = tabular.all_responses(self.model, self.length)
        speaker = Speaker({POLICY: 1.0})
        return tabular.response_log_probs(self.model, self.sets, speaker, choices)


ITSELF, THE_REFERENCE = {POLICY: 1.0}, {REFERENCE: 1.0}


def payoff(opponent=None, anchor=REFERENCE):
    """E_pi[P(y > opponent) or reward] - tau KL(pi, anchor)."""

    def claim(world):
        log_policy = world.log_policy()
        policy, log_anchor = jnp.exp(log_policy), world.log_probs({anchor: 1.0})
        value = world.value(opponent) if opponent else jnp.asarray(world.reward)
        return policy @ (value - TAU * (log_policy - log_anchor))

    return claim


def regression(first, second, values, anchors=None, scale=1 / TAU, alpha=0.0):
    """Half of E[(g(y) - g(y')) (log pi(y) - log pi(y'))], g = value - log(pi/a)/scale.

    `first` and `second` are speakers' arguments, `values` pairs of (weight, opponent).
    """

    def claim(world):
        log_policy = world.log_policy()
        anchor = sum(
            weight * world.log_probs({name: 1.0})
            for name, weight in (anchors or THE_REFERENCE).items()
        )
        g = sum(weight * world.value(opponent) for weight, opponent in values)
        g = jax.lax.stop_gradient(g - (log_policy - anchor) / scale)
        p, q = world.probs(*first), world.probs(*second)
        ascent = (p * (g - q @ g) + q * (g - p @ g)) @ log_policy / 2
        return ascent + alpha / (4 * scale) * p @ log_policy

    return claim


def logistic(second, alpha=0.0, num_candidates=2):
    def claim(world):
        log_policy, log_other = world.log_policy(), world.log_probs(THE_REFERENCE)
        ratio = TAU * (log_policy - log_other)
        h = ratio[:, None] - ratio[None, :]
        game = jnp.asarray(world.game)
        fit = game * jax.nn.log_sigmoid(h) + (1 - game) * jax.nn.log_sigmoid(-h)
        bonus = alpha * world.probs(second) @ log_policy
        drawn = jnp.outer(world.probs(ITSELF), world.probs(second))
        if num_candidates == 3:
            drawn = chosen_of_three(world, ITSELF, by_each_other)
        return ((drawn * fit).sum() - bonus) / (2 * TAU)

    return claim


def chosen_of_three(world, speaker, score):
    """How often (y, y') are the best and the worst of three, [N, N].

    `score(game, three)` rates the three by the game and the draws, the first three of
    which are the candidates.
    """
    size = len(world.game)
    drawn = np.array(list(itertools.product(range(size), repeat=score.num_draws)))
    scores = score(world.game, drawn)
    rows = np.arange(len(drawn))
    best = drawn[rows, scores.argmax(axis=1)]
    worst = drawn[rows, 2 - scores[:, ::-1].argmin(axis=1)]
    weights = world.probs(speaker)[drawn].prod(axis=1)
    return jnp.zeros((size, size)).at[best, worst].add(weights)


def by_a_fourth(game, drawn):
    """Scores three by how they do against a fourth."""
    return game[drawn[:, :3], drawn[:, 3:]]


def by_each_other(game, drawn):
    """Scores three by how they do against the other two."""
    return game[drawn[:, :, None], drawn[:, None, :]].sum(axis=2)


by_a_fourth.num_draws, by_each_other.num_draws = 4, 3


def chosen_regression(world):
    log_policy = world.log_policy()
    anchor = sum(w * world.log_probs({name: 1.0}) for name, w in PROXIMAL.items())
    g = jax.lax.stop_gradient(world.value(OLD) - (log_policy - anchor) / 4.0)
    lead, h = g[:, None] - g[None, :], log_policy[:, None] - log_policy[None, :]
    return (chosen_of_three(world, OLD, by_a_fourth) * lead * h).sum() / 2


def log_ratios(num_responses, step_size):
    def claim(world):
        log_policy, log_old = world.log_policy(), world.log_probs({"previous": 1.0})
        lead = (1 - 1 / num_responses) * (world.value({"previous": 1.0}) - 0.5)
        g = jax.lax.stop_gradient(lead - (log_policy - log_old) / step_size)
        return (jnp.exp(log_old) * g) @ log_policy

    return claim


def larger_of_two(world):
    """Of two rewards the standardised lead is the sign; k3 is taken token by token."""
    log_policy, policy = world.log_policy(), world.probs(ITSELF)
    reward = jnp.asarray(world.reward)
    sign = jnp.sign(reward[:, None] - reward[None, :])
    choices = tabular.all_responses(world.model, world.length)

    def tokens(sets, name):
        return tabular.sampling_log_probs(
            world.model, sets, Speaker({name: 1.0}), choices
        )

    ratio = tokens(world.held, REFERENCE) - tokens(world.sets, POLICY)
    divergence = (jnp.exp(ratio) - ratio - 1).sum(axis=1)
    return (policy * (sign @ policy)) @ log_policy - TAU * policy @ divergence


def best_response_to_mixture(beta):
    def fixed_point(game, reward, reference, tau=TAU):
        del reward
        if beta == 1:
            opponent = reference
        else:  # The mixture is the Nash equilibrium at tau / (1 - beta).
            opponent = solutions.regularised_nash(game, reference, tau / (1 - beta))
        return solutions.best_response(game, reference, tau, opponent)

    return fixed_point


def nash_at_tau(game, reward, reference, tau=TAU):
    del reward
    return solutions.regularised_nash(game, reference, tau)


def gibbs(game, reward, reference, tau=TAU):
    del game
    return solutions.normalise(np.log(reference) + reward / tau)


def nash_of_a_cycle(game, reward, reference):
    """Of three: the margin of the opposite pair, normalised."""
    del reward, reference
    margin = np.array([game[1, 2], game[2, 0], game[0, 1]]) - 0.5
    return margin / margin.sum()


def indifferent(game, reward, reference):
    """GRPO's with two responses: pi(y) (s(y) - tau) + tau mu(y) = 0 for every y.

    s(y) = P(r < r(y)) - P(r > r(y)), so the responses are solved from the best one on.
    """
    del game
    order, above, found = np.argsort(-reward), 0.0, np.zeros(3)
    for y in order:
        # s(y) = (1 - above - p) - above; p (tau - 1 + 2 above + p) = tau mu.
        b = TAU - 1 + 2 * above
        found[y] = (-b + np.sqrt(b * b + 4 * TAU * reference[y])) / 2
        above += found[y]
    return found


def bradley_terry(rng, reward):
    del rng
    return matrices.bradley_terry(reward)


def cycle(rng, reward):
    del reward
    return matrices.cyclic(*rng.uniform(0.1, 0.5, size=3))


def mixture(beta):
    return {k: w for k, w in ((POLICY, 1 - beta), (REFERENCE, beta)) if w}


STEP = {"tau": TAU, "step_size": 4.0}
PROXIMAL = {REFERENCE: 4.0 * TAU, "previous": 1 - 4.0 * TAU}
OLD, OLDER = {"previous": 1.0}, {"older": 1.0}
CLOSED_FORM = {"previous": 2.0, "older": -1.0}


def proximal(first=OLD, second=OLD, values=((1.0, OLD),), **more):
    more = {"anchors": PROXIMAL, "scale": 4.0} | more
    return regression((first,), (second,), values, **more)


def own_mixture(name, beta):
    settings = {"tau": TAU, "beta": beta}
    m = mixture(beta)
    claim = {
        "nash_md_pg": payoff(m),
        "ipo_md": regression((m,), (m,), [(1.0, m)]),
    }
    return Row(name, settings, claim[name], best_response_to_mixture(beta))


HOT = (ITSELF, 2.0)
TABLE = [
    own_mixture("nash_md_pg", 0.25),
    own_mixture("nash_md_pg", 0.0),
    own_mixture("ipo_md", 0.25),
    own_mixture("ipo_md", 1.0),
    Row("self_play", {"tau": TAU}, payoff(ITSELF), nash_at_tau),
    Row("spo", {"tau": TAU, "num_responses": 3}, payoff(ITSELF), nash_at_tau),
    Row(
        "best_response",
        {"tau": TAU},
        payoff(THE_REFERENCE),
        best_response_to_mixture(1),
    ),
    Row(
        "nash_ema_pg",
        {"tau": TAU, "decay": 0.9},
        payoff({"average": 1.0}),
        nash_at_tau,
    ),
    Row("nash_mirror_prox", {"tau": TAU}, payoff({"ahead": 1.0}), nash_at_tau),
    Row(
        "online_ipo",
        {"tau": TAU},
        regression((ITSELF,), (ITSELF,), [(1.0, ITSELF)]),
        nash_at_tau,
    ),
    Row("inpo", STEP, proximal(), nash_at_tau),
    Row("iterative_nlhf", STEP | {"num_comparators": 2}, proximal(), nash_at_tau),
    Row("iterative_nlhf", STEP | {"num_candidates": 3}, chosen_regression, nash_at_tau),
    Row(
        "enpo",
        STEP | {"alpha": 0.0, "num_comparators": 1},
        proximal(second={"adversary": 1.0}),
        nash_at_tau,
    ),
    Row(
        "enpo",
        STEP | {"alpha": 0.3, "num_comparators": 1},
        proximal(second={"adversary": 1.0}, alpha=0.3),
        nash_at_tau,
    ),
    Row(
        "enpo_closed_form",
        STEP | {"alpha": 0.3, "adversary_tau": 0.5, "num_comparators": 1},
        proximal(second=CLOSED_FORM, alpha=0.3),
        nash_at_tau,
    ),
    Row(
        "egpo",
        {"tau": TAU, "temperature": 2.0},
        regression(HOT, HOT, [(1.0, {"ahead": 1.0})]),
        nash_at_tau,
    ),
    Row("onpo", STEP, proximal(values=((2.0, OLD), (-1.0, OLDER))), nash_at_tau),
    Row(
        "onpo",
        {"step_size": 4.0},
        proximal(values=((2.0, OLD), (-1.0, OLDER)), anchors=OLD),
        nash_of_a_cycle,
        cycle,
    ),
    Row(
        "sppo",
        {"step_size": 4.0, "num_responses": 3},
        log_ratios(3, 4.0),
        nash_of_a_cycle,
        cycle,
    ),
    Row("mpo", {"tau": TAU}, payoff(ITSELF, "magnet"), nash_of_a_cycle, cycle),
    Row(
        "comal",
        STEP,
        proximal(anchors={"magnet": 4.0 * TAU, "previous": 1 - 4.0 * TAU}),
        nash_of_a_cycle,
        cycle,
    ),
    Row("reward_pg", {"tau": TAU}, payoff(), gibbs),
    Row("rloo", {"tau": TAU, "num_responses": 3}, payoff(), gibbs),
    Row("grpo", {"tau": TAU, "num_responses": 2}, larger_of_two, indifferent),
    Row("online_dpo", {"tau": TAU}, logistic(ITSELF), gibbs, bradley_terry),
    Row(
        "online_dpo",
        {"tau": TAU, "num_candidates": 3},
        logistic(ITSELF, num_candidates=3),
        gibbs,
        bradley_terry,
    ),
    Row(
        "xpo", {"tau": TAU, "alpha": 0.0}, logistic(THE_REFERENCE), gibbs, bradley_terry
    ),
]
# With a bonus that moves the fixed point where no closed form is known.
BONUS = Row("xpo", {"tau": TAU, "alpha": 0.02}, logistic(THE_REFERENCE, 0.02), gibbs)
each_algorithm = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
# One row for each name, for tests that take long and do not depend on the settings. The
# suite runs one of each shape: a player beside the policy, two half-steps, an average,
# groups, pairs.
SHORT = ("self_play", "nash_md_pg", "nash_ema_pg", "grpo", "online_dpo", "egpo", "enpo")
each_name = pytest.mark.parametrize(
    "row",
    all_but(SHORT, {row.name: row for row in TABLE}.values(), lambda row: row.name),
    ids=lambda row: row.name,
)


def test_every_registered_algorithm_has_a_row():
    assert {row.name for row in TABLE} == set(ALGORITHMS)


def sets_of(algorithm, make):
    """Returns a value of `make(name)` for every set but the reference's judges."""
    names = (POLICY, REFERENCE, *algorithm.derived_sets, *algorithm.lookaheads)
    return {name: make(name) for name in names}


@pytest.mark.parametrize("row", [*TABLE, BONUS], ids=lambda row: row.name)
@pytest.mark.parametrize("ends", all_but([(2, 1)], [(1, -1), (2, 1), (3, 0)]), ids=str)
def test_the_expected_gradient_is_the_claimed_one(row, ends, float64):
    algorithm, (length, eos_id) = row.make(), ends
    # What K speakers say together is enumerated, so long responses need a small V.
    vocab_size = 3 if len(algorithm.speakers) == 2 else 2
    model = tabular.tabular_model(vocab_size, length, eos_id=eos_id)
    keys = iter(jax.random.split(jax.random.key(length), 9))
    sets = sets_of(algorithm, lambda name: model.init(next(keys)))
    size = len(tabular.all_responses(model, length).tokens_BT)
    rng = np.random.default_rng(0)
    game, reward = matrices.random_game(rng, size), rng.normal(size=size)
    judge = table_judge(model, game, reward)
    found = exact.expected_gradient(model, algorithm, judge, sets, length)

    def claim(params):
        world = World(model, length, game, reward, sets | {POLICY: params}, sets)
        return row.claim(world)

    claimed = jax.jit(jax.grad(claim))(sets[POLICY])
    np.testing.assert_allclose(found["table"], -claimed["table"], atol=EXACT)
    assert np.abs(claimed["table"]).max() > 1e-5


@functools.cache
def one_token_gradients(row):
    """Returns the expected gradient of a row of the table, as a compiled function."""
    model, algorithm = tabular.tabular_model(3, 1), row.make()

    @jax.jit
    def gradient(sets, game, reward):
        judge = table_judge(model, game, reward)
        return exact.expected_gradient(model, algorithm, judge, sets, 1)["table"]

    return gradient


def one_token_gradient(row, policy, reference, game, reward):
    sets = sets_of(row.make(), lambda name: tabular.table(np.log(policy)))
    sets |= {REFERENCE: tabular.table(np.log(reference))}
    compiled = one_token_gradients(row)
    return compiled(*jax.tree.map(jnp.asarray, (sets, game, reward)))


@each_algorithm
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_zero_at_the_documented_fixed_point(row, seed, float64):
    rng = np.random.default_rng(seed)
    reward = 0.1 * rng.normal(size=3)
    game = row.game(rng, reward)
    point = row.fixed_point(game, reward, SKEWED)
    gradient = one_token_gradient(row, point, SKEWED, game, reward)
    np.testing.assert_allclose(gradient, 0.0, atol=EXACT)


def known_game(row):
    """The skew game, or the one of row's kind nearest to it, with small rewards."""
    reward = np.array([0.06, -0.02, 0.04])
    if row.game is bradley_terry:
        return matrices.bradley_terry(reward), reward
    return matrices.skew(), reward


@each_algorithm
def test_the_gradient_is_not_zero_beside_the_fixed_point(row, float64):
    game, reward = known_game(row)
    point = row.fixed_point(game, reward, SKEWED)
    for move in 0.01 * np.eye(3):
        beside = solutions.normalise(np.log(point) + move)
        gradient = one_token_gradient(row, beside, SKEWED, game, reward)
        assert np.abs(gradient).max() > 1e-5


@each_algorithm
def test_the_fixed_point_is_found_from_the_gradient_alone(row):
    game, reward = known_game(row)
    known = row.fixed_point(game, reward, SKEWED)
    ((found, move),) = exact.fixed_points(
        tabular.tabular_model(3, 1),
        row.make(),
        [(game, reward)],
        {REFERENCE: tabular.table(np.log(SKEWED))},
        tabular.table(np.log(SKEWED)),
        1,
    )
    assert move < EXACT
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)


@each_algorithm
def test_the_gradient_is_not_zero_at_the_reference(row, float64):
    utility = np.array([0.1, 0.9, 0.4])
    gradient = one_token_gradient(
        row, SKEWED, SKEWED, matrices.linear_utility(utility), utility
    )
    assert np.abs(gradient).max() > 0.01


def test_a_fixed_beta_is_not_the_nash_at_tau(float64):
    row, game = TABLE[0], matrices.skew()
    nash = solutions.regularised_nash(game, SKEWED, TAU)
    gradient = one_token_gradient(row, nash, SKEWED, game, np.zeros(3))
    assert np.abs(gradient).max() > 1e-4


# The skew game, reference (.5, .3, .2), tau .05 and policy logits (.3, -.1, .2), by
# weight of the reference; computed independently (numpy, float64, twelve decimals or
# more). The opponent, P(y > opponent) - 1/2 - tau lr(y), the ascent direction, and what
# the direction would be if the opponent were differentiated as well.
LOGITS = np.array([0.3, -0.1, 0.2])
KNOWN = {
    0.0: (
        (0.38832576801688, 0.26030254669390, 0.35137168528922),
        (-0.04071282110889, -0.03543109112366, 0.06229111428106),
        (-0.01458843377915, -0.00840407183632, 0.02299250561547),
        (0.006129132812, 0.002666070975, -0.008795203732),
    ),
    0.125: (
        (0.40352467091312, 0.26676934940661, 0.32970597968027),
        (-0.03291974888367, -0.04063744226380, 0.06620410487866),
        (-0.01274499938947, -0.01055216381893, 0.02329716320839),
        (0.005016915994, -0.001336138977, -0.003680777072),
    ),
    0.25: (
        (0.41844329857044, 0.27282620685027, 0.30873049457930),
        (-0.02541573186464, -0.04571871630536, 0.07007400743149),
        (-0.01097698780105, -0.01264301352354, 0.02362000132459),
        (0.003884219169, -0.005168065587, 0.001283846474),
    ),
    0.5: (
        (0.44726791237655, 0.28365109941894, 0.26908098820451),
        (-0.01135590143847, -0.05544858970406, 0.07763890231645),
        (-0.00768606013705, -0.01662955923102, 0.02431561936807),
        (0.001654856363, -0.012240659153, 0.010585802845),
    ),
    1.0: (
        (0.5, 0.3, 0.2),
        (0.01263817513909, -0.07290310604921, 0.09182363854539),
        (-0.00215789382367, -0.02371309282800, 0.02587098665167),
        (-0.002157893824, -0.023713092828, 0.025870986652),
    ),
}
SKEW_SETS = {POLICY: tabular.table(LOGITS), REFERENCE: tabular.table(np.log(SKEWED))}
each_beta = pytest.mark.parametrize("beta", KNOWN)


def nash_md(beta):
    return ALGORITHMS["nash_md_pg"](tau=0.05, beta=beta)


@each_beta
def test_nash_md_answers_the_known_mixture(beta, float64):
    model = tabular.tabular_model(3, 1)
    opponent = tabular.response_log_probs(
        model, SKEW_SETS, nash_md(beta).speakers[1], tabular.all_responses(model, 1)
    )
    np.testing.assert_allclose(np.exp(opponent), KNOWN[beta][0], rtol=0, atol=EXACT)


@each_beta
def test_nash_md_weighs_each_response_by_the_known_advantage(beta, float64):
    # Every response once, judged against the whole opponent at once: the loss is
    # linear in the judge's answer.
    log_policy = jax.nn.log_softmax(LOGITS)[:, None]
    answers = Feedback((jnp.asarray(matrices.skew() @ np.array(KNOWN[beta][0])),), ())

    def loss(x):
        every = scored(x, np.log(SKEWED)[:, None], np.ones((3, 1), bool))
        return nash_md(beta).loss((every,), answers).loss_B.sum()

    advantage = -jax.grad(loss)(log_policy)[:, 0]
    np.testing.assert_allclose(advantage, KNOWN[beta][1], rtol=0, atol=EXACT)


@each_beta
def test_nash_md_follows_the_direction_with_a_constant_opponent(beta, float64):
    policy = solutions.normalise(LOGITS)
    assert abs(solutions.kl(policy, SKEWED) - 0.062906139468) < EXACT
    row = own_mixture("nash_md_pg", beta)
    gradient = one_token_gradient(row, policy, SKEWED, matrices.skew(), np.zeros(3))
    np.testing.assert_allclose(-gradient[0, 0], KNOWN[beta][2], rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    "shift, variance", [(0.0, 0.0195779390075), (0.5, 0.184458754896)]
)
def test_the_half_in_the_payoff_is_free_and_quiet(shift, variance, float64):
    # Trace of the covariance of one sample's gradient at beta 0.25, computed
    # independently (numpy, float64). A judge that is half a point too kind has the same
    # effect as leaving 1/2 = P(y > y) out: the same mean, nine times the variance.
    policy = solutions.normalise(LOGITS)
    first, second = np.divmod(np.arange(9), 3)
    weight = policy[first] * np.array(KNOWN[0.25][0])[second]
    kind = jnp.asarray(matrices.skew()[first, second] + shift)

    def loss(logits, y, preference):
        log_prob = jax.nn.log_softmax(logits)[y].reshape(1, 1)
        one = scored(log_prob, np.log(SKEWED)[y].reshape(1, 1), np.ones((1, 1), bool))
        return nash_md(0.25).loss((one,), Feedback((preference[None],), ())).loss_B[0]

    drawn = [
        -np.asarray(jax.grad(loss)(jnp.asarray(LOGITS), y, preference))
        for y, preference in zip(first, kind, strict=True)
    ]
    mean = weight @ np.array(drawn)
    np.testing.assert_allclose(mean, KNOWN[0.25][2], rtol=0, atol=EXACT)
    found = weight @ np.sum(np.square(drawn), axis=1) - mean @ mean
    np.testing.assert_allclose(found, variance, rtol=0, atol=EXACT)


@each_beta
def test_an_opponent_that_is_differentiated_turns_the_direction(beta, float64):
    model, speaker = tabular.tabular_model(3, 1), nash_md(beta).speakers[1]

    def value(params):
        sets, choices = SKEW_SETS | {POLICY: params}, tabular.all_responses(model, 1)
        log_policy = tabular.response_log_probs(
            model, sets, Speaker({POLICY: 1.0}), choices
        )
        opponent = tabular.response_log_probs(model, sets, speaker, choices)
        policy = jnp.exp(log_policy)
        divergence = policy @ (log_policy - np.log(SKEWED))
        return policy @ matrices.skew() @ jnp.exp(opponent) - 0.05 * divergence

    wrong = jax.grad(value)({"table": jnp.asarray(SKEW_SETS[POLICY]["table"])})
    np.testing.assert_allclose(wrong["table"][0, 0], KNOWN[beta][3], atol=EXACT)
    agreement = np.dot(KNOWN[beta][2], KNOWN[beta][3])
    assert (agreement > 0) == (beta > 0.125), "wrong by sign for a small beta"


def scored(log_probs, reference, mask):
    return ScoredSample(
        jnp.asarray(mask),
        {POLICY: jnp.asarray(log_probs), REFERENCE: jnp.asarray(reference)},
        jax.lax.stop_gradient(jnp.asarray(log_probs)),
    )


def losses_of(row, mask, log_probs, others, preference=0.5, reward=0.0):
    """Returns the loss where every sample has these log-probabilities."""
    algorithm, mask = row.make(), jnp.asarray(mask)
    under = dict.fromkeys(algorithm.scored_under, jnp.asarray(others))
    sample = ScoredSample(
        mask, {POLICY: log_probs} | under, jax.lax.stop_gradient(log_probs)
    )
    feedback = Feedback(
        tuple(jnp.full(len(mask), preference) for _ in algorithm.comparisons),
        tuple(jnp.full(len(mask), reward) for _ in algorithm.ratings),
    )
    drawn = Samples(Responses(jnp.zeros(mask.shape, int), mask), {}, log_probs)
    _, feedback = algorithm.select((drawn,) * len(algorithm.speakers), feedback)
    return algorithm.loss((sample,) * len(algorithm.trained_on), feedback).loss_B


WITHOUT_BONUS = [row for row in TABLE if not row.settings.get("alpha")]


@pytest.mark.parametrize("row", WITHOUT_BONUS, ids=lambda row: row.name)
def test_a_tie_at_the_reference_moves_nothing_in_any_sample(row):
    log_probs = np.log(np.full((2, 3), 0.3))

    def loss(x):
        mask, held = np.ones((2, 3), bool), jax.lax.stop_gradient(x)
        return losses_of(row, mask, x, held, preference=0.5, reward=0.5).sum()

    gradient = jax.grad(loss)(jnp.asarray(log_probs))
    np.testing.assert_array_equal(gradient, 0.0)


@each_algorithm
def test_what_lies_behind_the_mask_changes_nothing(row):
    rng = np.random.default_rng(0)
    log_probs, reference = -rng.uniform(size=(2, 2, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)

    def loss_and_gradient(poison):
        dirty, others = (
            np.where(mask, clean, poison).astype(np.float32)
            for clean in (log_probs, reference)
        )

        def loss(x):
            return losses_of(row, mask, x, others, preference=0.8, reward=0.3).sum()

        return jax.value_and_grad(loss)(jnp.asarray(dirty))

    clean_loss, clean_gradient = loss_and_gradient(0.0)
    dirty_loss, dirty_gradient = loss_and_gradient(-1e4)
    assert clean_loss == dirty_loss
    np.testing.assert_array_equal(clean_gradient, dirty_gradient)
    np.testing.assert_array_equal(np.asarray(dirty_gradient)[~mask], 0.0)


# What every argument of the family is refused with.
BAD = {
    "tau": (-0.1, float("nan"), -float("inf")),
    "step_size": (0.0, -1.0, 1.01 / TAU),
    "decay": (-0.1, 1.1),
    "alpha": (-1e-3,),
    "adversary_tau": (0.0,),
    "sign": (0, 2),
    "temperature": (0.0,),
    "clip_range": (0.0, -0.2),
    "num_responses": (1, -3),
    "num_comparators": (0,),
    "num_candidates": (1, 0),
    "inner_gap": (-0.1, float("nan")),
    "num_proposals": (1,),
    "period": (0, -1),
    "magnet_period": (0,),
}


@each_algorithm
def test_bad_arguments_are_refused(row):
    parameters = inspect.signature(ALGORITHMS[row.name]).parameters
    for name in set(parameters) - {"beta"}:
        for value in BAD[name]:
            if name == "step_size" and value > 1 and not row.settings.get("tau"):
                continue  # without tau there is no largest step
            shown = re.escape(f"{value!r}")
            with pytest.raises(UserError, match=f"{name} must be .* got {shown}"):
                ALGORITHMS[row.name](**row.settings | {name: value})


@pytest.mark.parametrize("beta", [-0.1, 1.5])
def test_a_bad_beta_is_refused(beta):
    with pytest.raises(UserError, match=r"beta must be in \[0"):
        ALGORITHMS["nash_md_pg"](tau=TAU, beta=beta)


def test_opponents_of_weight_zero_cost_nothing():
    for beta, names in (
        (0.0, {POLICY}),
        (1.0, {REFERENCE}),
        (0.5, {POLICY, REFERENCE}),
    ):
        opponent = ALGORITHMS["nash_md_pg"](tau=TAU, beta=beta).speakers[1]
        assert set(opponent.weights) == names
