# SPDX-License-Identifier: Apache-2.0
"""Folders whose parameters are adapters, and the base that they stand on.

A run with LoRA keeps a base, which is frozen, and trains adapters. Its checkpoints hold
the adapters and their optimiser alone; its `model.json` names the base and a digest of
it. Elsewhere such a folder is a model like any other: its adapters are merged into its
base as it is read.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from nlhf_jax import checkpoints, manifests, partitioning, stored_states
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import folders
from nlhf_jax.models.adapters import adapted, init_adapters, merged
from nlhf_jax.settings import LoraSettings, MeshSettings
from nlhf_jax.types import POLICY, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Stand:
    """What a run with adapters stands on.

    Attributes:
      lora: the adapters' settings.
      base: a step's folder or a parameter file; with adapters of its own, these are
        merged into it.
      digest: of what `base` holds.
      start: the folder whose adapters the run starts with; "" makes fresh ones.
      start_digest: of these adapters.
      reference_digest: of the reference's adapters, where a run has such a reference.
    """

    lora: LoraSettings
    base: str
    digest: str
    start: str
    start_digest: str = ""
    reference_digest: str = ""

    def describes(self, whole: folders.ModelDescription) -> folders.ModelDescription:
        """Returns the description of the run's folder, given that of a whole model."""
        return dataclasses.replace(
            whole,
            lora=self.lora,
            base=self.base,
            base_digest=self.digest,
            reference_digest=self.reference_digest,
        )

    def adapters(self, network: Any, mesh: Any) -> Params:
        """Returns the adapters that `start` holds; {} without one.

        Args:
          network: of the base.
          mesh: of devices; each array is whole on all of them.
        """
        if not self.start:
            return {}
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        return _load_adapters(self.start, self.lora, shapes, mesh)


def stand_on(checkpoint: str, lora: LoraSettings) -> Stand:
    """Returns what a run with these adapters stands on if it starts at `checkpoint`.

    Adapters with the same settings go on from where they are, on the base they have;
    all else is a base as a whole.

    Raises:
      UserError: the folder is missing or holds no parameters, or the base of adapters
        has gone or has changed.
    """
    found = folders.description_of(checkpoint)
    if found.lora == lora:
        check_base(checkpoint, found.base, found.base_digest)
        now = digest_of(_source(checkpoint))
        return Stand(lora, found.base, found.base_digest, str(checkpoint), now)
    base = _source(checkpoint)
    return Stand(lora, str(base), digest_of(base), "")


def starts_at(stand: Stand, checkpoint: str) -> Stand:
    """Returns the stand of a policy that starts at `checkpoint`, on the same base.

    It remembers which adapters its reference has.

    Args:
      stand: of its reference.
      checkpoint: the reference itself, or adapters beside it.

    Raises:
      UserError: it is neither.
    """
    found = stand_on(checkpoint, stand.lora)
    is_same = not found.start and not stand.start and found.digest == stand.digest
    if is_same or (found.start and found.digest == stand.digest):
        return dataclasses.replace(found, reference_digest=stand.start_digest)
    raise UserError(
        f"with lora, initial_checkpoint_path must hold {stand.lora} on the reference's "
        f"base {stand.base!r}, or be '', got {checkpoint!r}"
    )


def _source(checkpoint: str | pathlib.Path) -> pathlib.Path:
    path = folders.resolve(checkpoint).absolute()
    sources = stored_states.param_sources(path)
    if not sources:
        raise UserError(f"{str(checkpoint)!r} holds no checkpoint")
    return sources[0]


def digest_of(source: pathlib.Path) -> str:
    """Returns the xxh3-128 of a parameter file, or of a step's digests by array."""
    if source.is_file():
        return manifests.digest_of_file(source)
    arrays = manifests.read(source)["arrays"]
    mine = f"param_sets/{POLICY}/"
    said = {name: facts for name, facts in arrays.items() if name.startswith(mine)}
    return manifests.digest_of_text(json.dumps(said, sort_keys=True))


def digest_if_there(checkpoint: str) -> str:
    """Returns the digest of a folder's parameters, "" where it has none yet."""
    sources = stored_states.param_sources(folders.resolve(checkpoint).absolute())
    return digest_of(sources[0]) if sources else ""


def check_base(checkpoint: str | pathlib.Path, base: str, digest: str) -> None:
    """Checks that the base of adapters is there and as it was.

    Raises:
      UserError: it is not.
    """
    place = pathlib.Path(base)
    if not place.exists():
        raise UserError(
            f"the adapters of {str(checkpoint)!r} stand on {base!r}, which does not "
            "exist: put it back, or write its new place into their model.json"
        )
    if digest_of(_source(place)) != digest:
        raise UserError(
            f"the adapters of {str(checkpoint)!r} stand on {base!r}, which has changed "
            "since they were trained"
        )


def check_bases(checkpoint: str | pathlib.Path) -> None:
    """Checks all that a folder's adapters stand on; of a whole model there is nothing.

    Raises:
      UserError: a base has gone or has changed.
    """
    found = folders.description_of(checkpoint)
    if found.lora is not None:
        check_base(checkpoint, found.base, found.base_digest)
        check_bases(found.base)


def check_goes_on(model_dir: pathlib.Path, stand: Stand | None) -> None:
    """Checks that a folder that is gone on with has the same adapters and base.

    Raises:
      UserError: it was trained with others, or without.
    """
    if not (model_dir / folders.DESCRIPTION_FILE).is_file():
        return
    found = folders.description_of(model_dir)
    wanted = (None, "") if stand is None else (stand.lora, stand.digest)
    if (found.lora, found.base_digest) != wanted:
        was = f"{found.lora} on {found.base!r}" if found.lora else "no adapters"
        now = f"{stand.lora} on {stand.base!r}" if stand else "no adapters"
        raise UserError(
            f"{str(model_dir)!r} was trained with {was}, got {now}: name another "
            "MODEL_DIR"
        )
    reference = "" if stand is None else stand.reference_digest
    if found.reference_digest and found.reference_digest != reference:
        raise UserError(
            f"the reference's adapters have changed since {str(model_dir)!r} began: "
            "reference_checkpoint must name the step that it began with "
            "(FOLDER/checkpoints/STEP), or MODEL_DIR another folder"
        )


def load_whole(
    checkpoint: str | pathlib.Path, shapes: PyTree, shardings: PyTree | None = None
) -> Params:
    """Returns a folder's float32 parameters, its adapters merged if it has any.

    Args:
      checkpoint: model folder, or a path in it.
      shapes: the model's parameters, abstract.
      shardings: where each array is to lie; None puts all on one device.

    Raises:
      UserError: nothing readable is there, it does not fit, or the base of adapters is
        missing or has changed.
    """
    found = folders.description_of(checkpoint)
    if found.lora is None:
        source = folders.resolve(checkpoint)
        return checkpoints.load_params(source, shapes, shardings)
    check_base(checkpoint, found.base, found.base_digest)
    base = load_whole(found.base, shapes, shardings)
    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh
    on = _load_adapters(checkpoint, found.lora, shapes, mesh)
    return merged(base, on, found.lora)


def load_adapters(
    checkpoint: str, network: Any, mesh: MeshSettings | None = None
) -> Params:
    """Returns the adapters of a folder that has some, whole on every device.

    Args:
      checkpoint: model folder.
      network: of the base; has `init`.
      mesh: how devices are laid out; None puts all on one.

    Raises:
      UserError: they do not fit the network.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    lora = folders.description_of(checkpoint).lora
    devices = None if mesh is None else partitioning.make_mesh(mesh)
    return _load_adapters(checkpoint, lora, shapes, devices)


def _load_adapters(
    checkpoint: str | pathlib.Path, lora: LoraSettings, shapes: PyTree, mesh: Any
) -> Params:
    like = _adapter_shapes(shapes, lora)
    shardings = None
    if mesh is not None:
        shardings = jax.tree.map(lambda _: partitioning.replicated(mesh), like)
    return checkpoints.load_params(folders.resolve(checkpoint), like, shardings)


def _adapter_shapes(shapes: PyTree, lora: LoraSettings) -> PyTree:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: init_adapters(shapes, lora, key), key)


def evaluated_on(
    evaluate: Callable[[TrainState], dict[str, float]],
    base: Params,
    lora: LoraSettings,
) -> Callable[[TrainState], dict[str, float]]:
    """Returns an evaluation of adapters, given one of whole parameter sets."""

    def evaluate_adapters(state: TrainState) -> dict[str, float]:
        policy = adapted(base, state.param_sets[POLICY], lora)
        return evaluate(state._replace(param_sets={POLICY: policy}))

    return evaluate_adapters
