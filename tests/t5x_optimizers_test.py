# SPDX-License-Identifier: Apache-2.0
"""States of optimisers in T5X checkpoints: T5X's own rule goes on from ours."""

import dataclasses
import functools
import json
import pathlib

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import optimizers
from nlhf_jax.checks import UserError
from nlhf_jax.conversion import (
    t5x,
    t5x_arrays,
    t5x_index,
    t5x_layouts,
    t5x_optimizers,
    t5x_writer,
)
from nlhf_jax.conversion.shapes import flat, nested, parameter_shapes
from nlhf_jax.conversion.tensors import Moments, Weights, of_array
from nlhf_jax.settings import OptimizerSettings
from nlhf_jax.t5_settings import T5Settings
from tests.t5x_toys import NATIVE, ORBAX, SCANNED, assert_same, unpack

# Every kernel but the narrow one's has both sides of at least 128; of `tall` the width
# is the longer side of attention's, of `square` both are equal.
WIDE = T5Settings(150, 128, 2, 70, 140, 1, 1)
TALL = T5Settings(130, 160, 4, 32, 129, 1, 2, bias_in_each_layer=True)
SQUARE = dataclasses.replace(TALL, emb_dim=128)
NARROW = dataclasses.replace(TALL, emb_dim=16, num_heads=3, head_dim=4, mlp_dim=20)
pytestmark = [pytest.mark.usefixtures("compiled_quickly"), pytest.mark.battery]
battery = pytest.mark.battery
RATE, CLIP, DECAY = 0.01, 0.7, 0.1
SLOTS = ("m", "v", "v_col", "v_row")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder with T5X's own checkpoints."""
    return unpack(tmp_path_factory.mktemp("sample"))


# --- T5X's rule, in plain numpy


def rule_of(name, shape, settings, scan):
    """The axes of an array of T5X's that are rows, columns and layers."""
    parts = name.split("/")
    in_layers = scan and parts[1] in ("encoder", "decoder")
    layers = (1,) if in_layers else ()
    kind = parts[-2]
    rows = (len(shape) - 1,) if kind in ("out", "wo") else (0,)
    columns = tuple(a for a in range(len(shape)) if a not in rows + layers)
    if len(shape) <= 2 and not layers:  # by sizes
        order = np.argsort(shape)
        if len(shape) < 2 or shape[order[-2]] < 128:
            return None, layers
        return ((int(order[-2]),), (int(order[-1]),)), layers
    has_both = kind not in ("relpos_bias",) and parts[-1] == "kernel"
    return ((rows, columns) if has_both else None), layers


def averaged(step, state, gradient, factors):
    """New averages of one array, and the direction it moves in."""
    # Both compute it in float32, whatever the parameters are.
    decay = float(1.0 - jnp.array(step + 1, jnp.float32) ** -0.8)
    square = gradient**2 + 1e-30
    if factors is None:
        v = decay * state["v"] + (1 - decay) * square
        return {"v": v}, gradient / np.sqrt(v)
    rows, columns = factors
    row = decay * state["v_row"] + (1 - decay) * square.mean(axis=columns)
    column = decay * state["v_col"] + (1 - decay) * square.mean(axis=rows)
    inner = tuple(axis - sum(c < axis for c in columns) for axis in rows)
    mean = row.mean(axis=inner, keepdims=True)
    along_rows = np.expand_dims((row / mean) ** -0.5, columns)
    along_columns = np.expand_dims(column**-0.5, rows)
    return {"v_row": row, "v_col": column}, gradient * along_rows * along_columns


def t5x_step(step, params, states, gradients, settings, scan):
    """One update by T5X's Adafactor, by the formulas of its documentation."""
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    new_params, new_states = {}, {}
    for name, param in params.items():
        factors, layers = rule_of(name, param.shape, settings, scan)
        state = {slot: states[f"{name}/{slot}"] for slot in SLOTS}
        gradient = gradients[name] * min(1.0, CLIP / norm)
        new, move = averaged(step, state, gradient, factors)
        within = tuple(a for a in range(param.ndim) if a not in layers)

        def size(x, within=within):
            return np.sqrt(np.mean(x**2, axis=within, keepdims=True))

        move = move / np.maximum(1.0, size(move))
        new_params[name] = (1 - RATE * DECAY) * param
        new_params[name] -= RATE * np.maximum(size(param), 1e-3) * move
        unused = {f"{name}/{slot}": np.zeros(1) for slot in SLOTS}
        new_states |= unused | {f"{name}/{slot}": x for slot, x in new.items()}
    return new_params, new_states


# --- ours


def shapes_of(settings):
    return {n: leaf.shape for n, leaf in flat(parameter_shapes(settings)).items()}


def random_tree(settings, seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape, scale=rng.uniform(0.01, 1)).astype(dtype)
        for name, shape in shapes_of(settings).items()
    }


@functools.cache
def optimizer_of(name):
    """An optimiser of ours, and its update, compiled once for each network."""
    how = OptimizerSettings(
        name, learning_rate=RATE, clip_norm=CLIP, weight_decay=DECAY
    )
    optimizer = optimizers.make_optimizer(how, 100)

    def update(gradients, state, params):
        moves, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, moves), state

    return jax.jit(optimizer.init), jax.jit(update)


def trained(settings, name, steps, dtype=np.float64):
    """Parameters of ours and the optimiser's state after some updates."""
    params = jax.tree.map(jnp.asarray, nested(random_tree(settings, 0, dtype)))
    state = optimizer_of(name)[0](params)
    for step in range(steps):
        params, state = updated(name, params, state, settings, step, dtype)
    return params, state


def drawn(settings, name, count):
    """Random parameters and a random state of as many updates, with no compilation."""
    params, rng = nested(random_tree(settings, 0, np.float32)), np.random.default_rng(1)
    shapes = jax.eval_shape(optimizer_of(name)[0], params)

    def one(leaf):
        if leaf.dtype == np.int32:
            return np.asarray(count, np.int32)
        return rng.uniform(size=leaf.shape).astype(np.float32)

    return params, jax.tree.map(one, shapes)


def updated(name, params, state, settings, step, dtype=np.float64):
    gradients = nested(random_tree(settings, 50 + step, dtype))
    gradients = jax.tree.map(jnp.asarray, gradients)
    return optimizer_of(name)[1](gradients, state, params)


def moments_of(state):
    """Our state as what is exported."""
    name, part = optimizers.slots_of(state)
    slots = {slot: flat(getattr(part, slot)) for slot in optimizers.SLOTS[name]}
    if name == "adafactor":
        is_whole = {n: x.shape != (1,) for n, x in slots["v"].items()}
        slots = {
            slot: {n: x for n, x in of.items() if is_whole[n] == (slot == "v")}
            for slot, of in slots.items()
        }
    tensors = {
        slot: {n: of_array(np.asarray(x)) for n, x in of.items()}
        for slot, of in slots.items()
    }
    return Moments(name, int(part.count), tensors)


def weights_with(settings, params, state):
    tensors = {n: of_array(np.asarray(x)) for n, x in flat(params).items()}
    return Weights(settings, tensors, moments=moments_of(state))


def read(tensors):
    return {name: np.asarray(tensor.read()) for name, tensor in tensors.items()}


def theirs_of(settings, params, state, scan):
    """Parameters and states as T5X has them."""
    weights = weights_with(settings, params, state)
    shapes = shapes_of(settings)
    states = t5x_optimizers.their_states(weights.moments, shapes, settings, scan)
    return read(t5x_writer.their_arrays(weights, scan)), read(states)


def gradients_of(settings, step, scan):
    tensors = {n: of_array(x) for n, x in random_tree(settings, 50 + step).items()}
    return read(t5x_writer.their_arrays(Weights(settings, tensors), scan))


def assert_close(found, wanted, atol=1e-12):
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, 1e-11, atol, err_msg=name)


@pytest.mark.parametrize(
    "settings, scan",
    [
        (WIDE, False),
        (TALL, True),
        pytest.param(TALL, False, marks=battery),
        pytest.param(SQUARE, True, marks=battery),
    ],
    ids=["one_bias", "scanned", "heads_apart", "square"],
)
def test_a_further_step_by_t5x_rule_is_ours(float64, settings, scan):
    """Where both factor the same matrices the two rules are one, to rounding."""
    params, state = trained(settings, "adafactor", 3)
    theirs, states = theirs_of(settings, params, state, scan)
    assert all(states[f"{name}/m"].shape == (1,) for name in theirs)
    gradients = gradients_of(settings, 3, scan)
    moved, new = t5x_step(3, theirs, states, gradients, settings, scan)
    params, state = updated("adafactor", params, state, settings, 3)
    ours, our_states = theirs_of(settings, params, state, scan)
    assert_close(ours, moved)
    assert_close(our_states, new)


def test_what_t5x_alone_factors_is_what_it_would_have(float64):
    """The means of an unfactored average are the factors of the same gradients."""
    params, state = trained(NARROW, "adafactor", 3)
    theirs, states = theirs_of(NARROW, params, state, True)
    assert states["decoder/decoder/mlp/wo/kernel/v_row"].shape == (2, 16)
    assert states["decoder/decoder/mlp/wo/kernel/v"].shape == (1,)
    wanted = {name: np.zeros_like(array) for name, array in states.items()}
    for step in range(3):
        gradients = gradients_of(NARROW, step, True)
        _, wanted = t5x_step(step, theirs, wanted, gradients, NARROW, True)
    assert_close(states, wanted)


# --- T5X's own files


def test_the_sample_written_again_has_its_optimiser_bit_for_bit(sample, tmp_path):
    weights = t5x.open_t5x(sample / NATIVE, {})
    assert (weights.moments.optimizer, weights.moments.count) == ("adafactor", 1)
    t5x_writer.write_t5x(tmp_path, weights, {})
    ours, theirs = tmp_path / "checkpoint_1", sample / NATIVE / "checkpoint_1"
    files = sorted(f.relative_to(theirs) for f in theirs.rglob("*") if f.is_file())
    assert sorted(f.relative_to(ours) for f in ours.rglob("*") if f.is_file()) == files
    for file in files:
        if str(file) != "checkpoint":
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    found, wanted = (t5x_index.read_index(one)["state"] for one in (ours, theirs))
    assert found["step"] == wanted["step"]
    assert leaves_of(found) == leaves_of(wanted)


def leaves_of(state):
    """Says of each leaf of an index whether it lies within, its shape and dtype."""
    return {
        name: (leaf["metadata"]["shape"], leaf["dtype"], leaf["kvstore"]["path"])
        if isinstance(leaf, dict)
        else (leaf.shape, leaf.dtype, leaf.tolist() if leaf.shape == (1,) else None)
        for name, leaf in t5x_arrays._leaves(state["param_states"])
    }


@pytest.mark.parametrize("name, scan", [(NATIVE, ""), (SCANNED, "true")])
def test_a_run_of_ours_has_the_tree_shapes_and_dtypes_of_the_sample(
    sample, tmp_path, name, scan
):
    settings = t5x.open_t5x(sample / name, {}).settings
    params, state = drawn(settings, "adafactor", 1)
    options = {"scan_layers": scan}
    t5x_writer.write_t5x(tmp_path, weights_with(settings, params, state), options)
    folders = tmp_path / "checkpoint_1", sample / name / "checkpoint_1"
    found, wanted = (leaves_of(t5x_index.read_index(f)["state"]) for f in folders)
    assert found == wanted
    if name == NATIVE:
        both = [t5x_index.read_index(f)["state"]["step"] for f in folders]
        assert both[0] == both[1] and both[0].dtype == both[1].dtype


def test_as_orbax_it_has_the_tree_of_the_sample(sample, tmp_path):
    weights = t5x.open_t5x(sample / ORBAX, {})
    t5x_writer.write_t5x(tmp_path, weights, {"t5x_layout": "orbax"})

    def tree(folder):
        text = (folder / "checkpoint_1" / "state" / "_METADATA").read_text()
        entries = json.loads(text)["tree_metadata"]
        return {
            name: (entry["key_metadata"], entry["value_metadata"]["write_shape"])
            for name, entry in entries.items()
        }

    assert tree(tmp_path) == tree(sample / ORBAX)
    both = [t5x_arrays.open_checkpoint(f, True) for f in (tmp_path, sample / ORBAX)]
    for name, array in both[1].states.items():
        np.testing.assert_array_equal(both[0].states[name].read(()), array.read(()))
        assert both[0].states[name].dtype == array.dtype


def test_both_layouts_of_the_sample_hold_one_state(sample):
    native, orbax = (t5x.open_t5x(sample / n, {}).moments for n in (NATIVE, ORBAX))
    assert_same_moments(native, orbax)


def assert_same_moments(found, wanted):
    assert (found.optimizer, found.count) == (wanted.optimizer, wanted.count)
    for slot, of in wanted.slots.items():
        assert sorted(found.slots[slot]) == sorted(of)
        for name, tensor in of.items():
            there = found.slots[slot][name]
            assert there.shape == tensor.shape == there.read().shape, (slot, name)
            assert there.read().dtype == np.float32
            np.testing.assert_array_equal(there.read(), tensor.read())


# --- there and back


@pytest.mark.parametrize(
    "settings, scan, name, layout",
    [
        (WIDE, "", "adafactor", "native"),
        (TALL, "true", "adafactor", "native"),
        (SQUARE, "true", "adafactor", "native"),
        (TALL, "false", "adamw", "native"),
        (WIDE, "", "adamw", "orbax"),
        pytest.param(SQUARE, "false", "adafactor", "orbax", marks=battery),
        pytest.param(TALL, "true", "adamw", "orbax", marks=battery),
    ],
)
def test_there_and_back_is_bit_for_bit(tmp_path, settings, scan, name, layout):
    params, state = drawn(settings, name, 2)
    weights = weights_with(settings, params, state)
    options = {"t5x_layout": layout, "scan_layers": scan}
    t5x_writer.write_t5x(tmp_path, weights, options)
    back = t5x.open_t5x(tmp_path / "checkpoint_2", {})
    assert_same(back, weights)
    assert_same_moments(back.moments, weights.moments)


def test_layers_along_the_first_axis_have_their_slots_there():
    params, state = drawn(TALL, "adafactor", 1)
    weights = weights_with(TALL, params, state)
    arrays, states = theirs_of(TALL, params, state, True)

    def first(name, array):
        in_layers = name.split("/")[1] in ("encoder", "decoder")
        length = 1 if name.startswith("encoder") else 2
        if not in_layers or array.shape == (1,):
            return array
        axis = next(a for a in (1, 0) if array.shape[a] == length)
        return np.moveaxis(array, axis, 0)

    turned, slots = (
        {name: first(name, array) for name, array in one.items()}
        for one in (arrays, states)
    )
    checkpoint = checkpoint_of(turned, slots, 1)
    found = t5x_optimizers.our_moments(checkpoint, shapes_of(TALL))
    assert_same_moments(found, weights.moments)
    layers = t5x_layouts.separate_layers(checkpoint.arrays)
    assert layers["decoder/layers_1/mlp/wo/kernel"].shape == (129, 160)


def test_an_unfactored_state_becomes_a_factored_one():
    """T5X may be told not to factor; the means are then what ours would have."""
    params, state = drawn(WIDE, "adafactor", 1)
    name, rng = "encoder/layers_0/mlp/wo/kernel", np.random.default_rng(0)
    arrays, states = theirs_of(WIDE, params, state, False)
    whole = rng.uniform(size=(140, 128)).astype(np.float32)
    zeros = np.zeros(1, np.float32)
    states |= {f"{name}/v": whole, f"{name}/v_row": zeros, f"{name}/v_col": zeros}
    found = t5x_optimizers.our_moments(checkpoint_of(arrays, states), shapes_of(WIDE))
    assert name not in found.slots["v"]
    row, column = (found.slots[slot][name].read() for slot in ("v_row", "v_col"))
    np.testing.assert_allclose(row, whole.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(column, whole.mean(axis=1), rtol=1e-6)


def checkpoint_of(arrays, states, count=3):
    def stored(arrays):
        return {
            name: t5x_arrays.StoredArray(a.shape, a.dtype, lambda i, a=a: a[i])
            for name, a in arrays.items()
        }

    step = stored({"step": np.asarray(count, np.int32)})["step"]
    folder = pathlib.Path()
    return t5x_arrays.Checkpoint(folder, stored(arrays), True, stored(states), step)


# --- AdamW


def test_adamw_is_what_t5x_has_of_optax(float64):
    """T5X stores optax's state by position; optax goes on from ours as ours does."""
    params, state = trained(WIDE, "adamw", 3)
    _, states = theirs_of(WIDE, params, state, False)
    rate = optimizers.learning_rate_schedule(OptimizerSettings(learning_rate=RATE), 100)
    theirs = optax.adamw(rate, weight_decay=DECAY)
    empty = theirs.init(params)
    wanted = flat(flax.serialization.to_state_dict(empty))
    assert {n: (x.shape, np.dtype(x.dtype)) for n, x in wanted.items()} == {
        n: (x.shape, x.dtype) for n, x in states.items()
    }
    content = {"1": {}} | nested({n: jnp.asarray(x) for n, x in states.items()})
    restored = flax.serialization.from_state_dict(empty, content)
    gradients = nested(random_tree(WIDE, 53))
    clipped, _ = optax.clip_by_global_norm(CLIP).update(gradients, optax.EmptyState())
    moves, _ = jax.jit(theirs.update)(clipped, restored, params)
    moved = flat(optax.apply_updates(params, moves))
    ours, _ = updated("adamw", params, state, WIDE, 3)
    assert_close(moved, flat(ours))


def test_adamw_within_a_chain_is_found():
    params, state = drawn(WIDE, "adamw", 2)
    arrays, states = theirs_of(WIDE, params, state, False)
    inner = {f"1/{name}": array for name, array in states.items()}
    found = t5x_optimizers.our_moments(checkpoint_of(arrays, inner), shapes_of(WIDE))
    assert_same_moments(found, moments_of(state))
    inner["0/trace/token_embedder/embedding"] = np.zeros(1, np.float32)
    with pytest.raises(t5x_optimizers.NotHeld, match="AdamW's averages it holds 0/tr"):
        t5x_optimizers.our_moments(checkpoint_of(arrays, inner), shapes_of(WIDE))


# --- what is left out, and what is wrong


def test_what_we_do_not_have_is_left_out_and_said(sample, caplog):
    weights = t5x.open_t5x(sample / SCANNED, {})
    assert weights.moments is None
    said = "\n".join(caplog.messages)
    assert "optimiser's state is left out: decoder/decoder/encoder_decoder" in said
    assert "not where a side is below 128" in said
    caplog.clear()
    assert t5x.open_t5x(sample / NATIVE, {"optimizer": "false"}).moments is None
    assert "optimiser" not in "\n".join(caplog.messages)


def _states(change):
    params, state = drawn(WIDE, "adafactor", 1)
    arrays, states = theirs_of(WIDE, params, state, False)
    change(states)
    return checkpoint_of(arrays, states)


NAME = "encoder/encoder_norm/scale"


@pytest.mark.parametrize(
    "change, error, said",
    [
        (
            lambda s: s.update({f"{NAME}/m": np.zeros(128, np.float32)}),
            t5x_optimizers.NotHeld,
            "it has momentum",
        ),
        (
            lambda s: s.update({"more/sums": np.zeros(128, np.float32)}),
            t5x_optimizers.NotHeld,
            "it is neither Adafactor's nor that of one AdamW",
        ),
        (
            lambda s: s.update({f"{NAME}/v": np.zeros(128, np.float16)}),
            t5x_optimizers.NotHeld,
            "scale/v is of float16",
        ),
        (
            lambda s: s.pop(f"{NAME}/v_row"),
            UserError,
            f"tensor param_states/{NAME}/v_row is missing: --optimizer=false",
        ),
        (
            lambda s: s.update(
                {"token_embedder/embedding/v_row": np.zeros(3, np.float32)}
            ),
            UserError,
            r"embedding/v_row must have 128 numbers, got the shape \(3,\)",
        ),
    ],
    ids=["momentum", "other", "dtype", "missing", "shape"],
)
def test_states_that_are_not_ours(change, error, said):
    with pytest.raises(error, match=said):
        t5x_optimizers.our_moments(_states(change), shapes_of(WIDE))


def test_a_count_that_is_none():
    checkpoint = _states(lambda s: None)
    with pytest.raises(UserError, match="tensor step must be one integer"):
        t5x_optimizers.our_moments(
            dataclasses.replace(checkpoint, step=None), shapes_of(WIDE)
        )


def test_the_step_is_what_adafactor_has_seen(sample, tmp_path):
    weights = t5x.open_t5x(sample / NATIVE, {})
    with pytest.raises(UserError, match=r"step must be 1, the updates .* got 7: --opt"):
        t5x_writer.write_t5x(tmp_path / "out", weights, {"step": "7"})
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="optimizer must be one of false, true"):
        t5x_writer.write_t5x(tmp_path / "out", weights, {"optimizer": "no"})
    options = {"step": "7", "optimizer": "false"}
    t5x_writer.write_t5x(tmp_path / "out", weights, options)
    assert (
        "param_states"
        not in t5x_index.read_index(tmp_path / "out/checkpoint_7")["state"]
    )
