# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and go on: bit for bit, in how long, at what cost."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import random
import signal
import statistics
import tempfile
import time

import jax
import numpy as np

from nlhf_jax import checkpoints, metrics
from tests.faults import gangs
from tests.faults.gangs import require
from tests.faults.rows import Row, Trial

STEPS, PERIOD, SOAK_PERIOD = 40, 5, 50
# Of the soak, row 21: an hour when the table is made, a moment in CI.
MINUTES = float(os.environ.get("NLHF_SOAK_MINUTES", "0.1"))
BETWEEN_KILLS = (50.0, 70.0) if MINUTES > 1 else (4.0, 5.0)


@dataclasses.dataclass(frozen=True)
class History:
    """What became of a run under the launcher.

    Attributes:
      code: the launcher's.
      params: a digest of the last parameters.
      rows: lines of metrics, without what a clock says.
      attempts: how often all processes were started.
      back: seconds from the kill to the first step that was done again.
      redone: steps that were done again.
      allowed: how many may be.
      left: what was left behind.
    """

    code: int
    params: str
    rows: list[dict]
    attempts: int
    back: float = 0.0
    redone: int = 0
    allowed: int = 0
    left: tuple[str, ...] = ()


def _digest(folder: pathlib.Path) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(checkpoints.load_params(folder)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _rows(folder: pathlib.Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in metrics.TIMES}
        for line in lines
    ]


def _ended(folder: pathlib.Path, launcher, **more) -> History:
    """Waits for the launcher; returns how it ended."""
    code = gangs.wait_until(lambda: _code(launcher), "the end", 0.05)[0]
    require(code == 0, f"code {code}\n{(folder / 'launcher.log').read_text()[-3000:]}")
    run = folder / "run"
    attempts = len(list((folder / "pids").glob("*_0")))
    left = tuple(gangs.leftovers(folder))
    return History(code, _digest(run), _rows(run), attempts, left=left, **more)


def _code(launcher) -> tuple[int] | None:
    return None if launcher.poll() is None else (launcher.returncode,)


@functools.cache
def unbroken(count: int) -> History:
    """Returns the history of a run that nothing happens to."""
    with tempfile.TemporaryDirectory(prefix="unbroken_") as name:
        folder = pathlib.Path(name)
        with gangs.supervised(folder, count, steps=STEPS, period=PERIOD) as launcher:
            return _ended(folder, launcher)


@functools.cache
def broken(count: int, seed: int) -> History:
    """Returns the history of a run of which a random process is killed."""
    chosen = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="broken_") as name:
        folder = pathlib.Path(name)
        with gangs.supervised(folder, count, steps=STEPS, period=PERIOD) as launcher:
            killed_at = _kill_one(folder, count, 1, chosen.randrange(8, 25), chosen)
            again = gangs.wait_until(lambda: _second_step(folder, 2), "a step again")
            redone, allowed = _redone(gangs.events(folder), 1, PERIOD)
            return _ended(
                folder,
                launcher,
                back=again - killed_at,
                redone=redone,
                allowed=allowed,
            )


def _kill_one(folder, count, attempt, step, chosen) -> float:
    """Kills a process at any moment after a step; returns when."""
    gangs.wait_for_step(folder, step, count, attempt)
    time.sleep(chosen.uniform(0, 0.15))
    pid = gangs.pid_of(folder, attempt, chosen.randrange(count))
    when = time.time()
    os.kill(pid, signal.SIGKILL)
    return when


def _second_step(folder: pathlib.Path, attempt: int) -> float | None:
    """When the first step of an attempt was under way, and its program compiled."""
    found = _of(gangs.events(folder), "step", attempt)
    return found[1].when if len(found) > 1 else None


def _of(events, what: str, attempt: int) -> list[gangs.Event]:
    """Returns what process 0 noted."""
    return [e for e in events if (e.what, e.attempt, e.process) == (what, attempt, 0)]


def _redone(events, attempt: int, period: int) -> tuple[int, int]:
    """Returns how many steps of an attempt the next one did again, and may."""
    done = max(e.step for e in events if e.what == "step" and e.attempt == attempt) - 1
    start = _of(events, "step", attempt + 1)[0].step - 1
    saves = [e.step for e in _of(events, "saved", attempt)]
    # The newest save may have been under way; those steps were done meanwhile.
    during = done - saves[-1] if saves and start < saves[-1] else 0
    return done - start, period + 1 + during


def same_end(seed: int, folder: pathlib.Path) -> Trial:
    """Holds a run that was killed and went on to the one that was not."""
    del folder
    whole, run = unbroken(2), broken(2, seed)
    require(run.attempts == 2, f"{run.attempts} attempts")
    require(run.params == whole.params, "other parameters than the unbroken run")
    require(run.rows == whole.rows, _first_difference(run.rows, whole.rows))
    return Trial(figures={"steps redone": run.redone})


def _first_difference(ours: list[dict], theirs: list[dict]) -> str:
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            return f"metrics differ: {one} and {other}"
    return f"{len(ours)} lines of metrics, not {len(theirs)}"


def back_again(seed: int, folder: pathlib.Path) -> Trial:
    """Measures how long three processes need after the death of one."""
    del folder
    run = broken(3, seed)
    require(run.attempts == 2, f"{run.attempts} attempts")
    return Trial(figures={"to the first step, s": run.back})


def little_redone(seed: int, folder: pathlib.Path) -> Trial:
    """Counts the steps that were done again."""
    del folder
    run = broken(2, seed)
    require(0 <= run.redone <= run.allowed, f"{run.redone} of {run.allowed} redone")
    return Trial(figures={"steps redone": run.redone, "steps allowed": run.allowed})


def nothing_left(seed: int, folder: pathlib.Path) -> Trial:
    """Looks for what is left after a hang, a death and the end of a run."""
    chosen = random.Random(seed)
    hangs = {"kind": "hang", "process": chosen.randrange(2), "step": 12}
    given = {"steps": STEPS, "period": PERIOD, "fault": hangs}
    # On a busy machine an honest step may take two seconds, and would count as another.
    with gangs.supervised(folder, 2, hang_seconds=6, **given) as launcher:
        _kill_one(folder, 2, 2, chosen.randrange(14, 25), chosen)
        run = _ended(folder, launcher)
    require(run.attempts == 3, f"{run.attempts} attempts")
    require(run.rows == unbroken(2).rows, "other metrics than the unbroken run")
    require(not run.left, f"left: {', '.join(run.left)}")
    return Trial(figures={"left behind": len(run.left)})


# ------------------------------------------------------------------------ the soak


def soak(seed: int, folder: pathlib.Path) -> Trial:
    """Kills one of two processes about every minute, for MINUTES."""
    chosen, resident = random.Random(seed), {}
    given = {"steps": 10**7, "period": SOAK_PERIOD, "seconds": 0.05}
    with gangs.supervised(folder, 2, **given) as launcher:
        begin = time.time()
        launcher_before, attempt = 0, 1
        while time.time() < begin + 60 * MINUTES:
            gangs.wait_for_step(folder, 1, 2, attempt)
            launcher_before = launcher_before or gangs.resident(launcher.pid)
            until = time.time() + chosen.uniform(*BETWEEN_KILLS)
            while time.time() < until:
                for number in range(2):
                    pid = gangs.pid_of(folder, attempt, number)
                    seen = resident.setdefault((attempt, number), [])
                    seen.append(gangs.resident(pid))
                time.sleep(0.5)
            require(launcher.poll() is None, "the launcher has ended")
            os.kill(gangs.pid_of(folder, attempt, chosen.randrange(2)), signal.SIGKILL)
            attempt += 1
        gangs.wait_for_step(folder, 1, 2, attempt)
        growth = gangs.resident(launcher.pid) / launcher_before - 1
        seconds = time.time() - begin
        launcher.send_signal(signal.SIGTERM)
        code = gangs.wait_until(lambda: _code(launcher), "the end", 0.05)[0]
    require(
        code == 143, f"code {code}\n{(folder / 'launcher.log').read_text()[-3000:]}"
    )
    require(not (left := gangs.leftovers(folder)), f"left: {left}")
    return Trial(figures=_soaked(folder, attempt, seconds, growth, resident))


def _soaked(folder, attempts, seconds, growth, resident) -> dict[str, float | int]:
    """Returns what a soak came to; nothing may be lost."""
    events = gangs.events(folder)
    for attempt in range(1, attempts):
        redone, allowed = _redone(events, attempt, SOAK_PERIOD)
        require(0 <= redone <= allowed, f"attempt {attempt}: {redone} steps lost")
    rows = [row["step"] for row in _rows(folder / "run") if "loss/token_nll" in row]
    require(rows == list(range(1, len(rows) + 1)), "metrics lack a step, or have two")
    begun = [e for e in events if e.what == "step" and e.process == 0]
    gaps = [b.when - a.when for a, b in itertools.pairwise(begun)]
    useful = len(rows) * statistics.median(gaps)
    grown = [seen[-1] / seen[len(seen) // 2] - 1 for seen in resident.values()]
    return {
        "kills": attempts - 1,
        "steps": len(rows),
        "lost": 0,
        "goodput lost, %": 100 * (1 - useful / seconds),
        "memory growth, %": 100 * max([growth, *grown]),
    }


ROWS = (
    Row(
        2,
        "exact resume of two processes",
        "kill -9 of a random one at a random moment; the launcher starts both again",
        2,
        20,
        same_end,
        "parameters and metrics bit for bit those of the unbroken run",
    ),
    Row(
        8,
        "back after a death",
        "three processes under the launcher, kill -9 of a random one",
        1,
        30,
        back_again,
        "median < 15 s, max < 25 s, no hand",
        {"to the first step, s": ("max", 25.0)},
    ),
    Row(
        9,
        "little is done twice",
        "the runs of row 2",
        2,
        20,
        little_redone,
        "save interval + 1 step + the steps during a save",
    ),
    Row(
        20,
        "nothing is left",
        "a hang, a kill -9 and an end under the launcher",
        1,
        10,
        nothing_left,
        "0 processes, 0 temporary checkpoint folders, ports free",
        {"left behind": ("max", 0)},
    ),
    Row(
        21,
        "soak",
        f"2 processes, {MINUTES:g} minutes (NLHF_SOAK_MINUTES), a kill every "
        f"{BETWEEN_KILLS[0]:g} to {BETWEEN_KILLS[1]:g} s",
        1,
        1,
        soak,
        "0 lost, memory growth < 5 %, goodput >= 70 %",
        {"memory growth, %": ("max", 5.0), "goodput lost, %": ("max", 30.0)}
        if MINUTES > 1
        else {},
    ),
)
