# SPDX-License-Identifier: Apache-2.0
"""The step: keys, microbatches, compilation, frozen weights, and learning a game."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import loss_gradient, train_step
from nlhf_jax.games import matrices, solutions
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import POLICY, REFERENCE, Feedback, Responses, Samples
from tests.algorithms_test import TABLE, Row, each_name

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ROWS = {row.name: row for row in TABLE}.values()
LENGTH, VOCAB = 2, 3
SIZE = VOCAB**LENGTH


def setting(row, *, game=None, num_microbatches=1, optimizer=None, seed=0):
    """Returns (step function, first state, frozen sets) on a tabular model."""
    rng = np.random.default_rng(seed)
    game = matrices.random_game(rng, SIZE) if game is None else game
    model = tabular.tabular_model(VOCAB, LENGTH)
    judge = table_judge(model, game, rng.normal(size=SIZE))
    algorithm = row.make()
    optimizer = optimizer or optax.sgd(0.5)
    params = model.init(jax.random.key(seed))
    frozen = {REFERENCE: model.init(jax.random.key(seed + 1))}
    step = train_step.make_train_step(
        model,
        algorithm,
        judge,
        optimizer,
        max_length=LENGTH,
        num_microbatches=num_microbatches,
    )
    return step, train_step.init_state(params, algorithm, optimizer), frozen


@functools.cache
def compiled_setting(name):
    """Returns a jitted step, which tests share, and its first state and frozen sets."""
    (row,) = (row for row in ROWS if row.name == name)
    step, state, frozen = setting(row)
    return jax.jit(step), state, frozen


@each_name
def test_it_compiles_once_and_depends_on_key_and_step_only(row):
    compiled, state, frozen = compiled_setting(row.name)
    prompts = tabular.empty_prompts(64)
    first, metrics = compiled(state, frozen, prompts, jax.random.key(1))
    again, _ = compiled(state, frozen, prompts, jax.random.key(1))
    other, _ = compiled(state, frozen, prompts, jax.random.key(2))
    later, _ = compiled(first, frozen, prompts, jax.random.key(1))
    assert compiled._cache_size() == 1
    assert int(first.step) == 1 and int(later.step) == 2
    jax.tree.map(np.testing.assert_array_equal, first, again)
    table = first.param_sets[POLICY]["table"]
    assert np.abs(table - other.param_sets[POLICY]["table"]).max() > 1e-4
    assert all(np.isfinite(value).all() for value in metrics.values())
    jax.tree.map(_assert_alike, first, state)


def _assert_alike(after, before):
    assert (after.shape, after.dtype) == (before.shape, before.dtype)


def some_examples(algorithm, rng, batch=8):
    """Returns prompts, selected samples and answers, all of them made up."""
    samples = tuple(
        Samples(
            Responses(
                jnp.asarray(rng.integers(0, VOCAB, size=(batch, LENGTH))),
                jnp.ones((batch, LENGTH), bool),
            ),
            {},
            -jnp.asarray(rng.uniform(size=(batch, LENGTH))),
        )
        for _ in algorithm.speakers
    )
    feedback = Feedback(
        tuple(jnp.asarray(rng.uniform(size=batch)) for _ in algorithm.comparisons),
        tuple(jnp.asarray(rng.normal(size=batch)) for _ in algorithm.ratings),
    )
    return (tabular.empty_prompts(batch), *algorithm.select(samples, feedback))


@each_name
def test_microbatches_give_the_gradient_of_the_whole(row, float64):
    rng, algorithm = np.random.default_rng(0), row.make()
    model = tabular.tabular_model(VOCAB, LENGTH)
    for part in algorithm.parts:
        names = {POLICY, REFERENCE, part.trains, *part.scored_under}
        sets = {
            name: model.init(jax.random.key(number))
            for number, name in enumerate(sorted(names))
        }
        examples = some_examples(part, rng)
        (whole, whole_metrics), (cut, cut_metrics) = (
            jax.jit(
                functools.partial(
                    loss_gradient.gradient, model, part, num_microbatches=number
                )
            )(sets[part.trains], sets, examples)
            for number in (1, 4)
        )
        assert np.abs(whole["table"]).max() > 1e-3
        np.testing.assert_allclose(whole["table"], cut["table"], rtol=0, atol=1e-12)
        for name, value in whole_metrics.items():
            np.testing.assert_allclose(
                value, cut_metrics[name], rtol=1e-12, err_msg=name
            )


@each_name
def test_frozen_weights_are_arguments_of_the_compiled_step(row):
    step, state, frozen = compiled_setting(row.name)
    closed = jax.make_jaxpr(step)(
        state, frozen, tabular.empty_prompts(64), jax.random.key(0)
    )
    largest = max((np.size(const) for const in closed.consts), default=0)
    # The judge's table is a constant of this test; weights have more entries.
    assert largest <= SIZE * SIZE
    other = {REFERENCE: jax.tree.map(lambda leaf: leaf + 1.5, frozen[REFERENCE])}
    skewed = {REFERENCE: {"table": frozen[REFERENCE]["table"].at[..., 0].add(2.0)}}
    args = (tabular.empty_prompts(64), jax.random.key(0))
    same, _ = step(state, frozen, *args)
    shifted, _ = step(state, other, *args)
    moved, _ = step(state, skewed, *args)
    table = same.param_sets[POLICY]["table"]
    # Adding a constant to all logits is the same reference; favouring a token is not.
    np.testing.assert_allclose(table, shifted.param_sets[POLICY]["table"], atol=1e-5)
    change = np.abs(table - moved.param_sets[POLICY]["table"]).max()
    # Without regularisation the reference is only what training starts from.
    assert change > 1e-3 if row.make().is_regularised else change == 0


def sequence_policy(params):
    model = tabular.tabular_model(VOCAB, LENGTH)
    choices = tabular.all_responses(model, LENGTH)
    from nlhf_jax.types import Speaker

    log_probs = tabular.response_log_probs(
        model, {POLICY: params}, Speaker({POLICY: 1.0}), choices
    )
    return np.exp(np.asarray(log_probs, np.float64))


@pytest.mark.parametrize("kind", ["cyclic", "bradley_terry"])
def test_self_play_finds_the_nash_of_a_game_by_sampling(kind):
    # Starting 0.05 or more away in the regularised gap, sampled self-play with a
    # falling step size must come below 2e-3.
    rng, tau = np.random.default_rng(5), 0.2
    if kind == "cyclic":
        game = matrices.random_game(rng, SIZE)
    else:
        game = matrices.bradley_terry(2 * rng.normal(size=SIZE))
    steps = 1500
    rate = optax.cosine_decay_schedule(2.0, steps)
    row = Row("self_play", {"tau": tau}, None, None)
    step, state, frozen = setting(row, game=game, optimizer=optax.sgd(rate))
    reference = sequence_policy(frozen[REFERENCE])
    prompts = tabular.empty_prompts(256)

    @jax.jit
    def train(state):
        def advance(state, _):
            return step(state, frozen, prompts, jax.random.key(7))[0], None

        return jax.lax.scan(advance, state, length=steps)[0]

    def gap(state):
        policy = sequence_policy(state.param_sets[POLICY])
        return solutions.regularised_gap(game, reference, tau, policy)

    start, end = gap(state), gap(train(state))
    assert start > 0.05
    assert end < 2e-3


def test_a_tie_has_no_say_but_the_regularisation(float64):
    # With P = 1/2 everywhere the policy returns to the reference.
    row = Row("self_play", {"tau": 1.0}, None, None)
    game = np.full((SIZE, SIZE), 0.5)
    step, state, frozen = setting(row, game=game, optimizer=optax.sgd(0.5))
    reference = sequence_policy(frozen[REFERENCE])
    compiled, prompts = jax.jit(step), tabular.empty_prompts(512)
    before = solutions.kl(sequence_policy(state.param_sets[POLICY]), reference)
    for _ in range(60):
        state, _ = compiled(state, frozen, prompts, jax.random.key(0))
    after = solutions.kl(sequence_policy(state.param_sets[POLICY]), reference)
    assert before > 0.3 and after < 0.02


def test_the_metrics_say_what_was_drawn():
    row = Row("self_play", {"tau": 0.1}, None, None)
    step, state, frozen = setting(row)
    _, metrics = step(state, frozen, tabular.empty_prompts(8), jax.random.key(0))
    assert float(metrics["response/length"]) == LENGTH
    assert float(metrics["response/eos_rate"]) == 0.0
    assert float(metrics["decode/steps"]) == LENGTH
    assert 0 <= float(metrics["preference/mean"]) <= 1
    assert jnp.isfinite(metrics["policy/kl"])
