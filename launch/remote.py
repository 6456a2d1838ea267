# SPDX-License-Identifier: Apache-2.0
"""The commands that run on a worker, as argument lists; nothing is put into a script.

Every one may be run twice: gcloud starts a command again when its connection drops.
"""

from launch.machines import Command

ROOT = "nlhf_jobs"
# Keeps the environment and the runs of an earlier attempt; all else is the new code.
_UNPACK = """set -e
mkdir -p "$1"
find "$1" -mindepth 1 -maxdepth 1 ! -name .venv ! -name .venv.lock ! -name runs \\
  -exec rm -rf {} +
tar -xzf "$2" -C "$1"
exec python3 "$1/launch/worker.py" prepare"""
# On new machines there is nothing to stop, and no code yet that could.
_STOP = """test ! -f "$1/launch/worker.py" ||
  exec python3 "$1/launch/worker.py" stop "$2" "$3\""""


def archive_name(name: str) -> str:
    """Returns the archive's name in a worker's home folder."""
    return f"{name}.tar.gz"


def _code(name: str) -> str:
    return f"{ROOT}/{name}/code"


def prepare(name: str) -> Command:
    """Returns the command that unpacks the code and installs from the lock."""
    return ["sh", "-c", _UNPACK, "sh", _code(name), archive_name(name)]


def run(
    name: str, attempt: int, environment: dict[str, str], job: list[str]
) -> Command:
    """Returns the command that starts an attempt, or follows it if it runs already."""
    settings = [f"--env={key}={value}" for key, value in environment.items()]
    worker = f"{_code(name)}/launch/worker.py"
    return ["python3", worker, "run", name, str(attempt), *settings, "--", *job]


def stop(name: str, grace: float) -> Command:
    """Returns the command that lets every attempt save, and ends it after `grace` s."""
    return ["sh", "-c", _STOP, "sh", _code(name), name, f"{grace:g}"]
