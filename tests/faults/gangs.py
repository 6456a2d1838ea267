# SPDX-License-Identifier: Apache-2.0
"""Toy jobs in real processes, alone or under the launcher, looked at from outside."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from tests import process_toys

WORKER = process_toys.ROOT / "tests" / "faults" / "toy_job.py"
LIMIT = 120  # seconds for anything that must come to pass
LAUNCH = (
    "import json, sys\n"
    "from types import SimpleNamespace\n"
    "from launch import local\n"
    "options = SimpleNamespace(**json.loads(sys.argv[1]))\n"
    "sys.exit(local.supervise(options, 'job', json.loads(sys.argv[2])))\n"
)


class Unkept(Exception):
    """What was promised did not come to pass; the sentence says what."""


@dataclasses.dataclass(frozen=True)
class Event:
    """One line that a toy job wrote: what, when, in which attempt, process and step."""

    what: str
    attempt: int
    when: float
    step: int
    process: int


def events(folder: pathlib.Path) -> list[Event]:
    """Returns all that the processes of a job noted, in the order of time."""
    found = []
    for path in (folder / "events").glob("*_*"):
        number = int(path.name.partition("_")[2])
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                what, attempt, when, step = line.split()
                found.append(Event(what, int(attempt), float(when), int(step), number))
    return sorted(found, key=lambda event: event.when)


def wait_until(condition: Callable[[], object], what: str, tick: float = 0.02):
    """Returns what a condition gives as soon as it is true.

    Raises:
      Unkept: it did not come true.
    """
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        if time.monotonic() > end:
            raise Unkept(f"{what}: not within {LIMIT} s")
        time.sleep(tick)
    return found


def wait_for_step(folder: pathlib.Path, step: int, count: int, attempt: int = 1):
    """Waits until every process of an attempt has come to a step or a later one."""

    def all_there():
        there = {
            event.process
            for event in events(folder)
            if event.what == "step" and event.attempt == attempt and event.step >= step
        }
        return len(there) == count

    wait_until(all_there, f"step {step} of attempt {attempt}")


class Job:
    """A toy job of some processes without a launcher.

    Attributes:
      gang: the processes.
    """

    def __init__(self, folder, gang, count, port):
        self.folder, self.gang, self.count, self.port = folder, gang, count, port

    def after(self, begin: float) -> tuple[list[int], list[float]]:
        """Returns exit codes, and how many seconds after `begin` each process ended.

        Raises:
          Unkept: one still runs after the limit.
        """
        ended: dict[int, float] = {}
        deadline = time.time() + LIMIT
        while len(ended) < self.count:
            for number, process in enumerate(self.gang.processes):
                if number not in ended and process.poll() is not None:
                    ended[number] = time.time() - begin
            if time.time() > deadline:
                late = sorted(set(range(self.count)) - set(ended))
                raise Unkept(f"processes {late} still run after {LIMIT} s")
            time.sleep(0.005)
        codes = [process.returncode for process in self.gang.processes]
        return codes, [ended[number] for number in range(self.count)]

    def kill(self, number: int) -> float:
        """Kills a process; returns when."""
        when = time.time()
        self.gang.processes[number].kill()
        return when


@contextlib.contextmanager
def job(
    folder: pathlib.Path, count: int, *, hang_seconds: float = 0, **given
) -> Iterator[Job]:
    """Starts a toy job, and leaves nothing of it running."""
    port = process_toys.free_port()
    with process_toys.gang(folder / "logs") as gang:
        for number in range(count):
            variables = {"NLHF_HANG_SECONDS": str(hang_seconds)} if hang_seconds else {}
            if count > 1:
                variables |= {
                    "NLHF_COORDINATOR": f"127.0.0.1:{port}",
                    "NLHF_NUM_PROCESSES": str(count),
                    "NLHF_PROCESS_ID": str(number),
                }
            gang.start([WORKER, folder, json.dumps(given)], **variables)
        yield Job(folder, gang, count, port)


@contextlib.contextmanager
def supervised(
    folder: pathlib.Path, count: int, *, hang_seconds: float = 0, **given
) -> Iterator[subprocess.Popen]:
    """Starts a toy job under the launcher; what is left of it in the end is killed."""
    options = {
        "processes": count,
        "devices_per_process": 1,
        "start_seconds": 120.0,
        "finish_seconds": 60.0,
        "pause_seconds": 0.1,
        "stable_seconds": 5,
        "grace_seconds": 60.0,
        "max_failures": 1000,
        "max_preemptions": 2,
        "log_dir": str(folder / "logs"),
    }
    command = [sys.executable, "-u", str(WORKER), str(folder), json.dumps(given)]
    environment = os.environ | {
        "PYTHONPATH": str(process_toys.ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    if hang_seconds:
        environment["NLHF_HANG_SECONDS"] = str(hang_seconds)
    with open(folder / "launcher.log", "w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, json.dumps(options), json.dumps(command)],
            cwd=process_toys.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        yield launcher
    finally:
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()
        for pid in alive(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pid_of(folder: pathlib.Path, attempt: int, number: int) -> int:
    """Returns the number that the system gave a process."""
    return _written(folder / "pids" / f"{attempt}_{number}")[0]


def ports(folder: pathlib.Path) -> set[int]:
    """Returns the coordinator's port of every attempt."""
    return {_written(path)[1] for path in (folder / "pids").glob("*")}


def _written(path: pathlib.Path) -> tuple[int, int]:
    """Returns number and port of a process, zeros while it writes them."""
    pid, _, port = (path.read_text() or "0 0").partition(" ")
    return int(pid), int(port)


def alive(folder: pathlib.Path) -> list[int]:
    """Returns the processes of a job, of any attempt, that still run."""
    pids = [_written(path)[0] for path in (folder / "pids").glob("*")]
    return [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX" and b"toy_job" in words


def is_free(port: int) -> bool:
    """Whether a new job can listen on a port at once."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def held(folder: pathlib.Path) -> list[str]:
    """Returns the processes and ports of a job that are not free, one clause each."""
    found = [f"process {pid} runs" for pid in alive(folder)]
    return found + [f"port {p} is taken" for p in ports(folder) if p and not is_free(p)]


def leftovers(folder: pathlib.Path) -> list[str]:
    """Returns what a job that ended well has left behind and nobody needs."""
    steps = (folder / "run" / "checkpoints").iterdir()
    strange = [path.name for path in steps if not path.name.isdecimal()]
    return [*held(folder), *(f"{name} lies there" for name in strange)]


def resident(pid: int) -> int:
    """Returns the memory of a process in bytes, 0 where it is gone."""
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def require(condition: object, sentence: str) -> None:
    """Raises Unkept with the sentence unless the condition holds."""
    if not condition:
        raise Unkept(sentence)
