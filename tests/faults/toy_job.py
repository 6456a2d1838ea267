# SPDX-License-Identifier: Apache-2.0
"""`nlhf sft` with a toy model, as one of several processes, with one fault in it.

    python tests/faults/toy_job.py FOLDER '{"steps": 40, "fault": {...}}'

Everything but model and data is the project's own: the command line, the roll call, the
loop, checkpoints, exit codes. In FOLDER lie `run/` (the model folder) and, for whoever
looks on, `pids/` and `events/`: a line for each batch, step, save and fault of each
process, with the attempt, the wall clock and the step. Batches are made ahead.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax

from nlhf_jax import checkpoints, cli, distributed, gin_bindings, supervised_step
from nlhf_jax.jobs import runs
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.settings import LoopSettings, MeshSettings, OptimizerSettings
from tests import supervised_toys as toys

BATCH = 12  # for one, two, three and four processes
DEFAULTS = {"steps": 40, "period": 5, "seconds": 0.02, "keep": 3, "eval": 0}


class Job:
    """What this process does, and the fault it makes.

    A fault is {"kind": ..., "where": ..., "process": K, "step": S, "attempt": A}: at
    that place ("batch", "step", "save" or "evaluation" of step S, counted from 1)
    process K, of the first attempt if A is not given, stands still ("hang"), raises an
    error ("raise") or gets SIGTERM ("signal"); K None is every process.
    """

    def __init__(self, folder, given):
        self.folder, self.given = pathlib.Path(folder), DEFAULTS | given
        self.number = int(os.environ.get("NLHF_PROCESS_ID", "0"))
        self.attempt = int(os.environ.get("NLHF_ATTEMPT", "1"))
        for name in ("pids", "events"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        name = f"{self.attempt}_{self.number}"
        port = os.environ.get("NLHF_COORDINATOR", ":0").rpartition(":")[2]
        (self.folder / "pids" / name).write_text(f"{os.getpid()} {port}")
        self.events = open(self.folder / "events" / name, "a")  # noqa: SIM115

    def note(self, what, step):
        """Writes an event down, with the time."""
        print(what, self.attempt, time.time(), step, file=self.events, flush=True)

    def at(self, where, step):
        """Comes to a place of a step; makes the fault if it is to be here."""
        self.note(where, step)
        fault = self.given.get("fault") or {}
        mine = fault.get("process") in (None, self.number)
        here = (fault.get("where", "batch"), fault.get("step")) == (where, step)
        if not (mine and here and fault.get("attempt", 1) == self.attempt):
            return
        self.note("fault", step)
        if fault["kind"] == "hang":
            time.sleep(1000)
        elif fault["kind"] == "raise":
            raise ValueError(f"made up in step {step}")
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def train(self):
        """Trains the toy model, from its newest checkpoint."""
        model = toys.toy_language_model()
        given = self.given
        optimizer = make_optimizer(OptimizerSettings(learning_rate=0.05), 1000)
        step_fn = supervised_step.make_sft_step(model, optimizer)

        def rows(step, which):
            self.at("batch", step + 1)
            time.sleep(given["seconds"])
            batch = jax.device_get(toys.supervised_batch(step % 64, BATCH))
            return jax.tree.map(lambda leaf: leaf[which], batch)

        def evaluate(state):
            self.at("evaluation", int(state.step))
            return {}

        self.watch_saves()
        self.watch_steps()
        training = runs.Training(
            "sft",
            lambda state, frozen, batch, key: step_fn(state, batch, key),
            {},
            rows,
            evaluate,
            {},
            model.logical_axes,
        )
        runs.run(
            training,
            folder=runs.open_folder(str(self.folder / "run")),
            initial_state=runs.initial_state(
                model.init,
                "",
                3,
                lambda params: supervised_step.init_state(params, optimizer),
            ),
            settings=LoopSettings(
                given["steps"],
                BATCH,
                checkpoint_period=given["period"],
                log_period=1,
                eval_period=given["eval"],
                keep_checkpoints=given["keep"],
            ),
            seed=0,
            mesh=MeshSettings(),
        )

    def watch_saves(self):
        """Comes to "save" before each, and notes "saved" when it has returned."""
        save, note = checkpoints.Checkpointer.save, self.note

        def noted(checkpointer, step, *arguments, **named):
            self.at("save", step)
            save(checkpointer, step, *arguments, **named)
            note("saved", step)

        checkpoints.Checkpointer.save = noted

    def watch_steps(self):
        """Comes to "step" before each."""
        call = runs._FrozenStep.__call__

        def noted(compiled, state, *arguments):
            self.steps_called = getattr(self, "steps_called", None)
            if self.steps_called is None:
                self.steps_called = int(state.step)
            self.steps_called += 1
            self.at("step", self.steps_called)
            return call(compiled, state, *arguments)

        runs._FrozenStep.__call__ = noted


def main(folder, given):
    """Runs the job under the real command line; returns the exit code."""
    job = Job(folder, json.loads(given))
    gin_bindings.load = lambda *arguments: None
    gin_bindings.run = lambda name: job.train()
    code = cli.main(["sft"])
    assert distributed.num_processes() == 1, "whoever has left is alone"
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
