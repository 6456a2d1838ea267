# SPDX-License-Identifier: Apache-2.0
"""The step at which a run's numbers were not finite, once more."""

import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nlhf_jax import retention
from nlhf_jax.checks import UserError
from nlhf_jax.divergence import TrainingDiverged
from nlhf_jax.jobs import failures, run_records, runs
from nlhf_jax.settings import LoopSettings

REPRODUCED, OTHERWISE = 0, 1
MOST_SHOWN = 20  # tensors that are not finite


@dataclasses.dataclass
class Played:
    """What came of playing a run up to a step.

    Attributes:
      start: the checkpoint that it was played from.
      batch: what is said of the step's batch.
      diverged: the numbers of the step that was not finite; None without one.
    """

    start: int = 0
    batch: str = ""
    diverged: TrainingDiverged | None = None


class _Done(Exception):
    """The step has been played; what would follow in the job is left out."""


def play(folder: str, rebuild: Callable[[pathlib.Path, Sequence[str]], None]) -> int:
    """Plays a step again whose numbers were not finite, and prints which.

    From the newest checkpoint before it, with the batch that was kept. Nothing is
    written into the run's folder.

    Args:
      folder: MODEL_DIR/failures/step_N.
      rebuild: (folder of the run, the words of its command) -> calls the job.

    Returns:
      REPRODUCED where the same tensor is the first that is not finite at the same
      step, else OTHERWISE.

    Raises:
      UserError: the folder is none that a run wrote, or the job cannot be rebuilt.
    """
    facts, batch = failures.read(folder)
    model_dir = pathlib.Path(folder).expanduser().resolve().parent.parent
    command, step = facts["command"], facts["step"]
    if not command:
        raise UserError(
            f"{folder!r} is of a run that no command started, so that its job cannot "
            "be rebuilt"
        )
    played = Played()
    with (
        tempfile.TemporaryDirectory(prefix="nlhf_replay_") as stand_in,
        _in(facts["working_folder"]),
        run_records.redirected(model_dir, pathlib.Path(stand_in)),
        runs.changed_by(lambda *run: _up_to(*run, step, batch, played)),
    ):
        played.start = _link_checkpoints(model_dir, pathlib.Path(stand_in), step)
        try:
            rebuild(model_dir, command)
        except TrainingDiverged as diverged:
            played.diverged = diverged
        except _Done:
            pass
        except runs.Stopped:
            raise KeyboardInterrupt from None
        else:
            raise UserError(
                f"nlhf {' '.join(command)} does not train {str(model_dir)!r}"
            )
    return _report(facts, model_dir, played)


@contextlib.contextmanager
def _in(working_folder: str) -> Iterator[None]:
    """Goes where the run was started, since its command may name files from there."""
    before = os.getcwd()
    with contextlib.suppress(OSError):
        os.chdir(working_folder)
    try:
        yield
    finally:
        os.chdir(before)


def _link_checkpoints(folder: pathlib.Path, stand_in: pathlib.Path, step: int) -> int:
    """Links the checkpoints before a step, and returns the newest one's step, or 0."""
    (stand_in / "checkpoints").mkdir()
    place = folder / "checkpoints"
    earlier = [one for one in retention.committed(place) if one < step]
    for one in earlier:
        (stand_in / "checkpoints" / str(one)).symlink_to(place / str(one))
    return max(earlier, default=0)


def _up_to(
    training: runs.Training,
    settings: LoopSettings,
    step: int,
    kept: Mapping[str, np.ndarray],
    played: Played,
) -> tuple[runs.Training, LoopSettings]:
    """Returns the run up to a step, which gets the kept batch; it is not evaluated."""

    def batches(number: int, rows: Any) -> Any:
        mine = training.batches(number, rows)
        if number + 1 != step:
            return mine
        played.batch, mine = _compared(mine, kept, np.asarray(rows))
        return mine

    def end(state: Any) -> dict[str, float]:
        if not played.batch:
            return {}  # the one that the checkpoint owes
        raise _Done

    changed = {
        "train_steps": step,
        "checkpoint_period": step,
        "eval_period": 0,
        "profile_steps": (),
        "keep_every_steps": 0,
        "keep_best": 0,
    }
    return (
        dataclasses.replace(training, batches=batches, evaluate=end, alarms=None),
        dataclasses.replace(settings, **changed),
    )


def _compared(
    mine: Any, kept: Mapping[str, np.ndarray], rows: np.ndarray
) -> tuple[str, Any]:
    """Returns whether a batch is the kept one, in words, and the kept one.

    Raises:
      UserError: their arrays have other names or shapes.
    """
    made = failures.named_arrays(mine)
    if made.keys() != kept.keys():
        raise UserError(
            f"the kept batch has the arrays {', '.join(kept)}, and the job's data now "
            f"give {', '.join(made)}"
        )
    for name, array in made.items():
        if array.shape[1:] != kept[name].shape[1:] or len(kept[name]) <= rows.max():
            raise UserError(
                f"the kept batch has {name!r} of shape {list(kept[name].shape)}, and "
                f"the job's data now give {list(array.shape)}"
            )
    stored = {name: kept[name][rows].astype(made[name].dtype) for name in made}
    differ = [n for n in made if not np.array_equal(made[n], stored[n], equal_nan=True)]
    said = (
        f"the kept one; the data have changed, they now give other {', '.join(differ)}"
        if differ
        else "the kept one, and the one that is computed now"
    )
    return said, jax.tree.unflatten(jax.tree.structure(mine), list(stored.values()))


def _report(facts: Mapping[str, Any], folder: pathlib.Path, played: Played) -> int:
    """Prints what was not finite, and returns whether it is what it was."""
    step, found = facts["step"], played.diverged
    print(f"{folder}: {facts['job']}, played from step {played.start} to step {step}")
    is_reached = found is None or found.step == step
    print(f"batch of step {step}: {played.batch if is_reached else 'was not reached'}")
    if found is None:
        print("not reproduced: every number of the step is finite")
        return OTHERWISE
    _print_numbers(found)
    is_same = (found.step, found.first_tensor) == (step, facts["first_tensor"])
    if is_same:
        print(f"reproduced: {found.what} at step {step}, as it was")
        return REPRODUCED
    print(
        f"not reproduced: {found.what} at step {found.step}; it was at step {step} "
        f"that {facts.get('what', facts['first_tensor'])}"
    )
    return OTHERWISE


def _print_numbers(found: TrainingDiverged) -> None:
    for name, value in found.metrics.items():
        if name.startswith("loss/") or not math.isfinite(value):
            print(f"  {name:<40} {value:.6g}")
    bad = {name: x for name, x in found.tensors.items() if not math.isfinite(x)}
    for name in list(bad)[:MOST_SHOWN]:
        print(f"  {name:<40} largest absolute value {bad[name]:.6g}")
    if len(bad) > MOST_SHOWN:
        print(f"  and {len(bad) - MOST_SHOWN} more that are not finite")
    fine = {name: x for name, x in found.tensors.items() if math.isfinite(x)}
    if fine:
        largest = max(fine, key=fine.get)
        print(
            f"  {len(fine)} tensors are finite; the largest absolute value in them is "
            f"{fine[largest]:.6g}, in the {largest}"
        )
