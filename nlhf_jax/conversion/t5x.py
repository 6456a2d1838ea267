# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints as weights; `t5x_layouts` says how the two differ."""

import functools
import logging
import pathlib
from collections.abc import Mapping

import numpy as np

from nlhf_jax.checks import UserError, check_choice, nearest
from nlhf_jax.conversion import t5x_arrays, t5x_optimizers, t5x_settings
from nlhf_jax.conversion.formats import Options
from nlhf_jax.conversion.shapes import flat, parameter_shapes
from nlhf_jax.conversion.t5x_arrays import StoredArray
from nlhf_jax.conversion.t5x_layouts import apart, separate_layers
from nlhf_jax.conversion.tensors import Moments, Tensor, Weights
from nlhf_jax.t5_settings import T5Settings

VOCABULARY = "vocabulary.model"
_log = logging.getLogger(__name__)


def recognises(path: pathlib.Path) -> bool:
    """Returns whether a path is a T5X checkpoint, or a folder of them."""
    return t5x_arrays.find_checkpoint(path) is not None


def wanted_shapes(settings: T5Settings) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of our parameters by name."""
    shapes = flat(parameter_shapes(settings))
    return {name: tuple(leaf.shape) for name, leaf in shapes.items()}


def open_t5x(path: pathlib.Path, options: Options) -> Weights:
    """Opens a checkpoint of an encoder-decoder that T5X wrote.

    The optimiser's state is read where we have such an optimiser; else that is said.

    Args:
      path: folder of one checkpoint, or of several, of which the newest is opened.
      options: see `t5x_settings.settings_of`; `optimizer` "true" (the default) or
        "false", whether the optimiser's state is read.

    Raises:
      UserError: the checkpoint is damaged or of another network; names the tensor.
    """
    wants_optimizer = with_optimizer(options)
    checkpoint = t5x_arrays.open_checkpoint(path, wants_optimizer)
    layers = separate_layers(checkpoint.arrays)
    shapes = {name: array.shape for name, array in layers.items()}
    settings = t5x_settings.settings_of(shapes, options, checkpoint.folder)
    tensors = _fitted(layers, settings)
    moments = _moments(checkpoint, settings) if wants_optimizer else None
    # T5X keeps no vocabulary there, but our exports do.
    vocabulary = checkpoint.folder.parent / VOCABULARY
    files = {VOCABULARY: vocabulary} if vocabulary.is_file() else {}
    return Weights(settings, tensors, files, moments=moments)


def with_optimizer(options: Options) -> bool:
    """Returns whether the optimiser's state is wanted.

    Raises:
      UserError: the option is neither "true" nor "false".
    """
    text = options.get("optimizer") or "true"
    return check_choice("optimizer", text, ("true", "false")) == "true"


def _moments(checkpoint: t5x_arrays.Checkpoint, settings: T5Settings) -> Moments | None:
    if not checkpoint.has_optimizer:
        return None
    try:
        return t5x_optimizers.our_moments(checkpoint, wanted_shapes(settings))
    except t5x_optimizers.NotHeld as reason:
        folder = checkpoint.folder
        _log.warning("%s: the optimiser's state is left out: %s", folder, reason)
        return None


def _fitted(
    layers: Mapping[str, StoredArray], settings: T5Settings
) -> dict[str, Tensor]:
    """Returns the tensors of our network.

    Raises:
      UserError: names the first that is missing, is not known, or has another shape.
    """
    wanted = wanted_shapes(settings)
    for name in wanted:
        if name not in layers:
            raise UserError(f"tensor {name} is missing{nearest(name, layers)}")
    for name in layers:
        if name not in wanted:
            raise UserError(
                f"tensor {name} has no place in this network{nearest(name, wanted)}"
            )
    tensors = {}
    for name, shape in wanted.items():
        array = layers[name]
        if array.shape not in (shape, apart(name, shape, settings)):
            raise UserError(
                f"tensor {name} must have the shape {shape}, got {array.shape}"
            )
        if np.dtype(array.dtype).name not in ("float32", "bfloat16"):
            raise UserError(
                f"tensor {name} must be of float32 or bfloat16, got {array.dtype}"
            )
        read = functools.partial(_read_as, array, shape)
        tensors[name] = Tensor(shape, array.dtype, read)
    return tensors


def _read_as(array: StoredArray, shape: tuple[int, ...]) -> np.ndarray:
    return array.read(()).reshape(shape)
