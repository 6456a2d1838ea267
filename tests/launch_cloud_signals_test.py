# SPDX-License-Identifier: Apache-2.0
"""A launcher that is stopped, killed or started twice, on a fake cloud."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.launch_cloud_tools import TPU, FakeCloud, tiny_tree

ROOT = pathlib.Path(__file__).resolve().parent.parent
CODE = """
import pathlib, sys
from launch import here, submit
here.ROOT = pathlib.Path(sys.argv[1])
sys.exit(submit.main(sys.argv[2:]))
"""
HANG = {"answers": {"run": [{"hang": True}, {"hang": True}]}}


class Launcher:
    """A launcher of its own process."""

    def __init__(self, cloud: FakeCloud, *flags: str):
        self.cloud = cloud
        mine = [w for w in TPU if w.partition("=")[0] not in " ".join(flags)]
        words = [*mine, f"--log_dir={cloud.folder}/logs", *flags, "--", "train"]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", CODE, str(cloud.folder / "tree"), *words],
            cwd=ROOT,
            env=dict(os.environ) | cloud.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, kind: str, count: int = 1) -> None:
        """Waits until the cloud has seen a kind of call so many times."""
        end = time.monotonic() + 30
        while sum(call["kind"] == kind for call in self.cloud.calls()) < count:
            assert time.monotonic() < end, self.cloud.calls()
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """Returns its exit code and what it said."""
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output


@pytest.fixture
def cloud(tmp_path):
    """Returns a fake cloud; no call of it runs on in the end."""
    tiny_tree(tmp_path / "tree")
    found = FakeCloud(tmp_path)
    yield found
    violations = [c["text"] for c in found.calls() if c["kind"] == "violation"]
    assert violations == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_job_save_and_deletes(cloud, number):
    cloud.history(HANG)
    launcher = Launcher(cloud)
    launcher.wait_for("run", 2)
    launcher.process.send_signal(number)
    code, output = launcher.end()
    assert code == 143, output
    assert f"{number.name}: the job saves and stops" in output
    assert cloud.story() == "node-create copy prepare run stop node-delete"
    assert not cloud.state()["exists"]


def test_with_keep_only_the_job_is_stopped(cloud):
    cloud.history(HANG)
    launcher = Launcher(cloud, "--keep")
    launcher.wait_for("run", 2)
    launcher.process.send_signal(signal.SIGTERM)
    code, output = launcher.end()
    assert code == 143, output
    state = cloud.state()
    assert state["exists"]
    assert not state["trainers"]


def test_a_second_signal_does_not_wait_for_saving_but_deletes(cloud):
    cloud.history({"answers": HANG["answers"] | {"stop": [{"seconds": 60}]}})
    launcher = Launcher(cloud)
    launcher.wait_for("run", 2)
    launcher.process.send_signal(signal.SIGINT)
    launcher.wait_for("stop")
    launcher.process.send_signal(signal.SIGINT)
    code, output = launcher.end()
    assert code == 130, output
    assert cloud.story() == "node-create copy prepare run stop node-delete"
    assert not cloud.state()["exists"]


@pytest.mark.parametrize("kind", ["node-create", "copy", "prepare"])
def test_a_signal_on_the_way_up_deletes_what_there_is(cloud, kind):
    cloud.history({"answers": {kind: [{"seconds": 60}]}})
    launcher = Launcher(cloud)
    launcher.wait_for(kind)
    begin = time.monotonic()
    launcher.process.send_signal(signal.SIGTERM)
    code, output = launcher.end()
    assert code == 143, output
    assert time.monotonic() - begin < 15, "it did not wait for the call"
    assert cloud.story().endswith(f"{kind} node-delete")
    assert not cloud.state()["exists"]


def test_signals_during_the_deletion_do_not_end_it(cloud):
    cloud.history({"answers": {"node-delete": [{"seconds": 1}]}})
    launcher = Launcher(cloud)
    launcher.wait_for("node-delete")
    for _ in range(3):
        launcher.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    code, output = launcher.end()
    assert code == 0, output
    assert not cloud.state()["exists"]


def test_a_killed_launcher_is_followed_by_one_that_stops_its_trainer(cloud):
    cloud.history({"answers": {"run": [{"hang": True}, {"hang": True}]}})
    first = Launcher(cloud)
    first.wait_for("run", 2)
    first.process.kill()
    first.end()
    assert cloud.state()["trainers"], "the job runs apart from the launcher"
    code, output = Launcher(cloud).end()
    assert code == 0, output
    assert cloud.story() == (
        "node-create copy prepare run stop copy prepare run node-delete"
    )
    assert not cloud.state()["exists"]


def test_what_a_killed_launcher_left_is_deleted_by_name(cloud):
    cloud.history(HANG)
    first = Launcher(cloud)
    first.wait_for("run", 2)
    first.process.kill()
    first.end()
    code, output = Launcher(cloud, "--delete").end()
    assert code == 0, output
    assert not cloud.state()["exists"]


def test_a_second_launcher_of_a_name_is_refused(cloud):
    cloud.history(HANG)
    first = Launcher(cloud)
    first.wait_for("run", 2)
    seen = len(cloud.calls())
    code, output = Launcher(cloud).end()
    assert code == 2
    assert f"run-1 is already running here (launcher {first.process.pid})" in output
    looks = [c["kind"] for c in cloud.calls()[seen:]]
    assert set(looks) <= {"node-describe"}, "only the first one's looks"
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == 143


def test_a_look_that_hangs_is_ended_and_made_again(cloud):
    cloud.history({"answers": {"node-describe": [{"seconds": 60}]}})
    code, output = Launcher(cloud, "--call_seconds=3").end()
    assert code == 0, output
    assert "no answer within the time limit" in output
