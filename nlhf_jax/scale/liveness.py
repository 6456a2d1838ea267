# SPDX-License-Identifier: Apache-2.0
"""How many bytes a program holds at once, read off its trace, without a compiler.

A traced program lists operations in order. Some leave an array in memory (products,
sums, gathers, loops); the others are taken to be fused into what reads them, and keep
alive what they read. The largest sum of arrays alive at one time is the estimate. It
knows neither the compiler's order of operations nor its layouts.

A parameter that is split along `fsdp` is followed: what is computed from it alone is
split too, until a layout constraint asks for it whole.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from nlhf_jax.scale.flat import Flat, Use

# Operations whose result is written to memory, whoever reads it.
_WRITTEN = {
    "dot_general",
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_and",
    "reduce_or",
    "argmax",
    "cumsum",
    "sort",
    "gather",
    "scatter",
    "scatter-add",
    "scatter_add",
    "concatenate",
    "stack",
    "dynamic_update_slice",
    "random_bits",
    "scan",
    "while",
    "cond",
}
# Operations so cheap that each reader does them again.
_CHEAP = {
    "convert_element_type",
    "transpose",
    "reshape",
    "squeeze",
    "copy",
    "broadcast_in_dim",
    "iota",
    "slice",
    "select_n",
    "eq",
    "lt",
    "gt",
    "ge",
    "le",
    "and",
    "or",
    "not",
    "pad",
    "sharding_constraint",
    "whole",
    "split",
    "stop_gradient",
    "dynamic_slice",
    "random_unwrap",
    "random_wrap",
    "neg",
}
_IN_PLACE = ("dynamic_update_slice", "scatter", "scatter-add", "scatter_add")

SizeOf = Callable[[Any], float]


def bytes_of(aval: Any) -> float:
    """Returns the bytes of an abstract array."""
    dtype = getattr(aval, "dtype", None)
    itemsize = getattr(dtype, "itemsize", 4)
    return float(math.prod(getattr(aval, "shape", ())) * itemsize)


def tiled_bytes_of(aval: Any) -> float:
    """Returns the bytes of an abstract array in a TPU's memory.

    The two innermost axes are cut into tiles of 8 x 128 values of 4 bytes (16 x 128 of
    2) and padded to whole tiles. The compiler orders the axes so that little is
    padding; it is taken to put the two there that waste least.
    """
    shape = [side for side in getattr(aval, "shape", ()) if side != 1]
    if len(shape) < 2:
        return bytes_of(aval)
    rows = 8 * max(1, 4 // aval.dtype.itemsize)
    grown = (
        (-(-low // 128) * 128 / low) * (-(-high // rows) * rows / high)
        for high, low in itertools.permutations(shape, 2)
    )
    return bytes_of(aval) * min(grown)


def peak_bytes(
    jaxpr: Any,
    size_of: SizeOf = bytes_of,
    *,
    split: Sequence[bool] = (),
    num_parts: int = 1,
    donated: Sequence[int] = (),
) -> float:
    """Returns the most bytes alive at once, inputs of the whole left out.

    Args:
      jaxpr: a closed jaxpr with the shapes of one device, but for what is split.
      size_of: abstract value -> bytes that a device holds of it.
      split: inputs of which a device holds one part in `num_parts`; none if empty.
      num_parts: see there.
      donated: outputs that are written where an input lay.
    """
    flat = Flat(jaxpr)
    return _Peak(size_of, num_parts).of(flat, split, frozenset(donated))[0]


class _Peak:
    """The walk through a program and, once each, the programs inside it."""

    def __init__(self, size_of: SizeOf, num_parts: int):
        self._size_of = size_of
        self._num_parts = num_parts
        self._known: dict[Any, tuple[float, list[bool]]] = {}
        self._flats: dict[int, Flat] = {}

    def of(
        self, flat: Flat, split: Sequence[bool], free: frozenset[int]
    ) -> tuple[float, list[bool]]:
        """Returns the peak, and which outputs are split; outputs in `free` are free."""
        parts, inside = self._follow(flat, split)
        written = _written(flat, parts)
        roots, born = _roots(flat, written)
        last = _last_uses(flat, roots, written)
        outputs = {root for v in flat.outputs for root in roots[v]}
        held = [v for n, v in enumerate(flat.outputs) if n not in free]
        costless = outputs - {root for v in held for root in roots[v]}
        change = [0.0] * (len(flat.uses) + 2)
        for buffer, start in born.items():
            if buffer in costless:
                continue
            end = len(flat.uses) if buffer in outputs else last.get(buffer, start)
            size = self._size(flat, buffer, parts)
            change[start] += size
            change[end + 1] -= size
        alive, peak = 0.0, 0.0
        for index in range(len(flat.uses)):
            alive += change[index]
            peak = max(peak, alive + inside[index])
        return peak, [parts[v] for v in flat.outputs]

    def _size(self, flat: Flat, value: int, parts: Sequence[bool]) -> float:
        size = self._size_of(flat.avals[value])
        return size / self._num_parts if parts[value] else size

    def _follow(self, flat: Flat, split: Sequence[bool]):
        """Returns which values are split, and what each operation holds inside."""
        parts = [False] * len(flat.avals)
        inside = [0.0] * len(flat.uses)
        # Constants come before the arguments.
        for value, flag in zip(flat.inputs[::-1], reversed(split), strict=False):
            parts[value] = flag
        for index, use in enumerate(flat.uses):
            flags = [parts[v] for v in use.reads]
            if use.bodies:
                inside[index], found = self._loop(use, flags)
            else:
                found = [_is_split(use, flat, flags)] * len(use.writes)
            for value, flag in zip(use.writes, found, strict=True):
                parts[value] = flag
        return parts, inside

    def _loop(self, use: Use, flags: list[bool]) -> tuple[float, list[bool]]:
        """Returns the most that a body holds, and which results are split."""
        peak, found = 0.0, [False] * len(use.writes)
        for body in use.bodies:
            its_flags = flags[use.skipped :]
            carried = range(use.num_carried)
            for _ in range(2):  # what goes round may come out split
                inner, outs = self._body(body, its_flags, frozenset(range(len(found))))
                for n in carried:
                    its_flags[use.num_consts + n] |= outs[n]
            peak = max(peak, inner)
            found = [a or b for a, b in zip(found, outs, strict=True)]
        return peak, found

    def _body(self, body: Any, flags: Sequence[bool], free: frozenset[int]):
        key = (id(body), tuple(flags))
        if key not in self._known:
            if id(body) not in self._flats:
                self._flats[id(body)] = Flat(body)
            self._known[key] = self.of(self._flats[id(body)], flags, free)
        return self._known[key]


def _is_split(use: Use, flat: Flat, flags: Sequence[bool]) -> bool:
    """Says whether a result lies in parts, as what it is made of does."""
    if use.name in ("whole", "split"):
        return use.name == "split"
    if use.name in ("dot_general", "gather") or not any(flags):
        return False
    if use.name in ("concatenate", "stack", "pad", "scatter-add", "scatter_add"):
        return True
    result = bytes_of(flat.avals[use.writes[0]])
    # A split scale does not split the activations it multiplies.
    return any(
        flag and 2 * bytes_of(flat.avals[value]) >= result
        for flag, value in zip(flags, use.reads, strict=True)
    )


def _written(flat: Flat, parts: Sequence[bool]) -> set[int]:
    """Returns the values that are written to memory, and not fused into readers."""
    readers: dict[int, list[str]] = {}
    for use in flat.uses:
        for value in use.reads:
            readers.setdefault(value, []).append(use.name)
    found = set(flat.outputs) - set(flat.inputs)
    for use in flat.uses:
        for value in use.writes:
            names = readers.get(value, ())
            is_fetched = use.name == "whole" and parts[use.reads[0]]
            is_kept = use.name not in _CHEAP and _is_kept(names)
            if use.name in _WRITTEN or is_fetched or is_kept:
                found.add(value)
    return found


def _is_kept(readers: Sequence[str]) -> bool:
    """A result that several operations read, or a product, is not made twice."""
    return len(readers) > 1 or "dot_general" in readers


def _roots(flat: Flat, written: set[int]):
    """Returns value -> buffers it needs, and buffer -> when it is made."""
    roots: list[frozenset[int]] = [frozenset()] * len(flat.avals)
    born: dict[int, int] = {}
    readers = _num_readers(flat)
    inputs = set(flat.inputs)
    for value in flat.inputs:
        roots[value] = frozenset({value})
    for index, use in enumerate(flat.uses):
        read = frozenset().union(*(roots[v] for v in use.reads))
        places = _places(use)
        for number, value in enumerate(use.writes):
            place = places.get(number)
            old = roots[place] if place is not None else frozenset()
            if use.bodies and place is None and value not in flat.read:
                continue  # nothing is stacked that nobody reads
            is_owned = use.name in _IN_PLACE or not old & inputs
            if old and readers[place] == 1 and is_owned:
                roots[value] = old
            elif value in written:
                roots[value] = frozenset({value})
                born[value] = index
            else:
                roots[value] = read
    return roots, born


def _places(use: Use) -> dict[int, int]:
    """Returns number of a result -> the value it may be written over."""
    if use.name in _IN_PLACE:
        return {0: use.reads[0]}
    first = use.skipped + use.num_consts
    return {n: use.reads[first + n] for n in range(use.num_carried)}


def _num_readers(flat: Flat) -> list[int]:
    count = [0] * len(flat.avals)
    for use in flat.uses:
        for value in use.reads:
            count[value] += 1
    for value in flat.outputs:
        count[value] += 1
    return count


def _last_uses(flat: Flat, roots, written: set[int]) -> dict[int, int]:
    last: dict[int, int] = {}
    for index, use in enumerate(flat.uses):
        if any(value in written for value in use.writes):
            for value in use.reads:
                for buffer in roots[value]:
                    last[buffer] = index
    return last
