# SPDX-License-Identifier: Apache-2.0
"""What a run keeps of a step whose numbers are not finite: MODEL_DIR/failures/step_N.

    facts.json    job, step, tensors, seed, the last good checkpoint, the command
    batch.npz     what the step was given, one array per leaf
    config.gin    the configuration in force

`nlhf replay` reads it. Non-finite numbers are text in the JSON: "nan", "inf", "-inf".
"""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from nlhf_jax import checkpoints, distributed, global_arrays
from nlhf_jax.checks import UserError
from nlhf_jax.divergence import TrainingDiverged
from nlhf_jax.jobs import run_records

FOLDER = "failures"
FACTS_FILE, BATCH_FILE = "facts.json", "batch.npz"


@contextlib.contextmanager
def kept_in(
    folder: pathlib.Path,
    name: str,
    seed: int,
    checkpointer: checkpoints.Checkpointer,
) -> Iterator[None]:
    """Keeps what a step that diverges inside was given, and says where.

    Args:
      folder: of the run.
      name: of the job.
      seed: of the run.
      checkpointer: knows the newest checkpoint.

    Raises:
      TrainingDiverged: again, with the whole sentence.
    """
    try:
        yield
    except TrainingDiverged as diverged:
        batch = global_arrays.fetch(diverged.batch)
        latest = checkpointer.latest_step()
        target = folder / FOLDER / f"step_{diverged.step}"
        facts = {
            "job": name,
            "step": diverged.step,
            "first_tensor": diverged.first_tensor,
            "what": diverged.what,
            "metrics": _spelled(diverged.metrics),
            "tensors": _spelled(diverged.tensors),
            "seed": seed,
            "checkpoint": latest,
            "command": list(run_records.command()),
            "working_folder": os.getcwd(),
            "versions": run_records.versions(),
        }
        mine = _unkept(target, facts, batch) if distributed.is_first() else ""
        unkept = distributed.exchange("failure", mine)[0]
        last = (
            "there is no checkpoint yet"
            if latest is None
            else f"the last good checkpoint is {checkpointer.folder / str(latest)}"
        )
        again = f"To see it again: nlhf replay {shlex.quote(str(target))}"
        if unkept:
            again = f"What the step was given is not in {target}: {unkept}"
        diverged.sentence = f"{name}: {diverged}; {last}. {again}"
        diverged.args = (diverged.sentence,)
        raise


def _spelled(values: Mapping[str, float]) -> dict[str, float | str]:
    return {k: v if np.isfinite(v) else str(float(v)) for k, v in values.items()}


def _unkept(target: pathlib.Path, facts: Mapping[str, Any], batch: PyTree) -> str:
    """Writes the folder; returns why it could not, "" if it could."""
    try:
        _write(target, facts, batch)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _write(target: pathlib.Path, facts: Mapping[str, Any], batch: PyTree) -> None:
    partial = target.with_name(f"{target.name}.partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    (partial / FACTS_FILE).write_text(text, encoding="utf-8")
    (partial / run_records.CONFIG_FILE).write_text(run_records.operative_config())
    np.savez_compressed(partial / BATCH_FILE, **named_arrays(batch))
    partial.rename(target)


def named_arrays(batch: PyTree) -> dict[str, np.ndarray]:
    """Returns the leaves of a batch by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }


def read(folder: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the facts and the arrays of a folder of this kind.

    Raises:
      UserError: it is none, or a file in it cannot be read.
    """
    path = pathlib.Path(os.path.expanduser(folder))  # `~nobody` is a plain name to it
    if not (path / FACTS_FILE).is_file():
        raise UserError(
            f"{folder!r} must be a folder that a run wrote when its numbers were not "
            f"finite, MODEL_DIR/{FOLDER}/step_N: there is no {FACTS_FILE} in it"
        )
    try:
        facts = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
        _check(facts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path / FACTS_FILE} cannot be read: {reason:.200}") from None
    try:
        with np.load(path / BATCH_FILE, allow_pickle=False) as arrays:
            return facts, dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path / BATCH_FILE} cannot be read: {str(error)[:200]}"
        ) from None


def _check(facts: Any) -> None:
    for name, kind in (
        ("job", str),
        ("step", int),
        ("first_tensor", str),
        ("metrics", dict),
        ("command", list),
        ("working_folder", str),
    ):
        if not isinstance(facts[name], kind):
            raise TypeError(f"{name} is no {kind.__name__}")
    if not all(isinstance(word, str) for word in facts["command"]):
        raise TypeError("command must hold words")
    if facts["step"] < 1:
        raise ValueError(f"step must be at least 1, got {facts['step']}")
