# SPDX-License-Identifier: Apache-2.0
"""Averages and snapshots of parameters, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import parameter_sets
from nlhf_jax.checks import UserError
from nlhf_jax.models import tabular
from nlhf_jax.types import POLICY, Speaker


def trace(update, sets, num_steps):
    """Moves the policy to 1, 2, ... and returns every other set after each step."""
    found = []
    for step in range(1, num_steps + 1):
        sets = sets | {POLICY: {"w": jnp.array([float(step)])}}
        sets = update(sets, jnp.array(step), {"measured/step": jnp.array(step)})
        found.append({k: float(v["w"][0]) for k, v in sets.items() if k != POLICY})
    return found


def test_a_snapshot_is_taken_at_every_period_and_stays_between():
    update = parameter_sets.snapshots({"previous": POLICY}, period=3)
    found = trace(update, {"previous": {"w": jnp.zeros(1)}}, 7)
    assert [one["previous"] for one in found] == [0, 0, 3, 3, 3, 6, 6]


def test_moves_of_one_update_read_what_was_there_before():
    moves = {"previous": POLICY, "older": "previous"}
    sets = {"previous": {"w": jnp.array([-1.0])}, "older": {"w": jnp.array([-2.0])}}
    found = trace(parameter_sets.snapshots(moves, period=2), sets, 6)
    assert [one["previous"] for one in found] == [-1, 2, 2, 4, 4, 6]
    assert [one["older"] for one in found] == [-2, -1, -1, 2, 2, 4]


def test_moves_happen_when_what_was_measured_says_so():
    update = parameter_sets.moves_when(
        lambda step, metrics: (step > 2) & (metrics["measured/step"] % 4 == 0),
        {"magnet": POLICY},
    )
    found = trace(update, {"magnet": {"w": jnp.zeros(1)}}, 9)
    assert [one["magnet"] for one in found] == [0, 0, 0, 4, 4, 4, 4, 8, 8]


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 1.0])
def test_the_average_is_recursive(decay, float64):
    update = parameter_sets.moving_average("average", decay=decay)
    found = trace(update, {"average": {"w": jnp.zeros(1)}}, 5)
    # After n steps: sum_k (1 - decay) decay^(n - k) k; the first value is 0.
    known = [
        sum((1 - decay) * decay ** (n - k) * k for k in range(1, n + 1))
        for n in range(1, 6)
    ]
    np.testing.assert_allclose([one["average"] for one in found], known, atol=1e-12)


def test_an_average_of_logits_is_the_geometric_mixture(float64):
    # One step of it is the mixture with weight `decay` on what was there before.
    decay, model = 0.3, tabular.tabular_model(3, 1)
    new, old = tabular.table(np.array([0.3, -0.1, 0.2])), tabular.table(np.zeros(3))
    update = parameter_sets.moving_average("average", decay=decay)
    sets = update({POLICY: new, "average": old}, jnp.array(1), {})
    weights = {POLICY: 1 - decay, "old": decay}
    mixed, averaged = (
        tabular.response_log_probs(
            model, sets | {"old": old}, Speaker(one), tabular.all_responses(model, 1)
        )
        for one in (weights, {"average": 1.0})
    )
    np.testing.assert_allclose(averaged, mixed, rtol=0, atol=1e-12)


def test_several_updates_follow_one_another():
    update = parameter_sets.in_turn(
        parameter_sets.snapshots({"a": POLICY}, period=1),
        parameter_sets.snapshots({"b": "a"}, period=2),
    )
    sets = {"a": {"w": jnp.zeros(1)}, "b": {"w": jnp.zeros(1)}}
    assert [(one["a"], one["b"]) for one in trace(update, sets, 4)] == [
        (1, 0),
        (2, 2),
        (3, 2),
        (4, 4),
    ]


def test_bad_periods_and_decays_are_refused():
    with pytest.raises(UserError, match="period must be an integer of at least 1"):
        parameter_sets.snapshots({}, period=0)
    with pytest.raises(UserError, match=r"decay must be in \[0.0, 1.0\], got 1.5"):
        parameter_sets.moving_average("average", decay=1.5)
