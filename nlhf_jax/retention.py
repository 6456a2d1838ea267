# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay, and how the others go: nothing is left half deleted."""

import dataclasses
import logging
import math
import pathlib
import shutil
from collections.abc import Collection, Mapping

from nlhf_jax import manifests
from nlhf_jax.checks import UserError, check_choice, check_integer

PINNED = ".pinned"
_DELETING, _DAMAGED = ".deleting", ".damaged"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept; one that any of the rules takes stays.

    Attributes:
      newest: how many of the newest, at least 1.
      every_steps: those of steps that it divides, for ever; 0 takes none.
      best: how many with the best `metric`; 0 takes none. A checkpoint without an
        evaluation at its step, or with one that is not a number, is never among them.
      metric: a name of the evaluation's, such as "eval/win_rate_reference".
      best_is: "higher" or "lower".
    """

    newest: int = 2
    every_steps: int = 0
    best: int = 0
    metric: str = ""
    best_is: str = "higher"

    def __post_init__(self):
        check_integer("keep_checkpoints", self.newest, 1)
        check_integer("keep_every_steps", self.every_steps)
        check_integer("keep_best", self.best)
        check_choice("best_is", self.best_is, ("higher", "lower"))
        if self.best and not self.metric:
            raise UserError(
                f"best_metric must name an evaluation's metric for keep_best "
                f"{self.best}, got ''"
            )


def to_delete(
    steps: Collection[int],
    rule: Retention,
    figures: Mapping[int, float],
    pinned: Collection[int] = (),
) -> list[int]:
    """Returns the steps whose checkpoints go, oldest first; never the newest one.

    Args:
      steps: of all checkpoints.
      rule: see above.
      figures: step -> the metric's value there; of equal ones the newer is better.
      pinned: steps that stay whatever the rule says.
    """
    sign = 1 if rule.best_is == "higher" else -1
    ranked = sorted(
        (step for step in steps if math.isfinite(figures.get(step, math.nan))),
        key=lambda step: (sign * figures[step], step),
    )
    kept = {*sorted(steps)[-rule.newest :], *pinned}
    kept |= set(ranked[len(ranked) - min(rule.best, len(ranked)) :])
    if rule.every_steps:
        kept |= {step for step in steps if step % rule.every_steps == 0}
    return sorted(set(steps) - kept)


def step_folders(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Returns step -> folder of all that are named as a step, checkpoints or not."""
    if not folder.is_dir():
        return {}
    found = [f for f in folder.iterdir() if f.name.isdecimal() and f.is_dir()]
    # "007" is nobody's step 7.
    return {int(f.name): f for f in found if f.name == str(int(f.name))}


def committed(folder: pathlib.Path) -> list[int]:
    """Returns the steps whose folders have a manifest, oldest first."""
    found = step_folders(folder).items()
    return sorted(step for step, path in found if manifests.is_complete(path))


def strangers(folder: pathlib.Path) -> list[int]:
    """Returns the steps whose folders have no manifest and are no leftover of ours."""
    return sorted(
        step
        for step, path in step_folders(folder).items()
        if not manifests.is_complete(path) and not manifests.is_leftover(path)
    )


def pinned_steps(folder: pathlib.Path) -> set[int]:
    """Returns the steps S for which there is a file `S.pinned`."""
    names = [path.name.removesuffix(PINNED) for path in folder.glob(f"*{PINNED}")]
    return {int(name) for name in names if name.isdecimal()}


def delete(folder: pathlib.Path, step: int) -> None:
    """Deletes a step's folder; a kill meanwhile leaves nothing under its name."""
    _delete(folder / str(step))


def _delete(place: pathlib.Path) -> None:
    gone = place.with_name(f"{place.name}{_DELETING}")
    if gone.exists():
        shutil.rmtree(gone, ignore_errors=True)
    place.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def discard(folder: pathlib.Path, step: int) -> None:
    """Frees the room of a save that failed; what cannot go stays marked as such."""
    place = folder / str(step)
    if not manifests.is_leftover(place):
        return
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Deletes what a process left that was killed while it saved or deleted."""
    for path in list(folder.iterdir()):
        name = path.name.removesuffix(_DELETING)
        if not name.isdecimal() or not path.is_dir():
            continue
        if name != path.name:
            shutil.rmtree(path, ignore_errors=True)
        elif manifests.is_leftover(path):
            _delete(path)


def set_aside(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Renames a step's folder to `<step>.damaged`, or with a number after it."""
    count, place = 1, folder / f"{step}{_DAMAGED}"
    while place.exists():
        count += 1
        place = folder / f"{step}{_DAMAGED}.{count}"
    (folder / str(step)).rename(place)
    return place
