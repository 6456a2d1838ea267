# SPDX-License-Identifier: Apache-2.0
"""Which results of a flattened program lie in memory, and which lie in the same place.

A compiler fuses cheap operations into what reads them, writes over what nobody reads
any more, and goes round a loop in place.
"""

from collections.abc import Sequence

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
    "turned",
    "split",
    "stop_gradient",
    "dynamic_slice",
    "random_unwrap",
    "random_wrap",
    "neg",
}
# The same bytes under another shape or name.
_RENAMED = {
    "reshape",
    "squeeze",
    "stop_gradient",
    "random_unwrap",
    "random_wrap",
    "sharding_constraint",
}
ADDED = ("scatter-add", "scatter_add")
_IN_PLACE = ("dynamic_update_slice", "scatter", *ADDED)

Roots = Sequence[frozenset[int]]


def written(flat: Flat, parts: Sequence[int]) -> set[int]:
    """Returns the values that are written to memory, and not fused into readers."""
    readers: dict[int, list[str]] = {}
    for use in flat.uses:
        for value in use.reads:
            readers.setdefault(value, []).append(use.name)
    found = set(flat.outputs) - set(flat.inputs)
    source = {u.writes[0]: u.reads[0] for u in flat.uses if u.name == "whole"}
    for use in flat.uses:
        for value in use.writes:
            names = readers.get(value, ())
            is_fetched = use.name == "whole" and parts[use.reads[0]]
            is_turned = use.name == "turned" and parts[source[use.reads[0]]] == 2
            is_kept = use.name not in _CHEAP and _is_kept(names)
            if use.name in _WRITTEN or is_fetched or is_turned or is_kept:
                found.add(value)
            elif use.name == "turned":
                found.discard(value)  # also as a result it is what was put together
    return found | _handed_over(flat)


def _handed_over(flat: Flat) -> set[int]:
    """Returns what a loop or an update in place is given: it must lie in memory."""
    wanted, found = set(), set()
    for use in reversed(flat.uses):
        if wanted.intersection(use.writes):
            if use.name in _RENAMED:
                wanted.update(use.reads)
            else:
                found.update(use.writes)
        if use.bodies:
            wanted.update(use.reads)
        elif use.name in _IN_PLACE:
            wanted.add(use.reads[0])
    return found


def _is_kept(readers: Sequence[str]) -> bool:
    """A result that several operations read, or a product, is not made twice."""
    return len(readers) > 1 or "dot_general" in readers


def roots(flat: Flat, written: set[int]):
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
                roots[value] = read if use.name != "turned" else roots[use.reads[0]]
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


def may_write_over(flat: Flat, roots, born, sizes) -> dict[int, list[int]]:
    """Returns element-wise operation -> buffers of its result's size that it reads."""
    found = {}
    for buffer, index in born.items():
        use = flat.uses[index]
        if use.name in _WRITTEN or use.name in _CHEAP:
            continue
        over = {root for v in use.reads for root in roots[v]}
        same = [b for b in over if b in born and sizes[b] == sizes[buffer]]
        if same and sizes[buffer]:
            found[index] = same
    return found


def read_buffers(flat: Flat, roots, written: set[int]) -> dict[int, list[int]]:
    """Returns what each operation that writes reads of buffers, fused ones through."""
    return {
        index: [buffer for value in use.reads for buffer in roots[value]]
        for index, use in enumerate(flat.uses)
        if any(value in written for value in use.writes)
    }


def before(flat: Flat, written: set[int]) -> dict[int, list[int]]:
    """Returns operations that write -> those whose results they read."""
    needs: list[frozenset[int]] = [frozenset()] * len(flat.avals)
    before = {}
    for index, use in enumerate(flat.uses):
        read = frozenset().union(*(needs[v] for v in use.reads))
        is_written = any(value in written for value in use.writes)
        if is_written:
            before[index] = sorted(read)
        for value in use.writes:
            needs[value] = frozenset({index}) if is_written else read
    return before
