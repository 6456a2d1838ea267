# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back bit for bit; what is damaged or foreign is named."""

import gc
import json
import logging
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import checkpoints, manifests, retention, saving
from nlhf_jax.checkpoints import (
    Checkpointer,
    CheckpointError,
    Retention,
    load_params,
    save_params,
)
from nlhf_jax.checks import UserError
from nlhf_jax.parameter_files import read_params_metadata
from nlhf_jax.supervised_step import init_state
from nlhf_jax.types import POLICY
from tests import supervised_toys as toys

# When a restore fails, orbax leaves coroutines of a closed event loop behind.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def _collect_what_orbax_left():
    yield
    gc.collect()


def _state(seed=0, width=None):
    params = toys.toy_language_model().init(jax.random.key(seed))
    if width is not None:
        params["out"] = jnp.zeros((width, toys.VOCAB))
    # Arrays of a few bytes are kept inside the format's index, which has checksums.
    large = jax.random.normal(jax.random.key(seed + 100), (64, 65))
    params = {
        "decoder": {"layer_0": params, "large": large},
        "small": jnp.ones(3, jnp.bfloat16),
    }
    state = init_state(params, optax.adam(1e-3))
    return state._replace(
        step=jnp.asarray(7, jnp.int32),
        param_sets={**state.param_sets, "ema": jax.tree.map(lambda x: x * 2, params)},
    )


def _assert_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def _saved(folder, steps=(3,), keep=5):
    with Checkpointer(folder, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, _state(step), {"seed": 11})
    return folder


def _data_files(step_folder):
    return [f for f in (step_folder / "state").rglob("d/*") if f.is_file()]


def test_state_comes_back_exactly(tmp_path):
    state = _state()
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(7, state, {"seed": 11, "versions": {"jax": "x"}})
    with Checkpointer(tmp_path / "checkpoints") as fresh:
        assert fresh.latest_step() == 7
        # Zeros, so that nothing can leak from the target into the result.
        restored = fresh.restore(7, jax.tree.map(jnp.zeros_like, state))
        _assert_identical(restored, state)
        _assert_identical(fresh.restore(7, jax.eval_shape(lambda: state)), state)
        meta = fresh.read_meta(7)
    assert meta["step"] == 7
    assert meta["seed"] == 11
    assert meta["versions"] == {"jax": "x"}
    assert (tmp_path / "checkpoints" / "7").is_dir()


def test_only_the_newest_stay(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 5):
            checkpointer.save(step, _state(step))
        checkpointer.wait()
        assert checkpointer.steps() == [2, 5]


def test_donating_the_state_after_save_does_no_harm(tmp_path):
    # The save is still writing when the next update reuses the memory of the state.
    size = 2_000_000
    state = init_state({"w": jnp.arange(size, dtype=jnp.float32)}, optax.identity())
    shift = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path, keep=10) as checkpointer:
        for step in range(4):
            checkpointer.save(step, state)
            state = shift(state)
        checkpointer.wait()
        for step in range(4):
            found = checkpointer.restore(step, state).param_sets[POLICY]["w"]
            np.testing.assert_array_equal(
                found, np.arange(size, dtype=np.float32) + step
            )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(tmp_path, value):
    state = _state()
    weights = state.param_sets[POLICY]["decoder"]["layer_0"]
    weights["out"] = weights["out"].at[2, 3].set(value)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="params/decoder/layer_0/out has num"):
            checkpointer.save(7, state)
        assert checkpointer.latest_step() is None


def test_a_step_that_is_not_newer_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, _state())
        checkpointer.wait()
        for step in (5, 4):
            with pytest.raises(CheckpointError, match="checkpoint 5 is there already"):
                checkpointer.save(step, _state())


def _full(*unused_args, **unused_kwargs):
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a long trace")


def _messages(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def _failing(monkeypatch, count):
    """Makes the first `count` writes of arrays fail in the background."""
    wait, left = saving.ocp.AsyncCheckpointer.wait_until_finished, [count]

    def fail(self):
        wait(self)
        if threading.current_thread().name == "checkpoint" and left[0] > 0:
            left[0] -= 1
            _full()

    monkeypatch.setattr(saving.ocp.AsyncCheckpointer, "wait_until_finished", fail)


def test_a_save_that_failed_is_tried_again_while_the_state_is_there(
    tmp_path, monkeypatch, caplog
):
    _failing(monkeypatch, 2)
    with Checkpointer(tmp_path, retry_seconds=0.0) as checkpointer:
        checkpointer.save(1, _state(), {"seed": 4})
        checkpointer.wait()
        assert checkpointer.read_meta(1)["seed"] == 4
        _assert_identical(checkpointer.restore(1, _state()), _state())
    assert _messages(caplog) == [
        f"checkpoint 1 in {tmp_path} could not be written: RESOURCE_EXHAUSTED: No "
        "space left on device; tried again in 0 s"
    ]


def test_a_save_that_goes_on_failing_is_raised_once(tmp_path, monkeypatch, caplog):
    _failing(monkeypatch, 9)
    sentence = (
        f"checkpoint 1 in {tmp_path} could not be written: RESOURCE_EXHAUSTED: No"
    )
    with Checkpointer(tmp_path, retry_seconds=0.0, attempts=2) as checkpointer:
        checkpointer.save(1, _state())
        with pytest.raises(CheckpointError, match=f"^{re.escape(sentence)}") as raised:
            checkpointer.wait()
        assert "\n" not in str(raised.value)
        checkpointer.wait()
        assert checkpointer.steps() == []
    # Neither a folder nor a temporary one: the room is needed.
    assert list(tmp_path.iterdir()) == []
    assert [m.partition("; ")[2] for m in _messages(caplog)] == [
        "tried again in 0 s",
        "given up after attempt 2, until the next one is due",
    ]


def test_a_write_that_cannot_begin_is_a_failed_one(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, attempts=1)
    monkeypatch.setattr(checkpointer._orbax, "save", _full)
    checkpointer.save(1, _state())
    with pytest.raises(CheckpointError, match=r"checkpoint 1 in .* No space left on"):
        checkpointer.wait()
    monkeypatch.undo()
    monkeypatch.setattr(manifests, "begin", lambda place: _raise(OSError(28, "full")))
    checkpointer.save(1, _state())
    with pytest.raises(CheckpointError, match=r"tmp.*/1 cannot be made: .*full"):
        checkpointer.close()


def test_a_commit_that_failed_after_its_rename_is_tried_again(tmp_path, monkeypatch):
    sync, failures = manifests._sync, [OSError(5, "Input/output error")]

    def once(path):
        if failures and path == tmp_path:
            raise failures.pop()
        sync(path)

    monkeypatch.setattr(manifests, "_sync", once)
    with Checkpointer(tmp_path, retry_seconds=0.0) as checkpointer:
        checkpointer.save(3, _state(3))
    assert not failures
    assert retention.committed(tmp_path) == [3]


def _raise(error):
    raise error


def test_the_loop_is_asked_for_another_save_after_a_while(tmp_path, monkeypatch):
    _failing(monkeypatch, 2)
    now = [100.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    with Checkpointer(tmp_path, retry_seconds=5.0, attempts=2) as checkpointer:
        assert not checkpointer.retry_is_due(9)
        checkpointer.save(10, _state())
        checkpointer._newest.join()
        assert not checkpointer.retry_is_due(11)
        now[0] += 5.0
        assert checkpointer.retry_is_due(12)
        checkpointer.save(12, _state(12))
        checkpointer._newest.join()
        now[0] += 50.0
        # Two attempts were all; the next save is the next period's.
        assert not checkpointer.retry_is_due(19)
        checkpointer.save(20, _state(20))
        checkpointer.wait()
        assert not checkpointer.retry_is_due(21)
        assert checkpointer.steps() == [20]


def test_what_libraries_print_of_a_failed_write_is_not_shown(tmp_path, caplog):
    Checkpointer(tmp_path).close()
    written = ValueError('Error writing "w/0" in OCDBT database: No space left')
    for name, error, is_shown in (
        ("asyncio", written, False),
        ("absl", written, False),
        ("asyncio", KeyError("a defect"), True),
    ):
        caplog.clear()
        logging.getLogger(name).error("never retrieved", exc_info=error)
        assert bool(caplog.records) == is_shown, (name, error)


def test_a_state_that_was_donated_is_not_tried_again(tmp_path, monkeypatch):
    _failing(monkeypatch, 1)
    state = _state()
    with Checkpointer(tmp_path, retry_seconds=0.0) as checkpointer:
        checkpointer.save(1, state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        with pytest.raises(CheckpointError, match="No space left"):
            checkpointer.wait()


def test_the_error_that_ended_the_block_is_shown(tmp_path, monkeypatch):
    _failing(monkeypatch, 9)

    def run():
        with Checkpointer(tmp_path, attempts=1) as checkpointer:
            checkpointer.save(1, _state())
            raise KeyError("the loop's own")

    with pytest.raises(KeyError, match="the loop's own"):
        run()


def test_reading_is_quiet(tmp_path, caplog):
    with Checkpointer(_saved(tmp_path)) as checkpointer:
        checkpointer.restore(3, _state())
    load_params(tmp_path)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []


def test_another_model_is_refused_by_name_and_shape(tmp_path):
    with Checkpointer(_saved(tmp_path)) as checkpointer:
        with pytest.raises(
            UserError,
            match=re.escape("layer_0/out' as float32[8, 11], but float32[9, 11] is ne"),
        ):
            checkpointer.restore(3, _state(width=9))
        state = _state()
        extra = {**state.param_sets, "magnet": state.param_sets[POLICY]}
        with pytest.raises(UserError, match=r"lacks 'param_sets/magnet/.* and 3 more"):
            checkpointer.restore(3, state._replace(param_sets=extra))
        fewer = {POLICY: state.param_sets[POLICY]}
        with pytest.raises(UserError, match="unexpected 'param_sets/ema/decoder"):
            checkpointer.restore(3, state._replace(param_sets=fewer))
        # orbax would cast this without a word.
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)._replace(
            step=state.step
        )
        with pytest.raises(UserError, match=r"float32\[.*but bfloat16\["):
            checkpointer.restore(3, half)


def test_missing_step_lists_those_there(tmp_path):
    with (
        Checkpointer(_saved(tmp_path, (1, 2))) as checkpointer,
        pytest.raises(UserError, match=r"no checkpoint 9 in .* steps there: \[1, 2\]"),
    ):
        checkpointer.restore(9, _state())


def _flip_one_bit(step_folder):
    target = max(_data_files(step_folder), key=lambda f: f.stat().st_size)
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(bytes(content))


def _truncate(step_folder):
    for target in _data_files(step_folder):
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])


def _delete_metadata(step_folder):
    (step_folder / "state" / "_METADATA").unlink()


def _cut_manifest(step_folder):
    _shorten(step_folder / "manifest.json")


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage", [_flip_one_bit, _truncate, _delete_metadata, _cut_manifest]
)
def test_damaged_newest_is_named_and_the_older_taken(tmp_path, caplog, damage):
    _saved(tmp_path, (1, 2))
    damage(tmp_path / "2")
    with (
        Checkpointer(tmp_path) as checkpointer,
        caplog.at_level(logging.WARNING, "nlhf_jax"),
    ):
        restored = checkpointer.restore(2, _state())
        _assert_identical(restored, _state(1))
        assert f"checkpoint {tmp_path / '2'} is damaged" in caplog.text
        assert (tmp_path / "2.damaged").is_dir()
        # The step can be saved again, and is the newest then.
        checkpointer.save(2, _state(2))
        checkpointer.wait()
        _assert_identical(checkpointer.restore(2, _state()), _state(2))


def test_nothing_readable_is_a_user_error_and_nothing_is_renamed(tmp_path):
    _saved(tmp_path, (1, 2))
    _cut_manifest(tmp_path / "1")
    _delete_metadata(tmp_path / "2")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(
            UserError,
            match=r"no readable .*: 2: state/_METADATA is missing; 1: manifest\.json",
        ),
    ):
        checkpointer.restore(2, _state())
    assert (tmp_path / "2").is_dir()


def test_what_is_no_checkpoint_is_named_ignored_and_saved_again(tmp_path, caplog):
    _saved(tmp_path, (1, 2))
    (tmp_path / "2" / "manifest.json").unlink()
    (tmp_path / "7").mkdir()
    (tmp_path / "007").mkdir()
    (tmp_path / "notes").mkdir()
    with Checkpointer(tmp_path) as checkpointer:
        ignored = "has no manifest.json, so it is no checkpoint and is ignored"
        assert _messages(caplog) == [f"{tmp_path / n} {ignored}" for n in "27"]
        assert checkpointer.steps() == [1]
        checkpointer.save(2, _state(2))
        checkpointer.wait()
        _assert_identical(checkpointer.restore(2, _state()), _state(2))
    assert (tmp_path / "2.damaged" / "state").is_dir()
    assert (tmp_path / "7").is_dir()


def test_what_a_killed_save_or_deletion_left_is_gone_after_the_next_start(tmp_path):
    _saved(tmp_path, (1, 2, 3))
    # As if killed while it saved 3 and while it deleted 1.
    (tmp_path / "3" / "manifest.json").rename(tmp_path / "3" / "manifest.json.partial")
    (tmp_path / "1").rename(tmp_path / "1.deleting")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_file_that_the_manifest_does_not_know_is_named(tmp_path, caplog):
    _saved(tmp_path)
    (tmp_path / "3" / "state" / "note.txt").write_text("mine")
    with Checkpointer(tmp_path) as checkpointer:
        _assert_identical(checkpointer.restore(3, _state()), _state(3))
    assert _messages(caplog) == [
        f"checkpoint {tmp_path / '3'} holds state/note.txt, which is not in its "
        "manifest and is not read"
    ]


def test_best_pinned_and_every_so_many_stay(tmp_path):
    rule = Retention(newest=1, every_steps=4, best=1, metric="eval/kl", best_is="lower")
    wins = {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.9, 5: np.nan, 6: 0.4, 7: 0.5, 8: 0.6, 9: 0.7}
    with Checkpointer(tmp_path, keep=rule) as checkpointer:
        checkpointer.save(1, _state(), {"evaluation": {"eval/kl": 0.3}})
        (tmp_path / "1.pinned").touch()
        for step in range(2, 6):
            checkpointer.save(step, _state(), {"evaluation": {"eval/kl": wins[step]}})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 4, 5]
    # The figures of checkpoints that another run wrote are read from them.
    with Checkpointer(tmp_path, keep=rule) as checkpointer:
        for step in range(6, 10):
            checkpointer.save(step, _state(), {"evaluation": {"eval/kl": wins[step]}})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 4, 8, 9]


def test_a_damaged_manifest_does_not_stop_the_deletion_of_old_ones(tmp_path):
    keep = Retention(newest=1, best=1, metric="eval/kl")
    with Checkpointer(tmp_path, keep=keep) as checkpointer:
        for step in (1, 2, 3):
            if step == 3:
                checkpointer.wait()
                _cut_manifest(tmp_path / "2")
                checkpointer._evaluations.clear()
            checkpointer.save(step, _state(), {"evaluation": {"eval/kl": -float(step)}})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]


def test_the_manifest_tells_the_bytes_of_what_grows_beside(tmp_path):
    lines = tmp_path / "metrics.jsonl"
    lines.write_text("12345\n")
    with Checkpointer(tmp_path / "steps", beside=[lines]) as checkpointer:
        checkpointer.save(1, _state())
        lines.write_text("12345\nmore\n")
        checkpointer.wait()
        assert checkpointer.read_meta(1)["positions"] == {"metrics.jsonl": 6}


def _as_float32(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def test_load_params_finds_them_at_every_level(tmp_path):
    _saved(tmp_path / "checkpoints", (1, 2))
    newest = _as_float32(_state(2).param_sets[POLICY])
    older = _as_float32(_state(1).param_sets[POLICY])
    for path, expected in (
        (tmp_path, newest),
        (tmp_path / "checkpoints", newest),
        (tmp_path / "checkpoints" / "2", newest),
        (tmp_path / "checkpoints" / "1", older),
    ):
        _assert_identical(load_params(path), expected)
        _assert_identical(load_params(str(path), expected), expected)


def test_load_params_skips_a_damaged_step(tmp_path):
    _saved(tmp_path, (1, 2))
    _truncate(tmp_path / "2")
    _assert_identical(load_params(tmp_path), _as_float32(_state(1).param_sets[POLICY]))
    with pytest.raises(UserError, match=r"is readable: .*: "):
        load_params(tmp_path / "2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_params_file_round_trip(tmp_path, dtype):
    params = _state().param_sets[POLICY] | {"count": jnp.asarray([1, 2], jnp.int32)}
    written = save_params(tmp_path / "export" / "checkpoints", params, dtype, {"a": 1})
    assert written == tmp_path / "export" / "checkpoints" / "params.safetensors"
    assert read_params_metadata(written)["a"] == 1

    def expected(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.asarray(leaf)
        return np.asarray(leaf.astype(dtype), np.float32)

    for path in (tmp_path / "export", written.parent, written):
        _assert_identical(load_params(path), jax.tree.map(expected, params))
    names = json.loads(written.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert "decoder/layer_0/embed" in names


def test_params_file_size_is_two_bytes_a_number(tmp_path):
    params = {"w": jnp.zeros((100, 1000))}
    assert save_params(tmp_path, params).stat().st_size < 2 * 100 * 1000 + 1000


def test_damaged_params_file_is_refused(tmp_path):
    path = save_params(tmp_path, _state().param_sets[POLICY])
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"is readable: .*: "):
        load_params(path)
    path.write_bytes(bytes(content[:100]))
    with pytest.raises(UserError, match=r"is readable: .*: "):
        load_params(path)


@pytest.mark.parametrize("export", [True, False])
def test_load_params_refuses_other_shapes_and_names(tmp_path, export):
    params = _state().param_sets[POLICY]
    if export:
        save_params(tmp_path, params)
    else:
        _saved(tmp_path)
    wide = _state(width=9).param_sets[POLICY]
    with pytest.raises(UserError, match=r"layer_0/out' as .*\[8, 11\].*\[9, 11\]"):
        load_params(tmp_path, wide)
    with pytest.raises(UserError, match="lacks 'head'"):
        load_params(tmp_path, params | {"head": jnp.zeros(2)})


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint '.*nowhere' does not exist"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint: expected a folder of"):
        load_params(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Checkpointer(file / "checkpoints")
    with pytest.raises(UserError, match="keep must be an integer of at least 1, got 0"):
        Checkpointer(tmp_path, keep=0)
