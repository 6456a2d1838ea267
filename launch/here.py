# SPDX-License-Identifier: Apache-2.0
"""Runs a job or the tests on this machine, from a fresh clone, with nothing prepared.

    python3 launch/here.py quickstart [flags]     any `nlhf` job and its flags
    python3 launch/here.py tests [pytest flags]   the test suite

Makes `.venv` in the repository from `requirements.lock` (every file's hash is
checked) on the first call and whenever the lock changes; later calls start at once.
Needs Python 3.11 or 3.12 with its venv module, and nothing else.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 11), (3, 12))
TEST_COMMAND = ("-m", "pytest", "-n", "2", "--dist", "worksteal", "-rs")


class SetupError(Exception):
    """What is missing on this machine, in one sentence."""


def find_python() -> str:
    """Returns a supported interpreter: the running one, else one on PATH.

    Inside a virtual environment it is the one that environment was made from: ours is
    deleted before it is made again.

    Raises:
      SetupError: there is none.
    """
    if sys.version_info[:2] in SUPPORTED:
        return getattr(sys, "_base_executable", None) or sys.executable
    for major, minor in SUPPORTED:
        found = shutil.which(f"python{major}.{minor}")
        if found and _version(found) == f"{major}.{minor}":
            return found
    running = ".".join(map(str, sys.version_info[:2]))
    raise SetupError(
        f"Python 3.11 or 3.12 is needed, this is {running} and neither is on PATH"
    )


def _version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


def stamp_text(root: pathlib.Path, python: str) -> str:
    """Returns what the environment was made from: lock, setup.py and interpreter."""
    digest = hashlib.sha256()
    for name in ("requirements.lock", "setup.py"):
        digest.update((root / name).read_bytes())
    return f"{digest.hexdigest()} {_version(python)} {root}\n"


def prepare(root: pathlib.Path = ROOT) -> pathlib.Path:
    """Makes the environment if it is missing or stale; returns its interpreter.

    The stamp is written last, so an interrupted installation is begun anew.

    Raises:
      SetupError: no supported Python, no venv module, or the installation failed.
    """
    python = find_python()
    folder = root / ".venv"
    inside, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = stamp_text(root, python)
    with _one_at_a_time(root / ".venv.lock"):
        if stamp.is_file() and stamp.read_text() == wanted:
            return inside
        print("here: installing into .venv, once (a few minutes)", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        _call(
            [python, "-m", "venv", str(folder)],
            "the venv module does not work (on Debian: apt-get install python3-venv)",
        )
        install = [str(inside), "-m", "pip", "install", "--disable-pip-version-check"]
        lock = root / "requirements.lock"
        _install(
            [*install, "--require-hashes", "-r", str(lock)],
            count_packages(lock.read_text()),
            "installing requirements.lock failed",
        )
        # The lock holds the build tools: an isolated build would fetch them unchecked.
        project = ["--no-deps", "--no-build-isolation", "-e", str(root)]
        _install([*install, *project], 1, "installing the project failed")
        stamp.write_text(wanted)
    return inside


@contextlib.contextmanager
def _one_at_a_time(path: pathlib.Path):
    """Makes a second call wait until the first has finished installing."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _call(command: list[str], failure: str) -> None:
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise SetupError(f"{failure}: {' '.join(command)}")


def count_packages(lock: str) -> int:
    """Returns how many packages a lock pins: the lines that hold a version."""
    return sum("==" in line.partition("#")[0] for line in lock.splitlines())


def _install(command: list[str], total: int, failure: str) -> None:
    """Runs pip with one line of progress every few packages, and its errors."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    seen, every = 0, max(1, total // 4)
    for line in process.stdout:
        if total > 1 and line.startswith("Collecting "):
            seen += 1
            if seen % every == 0:
                print(f"here: {seen} of about {total} packages found", file=sys.stderr)
        elif total > 1 and line.startswith("Installing collected packages"):
            print("here: all downloaded, unpacking", file=sys.stderr)
    if process.wait():
        raise SetupError(f"{failure}: {' '.join(command)}")


def command_for(python: pathlib.Path, words: list[str]) -> list[str]:
    """Returns the command line of `tests` or of a job.

    Raises:
      SetupError: no word is given.
    """
    if not words:
        raise SetupError("say what to run: quickstart, tests, or another nlhf job")
    if words[0] == "tests":
        return [str(python), *TEST_COMMAND, *words[1:]]
    return [str(python), "-m", "nlhf_jax", *words]


def main(words: list[str]) -> int:
    """Prepares the environment and runs the command in the repository."""
    try:
        command_for(pathlib.Path("python"), words)
        _become(command_for(prepare(), words))
    except SetupError as error:
        print(f"here: {error}", file=sys.stderr)
    return 2


def _become(command: list[str]) -> None:
    """Runs `command` in this process's place, in the repository."""
    # More threads than cores keep XLA's CPU client from deadlocking on fake devices.
    environment = {"NPROC": "16", "TF_CPP_MIN_LOG_LEVEL": "3"} | dict(os.environ)
    os.chdir(ROOT)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
