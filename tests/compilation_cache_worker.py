# SPDX-License-Identifier: Apache-2.0
"""Trains a toy for three steps in a process of its own; prints what came of it.

`python -m tests.compilation_cache_worker`: JSON with the metrics of the process, the
sentences that were shown, and the digest of the parameters.
"""

import hashlib
import io
import json

import jax
import numpy as np

from nlhf_jax import compilation_cache, loop, partitioning, progress
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.settings import LoopSettings, MeshSettings, OptimizerSettings
from nlhf_jax.speed import compile_ahead
from nlhf_jax.supervised_step import init_state, make_sft_step
from tests import supervised_toys as toys

STEPS = 3


class Lines(list):
    """Keeps the lines of metrics; stands for a checkpointer too."""

    def write(self, step, metrics):
        self.append({"step": step} | dict(metrics))

    def sync(self):
        pass

    def save(self, step, state, meta):
        pass

    def wait(self):
        pass

    def retry_is_due(self, done):
        return False


def main() -> None:
    """Runs the loop and prints."""
    compilation_cache.enable()
    # The toy compiles in less than what is worth an entry by itself.
    if jax.config.jax_persistent_cache_min_compile_time_secs < 1:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    model = toys.toy_language_model(dropout_rate=0.3)
    optimizer = make_optimizer(OptimizerSettings(name="adamw"), STEPS)
    mesh = partitioning.make_mesh(MeshSettings())
    whole = partitioning.replicated(mesh)
    step = partitioning.compile_step(make_sft_step(model, optimizer), mesh, whole)
    step.compile = lambda *args: compile_ahead(step, *args)
    state = jax.device_put(init_state(model.init(jax.random.key(1)), optimizer), whole)
    lines, shown = Lines(), io.StringIO()
    with progress.Progress(STEPS, "toy", stream=shown) as bar:
        state = loop.train_loop(
            step,
            state,
            lambda step: jax.device_get(toys.supervised_batch(step)),
            settings=LoopSettings(train_steps=STEPS, batch_size=4, log_period=2),
            checkpointer=lines,
            writer=lines,
            progress=bar,
            key=jax.random.key(2),
        )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    found = {
        "lines": lines,
        "shown": shown.getvalue().splitlines(),
        "digest": digest.hexdigest(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
