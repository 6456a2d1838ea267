# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics of the supervised steps against plain numpy; microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax.supervised_step import (
    init_state,
    make_preference_evaluation,
    make_preference_step,
    make_reward_evaluation,
    make_reward_step,
    make_sft_evaluation,
    make_sft_step,
    mean_metrics,
)
from nlhf_jax.types import POLICY
from tests import supervised_toys as toys

SGD = optax.sgd(1.0)
TASKS = {
    "sft": (toys.toy_language_model, make_sft_step, toys.supervised_batch),
    "preference": (
        toys.toy_preference_model,
        make_preference_step,
        toys.comparison_batch,
    ),
    "reward": (toys.toy_reward_model, make_reward_step, toys.comparison_batch),
}
EVALUATIONS = {
    "sft": make_sft_evaluation,
    "preference": make_preference_evaluation,
    "reward": make_reward_evaluation,
}


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


@functools.cache
def _first(task, **options):
    """Returns the task's model, first state, compiled step and a batch."""
    make_model, make_step, make_batch = TASKS[task]
    model = make_model()
    state = init_state(model.init(jax.random.key(0)), SGD)
    return model, state, jax.jit(make_step(model, SGD, **options)), make_batch(1)


def _assert_trees_close(left, right, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **tolerance), left, right
    )


def test_token_nll_and_accuracy_by_hand():
    model, state, step_fn, batch = _first("sft")
    _, metrics = step_fn(state, batch, jax.random.key(0))
    logits_BTV = np.asarray(
        model.logits(state.param_sets[POLICY], batch.prompts, batch.targets.tokens_BT),
        np.float64,
    )
    nll, right, count = 0.0, 0, 0
    for row, position in np.argwhere(np.asarray(batch.targets.mask_BT)):
        logits_V = logits_BTV[row, position]
        target = int(batch.targets.tokens_BT[row, position])
        nll -= np.log(np.exp(logits_V[target]) / np.exp(logits_V).sum())
        right += int(logits_V.argmax() == target)
        count += 1
    assert float(metrics["loss/token_nll"]) == pytest.approx(nll / count, rel=1e-5)
    assert float(metrics["token/accuracy"]) == pytest.approx(right / count, rel=1e-6)
    assert float(metrics["token/count"]) == count


def test_uniform_model_costs_log_vocab():
    model, state, step_fn, batch = _first("sft")
    zeros = jax.tree.map(jnp.zeros_like, state.param_sets[POLICY])
    _, metrics = step_fn(init_state(zeros, SGD), batch, jax.random.key(0))
    expected = np.log(model.vocab_size)
    assert float(metrics["loss/token_nll"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_microbatches_change_nothing(task, parts):
    # Lengths differ between rows, so a mean of means would show.
    _, state, step_fn, batch = _first(task)
    _, _, split_fn, _ = _first(task, num_microbatches=parts)
    key = jax.random.key(0)
    (whole, whole_metrics), (split, split_metrics) = (
        fn(state, batch, key) for fn in (step_fn, split_fn)
    )
    _assert_trees_close(whole.param_sets, split.param_sets, atol=1e-6, rtol=1e-6)
    assert whole_metrics.keys() == split_metrics.keys()
    _assert_trees_close(whole_metrics, split_metrics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_update_is_the_gradient_of_the_reported_loss(task):
    # Plain gradient descent at rate one moves the parameters by minus the gradient g,
    # so the slope of the reported loss along the move is -|g|^2.
    _, state, step_fn, batch = _first(task)
    loss_name = {"sft": "loss/token_nll"}.get(task, f"loss/{task}")
    params = state.param_sets[POLICY]
    new_state, metrics = step_fn(state, batch, jax.random.key(0))
    move = jax.tree.map(jnp.subtract, new_state.param_sets[POLICY], params)

    def loss_at(distance):
        moved = jax.tree.map(lambda p, m: p + distance * m, params, move)
        _, moved_metrics = step_fn(init_state(moved, SGD), batch, jax.random.key(0))
        return float(moved_metrics[loss_name])

    slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2
    squared_norm = float(optax.tree.norm(move, squared=True))
    assert slope == pytest.approx(-squared_norm, rel=1e-2)
    assert float(metrics["optimizer/gradient_norm"]) == pytest.approx(
        np.sqrt(squared_norm), rel=1e-5
    )
    assert int(new_state.step) == 1


@pytest.mark.parametrize("task", TASKS)
def test_padding_is_inert(task):
    _, state, step_fn, batch = _first(task)
    key = jax.random.key(0)

    def poison(tokens, mask):
        return jnp.where(mask, tokens, toys.VOCAB - 1)

    def poison_responses(responses):
        return responses._replace(tokens_BT=poison(*responses))

    poisoned = batch._replace(
        prompts=batch.prompts._replace(tokens_BS=poison(*batch.prompts)),
        **{
            name: poison_responses(getattr(batch, name))
            for name in ("targets", "first", "second")
            if hasattr(batch, name)
        },
    )
    clean, clean_metrics = step_fn(state, batch, key)
    dirty, dirty_metrics = step_fn(state, poisoned, key)
    _assert_trees_close(clean, dirty, rtol=0, atol=0)
    _assert_trees_close(clean_metrics, dirty_metrics, rtol=0, atol=0)


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_padding_are_inert(task):
    _, state, step_fn, batch = _first(task)
    padded = jax.tree.map(
        lambda leaf: jnp.concatenate([leaf, jnp.zeros_like(leaf[:3])]), batch
    )
    key = jax.random.key(0)
    short, short_metrics = step_fn(state, batch, key)
    long, long_metrics = step_fn(state, padded, key)
    _assert_trees_close(short.param_sets, long.param_sets, atol=1e-6, rtol=1e-5)
    _assert_trees_close(short_metrics, long_metrics, rtol=1e-5)


def test_preference_metrics_by_hand():
    model, state, step_fn, batch = _first("preference")
    _, metrics = step_fn(state, batch, jax.random.key(0))
    logit_B = np.asarray(
        model.logits(
            state.param_sets[POLICY], batch.prompts, batch.first, batch.second
        ),
        np.float64,
    )
    label_B = np.asarray(batch.preference_B, np.float64)
    predicted_B = _sigmoid(logit_B)
    loss = -(label_B * np.log(predicted_B) + (1 - label_B) * np.log(1 - predicted_B))
    favour = np.where(
        label_B == 0.5, 0.5, (label_B > 0.5) == (predicted_B > 0.5)
    ).astype(float)
    expected = {
        "loss/preference": loss.mean(),
        "preference/accuracy": favour.mean(),
        "preference/brier": ((predicted_B - label_B) ** 2).mean(),
        "preference/confidence": np.maximum(predicted_B, 1 - predicted_B).mean(),
        "preference/count": 8.0,
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name


def test_soft_labels_are_the_minimum_of_the_loss():
    # The gradient with respect to the logit is P - p: zero when the model says p.
    model = toys.toy_preference_model()
    batch = toys.comparison_batch(3, rows=1)
    params = model.init(jax.random.key(1))
    logit_B = model.logits(params, batch.prompts, batch.first, batch.second)
    batch = batch._replace(preference_B=jax.nn.sigmoid(logit_B))
    step_fn = jax.jit(make_preference_step(model, SGD))
    _, metrics = step_fn(init_state(params, SGD), batch, jax.random.key(0))
    assert float(metrics["optimizer/gradient_norm"]) < 1e-6
    off = batch._replace(preference_B=batch.preference_B * 0.5)
    _, metrics = step_fn(init_state(params, SGD), off, jax.random.key(0))
    assert float(metrics["optimizer/gradient_norm"]) > 1e-2


@pytest.mark.parametrize("task", ["preference", "reward"])
def test_swapping_the_responses_and_the_label_changes_nothing(task):
    _, state, step_fn, batch = _first(task)
    swapped = batch._replace(
        first=batch.second, second=batch.first, preference_B=1 - batch.preference_B
    )
    one, one_metrics = step_fn(state, batch, jax.random.key(0))
    two, two_metrics = step_fn(state, swapped, jax.random.key(0))
    _assert_trees_close(one.param_sets, two.param_sets, atol=1e-6, rtol=1e-5)
    _assert_trees_close(one_metrics, two_metrics, rtol=1e-5, atol=1e-6)


def test_reward_metrics_by_hand():
    model, state, step_fn, batch = _first("reward")
    _, metrics = step_fn(state, batch, jax.random.key(0))
    params = state.param_sets[POLICY]
    first_B, second_B = (
        np.asarray(model.rewards(params, batch.prompts, side), np.float64)
        for side in (batch.first, batch.second)
    )
    label_B = np.asarray(batch.preference_B, np.float64)
    lead_B = first_B - second_B
    loss = -label_B * np.log(_sigmoid(lead_B))
    loss -= (1 - label_B) * np.log(_sigmoid(-lead_B))
    margin = np.mean(lead_B * np.sign(label_B - 0.5))
    assert float(metrics["loss/reward"]) == pytest.approx(loss.mean(), rel=1e-5)
    assert float(metrics["reward/margin"]) == pytest.approx(margin, rel=1e-5)
    mean = (first_B + second_B).mean() / 2
    assert float(metrics["reward/mean"]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_over_batches_equals_one_batch(task):
    model, state, step_fn, _ = _first(task)
    params = state.param_sets[POLICY]
    batch = TASKS[task][2](5, rows=6)
    parts = [
        jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
        for rows in (slice(0, 1), slice(1, 6))
    ]
    evaluate = jax.jit(EVALUATIONS[task](model))
    whole = mean_metrics([evaluate(params, batch)])
    by_parts = mean_metrics([evaluate(params, part) for part in parts])
    assert whole == pytest.approx(by_parts, rel=1e-5)
    _, metrics = step_fn(state, batch, jax.random.key(0))
    for name, value in whole.items():
        assert value == pytest.approx(float(metrics[name]), rel=1e-5), name


def test_no_batches_give_no_metrics():
    assert mean_metrics([]) == {}


def test_dropout_follows_the_step_and_the_key():
    model = toys.toy_language_model(dropout_rate=0.5)
    state = init_state(model.init(jax.random.key(0)), SGD)
    step_fn = jax.jit(make_sft_step(model, SGD))
    batch = toys.supervised_batch(1)

    def loss(state, seed):
        return float(step_fn(state, batch, jax.random.key(seed))[1]["loss/token_nll"])

    later = state._replace(step=state.step + 1)
    assert loss(state, 0) == loss(state, 0)
    assert loss(state, 0) != loss(later, 0)
    assert loss(state, 0) != loss(state, 1)
    evaluate = make_sft_evaluation(model)
    plain = make_sft_evaluation(toys.toy_language_model())
    params = state.param_sets[POLICY]
    _assert_trees_close(evaluate(params, batch), plain(params, batch), rtol=0)


def test_z_loss_is_the_squared_log_normaliser():
    model, state, step_fn, batch = _first("sft", z_loss=0.01)
    new_state, metrics = step_fn(state, batch, jax.random.key(0))
    logits_BTV = np.asarray(
        model.logits(state.param_sets[POLICY], batch.prompts, batch.targets.tokens_BT),
        np.float64,
    )
    log_z_BT = np.log(np.exp(logits_BTV).sum(axis=-1))
    expected = 0.01 * np.mean(log_z_BT[np.asarray(batch.targets.mask_BT)] ** 2)
    assert float(metrics["loss/z_loss"]) == pytest.approx(expected, rel=1e-5)
    plain_state, plain = _first("sft")[2](state, batch, jax.random.key(0))
    assert "loss/z_loss" not in plain
    assert float(plain["loss/token_nll"]) == float(metrics["loss/token_nll"])
    assert not np.allclose(
        plain_state.param_sets[POLICY]["out"], new_state.param_sets[POLICY]["out"]
    )


def test_learning_rate_is_reported_at_the_step():
    model, state, _, batch = _first("sft")
    step_fn = make_sft_step(model, SGD, learning_rate=lambda step: 0.5 / (step + 1))
    state, first = step_fn(state, batch, jax.random.key(0))
    _, second = step_fn(state, batch, jax.random.key(0))
    assert float(first["optimizer/learning_rate"]) == 0.5
    assert float(second["optimizer/learning_rate"]) == 0.25


def test_other_parameter_sets_and_dtypes_stay():
    _, state, step_fn, batch = _first("sft")
    extra = jax.tree.map(jnp.copy, state.param_sets[POLICY])
    state = state._replace(param_sets={**state.param_sets, "ema": extra})
    new_state, _ = step_fn(state, batch, jax.random.key(0))
    _assert_trees_close(new_state.param_sets["ema"], extra, rtol=0, atol=0)
    before, after = (jax.tree.map(lambda x: x.dtype, s) for s in (state, new_state))
    assert before == after
