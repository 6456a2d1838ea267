# SPDX-License-Identifier: Apache-2.0
"""The CI script's verdict, with a bootstrap and a linter that say what we like."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PASSED, BATTERY = "7 passed in 0.10s", "3 passed, 7 deselected in 0.20s"
SKIPPED = "SKIPPED [2] tests/report_test.py:31: no headless browser here"


@pytest.fixture
def clone(tmp_path):
    """Returns a repository that holds the CI script, and fakes of what it calls."""
    for folder in (".ci", "launch", "tests", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "tests" / "expected_skips.txt").write_text(
        "# why\n\nno headless browser\nno second device\n"
    )
    return tmp_path


def run(
    clone,
    log: str,
    tests_exit: int = 0,
    ruff_exit: int = 0,
    battery: str = BATTERY,
    battery_exit: int = 0,
    pip_exit: int = 0,
):
    """Runs the script and returns (exit code, lines of its output)."""
    (clone / "launch" / "here.py").write_text(
        "import sys\nassert sys.argv[1] == 'tests'\n"
        "flags = [f for f in sys.argv[2:] if not f.startswith('--durations')]\n"
        "assert flags in ([], ['-m', 'battery', '--dist', 'loadfile'])\n"
        f"print({battery!r} if flags else {log!r})\n"
        f"sys.exit({battery_exit} if flags else {tests_exit})\n"
    )
    python = clone / ".venv" / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = ruff ] && exit {ruff_exit}\nexit {pip_exit}\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ".ci/run"],
        cwd=clone,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    return done.returncode, done.stdout.splitlines()


def test_passes_and_closes_with_the_summary(clone):
    code, lines = run(clone, f"....... [100%]\n{PASSED}")
    assert code == 0
    assert lines[-3].startswith("ci: 0 tests skipped")
    assert lines[-2:] == [PASSED, BATTERY]


@pytest.mark.parametrize(
    "summary", ["== 7 passed in 0.1s ==", "7 passed, 2 skipped, 1 warning in 0.10s"]
)
def test_reads_either_form_of_the_summary(clone, summary):
    code, lines = run(clone, summary)
    assert (code, lines[-2]) == (0, summary)


def test_expected_skip_is_counted(clone):
    code, lines = run(clone, f"{SKIPPED}\n{PASSED}")
    assert code == 0
    assert f"ci: expected skip: {SKIPPED}" in lines
    assert lines[-3].startswith("ci: 2 tests skipped")


@pytest.mark.parametrize("allowed", ["no second device\n", "", "# nothing\n\n"])
def test_unexpected_skip_fails(clone, allowed):
    (clone / "tests" / "expected_skips.txt").write_text(allowed)
    code, lines = run(clone, f"{SKIPPED}\n{PASSED}")
    assert code == 1
    assert lines[-1] == f"ci: unexpected skip: {SKIPPED}"


def test_second_skip_is_judged_too(clone):
    other = "SKIPPED [1] tests/t5_test.py:3: could not import 'torch'"
    code, lines = run(clone, f"{SKIPPED}\n{other}\n{PASSED}")
    assert code == 1
    assert lines[-1] == f"ci: unexpected skip: {other}"


def test_failed_tests_fail(clone):
    code, lines = run(clone, "1 failed, 6 passed in 0.1s", tests_exit=1)
    assert code == 1
    assert not any(line.startswith("ci:") for line in lines)


def test_the_battery_fails_it(clone):
    code, lines = run(clone, PASSED, battery="1 failed in 0.1s", battery_exit=1)
    assert code == 1
    assert not any(line.startswith("ci:") for line in lines)


def test_a_log_with_bytes_that_are_no_text_is_read_as_any_other(clone):
    code, lines = run(clone, f"Glyph 0 (\0) missing\n{SKIPPED}\n{PASSED}")
    assert (code, lines[-2:]) == (0, [PASSED, BATTERY])
    assert lines[-3].startswith("ci: 2 tests skipped")


def test_skips_of_the_battery_are_judged_too(clone):
    code, lines = run(clone, PASSED, battery=f"{SKIPPED}\n{BATTERY}")
    assert code == 0
    assert lines[-3].startswith("ci: 2 tests skipped")


def test_without_the_tpu_compiler_the_rest_runs(clone):
    code, lines = run(clone, PASSED, pip_exit=1)
    assert code == 0
    assert "ci: no libtpu here; its tests are skipped" in lines
    assert lines[-2:] == [PASSED, BATTERY]


def test_linter_fails_it(clone):
    assert run(clone, PASSED, ruff_exit=1)[0] == 1


def test_a_run_without_tests_fails(clone):
    assert run(clone, "no tests ran in 0.01s")[0] != 0
    assert run(clone, PASSED, battery="no tests ran in 0.01s")[0] != 0


def test_every_expected_skip_has_a_reason_above_it():
    lines = (ROOT / "tests" / "expected_skips.txt").read_text().splitlines()
    assert lines[0].startswith("#")
    assert all(line == line.strip() for line in lines)
