# SPDX-License-Identifier: Apache-2.0
"""N processes on this machine: one dies, all end, all start again and resume.

Never only the dead one: JAX refuses a process that comes back under its old number
and aborts the others.
"""

import dataclasses
import os
import pathlib
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from types import SimpleNamespace

from launch import here, names, processes
from launch.errors import (
    AGAIN,
    DONE,
    KILLED,
    SAVED,
    SubmitError,
    decisive,
    is_final,
    shell_code,
)
from launch.flags import Flag
from launch.processes import Child, Signals, Tail, say
from launch.repeats import Repeats
from launch.retries import FAILURE, PREEMPTION, RetryBudget

FLAGS = (
    Flag("processes", 1, "how many processes", least=1),
    Flag("devices_per_process", 0, "fake CPU devices of each; 0: what JAX finds"),
    Flag("python", "", "interpreter; else .venv, made from the lock on the first call"),
    Flag("start_seconds", 600.0, "limit until all processes have met"),
    Flag("finish_seconds", 120.0, "limit from the first process's end to the last's"),
    Flag("pause_seconds", 1.0, "pause before the first restart; then it doubles"),
    Flag("stable_seconds", 600.0, "an attempt of this length sets the pause back"),
)
# Between the first death and the signal to the others: who died of the same cause,
# or knows it better, gives its own exit code. And from that signal to SIGKILL.
SETTLE_SECONDS, END_SECONDS = 0.3, 0.7
ESTABLISHED = "01"
ASK_SECONDS = 60.0
_ASK_PYTHON = """
import importlib.util, sys
missing = [name for name in ("gin", "jax") if importlib.util.find_spec(name) is None]
old = "it is Python " + sys.version.split()[0]
print(old if sys.version_info < (3, 11) else "no " + missing[0] if missing else "ready")
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
      code: the exit code that says most.
      reason: one clause for the user.
      again: whether the whole job may be started again.
      died: whether a process of the job ended so by itself.
    """

    code: int
    reason: str
    again: bool
    died: bool = False


def submit(options: SimpleNamespace, job: list[str]) -> int:
    """Runs the job until it is done, cannot be helped, or is stopped.

    Raises:
      SubmitError: nothing could be started.
    """
    if options.dry_run:
        port = free_port()
        for index in range(options.processes):
            extra = _environment(options, index, port, 1)
            words = [f"{name}={value}" for name, value in extra.items()]
            print(shlex.join(["env", *words, *_command(_planned_python(options), job)]))
        return DONE
    return supervise(options, names.job_name(options.name, job), _ready(options, job))


def _planned_python(options: SimpleNamespace) -> str:
    return options.python or str(here.ROOT / ".venv" / "bin" / "python")


def _ready(options: SimpleNamespace, job: list[str]) -> list[str]:
    """The command of a process; makes the environment if there is none."""
    if options.python:
        _check_python(options.python)
        return _command(options.python, job)
    try:
        return _command(str(here.prepare()), job)
    except here.SetupError as error:
        raise SubmitError(str(error)) from error


def _check_python(python: str) -> None:
    """Asks an interpreter what it is, before there is a log that stays empty.

    Raises:
      SubmitError: it is none of ours.
    """
    try:
        done = subprocess.run(
            [python, "-c", _ASK_PYTHON],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
        )
        said = done.stdout.strip()
    except OSError as error:
        said = error.strerror
    except subprocess.TimeoutExpired:
        said = "it does not answer"
    if said != "ready":
        raise SubmitError(
            "--python must be an interpreter of Python 3.11 or later with the packages "
            f"of requirements.lock, got {python}: {said or 'it runs no Python'}"
        )


def _command(python: str, job: list[str]) -> list[str]:
    # Unbuffered: what a process printed before it was killed is in its log.
    return [python, "-u", "-m", "nlhf_jax", *job]


def free_port() -> int:
    """Returns a port of the loopback address that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(
    options: SimpleNamespace, index: int, port: int, attempt: int
) -> dict[str, str]:
    extra = {
        "NLHF_COORDINATOR": f"127.0.0.1:{port}",
        "NLHF_NUM_PROCESSES": str(options.processes),
        "NLHF_PROCESS_ID": str(index),
        "NLHF_ATTEMPT": str(attempt),
    }
    # More threads than cores keep XLA's CPU client from deadlocking on fake devices.
    wanted = {"NPROC": "16", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if options.processes > 1 or options.devices_per_process:
        wanted["JAX_PLATFORMS"] = "cpu"
    extra |= {name: v for name, v in wanted.items() if name not in os.environ}
    if options.devices_per_process:
        count = f"--xla_force_host_platform_device_count={options.devices_per_process}"
        extra["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    return extra


def supervise(options: SimpleNamespace, name: str, command: Sequence[str]) -> int:
    """Runs N processes of `command` until they are done; returns the exit code.

    Args:
      options: values of FLAGS and of the common flags.
      name: folder of the logs, under `options.log_dir`.
      command: what each process runs; they differ by NLHF_PROCESS_ID only.

    Raises:
      SubmitError: a job of this name runs already, or a process cannot be started.
    """
    folder = pathlib.Path(options.log_dir).expanduser() / name
    pauses = RetryBudget(
        options.max_failures,
        options.max_preemptions,
        options.pause_seconds,
        stable_seconds=options.stable_seconds,
    )
    repeats = Repeats()
    with processes.locked(folder, name) as lock, Signals() as signals:
        while True:
            gang = Gang(options, command, folder, lock, signals)
            ended = gang.run()
            if signals.received or not ended.again:
                break
            say(f"{ended.reason}; logs in {gang.folder}")
            kind = PREEMPTION if ended.code == SAVED else FAILURE
            has_died = kind == FAILURE and ended.died
            if has_died and (repeated := repeats.note(ended.code, gang.log)):
                say(repeated)
                return ended.code
            pause = pauses.spend(kind, gang.lasted)
            if pause is None:
                say(f"no restart is left after a {kind}; the same command resumes")
                return ended.code
            several = f"all {options.processes} processes start"
            who = several if options.processes > 1 else "the process starts"
            say(f"{who} again in {pause:.1f} s")
            if signals.sleep(pause):
                break
    if ended.code != DONE:
        say(f"{ended.reason}; logs in {gang.folder}")
    return _stopped_code(ended.code, signals) if signals.received else ended.code


def _stopped_code(code: int, signals: Signals) -> int:
    """143: stopped and saved, whatever the signal was; else the signal's own code."""
    if code in (DONE, SAVED) or is_final(code):
        return code
    return 128 + signals.received[0]


class Gang:
    """One attempt: N processes that live and die together.

    Attributes:
      folder: holds a log of each process.
      log: of the first process, which shows the steps.
      lasted: seconds the attempt took.
    """

    def __init__(self, options, command, folder, lock, signals):
        self._options, self._command, self._signals = options, command, signals
        self._attempt = processes.next_attempt(folder)
        self.folder = folder / f"attempt_{self._attempt}"
        self._lock, self._port = lock, free_port()
        self._children: list[Child] = []
        self.log = self.folder / "process_0.log"
        self._tail = Tail(self.log)
        self._started, self.lasted = time.monotonic(), 0.0
        self._met = options.processes == 1
        self._first_end: float | None = None

    def run(self) -> Ended:
        """Starts all, waits for their end, leaves none behind."""
        try:
            for index in range(self._options.processes):
                self._children.append(self._start(index))
            ended = self._watch()
        finally:
            processes.end_all(self._children, 0)
            self.lasted = time.monotonic() - self._started
            self._tail.copy()
        return ended

    def _start(self, index: int) -> Child:
        return processes.start(
            f"process {index}",
            self._command,
            self.folder / f"process_{index}.log",
            environment=_environment(self._options, index, self._port, self._attempt),
            # Held by every process: no second job of this name while one still saves.
            keep_open=[self._lock],
        )

    def _watch(self) -> Ended:
        while True:
            self._tail.copy()
            codes = [child.code() for child in self._children]
            if all(code is not None for code in codes):
                return self._verdict(codes)
            if any(codes):
                return self._one_failed(codes)
            if self._signals.received:
                return self._stop()
            if trouble := self._overdue(codes):
                return Ended(AGAIN, trouble, True)
            time.sleep(processes.TICK)

    def _one_failed(self, codes: list[int | None]) -> Ended:
        """Somebody died: the rest ends at once, or saves if that is what he did."""
        saving = decisive(shell_code(c) for c in codes if c is not None) == SAVED
        self._wait_for_end(self._options.grace_seconds if saving else SETTLE_SECONDS)
        codes = [child.code() for child in self._children]
        processes.end_all(self._children, END_SECONDS)
        return self._verdict(codes)

    def _wait_for_end(self, seconds: float, patience: int = 0) -> None:
        """Waits until all have ended, time is up, or a further signal has come."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(c.code() is None for c in self._children):
            self._tail.copy()
            if patience and len(self._signals.received) > patience:
                return
            time.sleep(processes.TICK)

    def _stop(self) -> Ended:
        """The user wants an end: all may save; a second signal kills."""
        say(f"{self._signals.received[0].name}: the job saves and stops; again: kills")
        for child in self._children:
            child.ask_to_stop()
        self._wait_for_end(self._options.grace_seconds, patience=1)
        codes = [child.code() for child in self._children]
        if None in codes:
            return Ended(KILLED, "killed before everything was saved", False)
        return self._verdict(codes)

    def _verdict(self, codes: list[int | None]) -> Ended:
        ended = {i: shell_code(c) for i, c in enumerate(codes) if c is not None}
        code = decisive(ended.values())
        if code == DONE:
            return Ended(DONE, "done", False)
        index = next(i for i, c in ended.items() if c == code)
        cause = f"killed by signal {code - 128}" if codes[index] < 0 else f"exit {code}"
        reason = f"process {index} ended ({cause})"
        return Ended(code, reason, not is_final(code), died=True)

    def _overdue(self, codes: list[int | None]) -> str:
        """What takes too long, as a clause; empty while nothing does."""
        now, options = time.monotonic(), self._options
        if not self._met:
            count = connections(self._port)
            self._met = count is None or count >= options.processes
            if not self._met and now - self._started > options.start_seconds:
                return (
                    f"only {count} of {options.processes} processes met within "
                    f"{options.start_seconds:g} s"
                )
        if None in codes and DONE in codes:
            self._first_end = self._first_end or now
            if now - self._first_end > options.finish_seconds:
                late = codes.index(None)
                return (
                    f"process {late} still ran {options.finish_seconds:g} s after "
                    f"process {codes.index(DONE)} had ended"
                )
        return ""


def connections(port: int) -> int | None:
    """Returns how many clients of this machine are connected to `port`.

    None where the kernel keeps no such list; then nobody can be found missing.
    """
    count = None
    for table in ("tcp", "tcp6"):
        try:
            lines = pathlib.Path("/proc/net", table).read_text().splitlines()[1:]
        except OSError:
            continue
        rows = [line.split() for line in lines]
        remote = f":{port:04X}"
        count = (count or 0) + sum(
            row[2].endswith(remote) and row[3] == ESTABLISHED for row in rows
        )
    return count
