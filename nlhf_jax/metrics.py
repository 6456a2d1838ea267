# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run on disk: two files of JSON lines, and TensorBoard events.

A name that is not in the table (`metric_table`) is not written: the assertion points at
the row that is missing. `python -m nlhf_jax.metrics` prints the table.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import SupportsFloat, SupportsIndex

import numpy as np
from jaxtyping import Float, Int

from nlhf_jax import event_files
from nlhf_jax.checks import CheckpointError
from nlhf_jax.metric_table import (
    METRICS,
    OF_THE_PROCESS,
    TIMES,
    check_names,
    format_line,
    markdown_table,
)

METRICS_FILE, TIMING_FILE = "metrics.jsonl", "timing.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

__all__ = [
    "METRICS",
    "METRICS_FILE",
    "OF_THE_PROCESS",
    "TIMES",
    "TIMING_FILE",
    "MetricWriter",
    "format_line",
    "read_metrics",
    "records",
]


class MetricWriter:
    """Appends metrics to `metrics.jsonl`, `timing.jsonl` and an event file.

    A line is strict JSON, `{"step": 20, "loss/token_nll": 3.1}`; a value that is not
    finite is null. What depends on the life of a process (`OF_THE_PROCESS`) stands in
    the second file, all else in the first, and both in the event file. Lines appear in
    the files at once.

    When a run resumes, lines of later steps than the checkpoint's are cut off, and
    TensorBoard is told to drop them too. So `metrics.jsonl` becomes, byte for byte,
    that of a run that never stopped.

    Args:
      folder: output folder of the run; made if it is missing.
      resume_step: updates the restored state has seen; 0 starts the files anew.
      tensorboard: also write event files.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        resume_step: int = 0,
        *,
        tensorboard: bool = True,
    ):
        self._folder = folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {}
        for name in (METRICS_FILE, TIMING_FILE):
            kept[name] = _cut_after(folder / name, resume_step)
        # An evaluation that was owed may be there: its run was stopped once more.
        self._there = {
            frozenset(record)
            for record in kept[METRICS_FILE]
            if record["step"] == resume_step
        }
        self._resume_step = resume_step
        self._metrics, self._timing = (
            open(folder / name, "a", encoding="utf-8")  # noqa: SIM115 closed by close
            for name in (METRICS_FILE, TIMING_FILE)
        )
        self._events = (
            event_files.EventFile(folder / TENSORBOARD_FOLDER, resume_step)
            if tensorboard
            else None
        )

    def write(self, step: SupportsIndex, metrics: Mapping[str, SupportsFloat]) -> None:
        """Writes the values of one step; an unknown name raises an AssertionError.

        What a resumed run finds written for the step it goes on from stays as it is.

        Raises:
          CheckpointError: they cannot be written; the disk is full, say.
        """
        check_names(metrics)
        values = {name: float(value) for name, value in metrics.items()}
        lasting = {k: v for k, v in values.items() if k not in OF_THE_PROCESS}
        if step == self._resume_step and {"step", *lasting} in self._there:
            return
        passing = {k: v for k, v in values.items() if k in OF_THE_PROCESS}
        with _unwritten_is_said(self._folder):
            self._line(self._metrics, step, lasting)
            self._line(self._timing, step, passing)
            if self._events is not None:
                self._events.scalars(int(step), values)

    def _line(self, file, step: SupportsIndex, values: Mapping[str, float]) -> None:
        if not values:
            return
        strict = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": int(step)} | strict, allow_nan=False)
        file.write(line + "\n")
        file.flush()

    def sync(self) -> None:
        """Returns when what was written would outlast a failure of the machine.

        Raises:
          CheckpointError: as `write`.
        """
        with _unwritten_is_said(self._folder):
            for file in (self._metrics, self._timing):
                os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files; writing after that is an error."""
        self._metrics.close()
        self._timing.close()
        if self._events is not None:
            self._events.close()


@contextlib.contextmanager
def _unwritten_is_said(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the metrics in {folder} could not be written: {error.strerror}; the same "
            "command resumes from the newest checkpoint"
        ) from error


def _cut_after(path: pathlib.Path, step: int) -> list[dict]:
    """Drops lines of steps after `step` and a last line that was not finished.

    Returns the lines that are left.
    """
    kept = [one for one in records(path) if step and one["step"] <= step]
    if path.exists():
        partial = path.with_suffix(".partial")
        text = "".join(json.dumps(record) + "\n" for record in kept)
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return kept


def records(path: pathlib.Path) -> Iterator[dict]:
    """Yields the lines of a file of metrics; one that was not finished is left out.

    A file that is not there has none.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed while it wrote this line
        if isinstance(record, dict) and "step" in record:
            yield record


def read_metrics(
    folder: str | os.PathLike,
) -> dict[str, tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]]:
    """Reads both files of a run into name -> (steps, values), null as NaN.

    A folder without them gives an empty dict.
    """
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for file in (METRICS_FILE, TIMING_FILE):
        for record in records(pathlib.Path(folder) / file):
            for name, value in record.items():
                if name != "step":
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(math.nan if value is None else value)
    return {
        name: (np.asarray(steps, int), np.asarray(values, float))
        for name, (steps, values) in columns.items()
    }


if __name__ == "__main__":
    print(markdown_table(), end="")
