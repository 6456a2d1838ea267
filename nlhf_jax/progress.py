# SPDX-License-Identifier: Apache-2.0
"""How far a long job is: a bar with the time left, or plain lines in a log."""

import io
import sys
import time
from collections.abc import Mapping
from typing import SupportsFloat, SupportsIndex

from nlhf_jax.metrics import format_line

_SHOWN_ON_BAR = 2
# What of the rates is shown beside the metrics of a step, and how on a bar.
RATES = {
    "time/steps_per_second": "{:.3g} steps/s",
    "time/tokens_per_second_per_chip": "{:.4g} tokens/s/chip",
    "compute/mfu": "MFU {:.1%}",
}


class Progress:
    """A context manager that shows steps done, time left and the newest metrics.

    On a terminal it is one bar that is redrawn; elsewhere (a log file, a batch system)
    it prints a plain line no more often than every `period` seconds, and one for the
    last step.

    Args:
      total: steps in all.
      description: what is being done; stands before the bar and each line.
      start_step: steps already done when a run resumes; they do not count for the
        time left. None takes the first update's step, and counts from there.
      period: least seconds between plain lines.
      stream: where to show it; standard error if None.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        start_step: int | None = None,
        period: float | int = 10.0,
        stream: io.TextIOBase | None = None,
    ):
        self._total = total
        self._description = description
        self._start_step = start_step
        self._period = period
        self._stream = sys.stderr if stream is None else stream
        self._display = None

    def __enter__(self) -> "Progress":
        self._start = time.monotonic()
        self._last_line = -float("inf")
        if self._stream.isatty():
            self._display, self._task = _bar(
                self._stream, self._description, self._total, self._start_step or 0
            )
            self._display.start()
        return self

    def __exit__(self, *unused_exception) -> None:
        if self._display is not None:
            self._display.stop()

    def update(
        self, step: SupportsIndex, metrics: Mapping[str, SupportsFloat] | None = None
    ) -> None:
        """Says that `step` steps are done."""
        step, metrics = int(step), metrics or {}
        if self._display is not None:
            text = bar_text(metrics)
            self._display.update(self._task, completed=step, metrics=text)
            return
        now = time.monotonic()
        if self._start_step is None:
            self._start_step, self._start = step, now
        if now - self._last_line >= self._period or step >= self._total:
            self._last_line = now
            line = format_line(step, metrics).removeprefix(f"step {step}")
            left = seconds_left(
                step - self._start_step, self._total - step, now - self._start
            )
            done = f"{self._description} {step}/{self._total}"
            self._stream.write(f"{done}  {duration(left)} left{line}\n")
            self._stream.flush()

    def say(self, text: str) -> None:
        """Shows a sentence on a line of its own, above the bar where there is one."""
        line = f"{self._description}: {text}"
        if self._display is not None:
            self._display.console.print(line, markup=False, highlight=False)
            return
        self._stream.write(line + "\n")
        self._stream.flush()


def bar_text(metrics: Mapping[str, SupportsFloat]) -> str:
    """Returns the first metrics and the rates, as they stand beside a bar."""
    first = list(metrics.items())[:_SHOWN_ON_BAR]
    parts = [f"{name} {float(value):.4g}" for name, value in first]
    rates = {k: v for k, v in metrics.items() if k in RATES}
    parts += [RATES[name].format(float(value)) for name, value in rates.items()]
    return "  ".join(parts)


def seconds_left(done: int, remaining: int, elapsed: float) -> float:
    """Returns the seconds `remaining` steps take at the pace of those `done`.

    NaN before the first step.
    """
    return elapsed / done * remaining if done > 0 else float("nan")


def duration(seconds: float | int) -> str:
    """Returns `1:02:03`, `2:03`, or `?` where nothing is known."""
    if not seconds >= 0 or seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(stream: io.TextIOBase, description: str, total: int, start_step: int):
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[metrics]}", markup=False),
    )
    display = progress.Progress(*columns, console=console.Console(file=stream))
    task = display.add_task(description, total=total, completed=start_step, metrics="")
    return display, task
