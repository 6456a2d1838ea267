# SPDX-License-Identifier: Apache-2.0
"""The step in two halves: `train_step` cut at its judge, and parts of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import guards, outside_step, train_step
from nlhf_jax.checks import UserError
from nlhf_jax.models import tabular
from nlhf_jax.optimizers import split_microbatches
from nlhf_jax.preferences import outside
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import POLICY, REFERENCE, PromptBatch, Responses, Rollout
from tests.algorithms_test import TABLE

pytestmark = pytest.mark.usefixtures("compiled_quickly")
LENGTH, VOCAB, BATCH = 2, 3, 12
SIZE = VOCAB**LENGTH
MODEL = tabular.tabular_model(VOCAB, LENGTH)
OPTIMIZER = optax.sgd(0.5)
ALGORITHMS = {row.name: row.make() for row in TABLE}
SERVED = sorted(
    name for name, one in ALGORITHMS.items() if len(one.parts) == 1 and not one.ratings
)
# The others are alike: what they share with these is all that is at stake.
KEPT = {"nash_md_pg", "mpo"}


def some_of(names):
    """Returns the names, of which the battery alone reads those not in KEPT."""
    return [
        n if n in KEPT else pytest.param(n, marks=pytest.mark.battery) for n in names
    ]


def setting(name):
    """Returns algorithm, judge, first state and frozen sets of a random game."""
    rng = np.random.default_rng(0)
    judge = table_judge(MODEL, rng.uniform(size=(SIZE, SIZE)), rng.normal(size=SIZE))
    algorithm = ALGORITHMS[name]
    params = MODEL.init(jax.random.key(0))
    frozen = {REFERENCE: MODEL.init(jax.random.key(1))}
    return algorithm, judge, train_step.init_state(params, algorithm, OPTIMIZER), frozen


@functools.cache
def halves(name, num_parts, in_float64, **learning):
    """Returns both halves compiled, which tests share."""
    del in_float64
    draw, learn = (
        functools.partial(half, MODEL, ALGORITHMS[name], *more)
        for half, more in ((outside_step.draw, ()), (outside_step.learn, (OPTIMIZER,)))
    )
    draw = functools.partial(draw, num_parts=num_parts, max_length=LENGTH)
    return jax.jit(draw), jax.jit(functools.partial(learn, **learning))


def in_halves(name, *, num_parts, frozen=None, **learning):
    """Returns state and metrics after a step whose judge is asked in between."""
    prompts, key = tabular.empty_prompts(BATCH), jax.random.key(5)
    algorithm, judge, state, own = setting(name)
    frozen = own if frozen is None else frozen
    draw, learn = halves(name, num_parts, jax.config.jax_enable_x64, **learning)
    samples, num_steps, answers = [], [], []
    for part in range(num_parts):
        drawn, steps = draw(state, frozen, prompts, key, part)
        samples.append(drawn)
        num_steps.append(steps)
        feedback = train_step.score(
            algorithm, judge, frozen, prompts, tuple(one.responses for one in drawn)
        )
        answers.append(feedback.preferences)
    assert draw._cache_size() == 1
    return learn(state, frozen, prompts, samples, num_steps, answers), samples


def rate(step):
    return 0.5 + step


@pytest.mark.parametrize("name", some_of(SERVED))
def test_with_one_part_it_is_the_step_with_the_judge_inside(name, float64):
    algorithm, judge, state, frozen = setting(name)
    whole = train_step.make_train_step(
        MODEL,
        algorithm,
        judge,
        OPTIMIZER,
        max_length=LENGTH,
        num_microbatches=3,
        num_updates_per_rollout=2,
        learning_rate=rate,
    )
    args = tabular.empty_prompts(BATCH), jax.random.key(5)
    expected, expected_metrics = jax.jit(whole)(state, frozen, *args)
    (found, metrics), _ = in_halves(
        name,
        num_parts=1,
        num_microbatches=3,
        num_updates_per_rollout=2,
        learning_rate=rate,
    )
    assert int(found.step) == 1
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12),
        found,
        expected,
    )
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-6, err_msg=key)
    moved = found.param_sets[POLICY]["table"] - state.param_sets[POLICY]["table"]
    assert np.abs(moved).max() > 1e-4


def test_parts_draw_different_responses():
    _, samples = in_halves("nash_md_pg", num_parts=2, skip_not_finite=True)
    one, other = (part[0].responses.tokens_BT for part in samples)
    assert one.shape == (BATCH // 2, LENGTH)
    assert not np.array_equal(one, other)


def test_rows_go_back_where_their_prompts_are():
    rows = jnp.arange(24.0).reshape(12, 2)
    for num_parts in (1, 2, 3, 4):
        parts = split_microbatches(rows, num_parts)
        np.testing.assert_array_equal(outside_step.joined(list(parts)), rows)


def test_a_part_reads_its_own_prompts(monkeypatch):
    """Part m has the rows m, m + M, ... of the batch."""
    seen = []

    def rollout(model, algorithm, sets, prompts, key, step, *, max_length):
        seen.append(np.asarray(prompts.tokens_BS[:, 0]))
        return Rollout((), jnp.asarray(max_length))

    monkeypatch.setattr(outside_step, "rollout", rollout)
    algorithm, _, state, frozen = setting("nash_md_pg")
    tokens = jnp.arange(6)[:, None]
    prompts = PromptBatch(tokens, jnp.ones((6, 1), bool))
    for part in range(3):
        outside_step.draw(
            MODEL,
            algorithm,
            state,
            frozen,
            prompts,
            jax.random.key(0),
            jnp.asarray(part),
            num_parts=3,
            max_length=LENGTH,
        )
    assert [one.tolist() for one in seen] == [[0, 3], [1, 4], [2, 5]]


def test_every_part_is_drawn_from_the_policy_before_the_update(float64):
    """The trained responses' probabilities are those of the state that came in."""
    (_, metrics), _ = in_halves("nash_md_pg", num_parts=4)
    np.testing.assert_allclose(metrics["policy/effective_share"], 1.0, atol=1e-12)


def test_a_bad_step_is_taken_back():
    _, _, state, frozen = setting("nash_md_pg")
    broken = {REFERENCE: {"table": frozen[REFERENCE]["table"] * jnp.nan}}
    (found, metrics), _ = in_halves(
        "nash_md_pg", num_parts=2, frozen=broken, skip_not_finite=True
    )
    assert float(metrics[guards.SKIPPED]) == 1.0
    assert int(found.step) == 1
    np.testing.assert_array_equal(
        found.param_sets[POLICY]["table"], state.param_sets[POLICY]["table"]
    )


def test_the_algorithms_that_are_served_are_those_that_compare_once():
    for name, algorithm in ALGORITHMS.items():
        if name in SERVED:
            outside.check_serves(algorithm)
            continue
        with pytest.raises(UserError, match=f"^{name} .* OutsideJudge .* instead$"):
            outside.check_serves(algorithm)


def test_the_indifferent_judge_calls_everything_a_tie():
    prompts, judge = tabular.empty_prompts(4), outside.indifferent()
    said = Responses(jnp.zeros((4, LENGTH), int), jnp.ones((4, LENGTH), bool))
    assert judge.preference({}, prompts, said, said).tolist() == [0.5] * 4
    assert judge.reward({}, prompts, said).tolist() == [0.0] * 4
