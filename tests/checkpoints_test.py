# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back bit for bit; what is damaged or foreign is named."""

import gc
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import checksums
from nlhf_jax.checkpoints import (
    Checkpointer,
    CheckpointError,
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


def test_a_failed_write_is_raised(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)

    def full(*unused_args, **unused_kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    manager = checkpointer._manager
    monkeypatch.setattr(manager, "wait_until_finished", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpointer.wait()
    monkeypatch.setattr(manager, "save", full)
    with pytest.raises(CheckpointError, match=r"checkpoint 1 in .* No space left"):
        checkpointer.save(1, _state())
    monkeypatch.undo()
    checkpointer.close()


FULL_DISK = """
    import pathlib, resource, signal, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from nlhf_jax.checkpoints import Checkpointer
    from nlhf_jax.supervised_step import init_state

    def state(size):
        numbers = np.random.default_rng(0).normal(size=size)
        return init_state({"w": jnp.asarray(numbers)}, optax.identity())

    with Checkpointer(pathlib.Path(sys.argv[1])) as checkpointer:
        checkpointer.save(1, state(10))
        checkpointer.wait()
        # A file that grows beyond the limit gives an error, as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpointer.save(2, state(1_000_000))
"""


def test_a_full_disk_fails_the_run_and_keeps_the_older_checkpoint(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    assert "CheckpointError: a checkpoint in" in run.stderr
    assert "could not be written" in run.stderr
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]


def test_the_error_that_ended_the_block_is_shown(tmp_path, monkeypatch):
    def full(*unused_args):
        raise ValueError("No space left on device")

    def run():
        with Checkpointer(tmp_path) as checkpointer:
            monkeypatch.setattr(checkpointer._manager, "wait_until_finished", full)
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


def _empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


@pytest.mark.parametrize("damage", [_flip_one_bit, _truncate, _empty])
def test_damaged_newest_is_named_and_the_older_taken(tmp_path, caplog, damage):
    _saved(tmp_path, (1, 2))
    damage(tmp_path / "2")
    with (
        Checkpointer(tmp_path) as checkpointer,
        caplog.at_level(logging.WARNING, "nlhf_jax.checkpoints"),
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
    _empty(tmp_path / "1")
    _empty(tmp_path / "2")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError, match=r"no readable checkpoint in .*\[2, 1\]"),
    ):
        checkpointer.restore(2, _state())
    assert (tmp_path / "2").is_dir()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksum_sees_any_one_flipped_bit(dtype):
    random = np.random.default_rng(0)
    array = random.integers(0, 2, size=(3, 5)).astype(dtype)
    before = int(checksums.checksum(jnp.asarray(array)))
    raw = np.frombuffer(array.tobytes(), np.uint8)
    # A bool has one bit that counts.
    bits = range(0, 8 * raw.size, 8) if dtype == "bool" else range(8 * raw.size)
    for bit in bits:
        flipped = raw.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        other = np.frombuffer(flipped.tobytes(), array.dtype).reshape(array.shape)
        assert int(checksums.checksum(jnp.asarray(other))) != before


def test_checksum_by_hand():
    words = np.asarray([[3, 5, 2**31], [7, 11, 13]], np.uint32)
    expected = sum(int(w) * (2 * i + 1) for i, w in enumerate(words.ravel())) % 2**32
    assert int(checksums.checksum(jnp.asarray(words))) == expected


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
    with pytest.raises(UserError, match="is readable: all are damaged"):
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
    with pytest.raises(UserError, match="is readable: all are damaged"):
        load_params(path)
    path.write_bytes(bytes(content[:100]))
    with pytest.raises(UserError, match="is readable: all are damaged"):
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
