# SPDX-License-Identifier: Apache-2.0
"""What a compiled program computes, moves and sends, loops counted out.

XLA's own analysis counts the body of a loop once. Here a body counts as often as it
runs: a loop whose length the compiler knows by that length; one that may end early
(decoding) counts per iteration, and the caller says how many there are. All figures
are those of one device.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from nlhf_jax.scale.hlo import Array, Computation, Instruction, parse, trip_count

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What goes from slice to slice is a `send` to the runtime that joins them, and back.
BETWEEN_SLICES = "between slices, "
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')
_WINDOW = re.compile(r"(\w+)=([\dx_\-]+)")
# Instructions that touch no memory by themselves.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "optimization-barrier",
}


class Times(NamedTuple):
    """How much of something happens: outside open loops, and per iteration of them."""

    once: float
    per_iteration: float

    def total(self, num_iterations: float | int) -> float:
        """Returns the amount when every open loop runs so many iterations."""
        return self.once + num_iterations * self.per_iteration

    def __mul__(self, factor: float | int) -> "Times":
        return Times(self.once * factor, self.per_iteration * factor)

    def plus(self, other: "Times") -> "Times":
        """Returns the sum of two amounts."""
        return Times(self.once + other.once, self.per_iteration + other.per_iteration)


NEVER = Times(0.0, 0.0)


class Collective(NamedTuple):
    """All communication of one kind between groups of one size.

    Attributes:
      kind: one of `COLLECTIVES`; with `BETWEEN_SLICES` before it where it leaves the
        slice.
      group_size: devices, or slices, that take part together.
      count: how often it runs.
      num_bytes: of the larger of what goes in and what comes out, on one device.
    """

    kind: str
    group_size: int
    count: Times
    num_bytes: Times


class Analysis(NamedTuple):
    """What one device does in one call of a compiled program.

    Attributes:
      flops: of matrix products and convolutions; 2 for a multiplication and its sum.
      num_bytes: read from and written to HBM.
      collectives: communication by kind and size of group.
      num_open_loops: loops that may end early.
    """

    flops: Times
    num_bytes: Times
    collectives: tuple[Collective, ...]
    num_open_loops: int


def _dot_flops(dot: Instruction, operands: list[Instruction]) -> float:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
    left = operands[0].arrays[0].shape
    inner = [left[int(n)] for n in dims[1].split(",") if n] if dims else []
    return 2.0 * dot.arrays[0].size * math.prod(inner)


def _window(text: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", text)
    return {
        key: value.split("x")
        for key, value in _WINDOW.findall(found[1] if found else "")
    }


@functools.lru_cache(maxsize=4096)
def _valid_pairs(
    outputs: int, inputs: int, size: int, stride: int, low: int, dilated: int, step: int
) -> int:
    """Returns how many (output, kernel) positions meet an input and not padding."""
    place = np.arange(outputs)[:, None] * stride - low + np.arange(size)[None, :] * step
    inside = (place >= 0) & (place <= (inputs - 1) * dilated) & (place % dilated == 0)
    return int(inside.sum())


def _convolution_flops(one: Instruction, operands: list[Instruction]) -> float:
    """Counts as a TPU program needs it, where every matrix product is a convolution.

    Axes of a batched product become window axes, most of whose positions are padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    left, right, result = labels[1], labels[2], labels[3]
    sizes = operands[0].arrays[0].shape, operands[1].arrays[0].shape
    out = one.arrays[0].shape
    window = _window(one.rest)

    def along(key: str, axis: int, default: int) -> int:
        return int(window[key][axis]) if key in window else default

    pairs = 1
    for axis in range(sum(letter.isdigit() for letter in result)):
        letter = str(axis)
        low = window["pad"][axis].split("_")[0] if "pad" in window else "0"
        pairs *= _valid_pairs(
            out[result.index(letter)],
            sizes[0][left.index(letter)],
            along("size", axis, sizes[1][right.index(letter)]),
            along("stride", axis, 1),
            int(low),
            along("lhs_dilate", axis, 1),
            along("rhs_dilate", axis, 1),
        )
    features = sizes[1][right.index("i")]
    outer = out[result.index("b")] * out[result.index("f")]
    return 2.0 * outer * features * pairs


_FLOPS = {"dot": _dot_flops, "convolution": _convolution_flops}


def flops_of(instruction: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of one matrix product; everything else counts nothing."""
    if instruction.opcode not in _FLOPS:
        return 0.0
    operands = [computation[name] for name in instruction.operands]
    return _FLOPS[instruction.opcode](instruction, operands)


def _hbm_bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.num_bytes for array in arrays if not array.is_on_chip)


def _read_by_fusion(
    fused: Computation, computations: Mapping[str, Computation], number: int, whole: int
) -> int:
    """Returns the bytes a fusion reads of one operand: a slice, where it takes one."""
    parameter = next(
        one
        for one in fused.values()
        if one.opcode == "parameter" and one.inside == str(number)
    )
    readers = [one for one in fused.values() if parameter.name in one.operands]
    total = 0
    for one in readers:
        first = one.operands[0] == parameter.name
        if one.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += one.arrays[0].num_bytes
        elif one.opcode == "dynamic-update-slice" and first:
            continue  # written in place; the update is counted as the result
        elif one.opcode == "fusion":
            inner = computations[one.called("calls")]
            place = one.operands.index(parameter.name)
            total += _read_by_fusion(inner, computations, place, whole)
        else:
            return whole
    return min(total, whole)


def _written_by_fusion(fused: Computation, result: tuple[Array, ...]) -> int:
    """Returns the bytes a fusion writes: the update, where it updates in place."""
    root = next(one for one in fused.values() if one.is_root)
    parts = [root] if root.opcode != "tuple" else [fused[n] for n in root.operands]
    total = 0
    for part, array in zip(parts, result, strict=False):
        if array.is_on_chip:
            continue
        if part.opcode == "bitcast" and part.operands[0] in fused:
            part = fused[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            array = fused[part.operands[1]].arrays[0]
        total += array.num_bytes
    return total


def bytes_of(
    instruction: Instruction,
    computation: Computation,
    computations: Mapping[str, Computation],
) -> float:
    """Returns the bytes of HBM that one instruction of an unfused computation moves."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    operands = [computation[n] for n in instruction.operands if n in computation]
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _hbm_bytes(instruction.arrays)
    if opcode == "dynamic-update-slice":
        return 2.0 * _hbm_bytes(operands[1].arrays)
    fused = computations.get(instruction.called("calls"))
    if opcode != "fusion" or fused is None:
        return float(
            _hbm_bytes(instruction.arrays)
            + sum(_hbm_bytes(one.arrays) for one in operands)
        )
    total = float(_written_by_fusion(fused, instruction.arrays))
    for number, one in enumerate(operands):
        whole = _hbm_bytes(one.arrays)
        if whole:
            total += _read_by_fusion(fused, computations, number, whole)
    return total


def _group_size(rest: str) -> int:
    """Returns how many devices take part; 0 says all of them."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed[1].split(","))
    return 2 if "source_target_pairs" in rest else 0


def _between_slices(one: Instruction, times: Times) -> Collective | None:
    """Returns what an instruction sends to other slices, if it does."""
    found = _TRANSFER.search(one.rest)
    if one.opcode != "send" or found is None:
        return None
    kind = BETWEEN_SLICES + found[1].lower().replace("_", "-")
    target = _SLICES.search(one.rest)
    ids = [part.split(":") for part in target[1].split(",")] if target else []
    size = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ids)
    return Collective(kind, size, times, times * float(one.arrays[0].num_bytes))


def _collective(
    name: str, one: Instruction, computation: Computation, times: Times
) -> Collective | None:
    kind = one.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    if "all-reduce-scatter" in name:
        kind = "reduce-scatter"
    operands = [computation[n].arrays for n in one.operands if n in computation]
    sent = sum(array.num_bytes for arrays in operands for array in arrays)
    arrived = sum(array.num_bytes for array in one.arrays)
    if one.opcode.endswith("-start") and kind != "all-reduce":
        arrived = max((array.num_bytes for array in one.arrays), default=0)
    return Collective(
        kind, _group_size(one.rest), times, times * float(max(sent, arrived))
    )


class _Walk:
    """Goes through a program from its entry, and adds up."""

    def __init__(self, computations: Mapping[str, Computation]):
        self.computations = computations
        self.flops, self.num_bytes = NEVER, NEVER
        self.collectives: dict[tuple[str, int], Collective] = {}
        self.num_open_loops = 0

    def visit(self, name: str, times: Times, is_fused: bool) -> None:
        computation = self.computations[name]
        for one in computation.values():
            self.flops = self.flops.plus(times * flops_of(one, computation))
            if not is_fused:
                moved = bytes_of(one, computation, self.computations)
                self.num_bytes = self.num_bytes.plus(times * moved)
            found = _collective(name, one, computation, times)
            if found := found or _between_slices(one, times):
                self._add(found)
            for inner, its_times, fused in self._calls(one, times):
                self.visit(inner, its_times, is_fused or fused)

    def _calls(
        self, one: Instruction, times: Times
    ) -> Iterator[tuple[str, Times, bool]]:
        if one.opcode == "while":
            trips = trip_count(one, self.computations)
            self.num_open_loops += trips is None
            # Inside an open loop an open loop would count once; there is none.
            inner = Times(0.0, times.once) if trips is None else times * trips
            yield one.called("body"), inner, False
        elif one.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
            for name in re.findall(r"[\w.\-]+", branches[1]) if branches else ():
                yield name, times, False
        elif one.opcode in ("fusion", "call", "async-start"):
            word = "to_apply" if one.opcode == "call" else "calls"
            if one.called(word) in self.computations:
                yield one.called(word), times, one.opcode != "call"

    def _add(self, new: Collective) -> None:
        key = new.kind, new.group_size
        old = self.collectives.get(key, Collective(*key, NEVER, NEVER))
        self.collectives[key] = Collective(
            *key, old.count.plus(new.count), old.num_bytes.plus(new.num_bytes)
        )


def analyse(text: str) -> Analysis:
    """Returns what one device does in a compiled program, given `compiled.as_text()`.

    Matrix products are counted exactly, also where the compiler writes them as
    convolutions; element-wise work is not. Bytes are those of every unfused
    instruction's operands and results that lie in HBM, of slices only the slice.
    """
    computations, entry = parse(text)
    walk = _Walk(computations)
    walk.visit(entry, Times(1.0, 0.0), False)
    order = sorted(
        walk.collectives.values(), key=lambda one: (one.kind, one.group_size)
    )
    return Analysis(walk.flops, walk.num_bytes, tuple(order), walk.num_open_loops)
