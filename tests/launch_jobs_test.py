# SPDX-License-Identifier: Apache-2.0
"""Real jobs under the launcher: killed and stopped, they end bit for bit the same."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from nlhf_jax import checkpoints
from tests.jobs_test import STEPS, read_lines, words_for
from tests.jobs_test import sft as sft
from tests.jobs_test import work as work

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 240


def submit(work: pathlib.Path, name: str, **changed) -> subprocess.Popen:
    """Starts the launcher with one process of the toy job."""
    more = [f"--gin.TRAIN_STEPS={STEPS}", "--gin.LoopSettings.log_period=1"]
    more.append("--gin.LoopSettings.checkpoint_period=2")
    flags = {"name": name, "python": sys.executable, "log_dir": work / "logs"}
    flags |= {"pause_seconds": 0.1, "max_failures": 1} | changed
    return subprocess.Popen(
        [
            *(sys.executable, "launch/submit.py", "--backend=local"),
            *(f"--{flag}={value}" for flag, value in flags.items()),
            *("--", *words_for(work, "sft", name), *more),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: pathlib.Path, step: int, running: subprocess.Popen) -> None:
    """Waits until the job has logged a step."""
    file, end = folder / "metrics.jsonl", time.monotonic() + LIMIT
    while not (file.exists() and any(r["step"] >= step for r in read_lines(file))):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end, "no step was logged"
        time.sleep(0.02)


def trainer_of(running: subprocess.Popen) -> int:
    """Returns the one child of the launcher."""
    path = f"/proc/{running.pid}/task/{running.pid}/children"
    (child,) = pathlib.Path(path).read_text().split()
    return int(child)


def assert_equal(one: pathlib.Path, other: pathlib.Path) -> None:
    """Holds two runs' last parameters to each other, bit for bit."""
    ours, theirs = map(checkpoints.load_params, (one, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.battery
def test_a_killed_job_starts_again_and_ends_as_if_nothing_had_been(work, sft):
    with submit(work, "killed") as running:
        wait_for_step(work / "killed", 3, running)
        os.kill(trainer_of(running), signal.SIGKILL)
        _, errors = running.communicate(timeout=LIMIT)
    assert running.returncode == 0, errors
    assert "process 0 ended (killed by signal 9)" in errors
    assert "the process starts again in" in errors
    assert len(list((work / "logs" / "killed").glob("attempt_*"))) == 2
    assert_equal(work / "killed", sft)


@pytest.mark.battery
def test_a_stopped_job_has_saved_and_the_same_command_goes_on(work, sft):
    with submit(work, "halted") as running:
        wait_for_step(work / "halted", 3, running)
        running.send_signal(signal.SIGTERM)
        output, errors = running.communicate(timeout=LIMIT)
    assert running.returncode == 143, errors
    assert "everything is saved" in output
    with submit(work, "halted") as running:
        _, errors = running.communicate(timeout=LIMIT)
    assert running.returncode == 0, errors
    assert_equal(work / "halted", sft)


@pytest.mark.battery
def test_a_mistake_in_the_configuration_is_not_tried_again(work):
    words = [sys.executable, "launch/submit.py", "--backend=local", "--name=mistaken"]
    words += [f"--python={sys.executable}", f"--log_dir={work}/logs"]
    done = subprocess.run(
        [*words, "--", *words_for(work, "sft", "mistaken"), "--gin.TRAIN_STPS=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 2
    assert "TRAIN_STPS" in done.stdout
    assert len(list((work / "logs" / "mistaken").glob("attempt_*"))) == 1
