# SPDX-License-Identifier: Apache-2.0
"""A plan of a device's memory from shapes alone: seconds, no compiler."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from nlhf_jax import flops, partitioning
from nlhf_jax.jobs.programs import Program, Share, program
from nlhf_jax.scale import liveness, needs
from nlhf_jax.scale.chips import chip_of
from nlhf_jax.scale.costs import Times


class Plan(NamedTuple):
    """Bytes that one device is expected to hold.

    Attributes:
      arguments: parameters, optimiser, frozen sets and batch; exact but for padding.
      temporaries: the most that is alive at once besides; an estimate.
      flops: of the step's matrix products on this device.
    """

    arguments: int
    temporaries: int
    flops: Times

    @property
    def total(self) -> int:
        """Returns their sum."""
        return self.arguments + self.temporaries


def plan(
    job: str,
    bindings: Mapping[str, Any],
    given: Mapping[str, Any],
    mesh: Mesh,
    whole: Program,
) -> Plan:
    """Returns the bytes that a device needs for a job's step.

    The step is traced as one device sees it: its rows of the batch, its heads, hidden
    units and part of the vocabulary. Parameters and gradients are split over `fsdp`
    as well, until the step asks for them whole. `whole` is the program of all devices.
    Not counted: the code, holes between arrays, what a scheduler fetches early, and
    what a TPU keeps out of HBM, in its vector memory.

    Raises:
      UserError: the mesh divides neither the parameters nor the batch.
    """
    lie = whole.shardings(mesh)
    batch_bytes = needs.device_bytes(
        whole.batch,
        jax.tree.map(lambda _: partitioning.batch_sharding(mesh), whole.batch),
    )
    arguments = (
        needs.device_bytes(whole.state, lie.state)
        + needs.device_bytes(whole.frozen, lie.frozen)
        + batch_bytes
    )
    part = _part(job, bindings, given, mesh, whole)
    with jax.set_mesh(mesh):
        jaxpr = part.jaxpr()
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    split = [_split_axis(one) for one in jax.tree.leaves((lie.state, lie.frozen))]
    if not is_cpu:
        # A TPU's gather writes the layout that its reader wants.
        split = [min(axis, 1) for axis in split]
    num_state = len(jax.tree.leaves(part.state))
    temporaries = liveness.peak_bytes(
        jaxpr,
        _size_of(mesh),
        split=split + [0] * (len(jaxpr.in_avals) - len(split)),
        num_parts=mesh.shape["fsdp"],
        donated=range(num_state),
        is_concurrent=is_cpu,
        fast_bytes=chip.vmem_bytes if (chip := chip_of(mesh.devices.flat[0])) else 0.0,
    )
    return Plan(arguments, int(temporaries), flops.of_traced(jaxpr))


def _part(
    job: str,
    bindings: Mapping[str, Any],
    given: Mapping[str, Any],
    mesh: Mesh,
    whole: Program,
) -> Program:
    """Returns the program with one device's rows and share of every network."""
    rows = partitioning.num_row_parts(mesh)
    if mesh.shape["tensor"] > 1:
        return program(job, bindings, given, Share(rows, mesh.shape["tensor"]))
    # The networks are the same, and to describe them again would take as long again.
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (leaf.shape[0] // rows, *leaf.shape[1:]), leaf.dtype
        ),
        whole.batch,
    )
    return dataclasses.replace(whole, batch=batch)


def _split_axis(sharding: Any) -> int:
    """Returns 0 for what `fsdp` leaves whole, 1 if its first axis is split, else 2."""
    if "fsdp" not in sharding.spec:
        return 0
    return 1 if sharding.spec[0] == "fsdp" else 2


def _size_of(mesh: Mesh) -> liveness.SizeOf:
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    return liveness.tiled_bytes_of if is_tpu else liveness.bytes_of
