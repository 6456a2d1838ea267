# SPDX-License-Identifier: Apache-2.0
"""What the tests of the cloud backends share: a fake cloud, a tiny tree, a report."""

import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import stat
import sys

import pytest

from launch import here, submit

TESTS = pathlib.Path(__file__).resolve().parent
LAUNCH = TESTS.parent / "launch"
QUICK = (
    "--poll_seconds=0.02",
    "--pause_seconds=0.01",
    "--max_failures=2",
    "--max_preemptions=2",
    "--wait_seconds=20",
    "--call_seconds=10",
    "--grace_seconds=5",
)
TPU = ("--backend=tpu_vm", "--zone=us-central2-b", "--accelerator_type=v4-16")
TPU = (*TPU, "--version=tpu-ubuntu2204-base", "--name=run-1", *QUICK)
JOB = ("--", "train", "--gin_file=a.gin")
LOOKS = ("node-describe", "request-describe", "group-describe", "group-list-instances")


def put_on_path(folder: pathlib.Path, program: str, script: str) -> pathlib.Path:
    """Writes a program of Python's into `folder/bin`; returns that folder."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    path = bin_folder / program
    # Without site and environment Python starts in a fraction of the time.
    path.write_text(f"#!{sys.executable} -SE\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return bin_folder


@dataclasses.dataclass(frozen=True)
class History:
    """One history: what happens, and what must come of it.

    Attributes:
      happens: read by the fake cloud.
      story: the calls that change something, in order.
      code: the launcher's exit code.
      says: what its standard error must hold.
      flags: besides those of every history.
      remains: whether the machines are there at the end.
    """

    happens: dict
    story: str
    code: int = 0
    says: str = ""
    flags: tuple[str, ...] = ()
    remains: bool = False


class FakeCloud:
    """A fake gcloud on PATH and the calls it saw."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        text = (TESTS / "launch_fake_cloud.py").read_text()
        self.bin = put_on_path(folder, "gcloud", text)
        self.history({})

    @property
    def environment(self) -> dict[str, str]:
        """What a launcher must find in its environment."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "FAKE_CLOUD": str(self.folder)}

    def history(self, history: dict) -> None:
        """Sets what will happen."""
        (self.folder / "history.json").write_text(json.dumps(history))

    def calls(self) -> list[dict]:
        """Returns all calls in order."""
        path = self.folder / "calls.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def story(self) -> str:
        """Returns the kinds of the calls that change something, in order.

        The workers' runs, which start together, are one: where the first fails at
        once, the others may be ended before they are noted.
        """
        kinds = [c["kind"] for c in self.calls() if c["kind"] not in LOOKS]
        return " ".join(
            kind
            for kind, series in itertools.groupby(kinds)
            for _ in (series if kind != "run" else [0])
        )

    def state(self) -> dict:
        """Returns what is there now; no call is writing it meanwhile."""
        with open(self.folder / "state.json") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return json.loads(file.read())


def tiny_tree(root: pathlib.Path) -> pathlib.Path:
    """Writes a tree that has what is needed to be sent, and no more."""
    (root / "launch").mkdir(parents=True)
    for name in ("here.py", "worker.py"):
        (root / "launch" / name).write_text((LAUNCH / name).read_text())
    (root / "requirements.lock").write_text("")
    return root


@pytest.fixture
def found_cloud(tmp_path, monkeypatch):
    """Returns a fake cloud that the launcher finds on PATH, and a tiny tree to send."""
    cloud = FakeCloud(tmp_path)
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(here, "ROOT", tiny_tree(tmp_path / "tree"))
    return cloud


def check_history(cloud: FakeCloud, base: tuple, history: History, capfd) -> None:
    """Runs the launcher through a history and checks all that must come of it."""
    cloud.history(history.happens)
    own = {word.partition("=")[0] for word in history.flags}
    words = [word for word in base if word.partition("=")[0] not in own]
    words += [f"--log_dir={cloud.folder}/logs", *history.flags, *JOB]
    code = submit.main(words)
    errors = capfd.readouterr().err
    assert cloud.story() == history.story, errors
    assert code == history.code, errors
    assert history.says in errors
    assert [c["text"] for c in cloud.calls() if c["kind"] == "violation"] == []
    assert "Traceback" not in errors
    state = cloud.state()
    assert state["exists"] == history.remains
    assert not state["extra"], "an object that goes with the machines is left"
    assert not state["trainers"], "a trainer runs on"
