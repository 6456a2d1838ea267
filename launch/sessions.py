# SPDX-License-Identifier: Apache-2.0
"""One attempt on machines: a connection to every worker, with a log of each."""

import pathlib
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace

from launch import processes
from launch.calls import Stopped
from launch.errors import AGAIN, DONE, SAVED, decisive, shell_code
from launch.machines import Action
from launch.processes import Child, Signals, Tail, say

GONE = "the machines are gone"
# From the first worker's death to the end of waiting for the others' own exit codes;
# from the first normal end to that of all.
SETTLE_SECONDS, FINISH_SECONDS = 5.0, 600.0


class Sessions:
    """The connections of one attempt; whatever happens, all are ended.

    Attributes:
      log: of the first worker, which shows the steps.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        commands: Mapping[tuple[str, int], list[str]],
        options: SimpleNamespace,
        signals: Signals,
    ):
        self._folder, self._commands, self._options = folder, commands, options
        self._signals = signals
        self._children: list[Child] = []
        self._stopping: list[Child] = []
        self.log = self._log(next(iter(commands)))
        self._tail = Tail(self.log)

    def _log(self, worker: tuple[str, int]) -> pathlib.Path:
        return self._folder / f"{worker[0]}_worker_{worker[1]}.log"

    def run(
        self,
        watch: Callable[[], Action],
        stop_commands: Callable[[], list[list[str]]],
    ) -> tuple[int, str]:
        """Follows all workers to the end; returns (exit code, reason).

        Args:
          watch: asks what the machines' state wants, every `poll_seconds`.
          stop_commands: calls that let the job save and end on every worker.
        """
        try:
            for worker, command in self._commands.items():
                name = f"{worker[0]} worker {worker[1]}"
                child = processes.start(name, command, self._log(worker))
                self._children.append(child)
            return self._follow(watch, stop_commands)
        finally:
            processes.end_all([*self._children, *self._stopping], 1.0)
            self._tail.copy()

    def _follow(self, watch, stop_commands) -> tuple[int, str]:
        next_look = time.monotonic() + self._options.poll_seconds
        first_end = None
        while True:
            self._tail.copy()
            codes = self._codes()
            if None not in codes:
                return self._verdict(codes)
            if any(codes):
                return self._one_failed(codes)
            if self._signals.received:
                say(f"{self._signals.received[0].name}: the job saves and stops")
                return self._stop(stop_commands)
            now = time.monotonic()
            if DONE in codes:
                first_end = first_end or now
                if now - first_end > FINISH_SECONDS:
                    return AGAIN, "a worker ended long before another"
            if now >= next_look:
                next_look = now + self._options.poll_seconds
                wanted = self._look(watch)
                if wanted == Action.REPLACE:
                    return AGAIN, GONE
                if wanted == Action.LEAVE:
                    say("maintenance: the job saves and stops")
                    self._stop(stop_commands)
                    return AGAIN, GONE
            time.sleep(processes.TICK)

    def _look(self, watch: Callable[[], Action]) -> Action:
        try:
            return watch()
        except Stopped:
            return Action.RUN  # the loop sees the signal next

    def _codes(self) -> list[int | None]:
        return [child.code() for child in self._children]

    def _one_failed(self, codes: list[int | None]) -> tuple[int, str]:
        saved = decisive(shell_code(c) for c in codes if c is not None) == SAVED
        settle = min(SETTLE_SECONDS, self._options.poll_seconds)
        self._wait(self._options.grace_seconds if saved else settle)
        return self._verdict(self._codes())

    def _wait(self, seconds: float) -> None:
        """Waits until all have ended, time is up, or one more signal has come."""
        end, seen = time.monotonic() + seconds, len(self._signals.received)
        while time.monotonic() < end and None in self._codes():
            self._tail.copy()
            if len(self._signals.received) > seen:
                return
            time.sleep(processes.TICK)

    def _stop(self, stop_commands) -> tuple[int, str]:
        self._stopping = [
            processes.start("stop", command, self._folder / "stop.log")
            for command in stop_commands()
        ]
        self._wait(self._options.grace_seconds)
        if None in self._codes():
            return AGAIN, "not everything was saved"
        return self._verdict(self._codes())

    def _verdict(self, codes: list[int | None]) -> tuple[int, str]:
        # A lost connection stays 255: it says nothing about the job.
        ended = {i: c if c == 255 else shell_code(c) for i, c in _known(codes).items()}
        code = decisive(ended.values())
        if code == DONE:
            return DONE, "done"
        index = next(i for i, c in ended.items() if c == code)
        return code, f"{self._children[index].name} ended with exit code {code}"


def _known(codes: list[int | None]) -> dict[int, int]:
    return {i: code for i, code in enumerate(codes) if code is not None}
