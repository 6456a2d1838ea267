# SPDX-License-Identifier: Apache-2.0
"""Schedules by formula, first updates in closed form, microbatches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.optimizers import (
    accumulate_gradients,
    learning_rate_schedule,
    make_optimizer,
    split_microbatches,
)
from nlhf_jax.settings import OptimizerSettings

PEAK, WARMUP, STEPS = 0.3, 4, 20


def _expected_rate(schedule, step):
    rise = min(1.0, step / WARMUP)
    done = min(max((step - WARMUP) / (STEPS - WARMUP), 0.0), 1.0)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": math.cos(math.pi * done / 2) ** 2,
        "rsqrt": math.sqrt(WARMUP / max(step, WARMUP)),
    }[schedule]
    return PEAK * rise * decay


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "rsqrt"])
def test_schedule_formula(name, float64):
    settings = OptimizerSettings(learning_rate=PEAK, schedule=name, warmup_steps=WARMUP)
    schedule = learning_rate_schedule(settings, STEPS)
    for step in range(STEPS + 5):
        expected = _expected_rate(name, step)
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-12)
        traced = jax.jit(schedule)(jnp.asarray(step))
        assert float(traced) == pytest.approx(expected, abs=1e-12)


def test_no_warmup_starts_at_the_peak():
    for name in ("constant", "linear", "cosine", "rsqrt"):
        settings = OptimizerSettings(learning_rate=PEAK, schedule=name)
        rate = learning_rate_schedule(settings, STEPS)(0)
        assert float(rate) == pytest.approx(PEAK, rel=1e-6)


def test_warmup_longer_than_the_run_only_rises():
    settings = OptimizerSettings(learning_rate=1.0, schedule="linear", warmup_steps=100)
    schedule = learning_rate_schedule(settings, 10)
    assert float(schedule(9)) == pytest.approx(0.09, rel=1e-6)


def _first_update(settings, params, gradient):
    optimizer = make_optimizer(settings, STEPS)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return updates


def test_adamw_first_step_closed_form(float64):
    # The bias-corrected moments of the first step are g and g^2.
    gradient = {"w": jnp.asarray([0.5, -2.0, 0.01])}
    params = {"w": jnp.asarray([1.0, 2.0, -3.0])}
    settings = OptimizerSettings(
        name="adamw", learning_rate=0.1, weight_decay=0.03, clip_norm=0.0
    )
    got = _first_update(settings, params, gradient)["w"]
    direction = gradient["w"] / (jnp.abs(gradient["w"]) + 1e-8)
    expected = -0.1 * (direction + 0.03 * params["w"])
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_first_step_closed_form(relative, float64):
    # At the first step the second moment is g^2, so the direction is the sign, of
    # root mean square one: nothing is clipped.
    gradient = {"w": jnp.asarray([0.5, -2.0, 0.01])}
    params = {"w": jnp.asarray([1.0, 2.0, -3.0])}
    settings = OptimizerSettings(
        learning_rate=0.1,
        weight_decay=0.03,
        clip_norm=0.0,
        multiply_by_parameter_scale=relative,
    )
    got = _first_update(settings, params, gradient)["w"]
    scale = math.sqrt((1 + 4 + 9) / 3) if relative else 1.0
    expected = -0.1 * (scale * jnp.sign(gradient["w"]) + 0.03 * params["w"])
    np.testing.assert_allclose(got, expected, atol=1e-10)


def test_clip_makes_large_gradients_equal():
    # Adam is blind to the scale of a first gradient; the second tells.
    settings = OptimizerSettings(name="adamw", learning_rate=0.1, clip_norm=1.0)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    small = {"a": jnp.asarray([0.1, 0.0]), "b": jnp.asarray([0.2])}
    large = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([4.0])}

    def second_update(scale, clip_norm):
        optimizer = make_optimizer(
            OptimizerSettings(
                name="adamw",
                learning_rate=settings.learning_rate,
                clip_norm=clip_norm,
            ),
            STEPS,
        )
        state = optimizer.init(params)
        _, state = optimizer.update(small, state, params)
        scaled = jax.tree.map(lambda leaf: leaf * scale, large)
        return optimizer.update(scaled, state, params)[0]

    # large has norm 5: both 1 and 7 times it are clipped to large / 5.
    once, seven = second_update(1.0, 1.0), second_update(7.0, 1.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), once, seven)
    by_hand = second_update(0.2, 0.0)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), once, by_hand
    )
    unclipped = second_update(7.0, 0.0)
    assert not np.allclose(unclipped["a"], once["a"], rtol=1e-3)


def test_adamw_minimises_a_quadratic():
    # The mean of the data minimises the sum of squares; the rate ends at zero.
    target = jnp.asarray([1.0, -2.0, 0.5])
    settings = OptimizerSettings(name="adamw", learning_rate=0.1, schedule="cosine")
    optimizer = make_optimizer(settings, 300)
    params = jnp.zeros(3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: jnp.sum((p - target) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(300):
        params, state = step(params, state)
    np.testing.assert_allclose(params, target, atol=1e-3)


def test_microbatches_deal_rows_in_turn():
    parts = split_microbatches({"x": jnp.arange(6)}, 2)
    np.testing.assert_array_equal(parts["x"], [[0, 2, 4], [1, 3, 5]])
    with pytest.raises(UserError, match="batch size 6, got 4"):
        split_microbatches({"x": jnp.arange(6)}, 4)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_accumulated_gradient_is_the_gradient_of_the_sum(parts, float64):
    x_BD = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))

    def summed(params, batch_BD, key):
        del key
        loss_B = jnp.sin(batch_BD @ params) ** 2
        return loss_B.sum(), {"rows": jnp.asarray(loss_B.shape[0]), "x": batch_BD.sum()}

    params = jnp.asarray([0.3, -1.0, 0.7])
    gradient, sums = accumulate_gradients(
        summed, params, x_BD, jax.random.key(0), num_microbatches=parts
    )
    expected = (jnp.sin(2 * x_BD @ params)[:, None] * x_BD).sum(axis=0)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    assert int(sums["rows"]) == 6
    assert float(sums["x"]) == pytest.approx(float(x_BD.sum()), abs=1e-12)


def test_each_part_has_its_own_key():
    def summed(params, batch, key):
        return params * batch.sum(), jax.random.uniform(key)

    _, total = accumulate_gradients(
        summed, jnp.ones(()), jnp.ones(4), jax.random.key(3), num_microbatches=4
    )
    keys = [jax.random.fold_in(jax.random.key(3), part) for part in range(4)]
    expected = sum(float(jax.random.uniform(key)) for key in keys)
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_bad_settings_name_the_value():
    with pytest.raises(UserError, match=r"adafactor, adamw; got 'adam'.*'adamw'"):
        OptimizerSettings(name="adam")
    with pytest.raises(UserError, match=r"learning_rate must be in \(0.0, inf\)"):
        OptimizerSettings(learning_rate=0.0)
