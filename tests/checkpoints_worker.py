# SPDX-License-Identifier: Apache-2.0
"""One of two processes that save together while one of them cannot write; JSON."""

import faulthandler
import json
import logging
import pathlib
import sys
import time

import jax
import numpy as np

from nlhf_jax import discovery, distributed, global_arrays, partitioning, saving
from nlhf_jax.checkpoints import Checkpointer, CheckpointError
from nlhf_jax.settings import MeshSettings
from nlhf_jax.types import POLICY, TrainState


def state_on(mesh, step):
    """Returns a state split over a mesh, a function of the step."""
    values = np.arange(64 * 65, dtype=np.float32).reshape(64, 65) + step
    state = TrainState(np.int32(step), {POLICY: {"w": values}}, {POLICY: {}})
    whole = partitioning.replicated(mesh)
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    return global_arrays.put(
        state, TrainState(whole, {POLICY: {"w": split}}, {POLICY: {}})
    )


def fail_in_background(left):
    """Makes the next writes of this process fail once the arrays are written."""
    wait = saving.ocp.AsyncCheckpointer.wait_until_finished

    def failing(self):
        wait(self)
        if saving.threading.current_thread().name == "checkpoint" and left:
            left.pop()
            raise OSError(28, "No space left on device")

    saving.ocp.AsyncCheckpointer.wait_until_finished = failing


class Said(logging.Handler):
    """Keeps messages."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        """Keeps one."""
        self.lines.append(record.getMessage())


def play(folder, number, said):
    """Returns what one process saw of a save that failed in the other one."""
    mesh = partitioning.make_mesh(MeshSettings(1, 4, 1))
    fail_in_background([0] if number == 1 else [])
    found = {"asked": []}
    with Checkpointer(folder / "steps", retry_seconds=0.0) as checkpointer:
        for step in range(1, 9):
            # As in a loop: no process gets further ahead than a step.
            distributed.barrier("step")
            time.sleep(0.2 * number)
            if checkpointer.retry_is_due(step):
                found["asked"].append(step)
            if step == 1 or checkpointer.retry_is_due(step):
                checkpointer.save(step, state_on(mesh, step))
        checkpointer.wait()
        found["steps"] = checkpointer.steps()
        newest = checkpointer.restore(found["steps"][-1], state_on(mesh, 0))
        values = global_arrays.fetch(newest.param_sets[POLICY]["w"])
        found["number"] = float(values[0, 0])
    with Checkpointer(folder / "steps", attempts=1) as checkpointer:
        fail_in_background([0, 0] if number == 1 else [])
        checkpointer.save(20, state_on(mesh, 20))
        try:
            checkpointer.wait()
        except CheckpointError as error:
            found["error"] = str(error)
    return found | {"said": said.lines}


def main(folder, number, port):
    """Writes what this process found."""
    faulthandler.dump_traceback_later(100, exit=True)
    folder, said = pathlib.Path(folder), Said()
    logging.getLogger("nlhf_jax").addHandler(said)
    distributed.start(
        discovery.Processes(f"127.0.0.1:{port}", 2, int(number), "a test")
    )
    found = play(folder, int(number), said)
    (folder / f"{number}.json").write_text(json.dumps(found))
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
