# SPDX-License-Identifier: Apache-2.0
"""The metric table, what the writer leaves on disk, and the progress display."""

import ast
import errno
import io
import json
import math
import pathlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from nlhf_jax import metric_table, metrics, progress
from nlhf_jax.checks import CheckpointError

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "metrics.md"


def _lines(folder):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_row_is_complete():
    for name, row in metrics.METRICS.items():
        assert re.fullmatch(r"[a-z]+/[a-z0-9_]+", name), name
        assert row.unit and row.meaning and row.low < row.high, name


def test_documented_table_is_the_table():
    table = DOCS.read_text().split("| name |", 1)[1]
    assert ("| name |" + table).strip() == metrics.markdown_table().strip()


def _names_in_source():
    """Returns the string literals outside the table that read like metric names."""
    package = pathlib.Path(metrics.__file__).parent
    for path in package.rglob("*.py"):
        if path.name not in {"metric_table.py", "plots.py"}:
            for node in ast.walk(ast.parse(path.read_text())):
                value = getattr(node, "value", None)
                if isinstance(value, str) and re.fullmatch(r"[a-z]+/[a-z0-9_]+", value):
                    yield value


def test_the_table_has_what_the_code_emits_and_nothing_else():
    areas = {name.split("/")[0] for name in metrics.METRICS}
    emitted = {name for name in _names_in_source() if name.split("/")[0] in areas}
    assert emitted <= set(metrics.METRICS)
    # Evaluations of supervised steps derive their names from the step's.
    derived = set(metric_table._evaluated(metric_table._SUPERVISED))
    assert set(metrics.METRICS) - emitted <= derived


def test_supervised_quantities_have_held_out_rows():
    row = metrics.METRICS["eval/preference_accuracy"]
    assert (row.unit, row.low, row.high) == ("share", 0, 1)


def test_one_line_per_step(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, {"loss/token_nll": 2.5})
    assert _lines(tmp_path) == [{"step": 1, "loss/token_nll": 2.5}]  # before close
    writer.write(np.int32(2), {"loss/token_nll": np.float32(1.5), "compile/count": 1})
    writer.close()
    assert _lines(tmp_path) == [
        {"step": 1, "loss/token_nll": 2.5},
        {"step": 2, "loss/token_nll": 1.5},
    ]
    timing = (tmp_path / "timing.jsonl").read_text()
    assert json.loads(timing) == {"step": 2, "compile/count": 1.0}
    assert list(metrics.read_metrics(tmp_path)) == ["loss/token_nll", "compile/count"]


def test_what_a_clock_says_stands_in_a_file_of_its_own(tmp_path):
    """Two runs that compute the same write the same bytes, whatever the clock."""
    for name, seconds in (("one", 0.5), ("other", 0.7)):
        writer = metrics.MetricWriter(tmp_path / name)
        for row in sorted(metrics.OF_THE_PROCESS):
            writer.write(1, {"loss/token_nll": 2.5, row: seconds})
        writer.write(2, {"time/seconds_per_step": seconds})
        writer.sync()
        writer.close()
    one, other = (
        (tmp_path / n / "metrics.jsonl").read_bytes() for n in ("one", "other")
    )
    assert one == other and one.count(b"\n") == len(metrics.OF_THE_PROCESS)


def test_a_line_that_is_there_is_not_written_again_after_a_resume(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(3, {"loss/token_nll": 2.5})
    writer.write(3, {"eval/kl": 0.5})
    writer.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    resumed = metrics.MetricWriter(tmp_path, 3)
    resumed.write(3, {"eval/kl": 0.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    resumed.write(3, {"eval/length": 2.0})  # of which the file says nothing yet
    resumed.write(4, {"eval/kl": 0.5})
    resumed.close()
    assert [line["step"] for line in _lines(tmp_path)] == [3, 3, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, value):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, {"loss/token_nll": value})
    writer.close()
    assert _lines(tmp_path) == [{"step": 1, "loss/token_nll": None}]
    (_, values_K) = metrics.read_metrics(tmp_path)["loss/token_nll"]
    assert np.isnan(values_K).all()


def test_a_name_without_a_row_is_refused_and_nothing_is_written(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    with pytest.raises(AssertionError, match="loss/made_up"):
        writer.write(1, {"loss/token_nll": 1.0, "loss/made_up": 1.0})
    writer.close()
    assert _lines(tmp_path) == []


def test_resuming_cuts_later_steps_and_a_torn_line(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss/token_nll": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss/tok')  # killed in the middle of a write
    resumed = metrics.MetricWriter(tmp_path, 3)
    resumed.write(4, {"loss/token_nll": -4.0})
    resumed.close()
    steps_K, values_K = metrics.read_metrics(tmp_path)["loss/token_nll"]
    np.testing.assert_array_equal(steps_K, [1, 2, 3, 4])
    np.testing.assert_array_equal(values_K, [1, 2, 3, -4])


@pytest.mark.parametrize("act", ["write", "sync"])
def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, act):
    writer = metrics.MetricWriter(tmp_path, tensorboard=False)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    monkeypatch.setattr(writer, "_line", full)
    arguments = (1, {"loss/token_nll": 1.0}) if act == "write" else ()
    with pytest.raises(CheckpointError) as caught:
        getattr(writer, act)(*arguments)
    assert str(caught.value) == (
        f"the metrics in {tmp_path} could not be written: No space left on device; the "
        "same command resumes from the newest checkpoint"
    )


def test_a_run_from_the_start_starts_the_file_anew(tmp_path):
    for value in (1.0, 2.0):
        writer = metrics.MetricWriter(tmp_path)
        writer.write(0, {"eval/kl": value})
        writer.close()
    assert _lines(tmp_path) == [{"step": 0, "eval/kl": 2.0}]


def test_reading_a_folder_without_metrics(tmp_path):
    assert metrics.read_metrics(tmp_path) == {}


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data):
    """Decodes one protocol buffer message: [(field number, raw value)]."""
    at, found = 0, []
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7)
            if size is None:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        found.append((key >> 3, value))
    return found


def _events(folder):
    """Decodes event files by hand: field numbers are those of event.proto."""
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield dict(_fields(data[12 : 12 + length]))
            data = data[16 + length :]


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(300, {"loss/token_nll": 2.5})
    writer.close()
    version, session, event = _events(tmp_path)
    assert version[3] == b"brain.Event:2"
    assert session[2] == 1 and dict(_fields(session[7]))[1] == 1  # START
    value = dict(_fields(dict(_fields(event[5]))[1]))
    assert event[2] == 300 and value[1] == b"loss/token_nll"
    assert struct.unpack("<f", value[2]) == (2.5,)


def test_tensorboard_is_told_where_a_run_resumes(tmp_path):
    metrics.MetricWriter(tmp_path).close()
    metrics.MetricWriter(tmp_path, 7).close()
    assert [event.get(2) for event in _events(tmp_path)] == [None, 1, None, 8]


def test_writing_does_not_import_tensorflow(tmp_path):
    code = (
        "import sys; from nlhf_jax import metrics;"
        f"w = metrics.MetricWriter({str(tmp_path)!r}); w.write(1, {{'eval/kl': 1.0}});"
        "w.close(); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plain_line_has_units_where_they_help():
    line = metrics.format_line(
        20, {"loss/token_nll": 3.14159, "token/accuracy": 0.5, "loss/z_loss": 0.1}
    )
    assert line == "step 20  loss/token_nll 3.142 nats  token/accuracy 0.5  " + (
        "loss/z_loss 0.1"
    )


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_progress_is_thinned_but_ends_with_the_last_step(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 3.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress.Progress(5, "sft", start_step=0, stream=stream) as bar:
        for step in range(1, 6):
            bar.update(step, {"loss/token_nll": step})
    # Updates at 1, 2, 3, 12 and 13 s: the first, one a period later, and the last.
    assert stream.getvalue().splitlines() == [
        "sft 1/5  0:04 left  loss/token_nll 1 nats",
        "sft 4/5  0:03 left  loss/token_nll 4 nats",
        "sft 5/5  0:00 left  loss/token_nll 5 nats",
    ]


def test_time_left_counts_only_steps_since_the_resume(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress.Progress(100, "sft", start_step=90, stream=stream) as bar:
        bar.update(95, {})
    assert stream.getvalue() == "sft 95/100  0:10 left\n"  # 2 s a step, 5 to go


def test_a_resume_that_nobody_announced_is_seen_at_the_first_update(monkeypatch):
    clock = iter([0.0, 50.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress.Progress(100, "sft", stream=stream) as bar:
        bar.update(90)
        bar.update(95)
    # 5 steps in 10 s, 5 to go.
    assert stream.getvalue() == "sft 90/100  ? left\nsft 95/100  0:10 left\n"


def test_terminal_gets_a_bar():
    stream = _Terminal()
    with progress.Progress(2, "sft [x]", stream=stream) as bar:
        bar.update(2, {"loss/token_nll": 1.25})
    assert "2/2" in stream.getvalue() and "sft [x]" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (61, "1:01"), (3723.4, "1:02:03"), (math.nan, "?"), (math.inf, "?")],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text
