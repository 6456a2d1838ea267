# SPDX-License-Identifier: Apache-2.0
"""How many bytes a program holds at once, read off its trace, without a compiler.

A traced program lists operations in order. Some leave an array in memory (products,
sums, gathers, loops); the others are taken to be fused into what reads them, and keep
alive what they read. The largest sum of arrays alive at one time is the estimate. It
knows neither the compiler's order of operations nor its layouts.

A parameter that is split along `fsdp` is followed: what is computed from it alone is
split too, until a layout constraint asks for it whole.
"""

import collections
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nlhf_jax.scale import buffers, orders
from nlhf_jax.scale.flat import Flat, Use

SHORT = 8
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
    split: Sequence[int] = (),
    num_parts: int = 1,
    donated: Sequence[int] = (),
    is_concurrent: bool = False,
    fast_bytes: float = 0.0,
) -> float:
    """Returns the most bytes alive at once, inputs of the whole left out.

    Args:
      jaxpr: a closed jaxpr with the shapes of one device, but for what is split.
      size_of: abstract value -> bytes that a device holds of it.
      split: for each input 0 if it is whole, 1 if a device holds one part in
        `num_parts` of its first axis, 2 of another, and what is put together of it is
        turned before it is read; all are whole if empty.
      num_parts: see there.
      donated: outputs that are written where an input lay.
      is_concurrent: whether the compiler orders operations for as many side by side as
        there can be (CPUs), and not for few arrays at a time (TPUs).
      fast_bytes: of a memory beside the main one. Arrays that are read by one of the
        next `SHORT` operations and no later lie in half of it, as far as they fit; the
        other half is for what operations fetch ahead and hold by themselves.
    """
    flat = Flat(jaxpr)
    walk = _Peak(size_of, num_parts, is_concurrent, fast_bytes)
    return walk.of(flat, split, frozenset(donated))[0]


class _Peak:
    """The walk through a program and, once each, the programs inside it."""

    def __init__(
        self, size_of: SizeOf, num_parts: int, is_concurrent: bool, fast_bytes: float
    ):
        self._size_of = size_of
        self._num_parts = num_parts
        self._is_concurrent = is_concurrent
        self._fast_bytes = fast_bytes
        self._known: dict[Any, tuple[float, list[int]]] = {}
        self._flats: dict[int, Flat] = {}

    def of(
        self, flat: Flat, split: Sequence[int], free: frozenset[int]
    ) -> tuple[float, list[int]]:
        """Returns the peak, and which outputs are split; outputs in `free` are free."""
        parts, inside = self._follow(flat, split)
        written = buffers.written(flat, parts)
        roots, born = buffers.roots(flat, written)
        outputs = {root for v in flat.outputs for root in roots[v]}
        held = [v for n, v in enumerate(flat.outputs) if n not in free]
        costless = outputs - {root for v in held for root in roots[v]}
        sizes = {
            buffer: 0.0 if buffer in costless else self._size(flat, buffer, parts)
            for buffer in born
        }
        reads = buffers.read_buffers(flat, roots, written)
        written_over = buffers.may_write_over(flat, roots, born, sizes)
        left = collections.Counter()
        for buffer, start in born.items():
            left[start] += sizes[buffer]

        def peak(order: Sequence[int]) -> float:
            """Returns the most alive at once when operations run in an order."""
            last = {b: place for place, n in enumerate(order) for b in reads[n]}
            place_of = {number: place for place, number in enumerate(order)}
            spans = {
                buffer: (
                    begin := place_of[start],
                    len(order) if buffer in outputs else last.get(buffer, begin),
                )
                for buffer, start in born.items()
            }
            for number, over in written_over.items():
                # Of what it reads, one array of its size that nobody reads after it.
                place = place_of[number]
                done = (b for b in over if last[b] == place and b not in outputs)
                if (one := next(done, None)) is not None:
                    spans[one] = spans[one][0], place - 1
            short = {b: span for b, span in spans.items() if b not in outputs}
            beside = _beside(short, sizes, self._fast_bytes / 2)
            change = [0.0] * (len(order) + 2)
            for buffer in spans.keys() - beside:
                begin, end = spans[buffer]
                change[begin] += sizes[buffer]
                change[max(begin, end) + 1] -= sizes[buffer]
            alive = itertools.accumulate(change)
            return max(
                (now + inside[n] for now, n in zip(alive, order, strict=False)),
                default=0.0,
            )

        return min(map(peak, self._orders(flat, written, left))), [
            parts[v] for v in flat.outputs
        ]

    def _orders(self, flat: Flat, written: set[int], left) -> list[list[int]]:
        """Returns the orders among which a compiler takes that which holds least."""
        before = buffers.before(flat, written)
        if self._is_concurrent:
            return [orders.breadth_first(before)]
        return [list(before), orders.depth_first(before, left)]

    def _size(self, flat: Flat, value: int, parts: Sequence[int]) -> float:
        size = self._size_of(flat.avals[value])
        return size / self._num_parts if parts[value] else size

    def _follow(self, flat: Flat, split: Sequence[int]):
        """Returns which values are split, and what each operation holds inside."""
        parts = [0] * len(flat.avals)
        inside = [0.0] * len(flat.uses)
        # Constants come before the arguments.
        for value, flag in zip(flat.inputs[::-1], reversed(split), strict=False):
            parts[value] = flag
        wanted = _wanted_split(flat)
        for index, use in enumerate(flat.uses):
            flags = [parts[v] for v in use.reads]
            if use.bodies:
                inside[index], found = self._loop(use, flags)
            else:
                is_split = use.writes[0] in wanted or _is_split(use, flat, flags)
                found = [is_split and max(1, *flags, 0)] * len(use.writes)
            for value, flag in zip(use.writes, found, strict=True):
                parts[value] = flag
        return parts, inside

    def _loop(self, use: Use, flags: list[int]) -> tuple[float, list[int]]:
        """Returns the most that a body holds, and which results are split."""
        peak, found = 0.0, [0] * len(use.writes)
        for body in use.bodies:
            its_flags = flags[use.skipped :]
            carried = range(use.num_carried)
            for _ in range(2):  # what goes round may come out split
                inner, outs = self._body(body, its_flags, frozenset(range(len(found))))
                for n in carried:
                    place = use.num_consts + n
                    its_flags[place] = max(its_flags[place], outs[n])
            peak = max(peak, inner)
            found = list(map(max, found, outs))
        return peak, found

    def _body(self, body: Any, flags: Sequence[int], free: frozenset[int]):
        key = (id(body), tuple(flags))
        if key not in self._known:
            if id(body) not in self._flats:
                self._flats[id(body)] = Flat(body)
            self._known[key] = self.of(self._flats[id(body)], flags, free)
        return self._known[key]


def _wanted_split(flat: Flat) -> set[int]:
    """Returns what is split from the start: it will be, and each part stands alone.

    So is a table's gradient: every device adds the rows of all to its own columns. A
    product is made whole first, and its parts are then summed.
    """
    found: set[int] = set()
    for use in reversed(flat.uses):
        if use.name == "split":
            found.add(use.reads[0])
        elif use.writes[0] in found:
            if use.name in (*buffers.ADDED, "convert_element_type"):
                found.add(use.reads[0])
            elif use.name != "broadcast_in_dim":
                found.discard(use.writes[0])
    return found


def _is_split(use: Use, flat: Flat, flags: Sequence[int]) -> bool:
    """Says whether a result lies in parts, as what it is made of does."""
    if use.name in ("whole", "turned", "split"):
        return use.name == "split"
    if use.name in ("dot_general", "gather") or not any(flags):
        return False
    if use.name in ("concatenate", "stack", "pad", *buffers.ADDED):
        return True
    result = bytes_of(flat.avals[use.writes[0]])
    # A split scale does not split the activations it multiplies.
    return any(
        flag and 2 * bytes_of(flat.avals[value]) >= result
        for flag, value in zip(flags, use.reads, strict=True)
    )


def _beside(
    spans: Mapping[int, tuple[int, int]], sizes: Mapping[int, float], room: float
) -> set[int]:
    """Returns buffers that lie in a fast memory: those in use for the shortest time.

    Args:
      spans: buffer -> first and last place.
      sizes: buffer -> bytes.
      room: bytes of that memory.
    """
    found: set[int] = set()
    if not room:
        return found
    used: dict[int, float] = collections.defaultdict(float)
    short = [b for b, (begin, end) in spans.items() if end - begin <= SHORT]
    for buffer in sorted(short, key=lambda b: spans[b][1] - spans[b][0]):
        begin, end = spans[buffer]
        places, size = range(begin, end + 1), sizes[buffer]
        if all(used[place] + size <= room for place in places):
            found.add(buffer)
            for place in places:
                used[place] += size
    return found
