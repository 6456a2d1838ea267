# SPDX-License-Identifier: Apache-2.0
"""Calls of gcloud and kubectl: argument lists in, an exit code and its meaning out."""

import dataclasses
import enum
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from launch.errors import CONNECTION_LOST, DONE, SubmitError
from launch.processes import TICK, Signals

TIMED_OUT = 124


class Stopped(Exception):
    """A signal came while a call was running or a wait lasted."""


class Problem(enum.Enum):
    """Why a call failed, as far as the next step depends on it."""

    NONE = "nothing"
    MISSING = "not found"
    EXISTS = "already exists"
    CAPACITY = "no capacity now"
    REFUSED = "refused for good"
    CONNECTION = "connection lost"
    OTHER = "failed"


# Read from the top: a quota is refused with the same word as a lack of machines.
_SIGNS = (
    (Problem.EXISTS, r"ALREADY_EXISTS|already exists"),
    (Problem.MISSING, r"NOT_FOUND|NotFound|not found|was not found"),
    (Problem.REFUSED, r"[Qq]uota|QUOTA"),
    (
        Problem.CAPACITY,
        r"RESOURCE_EXHAUSTED|no more capacity|ZONE_RESOURCE_POOL_EXHAUSTED|"
        r"does not have enough resources|stockout",
    ),
    (
        Problem.REFUSED,
        r"PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|Forbidden|"
        r"unrecognized arguments|Invalid choice|Reauthentication|"
        r"do not currently have an active account|forbidden|Invalid value",
    ),
)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a call answered.

    Attributes:
      code: its exit code; 124 where it was ended at its time limit.
      output: its standard output.
      errors: its standard error.
    """

    code: int
    output: str = ""
    errors: str = ""

    @property
    def problem(self) -> Problem:
        """Why it failed."""
        if self.code == DONE:
            return Problem.NONE
        if self.code == CONNECTION_LOST:
            return Problem.CONNECTION
        found = (kind for kind, sign in _SIGNS if re.search(sign, self.errors))
        return next(found, Problem.OTHER)

    @property
    def complaint(self) -> str:
        """The line of standard error that says most, for the user."""
        if self.code == TIMED_OUT and not self.errors.strip():
            return "no answer within the time limit"
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        marked = [
            line for line in lines if line.startswith(("ERROR", "Error", "error"))
        ]
        return [*marked, *lines[-1:], f"exit code {self.code}"][0]

    def json(self) -> Any:
        """Returns the output as JSON; None where it is not JSON."""
        try:
            return json.loads(self.output)
        except json.JSONDecodeError:
            return None


def shown(command: Sequence[str]) -> str:
    """Returns a command for reading, quoted as a shell would need it."""
    return shlex.join(command)


def need_program(program: str, dry_run: bool) -> None:
    """Checks that a program is there; a dry run does without.

    Raises:
      SubmitError: it is not on PATH.
    """
    if not dry_run and shutil.which(program) is None:
        raise SubmitError(
            f"{program} is not on PATH: install it, or look at the commands with "
            "--dry_run"
        )


class Caller:
    """Runs calls one after the other or side by side; a signal ends them.

    Attributes:
      signals: what the user sent.
      shielded: True while signals must not end a call, since something is deleted.
    """

    def __init__(self, signals: Signals, limit: float):
        self.signals, self.limit, self.shielded = signals, limit, False

    def __call__(self, command: Sequence[str], limit: float | None = None) -> Done:
        """Runs one call to its end or its limit, in seconds.

        Raises:
          Stopped: a signal came first; the call is ended.
        """
        return self.together([command], limit)[0]

    def together(
        self, commands: Sequence[Sequence[str]], limit: float | None = None
    ) -> list[Done]:
        """Runs calls at the same time; the same as above for each."""
        end = time.monotonic() + (self.limit if limit is None else limit)
        seen = len(self.signals.received)
        calls = [_Call(command) for command in commands]
        try:
            while any(call.running() for call in calls) and time.monotonic() < end:
                if len(self.signals.received) > seen and not self.shielded:
                    raise Stopped
                calls[0].wait(TICK)
        finally:
            done = [call.close() for call in calls]
        return done

    def sleep(self, seconds: float) -> None:
        """Waits.

        Raises:
          Stopped: a signal has come.
        """
        if self.shielded:
            time.sleep(seconds)
        elif self.signals.sleep(seconds):
            raise Stopped


class _Call:
    """A running call with its output in files: a full pipe cannot block it."""

    def __init__(self, command: Sequence[str]):
        self._out = tempfile.TemporaryFile()  # noqa: SIM115
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            # A terminal's Ctrl-C must reach us alone: we say when a call ends.
            start_new_session=True,
        )

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        time.sleep(TICK / 10)

    def close(self) -> Done:
        late = self.running()
        for number in (signal.SIGTERM, signal.SIGKILL) if late else ():
            _signal_group(self._process, number)
            self.wait(2.0)
        code = self._process.wait()
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Done(TIMED_OUT if late else code, *texts)


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)
