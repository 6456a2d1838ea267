# SPDX-License-Identifier: Apache-2.0
"""Two processes of two devices each that meet, disagree and share arrays; JSON."""

import datetime
import faulthandler
import json
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import discovery, distributed, global_arrays, partitioning, stopping
from nlhf_jax.checkpoints import Checkpointer
from nlhf_jax.checks import UserError
from nlhf_jax.settings import MeshSettings
from nlhf_jax.types import POLICY, TrainState

ROWS = 8
FIRST_STEP = 100  # more than any step before; JAX's service counts on


def error_of(fn, *arguments):
    """Returns the class and text of the error that a call raises."""
    try:
        fn(*arguments)
    except (UserError, distributed.PeerLost) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def meet(number):
    """Returns what barriers and errors say to this process."""

    def fail():
        if number == 1:
            raise UserError("no room on this host")
        return "done"

    done, order = [], []

    def late():
        time.sleep(0.3 if number == 0 else 0.0)
        order.append(time.time())
        return number

    found = {
        "exchanged": [
            distributed.exchange("words", f"I am {number}") for _ in range(3)
        ],
        "all_do": error_of(distributed.all_do, "fail", fail),
        "first_only": error_of(distributed.first_does, "fail at second", fail),
        "first_does": (
            distributed.first_does("act", lambda: done.append(number)),
            done,
        ),
        "first_then_others": (distributed.first_then_others("read", late), order[0]),
    }
    if number == 1:
        time.sleep(2.5)
        found["late"] = error_of(distributed.barrier, "tea", 1.0)
    else:
        found["late"] = error_of(distributed.barrier, "tea", 1.0)
        time.sleep(2.5)
    distributed.barrier("after the late one")
    return found


def stop_at(number, *, asked):
    """Returns the step at which this process stops, when `asked` says who is asked."""
    stop = stopping.Stop()
    for done in range(1, 20):
        # As in training: who has done a step has seen all others do the one before.
        distributed.barrier("step")
        if stop((number, done) in asked, done):
            return done
    # Who is asked after the last step has no step left to stop at.
    return f"settled: {stop.settle((number, 20) in asked, 19)}"


def preempted(number):
    """Returns where this process stops when JAX's service has heard of a preemption.

    Whoever hears of one puts it under this key, and every process looks there.
    """
    stop = stopping.Stop()
    stop(False, FIRST_STEP)
    if number == 1:
        client = distributed._job.client
        in_a_moment = datetime.datetime.now(datetime.UTC).isoformat()
        client.key_value_set("RECEIVED_PREEMPTION_NOTICE", in_a_moment)
    for done in range(FIRST_STEP + 1, FIRST_STEP + 1000):
        distributed.barrier("step")
        if stop(False, done):
            return [done > FIRST_STEP, done, stop.settle(False, done)]
        time.sleep(0.01)
    return None


def rows(settings):
    """Returns the rows of a batch here, and what all devices see of it."""
    mesh = partitioning.make_mesh(settings)
    sharding = partitioning.batch_sharding(mesh)
    here = global_arrays.rows_here(sharding, ROWS)
    whole = np.arange(ROWS * 3.0).reshape(ROWS, 3)
    batch = global_arrays.from_rows({"x": whole[here]}, here, ROWS, sharding)
    return {
        "rows": here.tolist(),
        "same": bool((global_arrays.fetch(batch)["x"] == whole).all()),
        "addressable": batch["x"].is_fully_addressable,
        "sum": float(jax.jit(jnp.sum)(batch["x"])),
    }


def places():
    """Returns whether values survive being put on a mesh, elsewhere, and fetched."""
    mesh = partitioning.make_mesh(MeshSettings(1, 4, 1))
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    value = np.arange(12.0).reshape(4, 3)
    on_mesh = global_arrays.put({"a": value}, {"a": split})["a"]
    again = global_arrays.put(on_mesh, split)
    from_device = global_arrays.put(jnp.asarray(value), split)
    moved = global_arrays.put(on_mesh, partitioning.replicated(mesh))
    values = [on_mesh, from_device, moved]
    return {
        "shards": [list(s.data.shape) for s in on_mesh.addressable_shards],
        "untouched": again is on_mesh,
        "equal": [bool((global_arrays.fetch(v) == value).all()) for v in values],
        "whole": moved.is_fully_replicated,
        "plain": global_arrays.fetch({"n": 3, "a": value})["n"],
    }


def state_on(mesh):
    """Returns a state split over a mesh, and what to restore it as."""
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    whole = partitioning.replicated(mesh)
    values = np.arange(64 * 65, dtype=np.float32).reshape(64, 65)
    state = TrainState(np.int32(5), {POLICY: {"w": values}}, {POLICY: {}})
    lie = TrainState(whole, {POLICY: {"w": split}}, {POLICY: {}})
    placed = global_arrays.put(state, lie)
    return placed, values


def checkpoints(folder, number):
    """Returns whether states come back, and what damage one process sees means."""
    mesh = partitioning.make_mesh(MeshSettings(1, 4, 1))
    state, values = state_on(mesh)
    with Checkpointer(folder / "steps", keep=5) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state)
        checkpointer.wait()
        written = sorted(p.name for p in (folder / "steps").iterdir())
        restored = checkpointer.restore(2, state)
        equal = (global_arrays.fetch(restored.param_sets[POLICY]["w"]) == values).all()
        distributed.first_does("damage", lambda: damage(folder / "steps" / "2"))
        older = checkpointer.restore(2, state)
        equal_older = global_arrays.fetch(older.param_sets[POLICY]["w"]) == values
    del number
    return {
        "written": written,
        "equal": bool(equal),
        "equal_older": bool(equal_older.all()),
        "left": sorted(p.name for p in (folder / "steps").iterdir()),
    }


def damage(step_folder):
    """Empties the data that process 1 wrote, which process 1 alone reads."""
    for file in step_folder.rglob("ocdbt.process_1/d/*"):
        file.write_bytes(b"")


def is_caught(number):
    """Whether anything, in C too, handles a signal of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    (mask,) = [line for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(mask.split()[1], 16) & 1 << (number - 1))


def main(folder, num_processes, number, port):
    """Writes what this process found."""
    faulthandler.dump_traceback_later(150, exit=True)
    folder, number = pathlib.Path(folder), int(number)
    processes = discovery.Processes(
        f"127.0.0.1:{port}", int(num_processes), number, "a test"
    )
    distributed.start(processes, {"test": "mechanics"})
    found = {
        "sigterm is caught": is_caught(signal.SIGTERM),
        "first": distributed.is_first(),
        "count": distributed.num_processes(),
        "devices": [jax.device_count(), jax.local_device_count()],
        "meet": meet(number),
        "stop": {
            "one": stop_at(number, asked={(1, 4)}),
            "both": stop_at(number, asked={(0, 5), (1, 5)}),
            "later": stop_at(number, asked={(0, 6), (1, 7)}),
            "nobody": stop_at(number, asked=()),
            "at the last step": stop_at(number, asked={(1, 19)}),
            "after the last step": stop_at(number, asked={(1, 20)}),
            "by JAX": preempted(number),
        },
        "rows": {
            "4 x 1 x 1": rows(MeshSettings()),
            "1 x 4 x 1": rows(MeshSettings(1, 4, 1)),
            "1 x 1 x 4": rows(MeshSettings(1, 1, 4)),
            "2 x 1 x 2": rows(MeshSettings(2, 1, 2)),
        },
        "places": places(),
        "checkpoints": checkpoints(folder, number),
    }
    with open(folder / f"{number}.json", "w") as file:
        json.dump(found, file)
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
