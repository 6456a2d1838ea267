# SPDX-License-Identifier: Apache-2.0
"""Every registered algorithm against exact games, through its own loss.

A new algorithm is one row of `TABLE`; all tests below then guard it.
"""

import dataclasses
from collections.abc import Callable

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
from nlhf_jax.types import POLICY, REFERENCE, Feedback, ScoredSample, Speaker

TAU, EXACT = 0.05, 1e-12
SKEWED = np.array([0.5, 0.3, 0.2])


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of an algorithm.

    Attributes:
      settings: arguments of its factory.
      beta: weight of the reference in its opponent; None where it has no opponent.
      fixed_point: (preference_NN, reward_N, reference_N, tau) -> policy_N, in closed
        form for one-token responses; for longer ones too where beta is 0, 1 or None.
    """

    name: str
    settings: dict
    beta: float | None
    fixed_point: Callable


def best_response_to_mixture(beta):
    def fixed_point(game, reward, reference, tau=TAU):
        del reward
        if beta == 1:
            opponent = reference
        else:  # The mixture is the Nash equilibrium at tau / (1 - beta).
            opponent = solutions.regularised_nash(game, reference, tau / (1 - beta))
        return solutions.best_response(game, reference, tau, opponent)

    return fixed_point


def gibbs(game, reward, reference, tau=TAU):
    del game
    return solutions.normalise(np.log(reference) + reward / tau)


TABLE = [
    Row("nash_md_pg", {"tau": TAU, "beta": 0.25}, 0.25, best_response_to_mixture(0.25)),
    Row("nash_md_pg", {"tau": TAU, "beta": 0.0}, 0.0, best_response_to_mixture(0.0)),
    Row("self_play", {"tau": TAU}, 0.0, best_response_to_mixture(0.0)),
    Row("best_response", {"tau": TAU}, 1.0, best_response_to_mixture(1.0)),
    Row("reward_pg", {"tau": TAU}, None, gibbs),
]
each_algorithm = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


def test_every_registered_algorithm_has_a_row():
    assert {row.name for row in TABLE} == set(ALGORITHMS)


def objective(row, params, constants, game, reward, model, length):
    """The exact function whose gradient the algorithm claims to ascend."""
    choices = tabular.all_responses(model, length)

    def log_probs(sets, weights):
        return tabular.response_log_probs(model, sets, Speaker(weights), choices)

    log_policy = log_probs({POLICY: params}, {POLICY: 1.0})
    log_reference = log_probs(constants, {REFERENCE: 1.0})
    policy = jnp.exp(log_policy)
    if row.beta is None:
        payoff = policy @ jnp.asarray(reward)
    else:
        weights = {POLICY: 1 - row.beta, REFERENCE: row.beta}
        # The opponent is built from constants only.
        opponent = jnp.exp(log_probs(constants, weights))
        payoff = policy @ (jnp.asarray(game) @ opponent)
    return payoff - TAU * jnp.sum(policy * (log_policy - log_reference))


@each_algorithm
@pytest.mark.parametrize("length, eos_id", [(1, -1), (2, -1), (2, 1), (3, 0)])
def test_the_expected_gradient_is_that_of_the_objective(row, length, eos_id, float64):
    model = tabular.tabular_model(3, length, eos_id=eos_id)
    keys = jax.random.split(jax.random.key(length))
    sets = {POLICY: model.init(keys[0]), REFERENCE: model.init(keys[1])}
    size = len(tabular.all_responses(model, length).tokens_BT)
    rng = np.random.default_rng(0)
    game, reward = matrices.random_game(rng, size), rng.normal(size=size)
    algorithm = ALGORITHMS[row.name](**row.settings)
    judge = table_judge(model, game, reward)
    found = exact.expected_gradient(model, algorithm, judge, sets, length)
    claimed = jax.jit(
        jax.grad(
            lambda params: objective(row, params, sets, game, reward, model, length)
        )
    )(sets[POLICY])
    np.testing.assert_allclose(found["table"], -claimed["table"], atol=EXACT)
    assert np.abs(claimed["table"]).max() > 1e-3


def one_token_gradient(row, policy, reference, game, reward):
    model = tabular.tabular_model(3, 1)
    sets = {
        POLICY: tabular.table(np.log(policy)),
        REFERENCE: tabular.table(np.log(reference)),
    }
    judge = table_judge(model, game, reward)
    algorithm = ALGORITHMS[row.name](**row.settings)
    return exact.expected_gradient(model, algorithm, judge, sets, 1)["table"]


@each_algorithm
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_zero_at_the_documented_fixed_point(row, seed, float64):
    rng = np.random.default_rng(seed)
    game, reward = matrices.random_game(rng, 3), 0.1 * rng.normal(size=3)
    point = row.fixed_point(game, reward, SKEWED)
    gradient = one_token_gradient(row, point, SKEWED, game, reward)
    np.testing.assert_allclose(gradient, 0.0, atol=EXACT)


@each_algorithm
def test_the_gradient_is_not_zero_beside_the_fixed_point(row, float64):
    game, reward = matrices.skew(), np.array([0.06, -0.02, 0.04])
    point = row.fixed_point(game, reward, SKEWED)
    for move in 0.01 * np.eye(3):
        beside = solutions.normalise(np.log(point) + move)
        gradient = one_token_gradient(row, beside, SKEWED, game, reward)
        assert np.abs(gradient).max() > 1e-5


@each_algorithm
def test_the_fixed_point_is_found_from_the_gradient_alone(row):
    game, reward = matrices.skew(), np.array([0.06, -0.02, 0.04])
    known = row.fixed_point(game, reward, SKEWED)
    ((found, move),) = exact.fixed_points(
        tabular.tabular_model(3, 1),
        ALGORITHMS[row.name](**row.settings),
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
    row = Row("nash_md_pg", {"tau": 0.05, "beta": beta}, beta, gibbs)
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
    )


def losses_of(row, samples, preference=0.5, reward=0.0):
    algorithm = ALGORITHMS[row.name](**row.settings)
    batch = samples[0].mask_BT.shape[0]
    feedback = Feedback(
        tuple(jnp.full(batch, preference) for _ in algorithm.comparisons),
        tuple(jnp.full(batch, reward) for _ in algorithm.ratings),
    )
    return algorithm.loss(samples[: len(algorithm.trained_on)], feedback)


@each_algorithm
def test_a_tie_at_the_reference_moves_nothing_in_any_sample(row):
    log_probs = np.log(np.full((2, 3), 0.3))
    mask = np.ones((2, 3), bool)

    def loss(x):
        one = ScoredSample(jnp.asarray(mask), {POLICY: x, REFERENCE: x + 0.0})
        return losses_of(row, (one, one), preference=0.5, reward=0.7).loss_B.sum()

    gradient = jax.grad(loss)(jnp.asarray(log_probs))
    np.testing.assert_array_equal(gradient, 0.0)


@each_algorithm
def test_what_lies_behind_the_mask_changes_nothing(row):
    rng = np.random.default_rng(0)
    log_probs, reference = -rng.uniform(size=(2, 2, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)

    def loss_and_gradient(poison):
        dirty = np.where(mask, log_probs, poison).astype(np.float32)

        def loss(x):
            one = ScoredSample(
                jnp.asarray(mask),
                {POLICY: x, REFERENCE: jnp.asarray(np.where(mask, reference, poison))},
            )
            return losses_of(row, (one, one), preference=0.8, reward=0.3).loss_B.sum()

        return jax.value_and_grad(loss)(jnp.asarray(dirty))

    clean_loss, clean_gradient = loss_and_gradient(0.0)
    dirty_loss, dirty_gradient = loss_and_gradient(-1e4)
    assert clean_loss == dirty_loss
    np.testing.assert_array_equal(clean_gradient, dirty_gradient)
    np.testing.assert_array_equal(np.asarray(dirty_gradient)[~mask], 0.0)


@each_algorithm
@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf") * -1])
def test_a_bad_tau_is_refused(row, tau):
    with pytest.raises(UserError, match=r"tau must be in \[0"):
        ALGORITHMS[row.name](**row.settings | {"tau": tau})


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
