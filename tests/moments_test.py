# SPDX-License-Identifier: Apache-2.0
"""Runs go on from an optimiser's state beside a model, and export that of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import checkpoints, cli, optimizers, partitioning, supervised_step
from nlhf_jax.checks import UserError
from nlhf_jax.conversion import safetensors_files, t5x
from nlhf_jax.conversion.shapes import flat, nested
from nlhf_jax.conversion.tensors import Moments, of_array
from nlhf_jax.jobs import conversions, first_states, folders, moments, our_weights
from nlhf_jax.models.families import language_model
from nlhf_jax.settings import MeshSettings, OptimizerSettings
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import TrainState
from tests.conversion_toys import refused
from tests.jobs_pipeline_test import data_in, run_sft, steps
from tests.t5x_toys import NATIVE, unpack

pytestmark = [pytest.mark.usefixtures("compiled_quickly"), pytest.mark.battery]
# Its embedding is factored, and nothing else.
SHAPE = T5Settings(259, 128, 2, 2, 4, 1, 1)
LENGTHS = {"inputs": 8, "targets": 4}
TABLE = "token_embedder/embedding"


def optimizer_of(name):
    return optimizers.make_optimizer(OptimizerSettings(name), 10)


def moments_like(name, count=7, seed=0):
    """Random averages of an optimiser of the network's parameters."""
    model, rng = language_model(SHAPE), np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    _, part = optimizers.slots_of(jax.eval_shape(optimizer_of(name).init, shapes))
    slots = {slot: flat(getattr(part, slot)) for slot in optimizers.SLOTS[name]}
    return Moments(
        name,
        count,
        {
            slot: {
                one: of_array(rng.uniform(size=leaf.shape).astype(np.float32))
                for one, leaf in of.items()
                if leaf.shape != (1,)
            }
            for slot, of in slots.items()
        },
    )


def model_in(folder, found=None):
    """A model folder, with averages beside it."""
    description = folders.ModelDescription("language_model", SHAPE, LENGTHS)
    folders.describe(folder, description, "byte")
    shapes = jax.eval_shape(language_model(SHAPE).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
    )
    checkpoints.save_params(folder, params, "float32")
    if found is not None:
        moments.write(folder, found)
    return folder


def first_state(folder, name):
    """The first state of a run with an optimiser that starts at a folder."""
    model = language_model(SHAPE)
    start = first_states.initial_state(
        model.init,
        str(folder),
        0,
        lambda params: supervised_step.init_state(params, optimizer_of(name)),
    )
    mesh = partitioning.make_mesh(MeshSettings())
    shapes = start.shapes
    lie = partitioning.step_shardings(
        mesh, shapes, shapes.param_sets["params"], model.logical_axes, {}, {}
    )
    return start.on(mesh, lie.params, lie.state)


def assert_same(found, wanted):
    assert (found.optimizer, found.count) == (wanted.optimizer, wanted.count)
    for slot, of in wanted.slots.items():
        assert sorted(found.slots[slot]) == sorted(of)
        for name, tensor in of.items():
            np.testing.assert_array_equal(found.slots[slot][name].read(), tensor.read())


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_what_lies_beside_a_model_is_what_a_run_begins_with(tmp_path, caplog, name):
    wanted = moments_like(name)
    assert_same(moments.beside(model_in(tmp_path / "m", wanted) / "any"), wanted)
    state = first_state(tmp_path / "m", name).opt_states["params"]
    assert "goes on from" in caplog.text and "after 7 updates" in caplog.text
    _, part = optimizers.slots_of(state)
    assert int(part.count) == 7
    for slot, of in wanted.slots.items():
        there = flat(getattr(part, slot))
        for one, leaf in there.items():
            expected = of[one].read() if one in of else np.zeros(1)
            np.testing.assert_array_equal(np.asarray(leaf), expected, err_msg=one)
    assert int(state[-1].count) == 0  # of the learning rate's schedule


def test_another_optimiser_begins_anew_and_says_so(tmp_path, caplog):
    model_in(tmp_path / "m", moments_like("adafactor"))
    state = first_state(tmp_path / "m", "adamw").opt_states["params"]
    _, part = optimizers.slots_of(state)
    assert int(part.count) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(part))
    assert "is of adafactor and this run's is adamw: it starts without" in caplog.text


def test_averages_of_another_network_are_refused(tmp_path):
    found = moments_like("adafactor")
    found.slots["v_row"][TABLE] = of_array(np.zeros(3, np.float32))
    model_in(tmp_path / "m", found)
    said = rf"v_row/{TABLE} must have the shape \(128,\), got \(3,\)"
    with pytest.raises(UserError, match=said):
        first_state(tmp_path / "m", "adafactor")


def test_a_damaged_file_is_named(tmp_path):
    flipped(model_in(tmp_path / "m", moments_like("adafactor")) / moments.MOMENTS_FILE)
    with pytest.raises(UserError, match=r"optimizer.safetensors is damaged: its dig"):
        moments.for_start(tmp_path / "m")


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_run_of_ours_is_exported_with_its_state(tmp_path, capsys, caplog, name):
    """From a step's folder, array by array, to T5X and back beside a model."""
    run, wanted = model_in(tmp_path / "run"), moments_like(name, 5)
    optimizer = optimizer_of(name)
    params = nested({n: t.read() for n, t in our_weights.tensors_in(run).items()})
    state = jax.jit(optimizer.init)(params)
    _, part = optimizers.slots_of(state)
    full = {
        slot: nested(
            flat(getattr(part, slot))
            | {one: jnp.asarray(t.read()) for one, t in of.items()}
        )
        for slot, of in wanted.slots.items()
    }
    state = optimizers.with_slots(state, jnp.asarray(5, jnp.int32), full)
    params = jax.tree.map(jnp.asarray, params)
    (run / "params.safetensors").unlink()
    with checkpoints.Checkpointer(run / "checkpoints") as saver:
        step = jnp.asarray(2, jnp.int32)
        saver.save(2, TrainState(step, {"params": params}, {"params": state}))
    assert_same(our_weights.open_folder(run, {"optimizer": "true"}).moments, wanted)
    assert our_weights.open_folder(run, {}).moments is None
    words = [f"--checkpoint={run}", f"--to={tmp_path / 't5x'}", "--format=t5x"]
    assert conversions.export_model([*words, "--check"]) == 0
    assert f"with the state of {name} after 5 updates, into" in capsys.readouterr().out
    assert_same(t5x.open_t5x(tmp_path / "t5x" / "checkpoint_5", {}).moments, wanted)
    words = [f"--from={tmp_path / 't5x'}", "--vocabulary=byte"]
    assert conversions.import_model([*words, f"--to={tmp_path / 'back'}"]) == 0
    assert_same(moments.for_start(tmp_path / "back"), wanted)
    without = [f"--to={tmp_path / 'bare'}", "--optimizer=false"]
    assert conversions.import_model([*words, *without]) == 0
    assert not (tmp_path / "bare" / moments.MOMENTS_FILE).exists()
    # To our own format a run's state goes where that is asked for; else a word is said.
    words = [f"--checkpoint={run}", "--format=nlhf"]
    assert conversions.export_model([*words, f"--to={tmp_path / 'left'}"]) == 0
    assert "(" + str(run / "checkpoints" / "2") + ") is not taken along" in caplog.text
    assert not (tmp_path / "left" / moments.MOMENTS_FILE).exists()
    assert our_weights.state_flag({"optimizer": "true"}) == our_weights.ANY


def flipped(file):
    """Changes the last byte of a file."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def foreign(file):
    """Writes what another program may have called so."""
    safetensors_files.write(file, {"state.0": of_array(np.zeros(2, np.float32))})


def converted(command, source, target):
    option = "--checkpoint" if command == "export" else "--from"
    return [command, f"{option}={source}", f"--to={target}"]


@pytest.mark.parametrize("spoil", [flipped, foreign])
def test_a_state_that_cannot_be_read_stops_only_who_reads_it(tmp_path, spoil, capsys):
    """The model beside it is whole, and most formats hold no optimiser's state."""
    folder = model_in(tmp_path / "m", moments_like("adafactor"))
    spoil(folder / moments.MOMENTS_FILE)
    assert our_weights.open_folder(folder, {}).moments is None
    without = "--optimizer=false"
    for number, words in enumerate(
        (
            ["export", "--format=hugging_face"],
            ["export", "--format=nlhf", without],
            ["export", "--format=t5x", without],
            ["import", without],
        )
    ):
        target = tmp_path / f"good_{number}"
        assert cli.main([*converted(words[0], folder, target), *words[1:]]) == 0
        assert not list(target.rglob(moments.MOMENTS_FILE))
    for words in (
        ["export", "--format=nlhf"],
        ["export", "--format=t5x"],
        ["import"],
    ):
        capsys.readouterr()
        command = [*converted(words[0], folder, tmp_path / "bad"), *words[1:]]
        said = refused(capsys, tmp_path / "bad", cli.main(command))
        assert f"{moments.MOMENTS_FILE} " in said and "=false leaves it out" in said
        assert "no checkpoint in" not in said


def test_a_states_error_does_not_choose_an_older_step(tmp_path, monkeypatch):
    run = model_in(tmp_path / "run")
    params = nested({n: t.read() for n, t in our_weights.tensors_in(run).items()})
    (run / "params.safetensors").unlink()
    with checkpoints.Checkpointer(run / "checkpoints") as saver:
        for step in (1, 2):
            one = jax.tree.map(lambda leaf: jnp.full(leaf.shape, step, float), params)  # noqa: B023
            saver.save(step, TrainState(jnp.asarray(step), {"params": one}, {}))

    def broken(folder):
        raise UserError(f"{folder.name} has a strange state")

    monkeypatch.setattr(moments, "of_step", broken)
    with pytest.raises(UserError, match="2 has a strange state; --optimizer=false"):
        our_weights.open_folder(run, {"optimizer": "true"})
    tensor = our_weights.open_folder(run, {}).tensors[TABLE]
    assert (tensor.read() == 2).all()


@pytest.mark.parametrize("words", [["export", "--format=nlhf"], ["import"]])
def test_what_lies_beside_a_model_goes_from_ours_to_ours(tmp_path, words, capsys):
    wanted = moments_like("adamw")
    command = converted(words[0], model_in(tmp_path / "m", wanted), tmp_path / "out")
    assert cli.main([*command, *words[1:]]) == 0
    assert "with the state of adamw after 7 updates" in capsys.readouterr().out
    assert_same(moments.for_start(tmp_path / "out"), wanted)
    code = cli.main(
        [*command[:2], *words[1:], f"--to={tmp_path / 'x'}", "--optimizer=y"]
    )
    assert "optimizer must be" in refused(capsys, tmp_path / "x", code)


@pytest.mark.battery
def test_a_fine_tuning_of_t5x_own_checkpoint_counts_on_and_goes_back(tmp_path, caplog):
    """Import, two steps of the job, export: T5X's count and two more."""
    sample = unpack(tmp_path / "sample")
    words = [f"--from={sample / NATIVE}", f"--to={tmp_path / 'ours'}"]
    assert conversions.import_model([*words, "--vocabulary=byte"]) == 0
    (tmp_path / "data").mkdir()
    adafactor = OptimizerSettings()
    start = {"initial_checkpoint_path": str(tmp_path / "ours"), "model": None}
    data = data_in(tmp_path / "data")
    run_sft(tmp_path / "run", data, steps(2), optimizer=adafactor, **start)
    assert "the optimiser goes on from" in caplog.text
    words = [f"--checkpoint={tmp_path / 'run'}", f"--to={tmp_path / 't5x'}"]
    assert conversions.export_model([*words, "--format=t5x"]) == 0
    back = t5x.open_t5x(tmp_path / "t5x" / "checkpoint_3", {})
    assert back.moments.count == 3
    before = t5x.open_t5x(sample / NATIVE, {}).moments.slots["v"]
    # With count 0 the first update would forget all that went before.
    for name in ("decoder/decoder_norm/scale", "encoder/layers_0/mlp/wo/kernel"):
        now = back.moments.slots["v"][name].read()
        decay = (1 - 2.0**-0.8) * (1 - 3.0**-0.8)
        assert (now >= 0.999 * decay * before[name].read()).all()
