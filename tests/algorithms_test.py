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
      fixed_point: (preference_NN, reward_N, reference_N) -> policy_N.
    """

    name: str
    settings: dict
    beta: float | None
    fixed_point: Callable


def best_response_to_mixture(beta):
    def fixed_point(game, reward, reference):
        del reward
        if beta == 1:
            opponent = reference
        else:  # The mixture is the Nash equilibrium at tau / (1 - beta).
            opponent = solutions.regularised_nash(game, reference, TAU / (1 - beta))
        return solutions.best_response(game, reference, TAU, opponent)

    return fixed_point


def gibbs(game, reward, reference):
    del game
    return solutions.normalise(np.log(reference) + reward / TAU)


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
@pytest.mark.parametrize("length", [1, 2])
def test_the_expected_gradient_is_that_of_the_objective(row, length, float64):
    model = tabular.tabular_model(3, length)
    keys = jax.random.split(jax.random.key(length))
    sets = {POLICY: model.init(keys[0]), REFERENCE: model.init(keys[1])}
    rng = np.random.default_rng(0)
    game, reward = matrices.random_game(rng, 3**length), rng.normal(size=3**length)
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


# Ascent directions computed independently (numpy, float64, twelve decimals) for the
# skew game, reference (.5, .3, .2), tau .05 and policy logits (.3, -.1, .2).
KNOWN_DIRECTIONS = {
    0.0: (-0.014588433779, -0.008404071836, 0.022992505615),
    0.25: (-0.010976987801, -0.012643013524, 0.023620001325),
    1.0: (-0.002157893824, -0.023713092828, 0.025870986652),
}


@pytest.mark.parametrize("beta", KNOWN_DIRECTIONS)
def test_nash_md_follows_the_direction_with_a_constant_opponent(beta, float64):
    row = Row("nash_md_pg", {"tau": 0.05, "beta": beta}, beta, gibbs)
    policy = solutions.normalise(np.array([0.3, -0.1, 0.2]))
    gradient = one_token_gradient(row, policy, SKEWED, matrices.skew(), np.zeros(3))
    np.testing.assert_allclose(-gradient[0, 0], KNOWN_DIRECTIONS[beta], atol=1e-12)


def test_the_kl_gradient_is_the_sequence_level_one(float64):
    # Two tokens of two: the true gradient of KL(pi, mu), twelve decimals. Multiplying
    # each log-ratio with its own token only would give .1373 for the first token.
    model = tabular.tabular_model(2, 2)
    sets = {
        POLICY: tabular.table([0.4, -0.2], [[1.0, -0.5], [-0.3, 0.8]]),
        REFERENCE: tabular.table(np.log([0.5, 0.5]), np.log([[0.7, 0.3], [0.6, 0.4]])),
    }
    judge = table_judge(model, np.full((4, 4), 0.5), np.zeros(4))
    algorithm = ALGORITHMS["self_play"](tau=1.0)
    found = exact.expected_gradient(model, algorithm, judge, sets, 2)["table"]
    known = [0.087672735173, 0.062853484642, -0.099952849586]
    np.testing.assert_allclose(
        [found[0, 0, 0], found[1, 0, 0], found[1, 1, 0]], known, atol=1e-12
    )


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
