# SPDX-License-Identifier: Apache-2.0
"""What the rows look through: that they see what is left, and what was redone."""

import os
import socket
import subprocess
import sys

import pytest

from tests.faults import gangs, resume_rows
from tests.faults.gangs import Event


@pytest.fixture
def folder(tmp_path):
    for name in ("pids", "events", "run/checkpoints/5"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def test_nothing_is_left_of_nothing(folder):
    (folder / "pids" / "1_0").write_text(f"{os.getpid()} 0")
    assert gangs.leftovers(folder) == []  # this process is no toy job


def test_processes_ports_and_folders_that_are_left_are_seen(folder):
    words = [sys.executable, "-SE", "-c", "import time; time.sleep(60)", "toy_job"]
    with subprocess.Popen(words) as left, socket.create_server(("127.0.0.1", 0)) as at:
        port = at.getsockname()[1]
        (folder / "pids" / "1_0").write_text(f"{left.pid} {port}")
        (folder / "run" / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir()
        assert gangs.leftovers(folder) == [
            f"process {left.pid} runs",
            f"port {port} is taken",
            "10.orbax-checkpoint-tmp lies there",
        ]
        assert gangs.resident(left.pid) > 0
        left.kill()
    assert gangs.resident(left.pid) == 0
    assert gangs.held(folder) == []


def test_a_line_that_is_being_written_is_left_out(folder):
    (folder / "events" / "2_1").write_text("batch 2 1.5 7\nsave 2 1.")
    assert gangs.events(folder) == [Event("batch", 2, 1.5, 7, 1)]


def history(*, saves, resumed):
    """Returns the events of a run that was killed in step 14, and went on."""
    first = [Event("step", 1, float(step), step, 0) for step in range(1, 15)]
    first += [Event("saved", 1, step + 0.5, step, 0) for step in saves]
    return [*first, Event("step", 2, 20.0, resumed + 1, 0)]


@pytest.mark.parametrize(
    ("saves", "resumed", "redone", "allowed"),
    [
        ((5, 10), 10, 3, 6),
        ((5, 10), 5, 8, 6 + 3),  # the save of step 10 was under way for 3 steps
        ((), 0, 13, 6),
        ((5, 10), 0, 13, 6 + 3),
    ],
)
def test_steps_that_were_done_again_are_counted(saves, resumed, redone, allowed):
    events = history(saves=saves, resumed=resumed)
    assert resume_rows._redone(events, 1, 5) == (redone, allowed)


def test_what_does_not_come_to_pass_is_said(monkeypatch):
    monkeypatch.setattr(gangs, "LIMIT", 0.05)
    with pytest.raises(gangs.Unkept, match="the end of it: not within"):
        gangs.wait_until(lambda: None, "the end of it")
