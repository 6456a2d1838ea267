# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay, by hand and for every rule; how the others go."""

import math
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlhf_jax import manifests, retention
from nlhf_jax.checks import UserError
from nlhf_jax.retention import Retention, to_delete
from nlhf_jax.settings import LoopSettings

STEPS = [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    ("rule", "figures", "pinned", "gone"),
    [
        (Retention(2), {}, (), [10, 20, 30]),
        (Retention(9), {}, (), []),
        (Retention(1, every_steps=20), {}, (), [10, 30]),
        (Retention(1), {}, (20, 70), [10, 30, 40]),
        (
            Retention(1, best=1, metric="m"),
            {10: 1.0, 20: 3.0, 30: 2.0},
            (),
            [10, 30, 40],
        ),
        (
            Retention(1, best=2, metric="m", best_is="lower"),
            {10: 1.0, 20: 3.0, 30: 2.0},
            (),
            [20, 40],
        ),
        # Of equal figures the newer, and no figure is worse than any.
        (Retention(1, best=1, metric="m"), {10: 1.0, 30: 1.0}, (), [10, 20, 40]),
        (Retention(1, best=3, metric="m"), {10: math.nan, 20: -9.0}, (), [10, 30, 40]),
        (Retention(1, best=1, metric="m"), {10: math.inf, 20: 0.0}, (), [10, 30, 40]),
    ],
)
def test_what_goes_by_hand(rule, figures, pinned, gone):
    assert to_delete(STEPS, rule, figures, pinned) == gone


RULES = st.tuples(
    st.integers(1, 5),
    st.integers(0, 6),
    st.integers(0, 5),
    st.just("eval/kl"),
    st.sampled_from(["higher", "lower"]),
)
FIGURES = st.dictionaries(st.integers(0, 40), st.floats(width=16), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.sets(st.integers(0, 40)), RULES, FIGURES, st.sets(st.integers(0, 40)))
def test_what_is_true_of_every_rule(steps, fields, figures, pinned):
    rule = Retention(*fields)
    gone = to_delete(steps, rule, figures, pinned)
    kept = sorted(steps - set(gone))
    assert set(gone) <= steps and gone == sorted(gone)
    assert kept[-rule.newest :] == sorted(steps)[-rule.newest :]
    assert not pinned & set(gone)
    if rule.every_steps:
        assert not any(step % rule.every_steps == 0 for step in gone)
    # None that goes is better than one of the best, and these are as many as asked for.
    usable = {s: f for s, f in figures.items() if s in steps and math.isfinite(f)}
    sign = 1 if rule.best_is == "higher" else -1
    better = sorted(usable, key=lambda s: (sign * usable[s], s), reverse=True)
    assert set(better[: rule.best]) <= set(kept)
    # Asked again, nothing more goes.
    assert to_delete(kept, rule, figures, pinned) == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"newest": 0}, "keep_checkpoints must be an integer of at least 1, got 0"),
        ({"every_steps": -1}, "keep_every_steps must be an integer of at least 0"),
        ({"best": 1}, "best_metric must name an evaluation's metric for keep_best 1"),
        ({"best_is": "highest"}, r"higher, lower; got 'highest' \(did you mean 'hig"),
    ],
)
def test_rules_check_themselves(given, sentence):
    with pytest.raises(UserError, match=sentence):
        Retention(**given)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"keep_every_steps": 15},
            "must be a multiple of checkpoint_period 10, got 15",
        ),
        (
            {"keep_best": 1},
            "keep_best 1 needs best_metric and eval_period, got '' and 0",
        ),
        ({"keep_best": 1, "best_metric": "eval/kl"}, "got 'eval/kl' and 0"),
        ({"best_is": "low"}, "best_is must be one of higher, lower; got 'low'"),
        ({"save_attempts": 0}, "save_attempts must be an integer of at least 1, got 0"),
        ({"save_retry_seconds": -1.0}, r"save_retry_seconds must be in \[0.0, inf\)"),
    ],
)
def test_settings_of_a_loop_check_what_is_kept(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        LoopSettings(100, 4, checkpoint_period=10, **fields)
    # A period that never comes divides nothing.
    assert LoopSettings(5, 4, checkpoint_period=10, keep_every_steps=15)


def checkpoint(folder, step):
    place = folder / str(step)
    manifests.begin(place)
    (place / "state").mkdir()
    (place / "state" / "data").write_text("numbers")
    manifests.commit(place, {"step": step, "files": {}, "arrays": {}})
    return place


def test_a_kill_while_deleting_leaves_nothing_under_the_name_of_a_step(
    tmp_path, monkeypatch
):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)

    def killed(path, **options):
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retention.delete(tmp_path, 1)
    assert retention.step_folders(tmp_path).keys() == {2}
    retention.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    # Also where an earlier attempt has left the other name.
    (tmp_path / "2.deleting").mkdir()
    retention.delete(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_a_checkpoint_a_stranger_a_leftover(tmp_path):
    checkpoint(tmp_path, 3)
    shutil.copytree(checkpoint(tmp_path, 12), tmp_path / "13")
    (tmp_path / "13" / "manifest.json").unlink()
    manifests.begin(tmp_path / "4")
    for name in ("5", "007", "-1", "two", "6.damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "8").write_text("a file")
    assert retention.committed(tmp_path) == [3, 12]
    assert retention.strangers(tmp_path) == [5, 13]
    retention.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["3", "12", "13", "5", "007", "-1", "two", "6.damaged", "8"]
    )
    assert retention.committed(tmp_path / "nowhere") == []


def test_pins_are_files_named_for_a_step(tmp_path):
    for name in ("3.pinned", "best.pinned", "4.pin", ".pinned"):
        (tmp_path / name).touch()
    assert retention.pinned_steps(tmp_path) == {3}


def test_what_is_set_aside_twice_is_there_twice(tmp_path):
    names = []
    for _ in range(3):
        checkpoint(tmp_path, 9)
        names.append(retention.set_aside(tmp_path, 9).name)
    assert names == ["9.damaged", "9.damaged.2", "9.damaged.3"]


def test_only_what_is_marked_is_discarded(tmp_path):
    manifests.begin(tmp_path / "1")
    (tmp_path / "1" / "state").mkdir()
    checkpoint(tmp_path, 2)
    for step in (1, 2, 3):
        retention.discard(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
