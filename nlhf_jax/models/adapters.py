# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA) on any model: what is trained is A and B, never W.

    y = x W + scale (x A) B,      scale = alpha / rank

A model with adapters has the functions of the model without (`with_base`); its
parameter sets are adapters alone, trees with a `lora_a` and a `lora_b` for each kernel
that is adapted, and {} for none: that is the base itself, computed as without this
module. So the policy, its averages and its reference share one base.

Source: Hu et al., 2021, arXiv 2106.09685.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from nlhf_jax.checks import check_choice
from nlhf_jax.models.layers import RANK
from nlhf_jax.settings import LoraSettings
from nlhf_jax.types import (
    Adapted,
    LanguageModel,
    Params,
    PreferenceModel,
    RewardModel,
)

Model = TypeVar("Model", LanguageModel, PreferenceModel, RewardModel)

NOT_ADAPTED = ("logits_dense",)  # the output layer, which is read in chunks
OF_PARAMS = (
    "logits",
    "logits_of",
    "token_scores",
    "prefill",
    "decode_step",
    "rewards",
)


def adapted_paths(tree: PyTree, targets: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """Returns the leaf that is adapted for each place where adapters go.

    Args:
      tree: a model's parameters, their shapes, or their logical axes.
      targets: names of modules, or of a tabular model's `table`.

    Raises:
      UserError: a target names no module of the model; the nearest one is named.
    """
    found: dict[tuple[str, ...], Any] = {}
    leaves = jax.tree_util.tree_flatten_with_path(tree, lambda x: isinstance(x, tuple))
    for path, leaf in leaves[0]:
        names = tuple(part.key for part in path)
        if names[-1] == "kernel":
            names = names[:-1]
        elif names != ("table",):
            continue
        if names[-1] not in NOT_ADAPTED:
            found[names] = leaf
    known = sorted({names[-1] for names in found})
    for name in targets:
        check_choice("targets", name, known)
    return {names: leaf for names, leaf in found.items() if names[-1] in targets}


def _nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*outer, last), leaf in leaves.items():
        place = tree
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = leaf
    return tree


def _pair_at(adapters: PyTree, names: Sequence[str]) -> Mapping[str, Any]:
    return functools.reduce(lambda tree, name: tree[name], names, adapters)


def init_adapters(shapes: PyTree, lora: LoraSettings, key: jax.Array) -> Params:
    """Returns fresh float32 adapters, under which a model is its base.

    Args:
      shapes: the model's parameters, concrete or abstract.
      lora: rank and targets.
      key: of A.

    Raises:
      UserError: a target names no module of the model.
    """
    paths = adapted_paths(shapes, lora.targets)
    keys = jax.random.split(key, len(paths))

    def one(leaf, key) -> dict[str, jax.Array]:
        *stack, inputs, outputs = leaf.shape
        bound = inputs**-0.5
        shape = (*stack, inputs, lora.rank)
        return {
            "lora_a": jax.random.uniform(key, shape, jnp.float32, -bound, bound),
            "lora_b": jnp.zeros((*stack, lora.rank, outputs), jnp.float32),
        }

    pairs = (one(leaf, key) for leaf, key in zip(paths.values(), keys, strict=True))
    return _nested(dict(zip(paths, pairs, strict=True)))


def adapter_axes(logical_axes: PyTree, lora: LoraSettings) -> PyTree:
    """Returns the adapters' logical axes: the kernel's, with the rank's between."""
    return _nested(
        {
            names: {
                "lora_a": (*axes[:-1], RANK),
                "lora_b": (*axes[:-2], RANK, axes[-1]),
            }
            for names, axes in adapted_paths(logical_axes, lora.targets).items()
        }
    )


def adapted(base: Params, adapters: PyTree, lora: LoraSettings) -> Adapted:
    """Returns a base with adapters on, in the form that a model's functions take."""

    def one(path, leaf):
        return leaf * lora.scale if path[-1].key == "lora_b" else leaf

    return Adapted(base, jax.tree_util.tree_map_with_path(one, adapters))


def product(pair: Mapping[str, Any], lora: LoraSettings) -> Any:
    """Returns scale A B of one kernel, in the adapters' dtype."""
    return (pair["lora_a"] @ pair["lora_b"]) * lora.scale


def merged(base: Params, adapters: PyTree, lora: LoraSettings, sign: int = 1) -> Params:
    """Returns plain parameters W + scale A B, in the base's dtype.

    With sign -1 the adapters are taken off again, which gives the base to rounding
    only; whoever needs its bits keeps them.
    """

    def one(path, leaf):
        names = tuple(part.key for part in path)
        names = names[:-1] if names[-1] == "kernel" else names
        if names not in paths:
            return leaf
        return (leaf + sign * product(_pair_at(adapters, names), lora)).astype(
            leaf.dtype
        )

    paths = adapted_paths(base, lora.targets) if adapters else {}
    return jax.tree_util.tree_map_with_path(one, base)


def with_base(network: Model, base: Params | None, lora: LoraSettings) -> Model:
    """Returns the model whose parameters are adapters on a base.

    Args:
      network: a language model, a preference model or a reward model.
      base: its parameters; inside a compiled step an argument of that step. None will
        do where only `init` and `logical_axes` are asked.
      lora: rank, scale and targets.

    Raises:
      UserError: a target names no module of the model.
    """
    changed: dict[str, Any] = {
        name: _on_base(getattr(network, name), base, lora)
        for name in OF_PARAMS
        if name in network._fields
    }
    if isinstance(network, LanguageModel):
        changed["for_decoding"] = _on_base(network.for_decoding, base, lora)
        changed["join"] = lambda sets: _joined([_value(s, base, lora) for s in sets])

    def init(key: jax.Array) -> Params:
        return init_adapters(jax.eval_shape(network.init, key), lora, key)

    axes = adapter_axes(network.logical_axes, lora)
    return network._replace(init=init, logical_axes=axes, **changed)


def _value(adapters: PyTree, base: Params | None, lora: LoraSettings) -> Adapted:
    # What has been made for a decode is not made twice.
    is_made = isinstance(adapters, Adapted)
    return adapters if is_made else adapted(base, adapters, lora)


def _on_base(function: Any, base: Params | None, lora: LoraSettings) -> Any:
    def on_base(adapters, *given, **named):
        return function(_value(adapters, base, lora), *given, **named)

    return on_base


def _joined(sets: Sequence[Adapted]) -> Adapted:
    """Returns the sets as one, with an axis N; a set without adapters adds zeros."""
    some = next((one.adapters for one in sets if one.adapters), None)
    if some is None:
        return sets[0]
    none = jax.tree.map(jnp.zeros_like, some)
    trees = [one.adapters or none for one in sets]
    return Adapted(
        sets[0].base, jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    )


def num_parameters(tree: PyTree) -> int:
    """Returns how many numbers a tree of arrays holds, concrete or abstract."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
