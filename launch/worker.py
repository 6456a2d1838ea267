# SPDX-License-Identifier: Apache-2.0
"""The half of the launcher that runs on a worker of a cloud, from the sent code.

    worker.py prepare                        Python, and the packages of the lock
    worker.py run NAME ATTEMPT [--env=A=B] -- JOB   starts the attempt or follows it
    worker.py stop NAME GRACE                lets every attempt save, then ends it

The job runs apart from the connection that started it, and every command may be
given twice: a connection that drops changes nothing. Needs Python 3.10.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

CODE = pathlib.Path(__file__).resolve().parent.parent
PYTHONS = ("python3.12", "python3.11")
TPU_LOCK = CODE / "requirements-tpu.lock"
LIBTPU_LOCK = pathlib.Path("/tmp/libtpu_lockfile")
INTERNAL, KILLED = 70, 137
TICK, KILL_SECONDS = 0.1, 5.0


def prepare() -> int:
    """Installs Python if there is none of ours, and what the lock pins."""
    if not any(map(shutil.which, PYTHONS)):
        apt = ["sudo", "apt-get", "-qq", "-y"]
        packages = ["python3.11", "python3.11-venv"]
        for words in ([*apt, "update"], [*apt, "install", *packages]):
            if subprocess.run(words).returncode:
                print("worker: Python 3.11 cannot be installed", file=sys.stderr)
                return 2
    setup = [sys.executable, str(CODE / "launch" / "here.py"), "--version"]
    code = subprocess.run(setup, stdin=subprocess.DEVNULL).returncode
    if code == 0 and has_tpu():
        pip = [str(CODE / ".venv" / "bin" / "python"), "-m", "pip", "install", "-q"]
        code = subprocess.run(
            [*pip, "--require-hashes", "-r", str(TPU_LOCK)]
        ).returncode
    return code


def has_tpu(devices: pathlib.Path = pathlib.Path("/dev")) -> bool:
    """Whether this machine has TPU chips: the names their drivers give them."""
    return any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*"))


class Attempt:
    """The folder of one attempt on this worker.

    Attributes:
      folder: holds `log`, `exit_code`, `pids` and `alive`, which is locked for as long
        as anything of the attempt runs.
    """

    def __init__(self, name: str, number: int):
        self.number = number
        self.folder = CODE.parent / f"attempt_{number}"
        if CODE.parent.name != name:
            raise SystemExit(f"worker: this is the code of {CODE.parent.name}")

    def read(self, file: str) -> str:
        """Returns a file's text; empty where it is not there."""
        try:
            return (self.folder / file).read_text()
        except FileNotFoundError:
            return ""

    def write(self, file: str, text: str) -> None:
        """Writes a file in one piece: whoever reads it sees all or nothing."""
        part = self.folder / f"{file}.part"
        part.write_text(text)
        os.replace(part, self.folder / file)

    def take(self):
        """Returns the open, locked `alive`, or None where the attempt runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / "alive", "a")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def is_alive(self) -> bool:
        """Whether anything of the attempt runs."""
        file = self.take()
        if file:
            file.close()
        return file is None


def attempts(name: str) -> list[Attempt]:
    """Returns the attempts that were started here, by number."""
    folders = CODE.parent.glob("attempt_*")
    numbers = sorted(int(path.name.removeprefix("attempt_")) for path in folders)
    return [Attempt(name, number) for number in numbers]


def stop(name: str, grace: float) -> int:
    """Ends every attempt; returns 0 when none is left.

    Args:
      grace: seconds a trainer may take to save.
    """
    running = [one for one in attempts(name) if one.is_alive()]
    for one in running:
        _signal(one, "trainer", signal.SIGTERM)
    _wait(running, grace)
    for who in ("trainer", "keeper"):
        for one in running:
            _signal(one, who, signal.SIGKILL, group=True)
        _wait(running, KILL_SECONDS)
    return int(any(one.is_alive() for one in running))


def _wait(running: list, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(one.is_alive() for one in running):
        time.sleep(TICK)


def _signal(attempt: Attempt, who: str, number: int, group: bool = False) -> None:
    """Signals a process of a live attempt; its number cannot be another's yet."""
    end = time.monotonic() + KILL_SECONDS
    while not attempt.read("pids") and attempt.is_alive() and time.monotonic() < end:
        time.sleep(TICK)  # it is just being started
    pids = json.loads(attempt.read("pids") or "{}")
    if who in pids and attempt.is_alive():
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(pids[who], number)


def run(name: str, number: int, environment: dict, job: list) -> int:
    """Starts the attempt unless it was started before; follows it to its exit code."""
    attempt = Attempt(name, number)
    alive = attempt.take()
    if alive and not attempt.read("exit_code") and not attempt.read("pids"):
        for earlier in attempts(name):
            if earlier.number != number and earlier.is_alive():
                print(f"worker: attempt {earlier.number} still runs", file=sys.stderr)
                return INTERNAL
        _remove_stale_lock()
        _start_keeper(name, number, environment, job, alive)
    if alive:
        alive.close()
    return follow(attempt)


def _start_keeper(name, number, environment, job, alive) -> None:
    """Starts a process of its own session that starts the job and awaits its end."""
    words = [sys.executable, str(pathlib.Path(__file__).resolve()), "keep", name]
    log = open(CODE.parent / f"attempt_{number}" / "log", "ab")  # noqa: SIM115
    with log:
        subprocess.Popen(
            [*words, str(number), "--", *job],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | environment,
            pass_fds=(alive.fileno(),),
            start_new_session=True,
            cwd=CODE,
        )


def keep(name: str, number: int, job: list) -> int:
    """Runs the job and writes down how it ended."""
    attempt = Attempt(name, number)
    # What is locked stays so until the job is dead, even if this process is killed.
    locks = [fd for fd in _open_files() if _is_same(fd, attempt.folder / "alive")]
    trainer = subprocess.Popen(
        [sys.executable, str(CODE / "launch" / "here.py"), *job],
        pass_fds=locks,
        start_new_session=True,
    )
    attempt.write("pids", json.dumps({"trainer": trainer.pid, "keeper": os.getpid()}))
    code = trainer.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trainer.pid, signal.SIGKILL)  # what it left behind
    # 255 would tell gcloud that its connection dropped; 1 is gcloud's own failure.
    code = 128 - code if code < 0 else INTERNAL if code in (1, 255) else code
    attempt.write("exit_code", f"{code}\n")
    return 0


def _open_files() -> list:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def _is_same(fd: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def follow(attempt: Attempt) -> int:
    """Copies the log to standard output until the attempt ends; returns its code.

    A second follower goes on where the first one stopped.
    """
    while True:
        is_over = not attempt.is_alive()  # asked first: what it wrote last is shown
        _show(attempt)
        if is_over:
            # Without a code the machine or the keeper was ended from outside.
            return int(attempt.read("exit_code") or KILLED)
        time.sleep(TICK)


def _show(attempt: Attempt) -> None:
    offset = int(attempt.read("shown") or 0)
    with (
        contextlib.suppress(FileNotFoundError),
        open(attempt.folder / "log", "rb") as log,
    ):
        log.seek(offset)
        text = log.read()
        if text:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
            attempt.write("shown", str(offset + len(text)))


def _remove_stale_lock(path: pathlib.Path = LIBTPU_LOCK) -> None:
    """Removes libtpu's lock file if whoever made it is dead."""
    with contextlib.suppress(OSError), open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def main(words: list) -> int:
    """Runs one command; returns its exit code."""
    command, *rest = words
    own = rest[: rest.index("--")] if "--" in rest else rest
    job = rest[len(own) + 1 :]
    if command == "prepare":
        return prepare()
    if command == "stop":
        return stop(own[0], float(own[1]))
    if command == "keep":
        return keep(own[0], int(own[1]), job)
    settings = [word.removeprefix("--env=").partition("=") for word in own[2:]]
    environment = {name: value for name, _, value in settings}
    return run(own[0], int(own[1]), environment, job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
