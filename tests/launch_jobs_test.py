# SPDX-License-Identifier: Apache-2.0
"""A real job under the launcher, told wrong; tests/faults kills and stops some."""

import pathlib
import subprocess
import sys

import pytest

from tests.jobs_test import words_for
from tests.jobs_test import work as work

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 240


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
