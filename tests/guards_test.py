# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not finite: measured in the step, named, and steps left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import divergence, guards, supervised_step, train_step
from nlhf_jax.checks import UserError
from nlhf_jax.models import tabular
from nlhf_jax.settings import LoopSettings
from nlhf_jax.types import POLICY, Judge, TrainState
from tests import supervised_toys as toys
from tests import train_step_test

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ADAM = optax.adam(0.1)
STEPS = {
    "sft": (
        toys.toy_language_model,
        supervised_step.make_sft_step,
        toys.supervised_batch,
    ),
    "preference": (
        toys.toy_preference_model,
        supervised_step.make_preference_step,
        toys.comparison_batch,
    ),
    "reward": (
        toys.toy_reward_model,
        supervised_step.make_reward_step,
        toys.comparison_batch,
    ),
}


def _rows(*names):
    return [row for row in train_step_test.ROWS if row.name in names]


def _state(**sets):
    opt_states = {POLICY: (jnp.zeros(2), jnp.zeros((), jnp.int32))}
    return TrainState(jnp.zeros((), jnp.int32), sets, opt_states)


def test_the_measure_of_a_tensor_is_its_largest_absolute_value():
    tree = {
        "b": jnp.asarray([[1.0, -3.0]]),
        "a": jnp.asarray(0.5),
        "count": jnp.asarray([9]),
        "key": jax.random.key(0),
        "none": jnp.zeros((0, 2)),
    }
    np.testing.assert_array_equal(guards.largest(tree), [0.5, 3.0, 0.0])
    assert guards.largest({}).shape == (0,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("place", [0, 17, 999])
def test_one_bad_number_shows_wherever_it_is(value, dtype, place):
    tensor = jnp.ones(1000, dtype).at[place].set(value)
    measure = jax.jit(guards.largest)
    assert not np.isfinite(measure({"w": tensor})).any()
    assert np.isfinite(measure({"w": jnp.ones(1000, dtype)})).all()


def test_names_are_those_of_what_a_step_measures():
    params = {"layer": {"w": jnp.ones(2), "b": jnp.ones(())}}
    names = guards.tensor_names(_state(params=params, average=params))
    assert names == [
        "gradient of layer/b",
        "gradient of layer/w",
        "parameter layer/b of the set average",
        "parameter layer/w of the set average",
        "parameter layer/b",
        "parameter layer/w",
        "optimizer state 0",
    ]


@pytest.mark.parametrize("row", _rows("nash_ema_pg", "enpo"), ids=lambda row: row.name)
def test_every_tensor_of_an_algorithm_is_measured_and_named(row):
    step, state, frozen = train_step_test.setting(row, optimizer=ADAM)
    prompts, key = tabular.empty_prompts(8), jax.random.key(1)
    after, metrics = jax.jit(step)(state, frozen, prompts, key)
    names = guards.tensor_names(state)
    sizes = dict(zip(names, np.asarray(metrics[guards.LARGEST]), strict=True))
    assert len(set(names)) == len(names)
    for name in state.param_sets:
        whose = "" if name == POLICY else f" of the set {name}"
        expected = np.abs(after.param_sets[name]["table"]).max()
        assert sizes[f"parameter table{whose}"] == pytest.approx(expected, rel=1e-6)
    for name in state.opt_states:
        whose = "" if name == POLICY else f" of the set {name}"
        moment = np.abs(after.opt_states[name][0].mu["table"]).max()
        assert sizes[f"optimizer state 0/mu/table{whose}"] == pytest.approx(moment)
        assert sizes[f"gradient of table{whose}"] > 0


def test_the_largest_gradient_of_several_updates_is_reported():
    (row,) = _rows("nash_md_pg")
    model, algorithm = tabular.tabular_model(3, 2), row.make()
    params = model.init(jax.random.key(0))
    state = train_step.init_state(params, algorithm, ADAM)
    examples = train_step_test.some_examples(algorithm, np.random.default_rng(0))
    sets = {POLICY: params, "reference": params}

    def largest(count):
        update = functools.partial(train_step.update, model, algorithm, ADAM)
        once = jax.jit(functools.partial(update, num_updates=count))
        return float(once(state, sets, examples)[1][guards.LARGEST][0])

    assert 0 < largest(1) <= largest(2)


@pytest.mark.parametrize("name", STEPS)
def test_a_bad_parameter_is_named_by_the_supervised_steps(name):
    make_model, make_step, make_batch = STEPS[name]
    model = make_model()
    state = supervised_step.init_state(model.init(jax.random.key(0)), ADAM)
    step = jax.jit(make_step(model, ADAM))
    names = guards.tensor_names(state)
    _, metrics = step(state, make_batch(1), jax.random.key(0))
    assert np.isfinite(metrics[guards.LARGEST]).all()
    params = state.param_sets[POLICY]
    bad = state._replace(
        param_sets={POLICY: params | {"out": params["out"].at[0].set(jnp.nan)}}
    )
    after, metrics = step(bad, make_batch(1), jax.random.key(0))
    found = divergence.named(names, metrics[guards.LARGEST])
    assert not np.isfinite(found["parameter out"])
    assert not np.isfinite(found["gradient of embed"])
    assert step._cache_size() == 1
    assert int(after.step) == 1


def _with_nan_judge(row, bad_from):
    """A step whose judge has no number from some step on; the same program always."""
    step, state, frozen = train_step_test.setting(row, optimizer=ADAM)
    del step
    model, algorithm = tabular.tabular_model(3, 2), row.make()

    def preference(frozen, prompts, first, second):
        is_bad = prompts.tokens_BS.max() >= bad_from
        return jnp.where(is_bad, jnp.nan, jnp.full(first.mask_BT.shape[0], 0.75))

    judge = Judge(preference, lambda frozen, prompts, y: jnp.zeros(len(y.mask_BT)))
    made = train_step.make_train_step(
        model, algorithm, judge, ADAM, max_length=2, skip_not_finite=True
    )
    return jax.jit(made), state, frozen


@pytest.mark.battery
@pytest.mark.parametrize("row", _rows("nash_ema_pg", "enpo"), ids=lambda row: row.name)
def test_a_step_that_is_left_out_moves_only_the_count_of_steps(row):
    step, state, frozen = _with_nan_judge(row, bad_from=2)
    good, key = tabular.empty_prompts(8), jax.random.key(1)
    bad = good._replace(tokens_BS=good.tokens_BS * 2)
    state, metrics = step(state, frozen, good, key)
    assert float(metrics[guards.SKIPPED]) == 0.0
    after, metrics = step(state, frozen, bad, key)
    assert float(metrics[guards.SKIPPED]) == 1.0
    assert int(after.step) == 2
    assert not np.isfinite(metrics[guards.LARGEST]).all()  # what was left out
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=state.step), state)
    again, _ = step(after, frozen, good, key)
    moved = again.param_sets[POLICY]["table"] - after.param_sets[POLICY]["table"]
    assert np.abs(moved).max() > 1e-3 and np.isfinite(moved).all()
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", STEPS)
def test_the_supervised_steps_leave_out_a_bad_one(name):
    make_model, make_step, make_batch = STEPS[name]
    model = make_model()
    state = supervised_step.init_state(model.init(jax.random.key(0)), ADAM)
    step = jax.jit(make_step(model, ADAM, skip_not_finite=True))
    fine, metrics = step(state, make_batch(1), jax.random.key(0))
    assert float(metrics[guards.SKIPPED]) == 0.0
    plain, _ = jax.jit(make_step(model, ADAM))(state, make_batch(1), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, fine, plain)
    # Moments so large that the second ones overflow: the parameters stay finite.
    huge = jax.tree.map(lambda leaf: leaf * 1e30, fine.param_sets[POLICY])
    before = fine._replace(param_sets={POLICY: huge})
    after, metrics = step(before, make_batch(1), jax.random.key(0))
    assert float(metrics[guards.SKIPPED]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=fine.step), before)


# ------------------------------------------------------------------- on the host


def test_what_is_said_names_losses_and_the_first_tensor():
    tensors = {"gradient of a": 1.0, "gradient of b": np.inf, "parameter a": np.nan}
    with pytest.raises(divergence.TrainingDiverged) as caught:
        divergence.check(7, {"loss/policy": np.nan}, tensors, batch="the batch")
    assert str(caught.value) == (
        "loss/policy is nan, and the first tensor that is not finite is the gradient "
        "of b at step 7; nothing was saved after it"
    )
    assert caught.value.sentence == str(caught.value)
    assert caught.value.first_tensor == "gradient of b"
    assert (caught.value.step, caught.value.batch) == (7, "the batch")


def test_other_metrics_may_be_infinite_and_finite_ones_are_no_reason():
    metrics = {"policy/kl": np.inf, "loss/policy": 1.0}
    assert divergence.check(1, metrics, {"a": 0.0}) == ""
    assert divergence.named(["a"], ()) == {}


@pytest.mark.parametrize("count, limit", [(1, 1), (3, 5)])
def test_a_step_within_the_limit_is_left_out(count, limit):
    metrics = {"loss/policy": np.nan, guards.SKIPPED: float(count)}
    said = divergence.check(4, metrics, {}, limit=limit)
    assert said == f"step 4 is left out, {count} of at most {limit}: loss/policy is nan"


def test_one_more_than_the_limit_ends_the_run():
    metrics = {"loss/policy": np.nan, guards.SKIPPED: 3.0}
    with pytest.raises(divergence.TrainingDiverged, match="after 2 steps that"):
        divergence.check(4, metrics, {}, limit=2)


def test_the_limit_is_a_count():
    with pytest.raises(UserError, match="max_skipped_steps must be an integer of at"):
        LoopSettings(1, 1, max_skipped_steps=-1)


@pytest.mark.parametrize("shape", [(3,), (4096,), (64, 64), (300, 50)])
def test_a_tensor_of_any_size_is_measured(shape):
    ones = np.ones(shape, np.float32)
    one_nan, one_infinite = ones.copy(), ones.copy()
    one_nan.reshape(-1)[1] = np.nan
    one_infinite.reshape(-1)[1] = -np.inf
    all_nan = np.full(shape, np.nan, np.float32)
    tree = [-2 * ones, one_nan, one_infinite, all_nan, np.arange(3)]
    found = jax.jit(guards.largest)([jnp.asarray(leaf) for leaf in tree])
    assert found[0] == 2.0
    assert not np.isfinite(found[1:]).any()
    assert len(found) == 4
