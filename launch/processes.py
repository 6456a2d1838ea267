# SPDX-License-Identifier: Apache-2.0
"""Child processes in groups of their own: started, watched, ended, none left behind."""

import contextlib
import ctypes
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from launch.errors import SubmitError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TICK = 0.05
PARENT_DEATH_SIGNAL = 1  # prctl's number of it


class Signals:
    """Counts Ctrl-C, SIGTERM and SIGHUP in place of dying of them.

    Attributes:
      received: the signals, in order.
    """

    def __init__(self):
        self.received: list[signal.Signals] = []
        self._previous: dict = {}

    def __enter__(self) -> "Signals":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _) -> None:
        self.received.append(signal.Signals(number))

    def sleep(self, seconds: float) -> bool:
        """Waits; returns early, and True, as soon as a signal has come."""
        end = time.monotonic() + seconds
        while not self.received and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, TICK))
        return bool(self.received)


class Child:
    """A process that leads a session of its own, with its output in a file.

    Its exit is seen without reaping it: until `end` its number, and so the number of
    its group, cannot be given to a stranger.
    """

    def __init__(self, name: str, process: subprocess.Popen):
        self.name = name
        self._process = process

    def code(self) -> int | None:
        """Returns the exit code (-n: ended by signal n), or None while it runs."""
        if self._process.returncode is not None:
            return self._process.returncode
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        seen = os.waitid(os.P_PID, self._process.pid, flags)
        if seen is None:
            return None
        return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to the process alone, so that it can save."""
        if self.code() is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def signal_group(self, number: signal.Signals) -> None:
        """Sends a signal to the process and all that it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def reap(self) -> int:
        """Waits for the end, which must be near; returns the exit code."""
        return self._process.wait()


def start(
    name: str,
    command: Sequence[str],
    log: pathlib.Path,
    *,
    environment: Mapping[str, str] | None = None,
    keep_open: Sequence[int] = (),
) -> Child:
    """Starts a command; its output goes to `log`, beside what is there.

    The child gets SIGTERM when this process dies, however it dies.

    Args:
      environment: added to this process's own.
      keep_open: file descriptors that the child inherits.

    Raises:
      SubmitError: the command cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(os.environ) | dict(environment or {}),
                pass_fds=tuple(keep_open),
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        except OSError as error:
            raise SubmitError(
                f"{command[0]} cannot be started: {error.strerror}"
            ) from error
    return Child(name, process)


def _die_with_parent() -> Callable[[], None] | None:
    """What a child calls to be sent SIGTERM at its parent's death; Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def register() -> None:
        # A terminal's background job may ignore these; its child must not.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)

    return register


def end_all(children: Iterable[Child], grace: float) -> list[int]:
    """Ends every group: SIGTERM, `grace` seconds, SIGKILL; returns the exit codes."""
    children = list(children)
    for child in children:
        child.signal_group(signal.SIGTERM)
    end = time.monotonic() + grace
    while time.monotonic() < end and any(child.code() is None for child in children):
        time.sleep(TICK)
    for child in children:
        # Also where the leader is dead: what it started may not be.
        child.signal_group(signal.SIGKILL)
    return [child.reap() for child in children]


class Tail:
    """Copies to standard output what is added to a file."""

    def __init__(self, path: pathlib.Path):
        self._path, self._offset = path, 0

    def copy(self) -> None:
        """Writes what is new; a file that is not there yet is empty."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._offset)
            text = file.read()
            self._offset += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()


@contextlib.contextmanager
def locked(folder: pathlib.Path, name: str) -> Iterator[int]:
    """Holds `folder/lock`, yields its descriptor; children that keep it hold it too.

    Raises:
      SubmitError: another launcher, or a process it left, holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise SubmitError(
            f"--log_dir: {folder} cannot be written: {error.strerror}"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SubmitError(
                f"{name} is already running here (launcher {file.read().strip()}): "
                "stop it, or give this job another --name"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def next_attempt(folder: pathlib.Path) -> int:
    """Returns the first attempt without logs, so that none are written over."""
    numbers = [
        int(path.name.removeprefix("attempt_"))
        for path in folder.glob("attempt_*")
        if path.name.removeprefix("attempt_").isdigit()
    ]
    return max(numbers, default=0) + 1


def say(sentence: str) -> None:
    """Prints a line of the launcher's own, apart from the job's output."""
    print(f"submit: {sentence}", file=sys.stderr, flush=True)
