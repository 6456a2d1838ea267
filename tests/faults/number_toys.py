# SPDX-License-Identifier: Apache-2.0
"""A small `sft` job of the command line, and NaNs put into one of its steps."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from nlhf_jax import supervised_step
from nlhf_jax.jobs import steps

KINDS = ("loss", "gradient", "parameter")
PERIOD, SEED = 2, 3
NEVER = 10**6  # steps
LEAF = ("decoder", "decoder_norm", "scale")
# A loss that is NaN makes all gradients so; the first one in the tree's order is named.
FIRST_TENSOR = {
    "loss": "loss/token_nll is nan, and the first tensor that is not finite is the "
    "gradient of decoder/decoder_norm/scale",
    "gradient": "gradient of decoder/decoder_norm/scale",
    "parameter": "is the parameter decoder/decoder_norm/scale",
}
CONFIG = """
include 'configs/runs/sft.gin'
VOCAB_SIZE = 384
T5Settings.emb_dim = 8
T5Settings.num_heads = 2
T5Settings.head_dim = 4
T5Settings.mlp_dim = 8
T5Settings.num_encoder_layers = 1
T5Settings.num_decoder_layers = 1
TASK_FEATURE_LENGTHS = {{'inputs': 8, 'targets': 4}}
MIXTURE_OR_TASK_NAME = 'jsonl'
VOCABULARY_PATH = 'byte'
TRAIN_FILE = '{folder}/lines.jsonl'
EVALUATION_FILE = '{folder}/lines.jsonl'
BATCH_SIZE = 2
TRAIN_STEPS = 8
RANDOM_SEED = {seed}
LoopSettings.checkpoint_period = {period}
LoopSettings.log_period = 1
LoopSettings.eval_period = 0
"""


def sft_words(folder: pathlib.Path, model_dir: pathlib.Path) -> list[str]:
    """Writes data and configuration of a small job; returns its command's words."""
    rows = [{"prompt": word, "target": word[:3]} for word in ("alpha", "beta", "gamma")]
    (folder / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = CONFIG.format(folder=folder, seed=SEED, period=PERIOD)
    (folder / "sft.gin").write_text(text)
    return ["sft", f"--gin_file={folder / 'sft.gin'}", f"--gin.MODEL_DIR='{model_dir}'"]


def leaves(params) -> list:
    """Returns the arrays of a tree."""
    return jax.tree.leaves(params)


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """While it is open, what is compiled is not tuned, for it runs a moment."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def poisoned(kind: str, step: int) -> Iterator[None]:
    """While it is open, a number of one step of the supervised jobs is NaN.

    Args:
      kind: "loss" multiplies the loss, "gradient" puts NaN into one gradient, and
        "parameter" into one parameter that the optimiser makes.
      step: counted from 1; 0 for none.
    """
    before = step - 1 if step else NEVER
    accumulate, make = supervised_step.accumulate_gradients, steps._optimizer_and_rate

    def gradients(summed_loss, params, batch, key, **options):
        nan = nan_at(key)

        def loss(*arguments):
            value, totals = summed_loss(*arguments)
            spoilt = {name: x * nan for name, x in totals.sums.items()}
            return value * nan, totals._replace(sums=spoilt)

        if kind == "loss":
            return accumulate(loss, params, batch, key, **options)
        found, totals = accumulate(summed_loss, params, batch, key, **options)
        return (spoil(found, nan) if kind == "gradient" else found), totals

    def nan_at(key):
        at = jax.random.fold_in(jax.random.key(SEED), before)
        is_step = (jax.random.key_data(key) == jax.random.key_data(at)).all()
        return jnp.where(is_step, jnp.nan, 1.0)

    def optimizer_and_rate(*arguments):
        inner, rate = make(*arguments)
        return (spoiling(inner, before) if kind == "parameter" else inner), rate

    with (
        mock.patch.object(supervised_step, "accumulate_gradients", gradients),
        mock.patch.object(steps, "_optimizer_and_rate", optimizer_and_rate),
    ):
        yield


def spoil(tree, factor):
    """Returns the tree with one leaf times `factor`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * factor if _is_it(path) else leaf, tree
    )


def _is_it(path) -> bool:
    return jax.tree_util.keystr(path, simple=True, separator="/") == "/".join(LEAF)


def spoiling(inner, before: int):
    """An optimiser whose update of one parameter is NaN after so many steps."""

    def init(params):
        return inner.init(params), jnp.zeros((), jnp.int32)

    def update(gradient, state, params):
        updates, state_of_inner = inner.update(gradient, state[0], params)
        nan = jnp.where(state[1] == before, jnp.nan, 1.0)
        return spoil(updates, nan), (state_of_inner, state[1] + 1)

    return optax.GradientTransformation(init, update)
