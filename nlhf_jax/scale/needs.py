# SPDX-License-Identifier: Apache-2.0
"""What a step needs of each device: bytes, FLOPs, messages, and the time they take."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from nlhf_jax.scale.chips import Chip
from nlhf_jax.scale.costs import BETWEEN_SLICES, Analysis, analyse

# Share of a message's bytes that a device sends, for a group of n on a ring; an
# all-reduce goes round twice.
_ROUNDS = {"all-reduce": 2.0}
_TOO_LARGE = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available")
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of a compiled program on one device, as the compiler counts them.

    Attributes:
      arguments: parameters, optimiser, frozen sets, batch.
      outputs: new state and metrics.
      aliased: outputs that lie where an argument lay.
      temporaries: everything between, caches included.
      code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Returns what must be there at once."""
        return (
            self.arguments + self.outputs - self.aliased + self.temporaries + self.code
        )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said.

    Attributes:
      memory: None where the compiler found that it does not fit.
      analysis: of the compiled program; None with the memory.
      refused_bytes: what it would have needed, where it did not fit; 0 unknown.
      trace_seconds: Python's part.
      compile_seconds: the compiler's part.
    """

    memory: Memory | None
    analysis: Analysis | None
    refused_bytes: float
    trace_seconds: float
    compile_seconds: float


class Roofline(NamedTuple):
    """Shortest time of a step on one device, if nothing waited for anything else.

    Attributes:
      compute: FLOPs over peak FLOP/s, seconds.
      memory: bytes of HBM over its bandwidth, seconds.
      network: bytes sent over the links' bandwidth, seconds.
      slices: bytes sent to other slices over that network's bandwidth, seconds; 0
        where none is published.
    """

    compute: float
    memory: float
    network: float
    slices: float = 0.0

    @property
    def step(self) -> float:
        """Returns the longest of them."""
        return max(self)

    @property
    def bound_by(self) -> str:
        """Returns which one that is."""
        return max(self._asdict(), key=self._asdict().get)


def compile_traced(trace: Any) -> Compiled:
    """Compiles a step and reads what the compiler says of it.

    Args:
      trace: () -> `jax.stages.Traced`.

    Raises:
      Exception: what the compiler raises, unless it is that memory is short.
    """
    start = time.perf_counter()
    lowered = trace().lower()
    traced = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - traced
        return Compiled(None, None, refused_bytes(str(error)), traced - start, seconds)
    seconds = time.perf_counter() - traced
    stats = compiled.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
    analysis = analyse(compiled.as_text())
    return Compiled(memory, analysis, 0.0, traced - start, seconds)


def refused_bytes(message: str) -> float:
    """Returns the bytes in a compiler's complaint that memory is short; 0 unknown."""
    found = _USED.search(message) or _TOO_LARGE.search(message)
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


def device_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Returns the bytes that one device holds of abstract arrays."""
    total = 0
    for leaf, sharding in zip(
        jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
    ):
        shape = sharding.shard_shape(tuple(leaf.shape))
        size = leaf.dtype.itemsize
        for side in shape:
            size *= side
        total += size
    return total


def roofline(analysis: Analysis, chip: Chip, num_iterations: int) -> Roofline:
    """Returns the least times of a step whose open loops run `num_iterations` times."""
    inside, between = 0.0, 0.0
    for one in analysis.collectives:
        size = one.group_size
        share = (size - 1) / size if size else 1.0
        kind = one.kind.removeprefix(BETWEEN_SLICES)
        sent = _ROUNDS.get(kind, 1.0) * share * one.num_bytes.total(num_iterations)
        if kind == one.kind:
            inside += sent
        else:
            between += sent
    return Roofline(
        analysis.flops.total(num_iterations) / chip.flops,
        analysis.num_bytes.total(num_iterations) / chip.hbm_bandwidth,
        inside / chip.link_bandwidth if chip.link_bandwidth else 0.0,
        between / chip.dcn_bandwidth if chip.dcn_bandwidth else 0.0,
    )


def as_json(
    compiled: Compiled, parts: Mapping[str, int], chip: Chip | None, iterations: int
) -> dict[str, Any]:
    """Returns everything as plain numbers, for tools."""
    found: dict[str, Any] = {
        "memory": {"parts": dict(parts)},
        "compile": {
            "trace_seconds": compiled.trace_seconds,
            "compile_seconds": compiled.compile_seconds,
        },
    }
    if chip is not None:
        found["memory"] |= {"hbm": chip.hbm_bytes, "usable": chip.usable_bytes}
    if compiled.memory is None or compiled.analysis is None:
        found["memory"]["total"] = compiled.refused_bytes or None
        return found
    memory, analysis = compiled.memory, compiled.analysis
    found["memory"] |= memory._asdict() | {"total": memory.total}
    found["flops"] = analysis.flops.total(iterations)
    found["bytes_moved"] = analysis.num_bytes.total(iterations)
    found["collectives"] = [
        {
            "kind": one.kind,
            "group_size": one.group_size,
            "count": one.count.total(iterations),
            "bytes": one.num_bytes.total(iterations),
        }
        for one in analysis.collectives
    ]
    if chip is not None:
        limits = roofline(analysis, chip, iterations)
        found["roofline"] = {
            f"{name}_seconds": seconds for name, seconds in limits._asdict().items()
        } | {"step_seconds": limits.step, "bound_by": limits.bound_by}
    return found
