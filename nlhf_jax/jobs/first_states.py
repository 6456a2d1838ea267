# SPDX-License-Identifier: Apache-2.0
"""The state that a run starts from, made where it will lie."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from nlhf_jax import checkpoints, partitioning
from nlhf_jax.checks import UserError
from nlhf_jax.conversion.tensors import Moments
from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.jobs import adapters, folders, moments
from nlhf_jax.models.adapters import with_base
from nlhf_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class InitialState:
    """How a run's first state is made, each array where it will lie.

    Attributes:
      params: shapes and dtypes of the parameters it starts from.
      load: shardings -> parameters of a checkpoint; None makes fresh ones.
      init: random key -> parameters.
      make: parameters -> state; pure, and run inside a compiled program.
      seed: of fresh parameters.
      moments: averages that the optimiser goes on from, where some lie beside the
        parameters.
      source: then the folder of both.
    """

    params: PyTree
    load: Callable[[PyTree], Params] | None
    init: Callable[[jax.Array], Params]
    make: Callable[[Params], TrainState]
    seed: int
    moments: Moments | None = None
    source: str = ""

    @property
    def shapes(self) -> TrainState:
        """The state's shapes and dtypes."""
        return jax.eval_shape(self.make, self.params)

    def on(self, mesh: Any, params: PyTree, state: PyTree) -> TrainState:
        """Returns the state, made on the mesh: no device ever holds all of it.

        Args:
          mesh: see `partitioning.make_mesh`.
          params: shardings of the parameters.
          state: shardings of the state.
        """
        if self.load is not None:
            loaded = self.load(params)
            made = partitioning.CompiledFunction(
                self.make, mesh, out_shardings=state, donate_argnums=0
            )(loaded)
            if self.moments is None:
                return made
            return moments.continued(made, state, self.moments, self.source)

        def fresh(key: jax.Array) -> TrainState:
            return self.make(self.init(key))

        return partitioning.initialize(fresh, mesh, state, jax.random.key(self.seed))


def required(name: str, value: Any) -> Any:
    """Returns `value`; raises a UserError where it is None."""
    if value is None:
        raise UserError(f"{name} must be set when no checkpoint is named, got None")
    return value


def initial_state(
    init: Callable[[jax.Array], Params],
    checkpoint: str,
    seed: int,
    make: Callable[[Params], TrainState],
) -> InitialState:
    """Returns a first state with fresh parameters, or those of `checkpoint` if named.

    Args:
      init: random key -> parameters.
      checkpoint: model folder; empty starts from scratch.
      seed: of fresh parameters.
      make: parameters -> state.

    Raises:
      UserError: the checkpoint is missing, or the optimiser's state in it damaged.
    """
    shapes = jax.eval_shape(init, jax.random.key(seed))
    load = found = None
    if checkpoint:
        folders.find_model_dir(checkpoint)
        found = moments.for_start(checkpoint)

        def load(shardings: PyTree) -> Params:
            return adapters.load_whole(checkpoint, shapes, shardings)

    return InitialState(shapes, load, init, make, seed, found, checkpoint)


def state_of_adapters(
    stand: adapters.Stand, network: Any, seed: int, make: Callable[[Params], TrainState]
) -> InitialState:
    """Returns the first state of a run with adapters: fresh ones, or those it has.

    Args:
      stand: see `stand_on`.
      network: of the base.
      seed: of fresh adapters.
      make: adapters -> state.
    """
    on_base = with_base(network, None, stand.lora)
    shapes = jax.eval_shape(on_base.init, jax.random.key(seed))
    load = None
    if moments.is_beside(stand.base):
        moments.say(
            f"the optimiser's state beside {stand.base!r} is of all its weights, and "
            "this run trains adapters: it starts without"
        )
    if stand.start:
        source = folders.resolve(stand.start)

        def load(shardings: PyTree) -> Params:
            return checkpoints.load_params(source, shapes, shardings)

    return InitialState(shapes, load, on_base.init, make, seed)


# What a start from other weights may change of the network.
MAY_DIFFER = ("dropout_rate", "dtype")


def settings_of(model: ModelSettings | None, checkpoint: str) -> ModelSettings:
    """Returns the shape that is trained: the checkpoint's, where there is one.

    Raises:
      UserError: there is neither, or they are two networks.
    """
    if not checkpoint:
        if model is None:
            raise UserError(
                "sft.model must be a network's settings, or initial_checkpoint_path a "
                "model folder, got None and ''"
            )
        return model
    found = folders.description_of(checkpoint).settings
    if model is None:
        return found
    if type(model) is not type(found):
        raise UserError(
            f"sft.model must be {type(found).__name__} as in {checkpoint!r}, got "
            f"{type(model).__name__}: leave it None (MODEL = None) to take the folder's"
        )
    for field in dataclasses.fields(found):
        name = field.name
        ours, theirs = getattr(model, name), getattr(found, name)
        if name not in MAY_DIFFER and ours != theirs:
            raise UserError(
                f"{name} of sft.model must be {theirs!r} as in {checkpoint!r}, got "
                f"{ours!r}: leave it None (MODEL = None) to take the folder's"
            )
    return model
