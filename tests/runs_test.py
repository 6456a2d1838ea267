# SPDX-License-Identifier: Apache-2.0
"""A training run around its steps: the first state, resuming, rows of a batch."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import checkpoints, distributed, supervised_step
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import folders, runs
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.settings import LoopSettings, MeshSettings, OptimizerSettings
from nlhf_jax.types import POLICY
from tests import process_toys
from tests import supervised_toys as toys
from tests.t5_toys import T5_1_1

ONE = MeshSettings(1, 1, 1)
OPTIMIZER = make_optimizer(OptimizerSettings(learning_rate=0.05), 10)
WORKER = process_toys.ROOT / "tests" / "runs_worker.py"


def make(params):
    return supervised_step.init_state(params, OPTIMIZER)


def never(*arguments):
    raise AssertionError("what is resumed must not be made first")


def rows_of(step, rows):
    batch = jax.device_get(toys.supervised_batch(step))
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def run(folder, steps, *, initial_state=None, batches=rows_of):
    """Returns the toy model's last state."""
    model = toys.toy_language_model()
    step_fn = supervised_step.make_sft_step(model, OPTIMIZER)
    training = runs.Training(
        "toy",
        lambda state, frozen, batch, key: step_fn(state, batch, key),
        {},
        batches,
        lambda state: {},
        {"data/truncated_prompts": 0},
        model.logical_axes,
    )
    return runs.run(
        training,
        folder=folder,
        initial_state=initial_state or runs.initial_state(model.init, "", 3, make),
        settings=LoopSettings(steps, 8, checkpoint_period=2, log_period=1),
        seed=0,
        mesh=ONE,
    )


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_resumed_run_ends_as_the_unbroken_one_and_makes_no_first_state(tmp_path):
    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "broken", 2)
    start = runs.initial_state(toys.toy_language_model().init, "", 3, make)
    resumed = dataclasses.replace(start, init=never, load=never)
    assert_same(run(tmp_path / "broken", 5, initial_state=resumed), whole)
    one, other = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken")
    )
    assert one == other
    lines = (tmp_path / "broken" / "timing.jsonl").read_text().splitlines()
    # The second step of each start included: nothing was compiled again.
    assert {json.loads(line)["compile/count"] for line in lines} == {1.0}


@pytest.mark.parametrize("method", ["wait", "close"])
def test_a_signal_while_the_last_checkpoint_is_awaited_counts(
    tmp_path, monkeypatch, method
):
    before, awaited = signal.getsignal(signal.SIGTERM), []
    wait = getattr(checkpoints.Checkpointer, method)

    def signalled(checkpointer):
        if not awaited:
            signal.raise_signal(signal.SIGTERM)
        awaited.append(method)
        wait(checkpointer)

    monkeypatch.setattr(checkpoints.Checkpointer, method, signalled)
    with pytest.raises(runs.Stopped, match="step 3"):
        run(tmp_path, 3)
    assert awaited
    assert signal.getsignal(signal.SIGTERM) is before
    # All is done and saved: the same command returns at once.
    assert int(run(tmp_path, 3).step) == 3


def test_the_first_state_is_that_of_the_plain_functions(tmp_path):
    model = toys.toy_language_model()
    expected = make(model.init(jax.random.key(3)))
    start = runs.initial_state(model.init, "", 3, make)
    assert jax.tree.structure(start.shapes) == jax.tree.structure(expected)
    mesh = runs.partitioning.make_mesh(ONE)
    whole = runs.partitioning.replicated(mesh)
    everywhere = jax.tree.map(lambda _: whole, (start.params, start.shapes))
    found = start.on(mesh, *everywhere)
    assert_same(found, expected)


def test_a_named_checkpoint_is_where_it_starts(tmp_path):
    model = toys.toy_language_model()
    params = jax.tree.map(lambda leaf: leaf + 1, model.init(jax.random.key(0)))
    checkpoints.save_params(tmp_path / "source", params, "float32")
    lengths = {"inputs": 1, "targets": 1}
    described = folders.ModelDescription("language_model", T5_1_1, lengths)
    folders.describe(tmp_path / "source", described, "byte")
    start = runs.initial_state(model.init, str(tmp_path / "source"), 3, make)
    mesh = runs.partitioning.make_mesh(ONE)
    whole = runs.partitioning.replicated(mesh)
    everywhere = jax.tree.map(lambda _: whole, (start.params, start.shapes))
    assert_same(start.on(mesh, *everywhere).param_sets[POLICY], params)
    with pytest.raises(UserError, match="'nowhere' does not exist"):
        runs.initial_state(model.init, "nowhere", 3, make)


def test_alone_every_row_is_asked_for_and_lies_on_the_mesh(tmp_path):
    asked = []

    def batches(step, rows):
        asked.append((step, rows.tolist()))
        return rows_of(step, rows)

    run(tmp_path, 2, batches=batches)
    assert asked == [(0, list(range(8))), (1, list(range(8)))]


def test_who_is_not_the_first_writes_no_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    run(tmp_path, 2)
    run(tmp_path, 3)  # does not say either that it continues
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
    assert capsys.readouterr().err == ""


def test_a_folder_that_others_do_not_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "first_does", lambda name, action: None)
    with pytest.raises(UserError, match="must be a folder that all processes share"):
        runs.open_folder(str(tmp_path / "elsewhere"))


# ------------------------------------------------------------------ eight devices


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What `runs_worker.py` found on eight fake devices."""
    folder = tmp_path_factory.mktemp("eight")
    with process_toys.gang(folder / "logs") as gang:
        gang.start([WORKER, folder], devices=8)
        assert gang.wait(200) == [0], "\n".join(gang.logs())
    return json.loads((folder / "found.json").read_text())


@pytest.mark.battery
@pytest.mark.parametrize("kind", ["fresh", "steps", "file", "resumed"])
def test_first_states_lie_split_and_are_never_whole_on_a_device(eight, kind):
    found = eight[kind]
    assert found["equal"]
    assert found["in_place"]
    # The table of 64 x 4096 numbers and its two moments, each an eighth per device.
    assert found["shards"] == [[512, 64]] * 3
    assert found["largest_on_one_device"] == 512 * 64


@pytest.mark.battery
def test_frozen_parameters_are_restored_into_their_places(eight):
    assert eight["frozen"] == {"in_place": True, "equal": True}


def test_shapes_need_no_device():
    start = runs.initial_state(toys.toy_language_model().init, "", 3, make)
    leaves = jax.tree.leaves(start.shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert start.shapes.step.dtype == jnp.int32
