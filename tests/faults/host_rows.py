# SPDX-License-Identifier: Apache-2.0
"""Faults of hosts: processes that die, raise, hang, are told to stop or start wrong."""

import pathlib
import random
import signal
import socket
import time

from nlhf_jax import checkpoints
from tests import process_toys
from tests.faults import gangs
from tests.faults.gangs import require
from tests.faults.rows import Row, Trial

AGAIN, SAVED, USAGE, DEFECT = 42, 143, 2, 1
HOST = socket.gethostname()
HANG_SECONDS = 2.0
MANY = 100_000  # steps: the fault comes long before
WARM = 4  # steps until a fault comes, at least
OUT = "the others out, s"


def _all_but(number: int, values: list) -> list:
    return [value for n, value in enumerate(values) if n != number]


def dead_peer(seed: int, folder: pathlib.Path) -> Trial:
    """Kills one of two to four processes."""
    chosen = random.Random(seed)
    count = 2 + seed % 3
    victim = chosen.randrange(count)
    with gangs.job(folder, count, steps=MANY) as job:
        gangs.wait_for_step(folder, WARM, count)
        time.sleep(chosen.uniform(0, 0.3))
        codes, seconds = job.after(job.kill(victim))
        logs = _all_but(victim, job.gang.logs())
    require(_all_but(victim, codes) == [AGAIN] * (count - 1), f"exit codes {codes}")
    named = f"process {victim} on {HOST} is gone"
    for log in logs:
        require(named in log, f"not in a log: {named}\n{log[-2000:]}")
    require(not (left := gangs.held(folder)), f"left: {left}")
    return Trial(figures={OUT: max(_all_but(victim, seconds))})


def exception(seed: int, folder: pathlib.Path) -> Trial:
    """Has one process raise an error in a random step."""
    chosen = random.Random(seed)
    count = 2 + seed % 2
    guilty, step = chosen.randrange(count), chosen.randrange(WARM, WARM + 8)
    fault = {"kind": "raise", "process": guilty, "step": step}
    with gangs.job(folder, count, steps=MANY, fault=fault) as job:
        (begin,) = gangs.wait_until(lambda: _faults(folder), "the error")
        codes, seconds = job.after(begin.when)
        logs = job.gang.logs()
    expected = [DEFECT if n == guilty else AGAIN for n in range(count)]
    require(codes == expected, f"exit codes {codes}, not {expected}")
    require("Traceback" in logs[guilty], "the guilty one shows no traceback")
    named = f"process {guilty} on {HOST} ended: ValueError: made up in step {step}"
    for log in _all_but(guilty, logs):
        require(named in log, f"not in a log: {named}\n{log[-2000:]}")
    return Trial(figures={OUT: max(_all_but(guilty, seconds))})


def _faults(folder: pathlib.Path) -> list:
    return [event for event in gangs.events(folder) if event.what == "fault"]


HANGS = (  # where, how many processes, what the sentence names
    ("batch", 2, "making the batch of step {}"),
    ("step", 1, "step {}, or waiting"),
    ("save", 2, "saving the checkpoint of step {}"),
    ("evaluation", 2, "the evaluation after step {}"),
)


def hang(seed: int, folder: pathlib.Path) -> Trial:
    """Has one process sleep in a batch, a step, a save or an evaluation."""
    where, count, words = HANGS[seed % len(HANGS)]
    step, guilty = 15, random.Random(seed).randrange(count)
    fault = {"kind": "hang", "where": where, "process": guilty, "step": step}
    given = {"steps": MANY, "eval": 5, "fault": fault}
    with gangs.job(folder, count, hang_seconds=HANG_SECONDS, **given) as job:
        (begin,) = gangs.wait_until(lambda: _faults(folder), "the hang")
        codes, seconds = job.after(begin.when)
        logs = job.gang.logs()
    require(codes == [AGAIN] * count, f"exit codes {codes}\n{logs[guilty][-2000:]}")
    said = f"process {guilty} on {HOST} hangs: {words.format(step)}"
    for log in logs:
        require(said in log, f"not in a log: {said}\n{log[-2000:]}")
        require("most recent call first" in log, "a log without stacks")
    require("toy_job.py" in logs[guilty], "the stack does not show where it slept")
    require(min(seconds) >= HANG_SECONDS, f"ended before the limit: {seconds}")
    return Trial(figures={"over the limit, s": max(seconds) - HANG_SECONDS})


def told(seed: int, folder: pathlib.Path) -> Trial:
    """Sends SIGTERM to one process, to all, twice to one, or during a save."""
    kind = ("one", "all", "twice", "during a save")[seed % 4]
    chosen = random.Random(seed)
    count = 2
    first = chosen.randrange(count)
    given = {"steps": MANY, "period": 10}
    if kind == "during a save":
        fault = {"kind": "signal", "where": "save", "process": first, "step": 20}
        given["fault"] = fault
    with gangs.job(folder, count, **given) as job:
        if kind == "during a save":
            (event,) = gangs.wait_until(lambda: _faults(folder), "the save")
            begin = event.when
        else:
            gangs.wait_for_step(folder, 25 if kind == "twice" else 12, count)
            time.sleep(chosen.uniform(0, 0.2))
            begin = time.time()
            for number in range(count) if kind == "all" else [first]:
                job.gang.processes[number].send_signal(signal.SIGTERM)
            if kind == "twice":
                time.sleep(0.03)  # two that are under way at once are one
                job.gang.processes[first].send_signal(signal.SIGTERM)
        codes, seconds = job.after(begin)
        logs = job.gang.logs()
    check = _left_at_once if kind == "twice" else _saved_together
    check(folder, first, codes, logs)
    return Trial(figures={f"told {kind}, out, s": max(seconds)})


def _saved_together(folder, first, codes, logs) -> None:
    del first
    require(codes == [SAVED] * len(codes), f"exit codes {codes}\n{logs}")
    steps = [_stopped_at(log) for log in logs]
    require(len(set(steps)) == 1, f"stopped at different steps: {steps}")
    (step,) = set(steps)
    done = max(e.step for e in gangs.events(folder) if e.what == "step")
    require(done == step, f"saved step {step} though step {done} was done")
    require(_newest(folder) == step, f"no checkpoint of step {step}")


def _left_at_once(folder, first, codes, logs) -> None:
    require(codes[first] in (-signal.SIGTERM, SAVED), f"exit codes {codes}\n{logs}")
    require(codes[1 - first] == AGAIN, f"exit codes {codes}\n{logs}")
    saves = {e.step for e in gangs.events(folder) if e.what == "saved"}
    # The newest may not have been written to its end, all before it have.
    require(_newest(folder) in sorted(saves)[-2:], "the checkpoint before is lost")
    checkpoints.load_params(folder / "run")


def _stopped_at(log: str) -> int:
    (line,) = [text for text in log.splitlines() if "was stopped by a signal" in text]
    require("the same command continues: nlhf sft" in line, f"no way on: {line}")
    return int(line.split("at step ")[1].split(",")[0])


def _newest(folder: pathlib.Path) -> int:
    steps = (folder / "run" / "checkpoints").iterdir()
    return max((int(s.name) for s in steps if s.name.isdecimal()), default=0)


START_SECONDS = 2
JOIN = (
    "import sys\n"
    "from nlhf_jax import cli, distributed, discovery\n"
    "cli._main = lambda words: distributed.start(discovery.find({})) or 0\n"
    "sys.exit(cli.main([]))\n"
)


def wrong_start(seed: int, folder: pathlib.Path) -> Trial:
    """Starts on a port that is taken, without a process, or with two counts."""
    kind = ("port", "missing", "count")[seed % 3]
    port = process_toys.free_port()
    counts = {"port": [2, 2], "missing": [3, 3], "count": [2, 3]}[kind]
    with process_toys.gang(folder) as gang, socket.socket() as taken:
        if kind == "port":
            taken.bind(("127.0.0.1", port))
            taken.listen()
        begin = time.time()
        for number, count in enumerate(counts):
            gang.start(
                ["-c", JOIN],
                NLHF_COORDINATOR=f"127.0.0.1:{port}",
                NLHF_NUM_PROCESSES=str(count),
                NLHF_PROCESS_ID=str(number),
                NLHF_START_SECONDS=str(START_SECONDS),
            )
        codes, seconds = gangs.Job(folder, gang, len(counts), port).after(begin)
        logs = gang.logs()
    require(codes == [USAGE] * len(counts), f"exit codes {codes}\n{logs}")
    for log in logs:
        lines = [line for line in log.splitlines() if line.strip()]
        require(len(lines) == 1 and lines[0].startswith("nlhf: "), f"said: {log}")
        require(HOST in log and f"127.0.0.1:{port}" in log, f"unnamed: {log}")
    return Trial(figures={"to the sentence, s": max(seconds)})


ROWS = (
    Row(
        5,
        "a dead peer takes all others along",
        "kill -9 of one of 2, 3 or 4 processes, process 0 included",
        3,
        20,
        dead_peer,
        "max < 2 s, exit code 42, the dead one named",
        {OUT: ("max", 2.0)},
    ),
    Row(
        6,
        "an exception on one host takes all others along",
        "an error in a random step of one of 2 or 3 processes",
        2,
        20,
        exception,
        "max < 2 s; its own traceback and code, 42 and its reason for the others",
        {OUT: ("max", 2.0)},
    ),
    Row(
        7,
        "a hang is noticed",
        "sleep in a batch, a step, a save or an evaluation; limit 2 s",
        3,
        12,
        hang,
        "limit + 2 s, stacks in every log, exit code 42",
        {"over the limit, s": ("max", 2.0)},
    ),
    Row(
        10,
        "SIGTERM saves",
        "to one of 2 processes, to both, twice to one, during a save",
        4,
        50,
        told,
        "one checkpoint at the step all stop at, code 143, < 5 s; twice: out at once "
        "and the checkpoint before intact",
        {
            f"told {kind}, out, s": ("max", 5.0)
            for kind in ("one", "all", "twice", "during a save")
        },
    ),
    Row(
        24,
        "a wrong start is refused",
        "port taken, a process missing, counts that differ; limit 2 s",
        3,
        9,
        wrong_start,
        "one sentence with host and port, limit + 2 s (import included)",
        {"to the sentence, s": ("max", START_SECONDS + 2.0)},
    ),
)
