# SPDX-License-Identifier: Apache-2.0
"""Which device holds what: the mesh, one table of rules, compiled steps.

Parameters carry logical axis names (`embed`, `mlp`, ...); `RULES` says along which
axis of the mesh each is split. Everything else follows from the table: optimiser
moments lie where their parameter lies, a batch is split by rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.settings import MeshSettings

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# In order of priority, as in T5X: a rule is taken if its mesh axes are still free in
# the array; else the next rule of the same name is tried. None leaves the axis whole.
RULES = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("joined_kv", "tensor"),
    ("embed", "fsdp"),
    ("embed", None),
    ("kv", None),
    ("relpos_buckets", None),
    ("abspos_buckets", None),
    ("length", None),
    ("layers", None),
    ("stack", None),
    ("mlp_activations", None),
    ("lora_rank", None),
)

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]
LogicalAxes = tuple[str | None, ...]


def _shape_text(mesh_sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in mesh_sizes.items())


def make_mesh(settings: MeshSettings, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh (data, fsdp, tensor) over all devices, with Auto axes.

    Where the devices lie in several slices, `data` is `slice` times the size that was
    set, and its slow part goes from slice to slice: over the network between them go
    sums over the batch alone; parameters are gathered inside a slice.

    Args:
      settings: sizes; -1 takes the devices that are left.
      devices: all of this job's if None.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the devices lie
        in another number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    num_slices = settings.slice
    _check_slices(num_slices, devices)
    sizes = {name: getattr(settings, name) for name in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1) * num_slices
    if -1 in sizes.values() and len(devices) % fixed == 0:
        rest = len(devices) // fixed
        sizes = {n: rest if size == -1 else size for n, size in sizes.items()}
    shape = tuple(sizes.values())
    if math.prod(shape) * num_slices != len(devices):
        named = {"slice": num_slices} | sizes if num_slices > 1 else sizes
        divisors = _divisors(len(devices))
        raise UserError(
            f"mesh {_shape_text(named)} must use all {len(devices)} devices; "
            f"each size must be one of {divisors}, and their product {len(devices)}"
        )
    axis_types = (AxisType.Auto,) * len(shape)
    if num_slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types, devices=devices)
    placed = over_slices(shape, num_slices, devices)
    return Mesh(placed, MESH_AXES, axis_types=axis_types)


def over_slices(
    shape: tuple[int, ...], num_slices: int, devices: Sequence[Any]
) -> np.ndarray:
    """Returns devices laid out as `shape` in each slice; the first axis has both."""
    across = (num_slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(shape, across, devices)


def _check_slices(wanted: int, devices: Sequence[Any]) -> None:
    # Elsewhere each process may count as a slice of its own.
    if wanted == 1 and devices[0].platform != "tpu":
        return
    found = len({getattr(device, "slice_index", None) for device in devices})
    if found != wanted:
        raise UserError(
            f"mesh slice must be {found}, the slices that the {len(devices)} devices "
            f"lie in, got {wanted}"
        )


def _free(mesh_axes: str | tuple[str, ...] | None, taken: dict[str, str]) -> bool:
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    return not any(name in taken for name in names)


def resolve(logical_axes: LogicalAxes, rules: Rules = RULES) -> PartitionSpec:
    """Returns the mesh axes of an array with these logical axes, by the rules.

    Rules are gone through in order, and each gives its mesh axes to the first axis of
    its name that has none yet, provided they are free.

    Raises:
      UserError: an unknown name, or two axes of the array want the same mesh axis and
        the table has no other rule for the second.
    """
    known = {name for name, _ in rules}
    for name in logical_axes:
        if name is not None and name not in known:
            raise UserError(
                f"unknown logical axis {name!r} in {logical_axes}{nearest(name, known)}"
            )
    chosen: dict[int, str | tuple[str, ...] | None] = {}
    taken: dict[str, str] = {}
    for name, mesh_axes in rules:
        for position, axis in enumerate(logical_axes):
            if axis != name or position in chosen or not _free(mesh_axes, taken):
                continue
            chosen[position] = mesh_axes
            for used in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
                taken[used] = name
    for position, name in enumerate(logical_axes):
        if name is not None and position not in chosen:
            _refuse_collision(name, logical_axes, rules, taken)
    return PartitionSpec(*(chosen.get(i) for i in range(len(logical_axes))))


def _refuse_collision(
    name: str, logical_axes: LogicalAxes, rules: Rules, taken: dict[str, str]
) -> None:
    wanted = dict(rules)[name]
    axes = (wanted,) if isinstance(wanted, str) else wanted
    holder = next(taken[axis] for axis in axes if axis in taken)
    raise UserError(
        f"logical axes {holder!r} and {name!r} of {logical_axes} both want mesh axis "
        f"{wanted!r}; add the rule ({name!r}, None) to keep the second whole"
    )


def _check_divisible(
    name: str, shape: tuple[int, ...], logical_axes: LogicalAxes, spec, mesh: Mesh
) -> None:
    if len(logical_axes) != len(shape):
        raise UserError(f"{name} has shape {shape} but logical axes {logical_axes}")
    for size, axis, mesh_axes in zip(shape, logical_axes, spec, strict=True):
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        parts = math.prod(mesh.shape[n] for n in names)
        if size % parts:
            sizes = _shape_text({n: mesh.shape[n] for n in names})
            raise UserError(
                f"axis {axis!r} of {name} has size {size}, which the mesh's {sizes} "
                f"does not divide; sizes that do: {_divisors(size)}"
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def shardings_for(
    logical_axes: PyTree, shapes: PyTree, mesh: Mesh, rules: Rules = RULES
) -> PyTree:
    """Returns the sharding of every parameter.

    Args:
      logical_axes: tree of tuples of names, as a model gives it.
      shapes: the parameters, concrete or abstract (`jax.eval_shape(init, key)`).
      mesh: see `make_mesh`.
      rules: the table.

    Raises:
      UserError: see `resolve`; or a size that the mesh does not divide.
    """

    def one(path, leaf, axes) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = resolve(tuple(axes), rules)
        _check_divisible(name, tuple(leaf.shape), tuple(axes), spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, shapes, logical_axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def num_row_parts(mesh: Mesh) -> int:
    """Returns the number of parts that a batch's rows are split into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def check_batch_size(
    batch_size: int, mesh: Mesh, num_parts: int = 1, what: str = "num_microbatches"
) -> None:
    """Checks that every device gets as many rows of every microbatch.

    Raises:
      UserError: names the nearest sizes that would do.
    """
    sizes = {name: mesh.shape[name] for name in BATCH_AXES}
    unit = num_row_parts(mesh) * num_parts
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"batch_size must be divisible by {unit} (mesh {_shape_text(sizes)}, "
            f"{what}={num_parts}), got {batch_size}; "
            f"{near} would do"
        )


def state_shardings(state: PyTree, param_shardings: PyTree, params: PyTree) -> PyTree:
    """Returns a sharding for every array of a train state.

    An array whose path ends in the path of a parameter and has its shape (the
    parameter itself, an average of it, a moment of the optimiser) lies as it does; all
    else (counters, factored moments) is whole on every device.

    Args:
      state: concrete or abstract.
      param_shardings: see `shardings_for`.
      params: the parameters, concrete or abstract.
    """
    shardings = jax.tree.leaves(param_shardings)
    whole = replicated(shardings[0].mesh)
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {
        (path, tuple(leaf.shape)): sharding
        for (path, leaf), sharding in zip(paths, shardings, strict=True)
    }

    def one(path, leaf) -> NamedSharding:
        ends = (path[start:] for start in range(len(path) + 1))
        found = (known.get((end, tuple(leaf.shape))) for end in ends)
        return next((sharding for sharding in found if sharding is not None), whole)

    return jax.tree_util.tree_map_with_path(one, state)


class StepShardings(NamedTuple):
    """Where everything lies that a step is given, besides its batch and key.

    Attributes:
      params: of the parameters that are trained.
      state: of the train state.
      frozen: of each frozen parameter set.
    """

    params: PyTree
    state: PyTree
    frozen: dict[str, PyTree]


def step_shardings(
    mesh: Mesh,
    state: PyTree,
    params: PyTree,
    logical_axes: PyTree,
    frozen: Mapping[str, PyTree],
    frozen_axes: Mapping[str, PyTree],
) -> StepShardings:
    """Returns where a job's state and frozen parameters lie.

    Args:
      mesh: see `make_mesh`.
      state: the train state, concrete or abstract.
      params: the parameters in it that are trained.
      logical_axes: of those.
      frozen: parameter sets that are not trained.
      frozen_axes: of each; a judge may have another shape than the policy.

    Raises:
      UserError: a size that the mesh does not divide.
    """
    lie = shardings_for(logical_axes, params, mesh)
    return StepShardings(
        lie,
        state_shardings(state, lie, params),
        {
            name: shardings_for(frozen_axes[name], tree, mesh)
            for name, tree in frozen.items()
        },
    )


class CompiledFunction:
    """A jitted function that runs under its mesh and counts its compilations."""

    def __init__(
        self,
        fn: Callable[..., Any],
        mesh: Mesh,
        *,
        state_sharding: PyTree = None,
        **jit_options: Any,
    ):
        """Compiles nothing yet.

        Args:
          fn: a pure function.
          mesh: set while the function is traced and run.
          state_sharding: where the first argument must lie; a state that is not on the
            mesh yet is put there. Else it would be compiled twice, for old and new.
          jit_options: of `jax.jit`.
        """
        self.mesh = mesh
        self.num_compilations = 0
        self._state_sharding = state_sharding

        def counted(*args):
            # Runs once per trace, and every trace is compiled.
            self.num_compilations += 1
            return fn(*args)

        counted.__name__ = getattr(getattr(fn, "func", fn), "__name__", "counted")
        self._jitted = jax.jit(counted, **jit_options)

    def __call__(self, *args: Any) -> Any:
        """Calls the function; it compiles if shapes, dtypes or structure are new."""
        if self._state_sharding is not None and not _is_on(self.mesh, args[0]):
            args = (jax.device_put(args[0], self._state_sharding), *args[1:])
        with jax.set_mesh(self.mesh):
            return self._jitted(*args)

    def trace(self, *args: Any) -> Any:
        """Returns the function traced for concrete or abstract arguments."""
        with jax.set_mesh(self.mesh):
            return self._jitted.trace(*args)

    def lower(self, *args: Any) -> Any:
        """Returns the function lowered for concrete or abstract arguments."""
        with jax.set_mesh(self.mesh):
            return self._jitted.lower(*args)


def _is_on(mesh: Mesh, tree: PyTree) -> bool:
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return all(getattr(sharding, "mesh", None) == mesh for sharding in shardings)


def initialize(
    init: Callable[..., PyTree], mesh: Mesh, shardings: PyTree, *args: Any
) -> PyTree:
    """Returns `init(*args)` made where it will lie: no device ever holds it whole."""
    return CompiledFunction(init, mesh, out_shardings=shardings)(*args)


def compile_step(
    step_fn: Callable[..., tuple[PyTree, PyTree]],
    mesh: Mesh,
    state_sharding: PyTree,
    *argument_shardings: PyTree,
) -> CompiledFunction:
    """Compiles (state, *arguments) -> (state, metrics); the state is donated.

    Args:
      step_fn: a pure function.
      mesh: see `make_mesh`.
      state_sharding: of the state that comes in and goes out, a tree or a prefix.
      argument_shardings: of each further argument; none means (batch, key): rows split
        over the mesh, and the key whole.

    Returns:
      The step; metrics are whole on every device. NumPy batches are put in place by it.
    """
    argument_shardings = argument_shardings or (batch_sharding(mesh), replicated(mesh))
    return CompiledFunction(
        step_fn,
        mesh,
        state_sharding=state_sharding,
        in_shardings=(state_sharding, *argument_shardings),
        out_shardings=(state_sharding, replicated(mesh)),
        donate_argnums=0,
    )
