# SPDX-License-Identifier: Apache-2.0
"""What can be found wrong with a job before it starts, from its arguments alone."""

import math
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from nlhf_jax.checks import (
    LARGEST_SEED,
    UserError,
    check_folder_name,
    check_integer,
    check_local_folder,
    check_range,
    expanded,
)
from nlhf_jax.data import tasks
from nlhf_jax.jobs import folders, outside_steps, programs, saves, train
from nlhf_jax.preferences.outside import OutsideJudge
from nlhf_jax.settings import LoopSettings, MeshSettings

# These check their own seeds, and differently.
OWN_SEEDS = ("sample", "convergence", "exploration")
KINDS = {
    "train": tasks.SUPERVISED,
    "sft": tasks.SUPERVISED,
    "preference": tasks.COMPARISONS,
    "reward": tasks.COMPARISONS,
}


def check(job: str, arguments: Mapping[str, Any]) -> None:
    """Checks values that are right by themselves and wrong together.

    Raises:
      UserError: a seed out of range, periods that don't divide, a name that is no
        folder's.
    """
    if "seed" in arguments and job not in OWN_SEEDS:
        check_range("seed", arguments["seed"], 0, LARGEST_SEED)
    if "max_decode_length" in arguments:
        check_integer("max_decode_length", arguments["max_decode_length"])
    for name in ("policies", "averages", "sweeps"):
        _check_folders(name, arguments.get(name) or {})
    for labels in (arguments.get("sweeps") or {}).values():
        _check_folders("sweeps", labels)
    for _, written in (arguments.get("averages") or {}).values():
        _check_folders("averages", [written])
    loop = arguments.get("loop")
    if isinstance(loop, LoopSettings):
        _check_periods(loop)
        saves.check_best_metric(loop)
        outside_steps.check_parts(arguments.get("outside_judge"), loop)
    if job == "train":
        train.check_counts(**_given(train.check_counts, arguments))
        train.check_sets(arguments["algorithm"], arguments.get("write_sets", ()))


def _given(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = function.__annotations__.keys() - {"return"}
    return {name: arguments[name] for name in names & arguments.keys()}


def _check_folders(what: str, names: Iterable[Any]) -> None:
    for name in names:
        check_folder_name(f"a name in {what}", name)


def _check_periods(loop: LoopSettings) -> None:
    """Checks that evaluations and checkpoints meet.

    The loop itself needs neither: a line of metrics is one step's, and checkpoints and
    evaluations write the lines before them. But a checkpoint between two evaluations
    has no figure to be chosen by. A period that the run is too short for is no period.
    """
    periods = sorted((loop.eval_period, loop.checkpoint_period))
    in_use = periods[0] > 0 and periods[1] < loop.train_steps
    if in_use and periods[1] % periods[0]:
        raise UserError(
            f"eval_period must divide checkpoint_period or be a multiple of it, so "
            f"that a checkpoint has an evaluation, got {loop.eval_period} and "
            f"{loop.checkpoint_period}"
        )


def check_batch(
    loop: LoopSettings, mesh: MeshSettings, outside: OutsideJudge | None = None
) -> None:
    """Checks the rows against the sizes that are known without the devices.

    Raises:
      UserError: the batch cannot be split so.
    """
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "slice": mesh.slice}
    sizes = {name: size for name, size in sizes.items() if size > 1}
    parts = {"num_microbatches": loop.num_microbatches}
    if outside is not None:
        parts["num_parts of OutsideJudge"] = outside.num_parts
    for what, number in parts.items():
        unit = math.prod(sizes.values()) * number
        if loop.batch_size % unit:
            axes = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise UserError(
                f"batch_size must be divisible by {unit} ({axes}, {what}={number}), "
                f"got {loop.batch_size}"
            )


def build(job: str, arguments: Mapping[str, Any]) -> str:
    """Builds a training job's step from shapes alone and returns what it is in words.

    Reads the descriptions and vocabularies of the folders that are named and the files
    of the user's data; makes no array and writes nothing. "" for jobs of another kind.

    Raises:
      UserError: a folder or a file is missing or unusable, or settings don't fit the
        model.
    """
    if job not in programs.BUILDERS:
        return ""
    if job == "train":
        train.check_judges(
            arguments["algorithm"],
            arguments.get("preference_checkpoint", ""),
            arguments.get("reward_checkpoint", ""),
            arguments.get("outside_judge"),
        )
    _check_model_dir(arguments["model_dir"])
    outside = arguments.get("outside_judge")
    check_batch(arguments["loop"], arguments.get("mesh") or MeshSettings(), outside)
    names = programs.folder_flags(job).values()
    named = [arguments.get(name, "") for name in names]
    for checkpoint in filter(None, named):
        folders.find_model_dir(checkpoint)
    folders.check_same_vocabulary(*named)
    tasks.check_name(arguments["data"], KINDS[job])
    if not arguments.get("comparisons_dir"):
        tasks.check_files(arguments["data"], KINDS[job])
    program = programs.program(job, arguments, {})
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        _, metrics = jax.eval_shape(
            program.step.step_fn, program.state, program.frozen, program.batch, key
        )
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{job}: the step cannot be built: {reason[0]}") from error
    size = sum(leaf.size for leaf in jax.tree.leaves(program.state.param_sets))
    return (
        f"its step was built from shapes alone: {size:,} parameters, a batch of "
        f"{program.loop.batch_size}, {len(metrics)} metrics"
    )


def _can_write(folder: pathlib.Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _check_model_dir(model_dir: str) -> None:
    """Checks what the folder of results would meet; it is not made."""
    path = expanded("MODEL_DIR", check_local_folder("MODEL_DIR", model_dir))
    for folder in (path, *path.parents):
        if folder.exists():
            if not folder.is_dir():
                raise UserError(
                    f"MODEL_DIR {model_dir!r} cannot be written: {str(folder)!r} is a "
                    "file"
                )
            if not _can_write(folder):
                raise UserError(
                    f"MODEL_DIR {model_dir!r} cannot be written: no file may be made "
                    f"in {str(folder)!r}"
                )
            return
