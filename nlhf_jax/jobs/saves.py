# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoints: which are kept, and what each says of the run."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from nlhf_jax import (
    checkpoints,
    distributed,
    manifests,
    metrics,
    retention,
    stored_states,
)
from nlhf_jax.checks import CheckpointError, UserError, check_choice
from nlhf_jax.settings import LoopSettings
from nlhf_jax.types import TrainState


def check_best_metric(settings: LoopSettings) -> None:
    """Checks that an evaluation may give what the best checkpoints are chosen by.

    Raises:
      UserError: no evaluation has a metric of that name; the nearest is named.
    """
    if settings.keep_best:
        known = [name for name in metrics.METRICS if name.startswith("eval/")]
        check_choice("best_metric", settings.best_metric, known)


def check_seed(
    folder: pathlib.Path, step: int, meta: Mapping[str, Any], seed: int
) -> None:
    """Checks that a checkpoint was trained with a seed.

    Args:
      folder: of the run.
      step: of the checkpoint.
      meta: what it says of the run.
      seed: of the run that is to continue it.

    Raises:
      UserError: it was trained with another one. Batches and random numbers are a
        function of it, so some would come twice and others never.
    """
    if meta.get("seed", seed) != seed:
        raise UserError(
            f"{str(folder)!r} was trained with seed {meta['seed']} up to step {step}, "
            f"got seed {seed}: its batches would not go on from there; name another "
            "MODEL_DIR, or that seed"
        )


def check_newest(folder: pathlib.Path, seed: int, shapes: TrainState) -> None:
    """Checks a run against the newest checkpoint in its folder, if one is readable.

    Args:
      folder: of the run.
      seed: of the run.
      shapes: of the state that it trains.

    Raises:
      UserError: the checkpoint was trained with another seed, or is of another model
        or optimiser; the first array that differs is named with both shapes.
    """
    place = folder / checkpoints.STEPS_FOLDER
    for step in retention.committed(place)[-1:]:
        # What is damaged is named where it is restored.
        with contextlib.suppress(CheckpointError):
            manifest = manifests.read(place / str(step))
            check_seed(folder, step, manifest, seed)
            stored_states.check_continues(place / str(step), manifest, shapes)


def checkpointer(
    folder: pathlib.Path, settings: LoopSettings
) -> checkpoints.Checkpointer:
    """Returns what saves and restores the run's states."""
    check_best_metric(settings)
    return checkpoints.Checkpointer(
        folder / checkpoints.STEPS_FOLDER,
        keep=checkpoints.Retention(
            newest=settings.keep_checkpoints,
            every_steps=settings.keep_every_steps,
            best=settings.keep_best,
            metric=settings.best_metric,
            best_is=settings.best_is,
        ),
        attempts=settings.save_attempts,
        retry_seconds=settings.save_retry_seconds,
        beside=[folder / metrics.METRICS_FILE],
    )


def facts(
    seed: int, mesh: Any, config: str, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Returns what every checkpoint's manifest says of the run.

    Args:
      seed: of the run; random keys and the order of the data follow from it.
      mesh: of devices.
      config: text of the operative configuration.
      versions: of what decides the numbers.
    """
    key, devices = jax.random.key(seed), mesh.devices.flat
    return {
        "seed": seed,
        "random_keys": {
            "kind": str(jax.random.key_impl(key)),
            "run": jax.random.key_data(key).tolist(),
            "step": "fold_in(run, updates done)",
        },
        "data": "the batch of the next update is a function of seed and updates done",
        "config": config,
        "config_xxh3_128": manifests.digest_of_text(config),
        "versions": dict(versions),
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(mesh.devices.flat),
            "mesh": dict(mesh.shape),
            "processes": distributed.num_processes(),
        },
    }
