# SPDX-License-Identifier: Apache-2.0
"""Faults of checkpoints: killed while saving, damaged, without room, stalled."""

import contextlib
import functools
import json
import logging
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import manifests, retention
from nlhf_jax.checkpoints import Checkpointer
from nlhf_jax.checks import CheckpointError, UserError
from nlhf_jax.types import POLICY, TrainState
from tests import process_toys
from tests.faults import checkpoint_worker
from tests.faults.checkpoint_worker import state_of
from tests.faults.rows import Row, Trial

WORKER = ["-m", "tests.faults.checkpoint_worker"]
NEWEST = 3


class Said(logging.Handler):
    """Keeps what the package says while it is attached."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        """Keeps one message."""
        self.lines.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("nlhf_jax").addHandler(self)
        return self

    def __exit__(self, *exception):
        logging.getLogger("nlhf_jax").removeHandler(self)


def same(one, other):
    """Whether two states have the same bits."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@functools.cache
def template():
    """Returns a folder with the checkpoints 1 to NEWEST, made once a process."""
    holder = tempfile.TemporaryDirectory(prefix="checkpoints_")
    with Checkpointer(holder.name, keep=NEWEST) as checkpointer:
        for step in range(1, NEWEST + 1):
            checkpointer.save(step, state_of(step))
    return holder


def copied(folder):
    """Returns a copy of the template in a trial's folder."""
    return pathlib.Path(shutil.copytree(template().name, folder / "steps"))


def damage(path, kind, random):
    """Flips one bit of a file, cuts it somewhere, or deletes it."""
    size = path.stat().st_size
    if kind == "delete" or not size:
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    place = int(random.integers(size))
    if kind == "flip":
        content[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(content))
    else:
        path.write_bytes(bytes(content[:place]))


def files_of(steps, step):
    """Returns all files of a checkpoint, its manifest among them."""
    return sorted(p for p in (steps / str(step)).rglob("*") if p.is_file())


def resumed(steps, expected):
    """Restores as a run does: ("" or what is wrong, what was said)."""
    with Said() as said, Checkpointer(steps, keep=9) as checkpointer:
        latest = checkpointer.latest_step()
        state = checkpointer.restore(latest, state_of(0))
    if not same(state, state_of(expected)):
        return f"step {int(state.step)} came back, not {expected} as saved", said.lines
    return "", said.lines


# --------------------------------------------------------------- 3: kill -9 in a save


def killed_while_saving(seed, folder):
    """Kills a process that saves all the time."""
    random = np.random.default_rng(seed)
    with process_toys.gang(folder / "logs") as gang:
        gang.start([*WORKER, "save", folder / "steps"])
        deadline = time.monotonic() + 120
        while not (seen := retention.committed(folder / "steps")):
            if time.monotonic() > deadline or gang.processes[0].poll() is not None:
                return Trial(f"no checkpoint was written: {gang.logs()}")
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 1.0))
        seen = retention.committed(folder / "steps")
        gang.processes[0].send_signal(signal.SIGKILL)
        gang.processes[0].wait()
    return after_the_kill(folder / "steps", seen)


def after_the_kill(steps, seen):
    """Looks at what a killed process left; `seen` was committed before."""
    left = retention.committed(steps)
    was_saving = any(map(manifests.is_leftover, retention.step_folders(steps).values()))
    figures = {"killed in a save": int(was_saving), "newest step": max(left)}
    if max(left) < max(seen):
        return Trial(f"checkpoint {max(seen)} was there and is lost", figures)
    for step in left:
        try:
            manifests.check_files(steps / str(step), manifests.read(steps / str(step)))
        except CheckpointError as error:
            return Trial(f"checkpoint {step} is half written: {error}", figures)
    with Said() as said, Checkpointer(steps) as checkpointer:
        state = checkpointer.restore(max(left), state_of(0, 8_000))
    if not same(state, state_of(max(left), 8_000)):
        return Trial("another state came back", figures)
    names = [path.name for path in steps.iterdir()]
    if said.lines or not all(name.isdecimal() for name in names):
        return Trial(f"left over: {names}; said: {said.lines}", figures)
    return Trial("", figures)


# ----------------------------------------------------------------- 4: one damaged file


def one_file_damaged(seed, folder):
    """Damages any one file of the newest checkpoint."""
    random, steps = np.random.default_rng(seed), copied(folder)
    files = files_of(steps, NEWEST)
    path = files[int(random.integers(len(files)))]
    damage(path, ("flip", "truncate", "delete")[seed % 3], random)
    wrong, said = resumed(steps, NEWEST - 1)
    name = path.relative_to(steps / str(NEWEST)).as_posix()
    if not wrong and not any(name in line for line in said):
        wrong = f"{name} is not named: {said}"
    return Trial(wrong)


# ------------------------------------------------------- 11: a disk without room


@contextlib.contextmanager
def small_disk(folder):
    """Yields a file system of 12 MB in memory, or None where it may not be mounted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    try:
        is_there = subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        is_there = False
    try:
        yield folder if is_there else None
    finally:
        if is_there:
            subprocess.run(["umount", str(folder)], check=True)


def on_a_full_disk(folder, kind, how_long):
    """Returns what is wrong with a run whose disk is full, "" if nothing is."""
    place = folder if kind == "tmpfs" else folder / how_long
    place.mkdir(exist_ok=True)
    with process_toys.gang(folder.parent / f"logs_{kind}_{how_long}") as gang:
        gang.start([*WORKER, "full", place, kind, how_long])
        (code,) = gang.wait(120)
        (log,) = gang.logs()
    left = retention.committed(place / "steps")
    names = [path.name for path in (place / "steps").iterdir()]
    lines = [line for line in log.splitlines() if "could not be written" in line]
    wanted = list(range(2, checkpoint_worker.LAST + 1, checkpoint_worker.PERIOD))
    if how_long == "always":
        last = f"nlhf: checkpoint {wanted[-1]} in "
        is_right = code == 74 and left == [2] and lines[-1].startswith(last)
    else:
        found = json.loads((place / "found.json").read_text())
        is_right = code == 0 and {2, *wanted[-2:]} <= set(left)
        is_right = is_right and found["steps while full"] == [2]
    # The sentence of step 4's save comes before step 6, when the next one is due.
    is_early = f"checkpoint {wanted[1]} " in log.partition("\nstep 6\n")[0]
    is_clean = "Traceback" not in log and all(name.isdecimal() for name in names)
    if is_right and is_early and is_clean and manifests.read(place / "steps" / "2"):
        return ""
    return f"{kind}, {how_long}: code {code}, {left} of {names}\n{log}"


def full_disk(seed, folder):
    """Takes the room away for a while, and for ever."""
    del seed
    limit = folder / "limit"
    limit.mkdir()
    wrong = [on_a_full_disk(limit, "limit", time) for time in ("once", "always")]
    with small_disk(folder / "disk") as disk:
        if disk is not None:
            wrong.append(on_a_full_disk(disk, "tmpfs", "once"))
    return Trial("".join(wrong), {"kinds of disk": len(wrong) - 1})


# ------------------------------------------------- 12: broken newest ones, strangers


def newest_damaged(steps, count):
    """Cuts a file of the newest checkpoints; the one before them is used."""
    for step in range(NEWEST, NEWEST - count, -1):
        path = max(files_of(steps, step), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1])
    if count == NEWEST:
        with Checkpointer(steps, keep=9) as checkpointer:
            try:
                checkpointer.restore(NEWEST, state_of(0))
            except UserError as error:
                named = [f"{step}: " in str(error) for step in (1, 2, 3)]
                return "" if all(named) else f"not each is named: {error}"
        return "a damaged checkpoint was used"
    wrong, said = resumed(steps, NEWEST - count)
    aside = [(steps / f"{NEWEST - n}.damaged").is_dir() for n in range(count)]
    return wrong or ("" if len(said) == count and all(aside) else f"said {said}")


def stranger(steps, make):
    """Puts what is no checkpoint where the newest one would be."""
    make(steps / "7")
    wrong, said = resumed(steps, NEWEST)
    is_named = [f"{steps / '7'} has no manifest.json" in line for line in said]
    return wrong or ("" if is_named == [True] else f"said {said}")


def stray(path):
    """A folder with something of somebody else's."""
    path.mkdir()
    (path / "notes.txt").write_text("not a checkpoint")


def half_deleted(path):
    """What is left when files were deleted one by one, the manifest first."""
    shutil.copytree(path.parent / str(NEWEST), path)
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "state" / "d")


CASES = (
    lambda steps: newest_damaged(steps, 1),
    lambda steps: newest_damaged(steps, 2),
    lambda steps: newest_damaged(steps, NEWEST),
    lambda steps: stranger(steps, stray),
    lambda steps: stranger(steps, pathlib.Path.mkdir),
    lambda steps: stranger(steps, half_deleted),
)


def broken_newest(seed, folder):
    """Breaks the newest checkpoints in one of six ways."""
    return Trial(CASES[seed % len(CASES)](copied(folder)))


# -------------------------------------------------------------------- 13: other meshes

MESHES = ((1, 1), (2, 2), (1, 8), (8, 1))
SAVED, TRAINED = 4, 8


def trained(folder, steps, data, fsdp):
    """Trains the toy on a mesh in a process of its own."""
    words = [*WORKER, "train", folder, steps, data, fsdp]
    with process_toys.gang(folder.parent / f"logs_{data}_{fsdp}") as gang:
        gang.start(words, devices=data * fsdp)
        if gang.wait(150) != [0]:
            raise AssertionError(gang.logs()[0])
    losses = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss/token_nll" in record:
            losses[record["step"]] = record["loss/token_nll"]
    return losses, json.loads((folder / "found.json").read_text())


@functools.cache
def unbroken():
    """Returns the run on 4 x 2 that never stops: (folder, losses, what it read)."""
    holder = tempfile.TemporaryDirectory(prefix="mesh_")
    folder = pathlib.Path(holder.name) / "run"
    folder.mkdir()
    return holder, folder, *trained(folder, TRAINED, 4, 2)


def other_mesh(seed, folder):
    """Goes on from a checkpoint of 4 x 2 devices on another mesh."""
    data, fsdp = MESHES[seed % len(MESHES)]
    _, whole, losses, read = unbroken()
    mine = folder / "run"
    shutil.copytree(whole, mine)
    for step in range(SAVED + 1, TRAINED + 1):
        shutil.rmtree(mine / "checkpoints" / str(step), ignore_errors=True)
    found, mine_read = trained(mine, TRAINED, data, fsdp)
    furthest = max(abs(found[step] - losses[step]) for step in losses)
    figures = {"difference of a loss": furthest}
    order = {str(step): read["read"][str(step)] for step in range(SAVED, TRAINED)}
    if mine_read["read"] != order:
        return Trial(f"{data}x{fsdp}: read {sorted(mine_read['read'])}", figures)
    if found.keys() != losses.keys() or not furthest <= 1e-5:
        return Trial(f"{data}x{fsdp}: losses {found}, not {losses}", figures)
    return Trial("", figures)


# ---------------------------------------------------------------- 22: the loop's stall


def stall(seed, folder):
    """Saves 200 MB, and looks how long the caller waits."""
    arrays = {
        str(n): jax.random.normal(jax.random.key(9 * seed + n), (2500, 4000))
        for n in range(5)
    }
    state = TrainState(jnp.asarray(seed), {POLICY: arrays}, {POLICY: {}})
    first = jax.tree.map(jnp.zeros_like, state)
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(1, first)  # compiles
        checkpointer.wait()
        del first
        began = time.monotonic()
        checkpointer.save(2, state)
        returned = time.monotonic() - began
        checkpointer.wait()
        ended = time.monotonic() - began
        again = checkpointer.restore(2, state)
    figures = {
        "stall, ms": 1000 * returned,
        "save, s": ended,
        "stall, % of the save": 100 * returned / ended,
    }
    return Trial("" if same(state, again) else "another state came back", figures)


ROWS = (
    Row(
        3,
        "no committed checkpoint lost",
        "kill -9 at a random moment of a process that saves 12 MB all the time",
        10,
        100,
        killed_while_saving,
        "0 lost, 0 half read, nothing left over after the next start",
    ),
    Row(
        4,
        "corruption noticed",
        "a bit flipped, the end cut, or any file deleted, of the newest checkpoint",
        20,
        500,
        one_file_damaged,
        "every one noticed by the file's name, the checkpoint before used",
    ),
    Row(
        11,
        "disk full",
        "no room for the second checkpoint, for a while and for ever",
        1,
        1,
        full_disk,
        "said before the next save is due, older ones intact, saves again when there "
        "is room, else exit code 74",
    ),
    Row(
        12,
        "broken newest checkpoints",
        "newest, newest two, all damaged; stray, empty, half-deleted folder",
        6,
        6,
        broken_newest,
        "the newest good one is used and the others are named; if there is none, one "
        "sentence names each",
    ),
    Row(
        13,
        "other mesh",
        "saved on 4 x 2 devices, continued on 1 x 1, 2 x 2, 1 x 8, 8 x 1",
        4,
        4,
        other_mesh,
        "same data in the same order, losses equal to 1e-5",
        {"difference of a loss": ("max", 1e-5)},
    ),
    Row(
        22,
        "the loop does not wait for the disk",
        "a state of 200 MB saved",
        3,
        10,
        stall,
        "the caller waits for less than 10 % of the save, in the median",
        {"stall, % of the save": ("median", 10.0)},
    ),
)
