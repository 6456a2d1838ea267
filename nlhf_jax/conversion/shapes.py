# SPDX-License-Identifier: Apache-2.0
"""Which parameters a network has, and whether tensors are all of them."""

from collections.abc import Mapping
from typing import Any

import jax

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.conversion.tensors import Weights
from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.models.families import language_model


def parameter_shapes(settings: ModelSettings) -> dict[str, Any]:
    """Returns the tree of a network's parameters, shapes and dtypes alone."""
    return jax.eval_shape(language_model(settings).init, jax.random.key(0))


def flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their `a/b/c` paths."""
    leaves = {}
    for name, value in tree.items():
        path = f"{before}{name}"
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{path}/")
        else:
            leaves[path] = value
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts that `flat` made flat."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def check_complete(weights: Weights) -> None:
    """Checks that a network's tensors are there, all, and no other.

    Raises:
      UserError: names the first tensor that is missing, not known, or of another shape.
    """
    shapes = flat(parameter_shapes(weights.settings))
    for path, shape in shapes.items():
        if path not in weights.tensors:
            near = nearest(path, weights.tensors)
            raise UserError(f"tensor {path} is missing{near}")
        found = weights.tensors[path].shape
        if tuple(found) != tuple(shape.shape):
            raise UserError(
                f"tensor {path} must have the shape {tuple(shape.shape)}, got "
                f"{tuple(found)}"
            )
    for path in weights.tensors:
        if path not in shapes:
            near = nearest(path, shapes)
            raise UserError(f"tensor {path} has no place in this network{near}")
