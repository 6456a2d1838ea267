# SPDX-License-Identifier: Apache-2.0
"""A run that is killed in tests: a tabular policy with an average, through `runs.run`.

As a program it is a server: each line it reads is a folder; it forks a process that
trains there, prints its number, and then how it ended. So Python is started once.
"""

import hashlib
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("NPROC", "16")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlhf_jax import algorithms, train_step
from nlhf_jax.alarms import AlarmSettings
from nlhf_jax.games import matrices
from nlhf_jax.jobs import runs
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.settings import LoopSettings, MeshSettings
from nlhf_jax.types import POLICY, REFERENCE, Judge, PromptBatch

LENGTH, VOCAB, SEED = 2, 3, 5
STEPS, BAD_STEP = 30, 9
OPTIMIZER = optax.adam(0.05)
SETTINGS = LoopSettings(
    STEPS, 16, log_period=1, checkpoint_period=4, eval_period=6, max_skipped_steps=2
)


def judge_with_a_bad_batch(model):
    """A judge that has no number for prompts with a token in them."""
    rng = np.random.default_rng(SEED)
    sound = table_judge(model, matrices.random_game(rng, VOCAB**LENGTH), np.zeros(9))

    def preference(frozen, prompts, first, second):
        preference_B = sound.preference(frozen, prompts, first, second)
        return jnp.where(prompts.tokens_BS.any(), jnp.nan, preference_B)

    return Judge(preference, sound.reward)


def batches(step, rows):
    """Prompts that nobody reads; a token in one step's is what the judge chokes on."""
    tokens = np.full((len(rows), 1), int(step + 1 == BAD_STEP), np.int32)
    return PromptBatch(tokens, np.ones((len(rows), 1), bool))


def evaluate(state):
    """Figures of both parameter sets."""
    average = state.param_sets["average"]["table"]
    return {
        "eval/kl": float(state.param_sets[POLICY]["table"].sum()),
        "eval/length": float(jnp.abs(average).sum()),
    }


def train(folder):
    """Trains in a folder, from its newest checkpoint, and returns the last state."""
    model = tabular.tabular_model(VOCAB, LENGTH)
    algorithm = algorithms.nash_ema_pg(tau=0.1, decay=0.9)
    step_fn = train_step.make_train_step(
        model,
        algorithm,
        judge_with_a_bad_batch(model),
        OPTIMIZER,
        max_length=LENGTH,
        skip_not_finite=True,
    )
    training = runs.Training(
        "toy",
        step_fn,
        {REFERENCE: model.init(jax.random.key(1))},
        batches,
        evaluate,
        {"data/truncated_prompts": 0},
        model.logical_axes,
        {REFERENCE: model.logical_axes},
        AlarmSettings(min_distinct_share=0.5, patience=2),
    )
    return runs.run(
        training,
        folder=pathlib.Path(folder),
        initial_state=runs.initial_state(
            model.init,
            "",
            SEED,
            lambda params: train_step.init_state(params, algorithm, OPTIMIZER),
        ),
        settings=SETTINGS,
        seed=SEED,
        mesh=MeshSettings(1, 1, 1),
    )


def digest(state):
    """Returns the sha256 of parameters, average, moments and step."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def child(folder, cache):
    """Trains, and writes the digest of the last state."""
    log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    (folder / "state.sha256").write_text(digest(train(folder)))


def main():
    """Serves until nobody asks any more; equal programs are compiled once."""
    with tempfile.TemporaryDirectory() as cache:
        serve(cache)


def serve(cache):
    """Trains in each folder that is asked for."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(pathlib.Path(line.strip()), cache)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
