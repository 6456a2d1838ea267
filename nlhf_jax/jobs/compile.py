# SPDX-License-Identifier: Apache-2.0
"""What a training job's step needs of a machine, said by the compiler, without one."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from nlhf_jax import partitioning
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import plans
from nlhf_jax.jobs.programs import Program, program
from nlhf_jax.scale import chips, needs, words
from nlhf_jax.settings import MeshSettings
from nlhf_jax.types import BASE, POLICY


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked besides the job itself.

    Attributes:
      topology: a TPU slice such as v5e:16x16, or "".
      cpu_devices: fake CPU devices, or 0.
      fit: look for the largest batch that fits.
      plan: from shapes alone, without the compiler.
      json: print one JSON object.
    """

    topology: str = ""
    cpu_devices: int = 0
    fit: bool = False
    plan: bool = False
    json: bool = False

    def __post_init__(self):
        if bool(self.topology) == bool(self.cpu_devices):
            raise UserError(
                "compile needs one of --topology=v5e:4x4 and --cpu_devices=8, got "
                + ("both" if self.topology else "neither")
            )


def target_of(options: Options, num_slices: int) -> chips.Target:
    """Returns the devices that are meant."""
    if options.topology:
        return chips.tpu(options.topology, num_slices)
    return chips.cpu(options.cpu_devices)


def parts_of(one: Program, mesh: Mesh) -> dict[str, int]:
    """Returns the bytes that a device holds of everything that has a name."""
    lie = one.shardings(mesh)
    sets = one.state.param_sets
    found = {}
    for name, tree in sets.items():
        label = "parameters" if name == POLICY else f"set {name}"
        found[label] = needs.device_bytes(tree, lie.state.param_sets[name])
    found["optimiser"] = needs.device_bytes(one.state.opt_states, lie.state.opt_states)
    for name, tree in one.frozen.items():
        found[f"frozen {name}"] = needs.device_bytes(tree, lie.frozen[name])
    if one.algorithm is not None:
        found["caches"] = cache_bytes(one, mesh)
    return found


def cache_bytes(one: Program, mesh: Mesh) -> int:
    """Returns a device's bytes of the keys and values of the largest rollout."""
    rows = one.loop.batch_size // partitioning.num_row_parts(mesh)
    prompts = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype),
        one.batch,
    )
    _, cache = jax.eval_shape(
        lambda params, prompts: one.network.prefill(
            params, prompts, one.response_length
        ),
        # The policy's own, or what its adapters stand on.
        one.frozen.get(BASE, one.state.param_sets[POLICY]),
        prompts,
    )
    size = tree_bytes(cache) // mesh.shape["tensor"]
    return size * max(
        sum(len(speaker.weights) for speaker in part.speakers)
        for part in one.algorithm.parts
    )


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of abstract arrays, whole."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(
    job: str,
    bindings: Mapping[str, Any],
    given: Mapping[str, Any],
    target: chips.Target,
) -> dict[str, Any]:
    """Compiles a job's step for a target and returns all figures."""
    one = program(job, bindings, given)
    mesh = partitioning.make_mesh(one.mesh, target.devices)
    parts = parts_of(one, mesh)
    with uncached():
        compiled = needs.compile_traced(lambda: one.trace(mesh))
    found = needs.as_json(compiled, parts, target.chip, one.response_length)
    return _with_verdict(head(one, target, mesh) | found, target, planned=False)


def estimate(
    job: str,
    bindings: Mapping[str, Any],
    given: Mapping[str, Any],
    target: chips.Target,
) -> dict[str, Any]:
    """Plans a job's step from shapes alone and returns the figures that it knows."""
    one = program(job, bindings, given)
    mesh = partitioning.make_mesh(one.mesh, target.devices)
    planned = plans.plan(job, bindings, given, mesh, one)
    memory: dict[str, Any] = {"parts": parts_of(one, mesh)}
    memory |= {"arguments": planned.arguments, "temporaries": planned.temporaries}
    memory["total"] = planned.total
    if target.chip is not None:
        memory |= {"hbm": target.chip.hbm_bytes, "usable": target.chip.usable_bytes}
    work = {"flops": planned.flops.total(one.response_length)}
    found = head(one, target, mesh) | {"memory": memory} | work
    return _with_verdict(found, target, planned=True)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Leaves the cache of compiled programs alone: their time is to be measured."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def head(one: Program, target: chips.Target, mesh: Mesh) -> dict[str, Any]:
    """Returns what was asked."""
    return {
        "job": one.job,
        "target": target.name,
        "num_devices": len(target.devices),
        # Along the mesh's own `data` lie the slices and, in each, `data` as it was set.
        "mesh": {"slice": one.mesh.slice}
        | dict(mesh.shape)
        | {"data": mesh.shape["data"] // one.mesh.slice},
        "batch_size": one.loop.batch_size,
        "num_microbatches": one.loop.num_microbatches,
        "rows_per_device": one.loop.batch_size // partitioning.num_row_parts(mesh),
        "prompt_length": one.prompt_length,
        "response_length": one.response_length,
        "remat": one.memory.remat,
        "source": target.chip.source if target.chip else "",
    }


def _with_verdict(
    found: dict[str, Any], target: chips.Target, *, planned: bool
) -> dict[str, Any]:
    """Adds whether it fits: None without a chip to compare with."""
    fits = None
    if target.chip is not None:
        memory = found["memory"]
        has_compiled = "temporaries" in memory
        fits = has_compiled and memory["total"] <= target.chip.usable_bytes
    return found | {"fits": fits, "planned": planned}


def largest(
    needed: Callable[[int], float | int], usable: float | int, most: int = 4096
) -> int:
    """Returns the largest number of 1, 2, ... whose need is at most `usable`, or 0.

    The first guess is on the line through the needs of 1 and 2; from there it goes to
    the last number that fits. An infinite need says no more than that it is too much.

    Args:
      needed: number -> bytes; it grows.
      usable: bytes.
      most: numbers beyond are not tried.
    """
    first = needed(1)
    if first > usable:
        return 0
    second = needed(2)
    if second > usable:
        return 1
    steps = (usable - first) / max(second - first, 1.0)
    low, high = 2, most + 1
    guess = min(max(3, 1 + int(steps)), most)
    while high - low > 1:
        if needed(guess) <= usable:
            low, guess = guess, min(guess + 1, high - 1)
        else:
            high, guess = guess, max(guess - 1, low + 1)
        if not low < guess < high:
            break
    return low


def largest_batch(
    figures: Callable[..., dict[str, Any]],
    job: str,
    bindings: Mapping[str, Any],
    given: Mapping[str, Any],
    target: chips.Target,
) -> int:
    """Returns the largest batch whose step fits, with the same microbatches.

    Raises:
      UserError: the target has no chip's memory to fit into.
    """
    if target.chip is None:
        raise UserError(f"--fit needs a --topology: {target.name} has no fixed memory")
    loop, layout = bindings["loop"], bindings.get("mesh", MeshSettings())
    mesh = partitioning.make_mesh(layout, target.devices)
    unit = partitioning.num_row_parts(mesh) * loop.num_microbatches

    def needed(number: int) -> float:
        resized = dataclasses.replace(loop, batch_size=number * unit)
        found = figures(job, dict(bindings) | {"loop": resized}, given, target)
        compiled = "temporaries" in found["memory"]
        return found["memory"]["total"] if compiled else math.inf

    return unit * largest(needed, target.chip.usable_bytes)


def run(
    job: str, bindings: Mapping[str, Any], given: Mapping[str, Any], options: Options
) -> int:
    """Prints what a job's step needs; returns the exit code.

    Raises:
      UserError: an unknown target or model, or settings that do not fit each other.
    """
    layout = bindings.get("mesh", MeshSettings())
    target = target_of(options, layout.slice)
    figures = estimate if options.plan else measure
    found = figures(job, bindings, given, target)
    if options.fit:
        found["largest_batch"] = largest_batch(figures, job, bindings, given, target)
    print(json.dumps(found, indent=2) if options.json else words.report(found))
    return 0
