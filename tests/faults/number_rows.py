# SPDX-License-Identifier: Apache-2.0
"""Faults of numbers: what is not finite, and what a kill leaves of a run's figures."""

import contextlib
import functools
import io
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from nlhf_jax import checkpoints, cli
from tests.faults import number_toys
from tests.faults.number_worker import STEPS
from tests.faults.rows import Row, Trial

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 120.0  # seconds until what is waited for counts as a hang
METRICS = "metrics.jsonl"


class Runs:
    """Starts runs of `number_worker` one after the other; each can be killed."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.number_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, folder: pathlib.Path) -> int:
        """Starts a run in a folder and returns its process."""
        folder.mkdir(exist_ok=True)
        self._server.stdin.write(f"{folder}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def end(self) -> int:
        """Waits for the run and returns how it ended."""
        return int(self._server.stdout.readline())

    def finish(self, folder: pathlib.Path) -> None:
        """Runs to the end, which must be a good one."""
        self.start(folder)
        code = self.end()
        assert code == 0, folder.with_suffix(".log").read_text()


@functools.cache
def server() -> Runs:
    """Returns the one that starts all runs; it ends when this process does."""
    return Runs()


def last_step(folder: pathlib.Path) -> int:
    """Returns the step of the last whole line of metrics, or 0."""
    file = folder / METRICS
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def killed(runs: Runs, folder: pathlib.Path, step: int, pause: float) -> bool:
    """Starts a run and kills it soon after a step; False where it ended before that."""
    process, deadline = runs.start(folder), time.monotonic() + LIMIT
    while last_step(folder) < step and not _is_dead(process):
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.002)
    time.sleep(pause)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return runs.end() == -signal.SIGKILL


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@functools.cache
def unbroken() -> tuple[str, bytes]:
    """Returns the digest of the state and the metrics of a run that nobody kills."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "unbroken"
        server().finish(folder)
        return _outcome(folder)


def _outcome(folder: pathlib.Path) -> tuple[str, bytes]:
    return (folder / "state.sha256").read_text(), (folder / METRICS).read_bytes()


def a_resume_is_exact(seed: int, folder: pathlib.Path) -> Trial:
    """Row 1: killed one to three times at random, then run to its end."""
    draw = random.Random(seed)
    run, steps, count = folder / "run", [], 0
    for step in sorted(draw.sample(range(1, STEPS), draw.randint(1, 3))):
        steps.append(step)
        count += killed(server(), run, step, draw.uniform(0.0, 0.05))
    server().finish(run)
    state, metrics = _outcome(run)
    wanted_state, wanted_metrics = unbroken()
    figures = {"kills": count}
    if state != wanted_state:
        return Trial(f"killed after {steps}: another state", figures)
    if metrics != wanted_metrics:
        return Trial(f"killed after {steps}: other metrics", figures)
    return Trial(figures=figures)


def no_line_is_lost_or_doubled(seed: int, folder: pathlib.Path) -> Trial:
    """Row 23: killed once; the file is read as it lies there, then the run ends."""
    draw = random.Random(1000 + seed)
    run = folder / "run"
    killed(server(), run, draw.randrange(1, STEPS), draw.uniform(0.0, 0.05))
    *lines, rest = (run / METRICS).read_bytes().split(b"\n")
    steps = [_trained_step(line) for line in lines]
    seen = [step for step in steps if step]
    committed = max(_committed(run), default=0)
    server().finish(run)
    figures = {"torn last lines": int(bool(rest)), "committed step": committed}
    if None in steps:
        return Trial("a line before the last is torn", figures)
    if seen != list(range(1, len(seen) + 1)):
        return Trial(f"steps {seen} when killed", figures)
    if len(seen) < committed:
        return Trial(f"steps up to {len(seen)}, checkpoint {committed}", figures)
    after = [_trained_step(x) for x in (run / METRICS).read_bytes().splitlines()]
    if [step for step in after if step] != list(range(1, STEPS + 1)):
        return Trial(f"steps {after} in the end", figures)
    return Trial(figures=figures)


def _trained_step(line: bytes) -> int | None:
    """The step whose update a line describes, 0 for other lines, None if it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record["step"] if "loss/policy" in record else 0


def _committed(run: pathlib.Path) -> list[int]:
    found = (run / "checkpoints").glob("*")
    return [int(step.name) for step in found if step.name.isdecimal()]


def nothing_bad_is_saved(seed: int, folder: pathlib.Path) -> Trial:
    """Row 16: NaN in loss, gradient or parameter of an `sft` job, then a replay."""
    draw = random.Random(seed)
    kind = number_toys.KINDS[seed % len(number_toys.KINDS)]
    step = draw.randint(3, 7)
    run = folder / "run"
    words = number_toys.sft_words(folder, run)
    with number_toys.compiled_quickly():
        with number_toys.poisoned(kind, step):
            code, _, said = _called(lambda: cli.main(words))
        wrong = _stopped_rightly(run, kind, step, code, said)
        if wrong:
            return Trial(f"{kind} at step {step}: {wrong}")
        before = _listing(run)
        failure = str(run / "failures" / f"step_{step}")
        # With its cause it comes out as it was; without, every number is finite.
        for cause, wanted in ((step, "\nreproduced: "), (0, "\nnot reproduced: ")):
            with number_toys.poisoned(kind, cause):
                code, out, said = _called(lambda: cli.main(["replay", failure]))
            if wanted not in out or code != (0 if cause else 1):
                return Trial(f"{kind}: replay ended with {code}: {out}{said}")
    if _listing(run) != before:
        return Trial(f"{kind} at step {step}: the replay wrote into the run's folder")
    return Trial(figures={"last good checkpoint, steps before": step - _newest(run)})


def _called(action: Callable[[], int]) -> tuple[int, str, str]:
    """Returns the exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = action()
    return code, out.getvalue(), err.getvalue()


def _stopped_rightly(
    run: pathlib.Path, kind: str, step: int, code: int, said: str
) -> str:
    """Returns what is wrong with the end of a run that was given a NaN, or ""."""
    if code != 70 or "Traceback" in said:
        return f"ended with {code}: {said}"
    sentence = said.strip().splitlines()[-1]
    good = (step - 1) // number_toys.PERIOD * number_toys.PERIOD
    named = f"checkpoints/{good}" if good else "there is no checkpoint yet"
    for part in (f"at step {step}", number_toys.FIRST_TENSOR[kind], named):
        if part not in sentence:
            return f"{part!r} is not in {sentence!r}"
    if (max(_committed(run), default=0)) != good:
        return f"checkpoints {_committed(run)}, wanted {good} as the newest"
    for saved in _committed(run):
        params = checkpoints.load_params(run / "checkpoints" / str(saved))
        if not all(np.isfinite(x).all() for x in number_toys.leaves(params)):
            return f"checkpoint {saved} is not finite"
    return ""


def _newest(run: pathlib.Path) -> int:
    return max(_committed(run), default=0)


def _listing(run: pathlib.Path) -> list[tuple[str, int, int]]:
    """Returns every file with its size and time, so that any write shows."""
    return sorted(
        (str(file.relative_to(run)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in run.rglob("*")
        if not re.search(r"\.lock$", file.name)
    )


ROWS = (
    Row(
        1,
        "exact resume",
        "kill -9 at a random moment, one to three times",
        3,
        50,
        a_resume_is_exact,
        "sha256 of parameters, average, moments and metrics.jsonl: all equal",
    ),
    Row(
        16,
        "NaN",
        "NaN in the loss, a gradient or a parameter of a random step",
        3,
        30,
        nothing_bad_is_saved,
        "nothing bad saved, step, tensor and last good checkpoint named, replay "
        "shows it again",
    ),
    Row(
        23,
        "metrics files",
        "kill -9 at a random moment",
        4,
        50,
        no_line_is_lost_or_doubled,
        "at most one torn last line, no step missing up to the checkpoint, none twice",
    ),
)
