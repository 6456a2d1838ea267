# SPDX-License-Identifier: Apache-2.0
"""Runs that are to be killed, starved of room or continued elsewhere: one process.

python -m tests.faults.checkpoint_worker save FOLDER
python -m tests.faults.checkpoint_worker full FOLDER (limit|tmpfs) (once|always)
python -m tests.faults.checkpoint_worker train FOLDER STEPS DATA FSDP
"""

import contextlib
import hashlib
import json
import pathlib
import resource
import signal
import sys
import time

import jax
import numpy as np
import optax

from nlhf_jax import cli, loop, supervised_step
from nlhf_jax.checkpoints import Checkpointer, Retention
from nlhf_jax.jobs import runs
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.settings import LoopSettings, MeshSettings, OptimizerSettings
from tests import supervised_toys as toys

FULL_AT, FREE_AT, LAST, PERIOD = 3, 8, 12, 2


def state_of(step, rows=64):
    """Returns a state whose numbers are a function of the step."""
    numbers = np.random.default_rng(step).normal(size=(rows, 129))
    params = {"w": numbers.astype(np.float32), "b": np.float32([step, 1, 2])}
    first = supervised_step.init_state(
        jax.tree.map(jax.numpy.asarray, params), optax.adam(1e-3)
    )
    return first._replace(step=jax.numpy.asarray(step, jax.numpy.int32))


def save_for_ever(folder):
    """Saves one state after another, each while the one before may be written."""
    with Checkpointer(folder, keep=2) as checkpointer:
        for step in range(1, 100_000):
            checkpointer.save(step, state_of(step, 8_000))


class Disk:
    """A disk that has no room for another checkpoint, and room for small files."""

    def __init__(self, folder, kind):
        self._ballast, self._is_limit = folder / "ballast", kind == "limit"
        self._hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(self):
        """Leaves 100 kB."""
        if self._is_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, self._hard))
            return
        with contextlib.suppress(OSError), open(self._ballast, "wb") as file:
            while True:
                file.write(bytes(100_000))
                file.flush()
        with open(self._ballast, "r+b") as file:
            file.truncate(self._ballast.stat().st_size - 100_000)

    def free(self):
        """Gives the room back."""
        if self._is_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._hard, self._hard))
        else:
            self._ballast.unlink()


class Shown:
    """Writes each step to standard error, where the messages go."""

    def write(self, step, metrics):
        pass

    def sync(self):
        pass

    def update(self, step, metrics):
        print(f"step {step}", file=sys.stderr, flush=True)

    def say(self, text):
        pass


def train_on_a_full_disk(folder, kind, how_long):
    """Trains a toy; the room goes before the second save."""
    disk, found = Disk(folder, kind), {}
    settings = LoopSettings(
        LAST, 1, checkpoint_period=PERIOD, save_attempts=2, save_retry_seconds=0.1
    )

    def batches(step):
        time.sleep(0.15)  # so that a step later means some time later
        if step == FULL_AT:
            checkpointer.wait()
            disk.fill()
        if step == FREE_AT and how_long == "once":
            found["steps while full"] = checkpointer.steps()
            disk.free()
        return step

    def step_fn(state, batch, key):
        del batch, key
        return state._replace(step=state.step + 1), {"loss/token_nll": state.step}

    try:
        with Checkpointer(
            folder / "steps",
            keep=Retention(newest=9),
            attempts=settings.save_attempts,
            retry_seconds=settings.save_retry_seconds,
        ) as checkpointer:
            loop.train_loop(
                step_fn,
                state_of(0, 2_000),
                batches,
                settings=settings,
                checkpointer=checkpointer,
                writer=Shown(),
                progress=Shown(),
                key=jax.random.key(0),
            )
    finally:
        (folder / "found.json").write_text(json.dumps(found))
    return 0


def train(folder, steps, data, fsdp):
    """Trains the toy language model on a mesh, and notes what it reads."""
    model, read = toys.toy_language_model(), {}
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.05), 10)
    step_fn = supervised_step.make_sft_step(model, optimizer)

    def batches(step, rows):
        batch = jax.device_get(toys.supervised_batch(step))
        content = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(batch))
        read[step] = hashlib.sha256(content).hexdigest()
        return jax.tree.map(lambda leaf: leaf[rows], batch)

    def make(params):
        return supervised_step.init_state(params, optimizer)

    state = runs.run(
        runs.Training(
            "toy",
            lambda state, frozen, batch, key: step_fn(state, batch, key),
            {},
            batches,
            lambda state: {},
            {"data/truncated_prompts": 0},
            model.logical_axes,
        ),
        folder=folder,
        initial_state=runs.initial_state(model.init, "", 3, make),
        settings=LoopSettings(
            steps, 8, checkpoint_period=PERIOD, log_period=1, keep_checkpoints=9
        ),
        seed=0,
        mesh=MeshSettings(data, fsdp, 1),
    )
    numbers = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(state)]
    (folder / "found.json").write_text(json.dumps({"read": read, "sums": numbers}))


def main(mode, folder, *words):
    """Does what one of the rows of the table of faults asks for."""
    folder = pathlib.Path(folder)
    if mode == "save":
        save_for_ever(folder)
    elif mode == "full":
        # The exit code is the command line's.
        cli._main = lambda _: train_on_a_full_disk(folder, *words)
        sys.exit(cli.main([]))
    else:
        train(folder, *map(int, words))


if __name__ == "__main__":
    main(*sys.argv[1:])
