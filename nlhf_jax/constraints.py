# SPDX-License-Identifier: Apache-2.0
"""Where arrays inside a compiled step lie: rows stay, weights come to them.

Nothing here does anything unless a mesh is set (`jax.set_mesh`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from nlhf_jax.partitioning import RULES, LogicalAxes, Rules, resolve


def constrain(array: Array, logical_axes: LogicalAxes, rules: Rules = RULES) -> Array:
    """Returns the array, laid out by the rules when a mesh is set (`jax.set_mesh`).

    An axis whose size its mesh axes do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    spec = _fitting(array, resolve(logical_axes, rules), mesh)
    return jax.lax.with_sharding_constraint(array, spec)


def gather(array: Array, logical_axes: LogicalAxes, rules: Rules = RULES) -> Array:
    """Returns a parameter whole along `fsdp`, as a product with split rows needs it.

    Its gradient is split again. Without this the compiler is free to gather the rows
    of every device instead, and does so where rows are few.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return array
    split = _fitting(array, resolve(logical_axes, rules), mesh)
    whole = PartitionSpec(*(axes if axes != "fsdp" else None for axes in split))
    return _gather(array, split, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(array: Array, split: PartitionSpec, whole: PartitionSpec) -> Array:
    del split
    return jax.lax.with_sharding_constraint(array, whole)


def _gather_forward(array, split, whole):
    return _gather(array, split, whole), None


def _gather_backward(split, whole, _, gradient):
    del whole
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)


def platform() -> str:
    """Returns what is compiled for: the mesh's platform, or else the backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def may_be_cut_up() -> bool:
    """Returns whether arrays may lie on several devices without a mesh that says how.

    What is compiled then is cut up by the compiler alone, which cannot cut a kernel.
    """
    return jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1


def per_device(
    fn: Callable[..., Array],
    arguments: Sequence[LogicalAxes],
    result: LogicalAxes,
    rules: Rules = RULES,
) -> Callable[..., Array]:
    """Returns the function run by each device on its part, where a mesh is set.

    For what the compiler cannot cut up itself, a kernel. The parts must not need each
    other; an axis whose size its mesh axes do not divide stays whole.

    Args:
      fn: arrays -> array.
      arguments: logical axes of each of its arrays; None is an axis that stays whole.
      result: of what it returns, whose axes are of the sizes of the first array's.
      rules: logical axis -> mesh axes.
    """

    def run(*arrays: Array) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return fn(*arrays)
        specs = [
            _fitting(array, resolve(axes, rules), mesh)
            for array, axes in zip(arrays, arguments, strict=True)
        ]
        whole = _fitting(arrays[0], resolve(result, rules), mesh)
        split = jax.shard_map(
            fn, in_specs=tuple(specs), out_specs=whole, check_vma=False
        )
        return split(*arrays)

    return run


def _fitting(array: Array, spec: PartitionSpec, mesh: Any) -> PartitionSpec:
    """Returns the layout without what does not divide the array's sides."""

    def fits(size: int, mesh_axes: str | tuple[str, ...] | None) -> bool:
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    sides = zip(array.shape, spec, strict=True)
    return PartitionSpec(*(axes if fits(size, axes) else None for size, axes in sides))


def count_constraints(fn: Callable[..., Any], mesh: Mesh, *args: Any) -> int:
    """Returns the number of sharding constraints in the trace of `fn(*args)`."""
    with jax.set_mesh(mesh):
        return str(jax.make_jaxpr(fn)(*args)).count("sharding_constraint")
