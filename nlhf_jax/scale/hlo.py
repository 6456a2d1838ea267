# SPDX-License-Identifier: Apache-2.0
"""Compiled programs as text, parsed into computations and instructions."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "u4": 4, "s4": 4}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """One array of an instruction's result.

    Attributes:
      dtype: XLA's name.
      shape: on this device.
      is_on_chip: laid out in the chip's own scratch memory and not in HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    is_on_chip: bool

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Returns bytes without the layout's padding."""
        bits = _ITEM_BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits[0]) if digits else 0
        return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: XLA's name of the operation.
      arrays: its result, tuples flattened.
      operands: names of what it reads.
      rest: what stands after the operands.
      is_root: whether it is the computation's result.
      inside: text between the opcode's parentheses.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool
    inside: str

    def called(self, word: str) -> str:
        """Returns the computation named by an attribute such as `body=`, or ''."""
        found = re.search(rf"\b{word}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


Computation = Mapping[str, Instruction]


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            dtype,
            tuple(int(n) for n in sizes.split(",") if n),
            bool(layout) and "S(1)" in layout,
        )
        for dtype, sizes, layout in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Returns the place after the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    return len(text)


def _instruction(line: str) -> Instruction | None:
    line = line.strip()
    is_root = line.startswith("ROOT ")
    name, equals, text = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    shape, text = text[:end], text[end:].lstrip()
    start = text.find("(")
    if start < 0:
        return None
    end = _closing(text, start)
    inside = text[start + 1 : end - 1]
    return Instruction(
        name.removeprefix("%"),
        text[:start],
        _arrays(shape),
        tuple(_NAME.findall(inside)),
        text[end:],
        is_root,
        inside,
    )


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a compiled program's text, and the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head and "->" in line:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _instruction(line):
            current[found.name] = found
    return computations, entry


def trip_count(
    loop: Instruction, computations: Mapping[str, Computation]
) -> int | None:
    """Returns how often a `while` runs, or None where it may end early.

    Where the compiler does not say, a condition that is nothing but `i < constant` is
    taken to count from zero in ones, which is how JAX writes a scan.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = computations.get(loop.called("condition"), {})
    root = next((one for one in condition.values() if one.is_root), None)
    if root is not None and root.opcode == "fusion":
        condition = computations.get(root.called("calls"), {})
        root = next((one for one in condition.values() if one.is_root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    values = [condition[name] for name in root.operands if name in condition]
    limits = [int(one.inside) for one in values if one.opcode == "constant"]
    return limits[0] if len(limits) == 1 else None
