# SPDX-License-Identifier: Apache-2.0
"""The other end of the line protocol: sides as processes of their own, run in turns."""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.protocol import MARK

ROOT = pathlib.Path(__file__).resolve().parent.parent
START_S, UNIT_S = 900.0, 600.0
SETTLE_S = 0.3  # for a thread pool that spins on after its last product


@dataclasses.dataclass(frozen=True)
class Side:
    """A program that does units of work.

    Attributes:
      name: in results and rows.
      module: what `python -m` runs.
      variant: its first argument.
      environment: folder with its `bin/python` below the peers' folder; "" runs it
        with this Python, as is done where there is no such folder.
      variables: environment variables besides everyone's.
    """

    name: str
    module: str
    variant: str
    environment: str = ""
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def command(self, size: str, peers: pathlib.Path | None) -> list[str]:
        """Returns the words that start it."""
        python = pathlib.Path(sys.executable)
        if peers and self.environment:
            own = peers / self.environment / "bin" / "python"
            python = own if own.exists() else python
        return [str(python), "-m", self.module, self.variant, f"--size={size}"]


class Lost(Exception):
    """A side that said nothing more; the reason."""


class Running:
    """A started side.

    Attributes:
      side: what was started.
      state: "starting", "ready", "absent", "crashed" or "ended".
      why: of an absent or crashed side.
      told: what it said when it was ready and at its end.
    """

    def __init__(
        self,
        side: Side,
        command: Sequence[str],
        log: pathlib.Path,
        variables: Mapping[str, str],
    ):
        self.side, self.state, self.why = side, "starting", ""
        self.told: dict[str, Any] = {}
        self._log = log
        self._lines: queue.Queue[str | None] = queue.Queue()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(variables),
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line.removeprefix(MARK))
        self._lines.put(None)

    def _hear(self, limit_s: float) -> tuple[str, dict[str, Any]]:
        """Returns the next answer; noise has been left out.

        Raises:
          Lost: it ended, said no sense, or took longer than `limit_s`.
        """
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise Lost(f"no answer within {limit_s:g} s") from None
        if line is None:
            code = self._process.wait()
            raise Lost(f"exit code {code}: {self._last_line()}")
        kind, _, text = line.partition(" ")
        try:
            return kind, json.loads(text)
        except json.JSONDecodeError:
            raise Lost(f"not JSON: {text.strip()[:80]}") from None

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next(
            (line.strip() for line in reversed(lines) if line.strip()), "silent"
        )

    def _ask(self, word: str, kind: str, limit_s: float) -> dict[str, Any] | None:
        """Returns the answer; None if there is none, and the side is crashed."""
        try:
            if word:
                self._process.stdin.write(word + "\n")
                self._process.stdin.flush()
            heard, fields = self._hear(limit_s)
            if heard == "absent":
                self.state, self.why = "absent", fields["why"]
                self.stop()
                return None
            if heard != kind:
                raise Lost(f"said {heard!r} where {kind!r} was due")
        except (Lost, OSError, KeyError) as error:
            if isinstance(error, OSError):
                error = Lost(f"it ended: {self._last_line()}")
            self.state, self.why = "crashed", str(error)
            self.stop()
            return None
        return fields

    def start(self, limit_s: float = START_S) -> None:
        """Waits until the side is ready, absent or crashed."""
        fields = self._ask("", "ready", limit_s)
        if fields is not None:
            self.state = "ready"
            self.told |= fields

    def unit(self, limit_s: float = UNIT_S) -> dict[str, Any] | None:
        """Returns {"seconds", "parts"} of one unit; None if the side is gone."""
        return self._ask("unit", "unit", limit_s) if self.state == "ready" else None

    def end(self, limit_s: float = UNIT_S) -> None:
        """Asks for peak memory and facts, and waits for the process."""
        if self.state == "ready":
            fields = self._ask("end", "end", limit_s)
            if fields is not None:
                self.told |= fields
                self.state = "ended"
        self.stop()

    def stop(self) -> None:
        """Ends the process if it has not ended."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5.0 if self.state == "ended" else 0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def record(self) -> dict[str, Any]:
        """Returns the side for the results file."""
        return {"state": self.state, "why": self.why} | self.told


def in_turns(
    running: Sequence[Running],
    rounds: int,
    settle_s: float = SETTLE_S,
    limit_s: float = UNIT_S,
) -> list[dict[str, dict[str, Any]]]:
    """Returns one {name of side: its unit} a round; sides that are gone are left out.

    Each round begins one side later than the one before, so that no side always
    follows the same neighbour.
    """
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        turn = number % len(running) if running else 0
        units = {}
        for one in [*running[turn:], *running[:turn]]:
            unit = one.unit(limit_s)
            if unit is not None:
                units[one.side.name] = unit
                time.sleep(settle_s)
        found.append(units)
    return found
