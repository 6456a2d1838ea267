# SPDX-License-Identifier: Apache-2.0
"""The report of `nlhf compile` in words and tables."""

from collections.abc import Iterator, Mapping
from typing import Any

_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNTS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def size(num_bytes: float | int) -> str:
    """Returns bytes as people say them: 1.50 GiB."""
    for unit, name in _BYTES:
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes:.0f} B"


def count(number: float | int) -> str:
    """Returns a large number with a prefix: 1.97 T."""
    for unit, name in _COUNTS:
        if abs(number) >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} "


def seconds(value: float) -> str:
    """Returns a time as people say it: 12 ms."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def advice(found: Mapping[str, Any]) -> str:
    """Returns which setting to change when a step does not fit, in one sentence.

    What the state needs goes down with `fsdp`; what the rows need with fewer rows at a
    time; what a single row needs with `tensor`.
    """
    memory = found["memory"]
    parts, usable = memory["parts"], memory["usable"]
    held = sum(size for name, size in parts.items() if name != "caches")
    if held > usable / 2:
        return (
            f"parameters, optimiser and frozen sets alone are {size(held)}: raise "
            f"FSDP from {found['mesh']['fsdp']}"
        )
    rows = found["rows_per_device"] // found["num_microbatches"]
    if rows > 1:
        return (
            f"{rows} rows are computed at once on a device: raise NUM_MICROBATCHES "
            f"from {found['num_microbatches']}, or devices along DATA_PARALLEL"
        )
    if found["remat"] != "full":
        return f"layers keep what they computed: set REMAT to 'full' ({found['remat']})"
    return f"a single row is too large: raise TENSOR from {found['mesh']['tensor']}"


# What compilers said of the cases in docs/scale.md, whose head has them one by one.
PLAN_ERROR = (
    "planned from shapes alone. Arguments are exact, temporaries an estimate: against "
    "the compiler, totals on fake CPU devices were within 10% with layers in a loop "
    "(13% below with TENSOR=2), up to 22% below where layers are kept, and for train "
    "on TPUs up to 40% below"
)


def verdict(found: Mapping[str, Any]) -> str:
    """Returns one line: whether the step fits, and what to change where it does not."""
    total = found["memory"]["total"]
    needed = size(total) if total else "more than there is"
    if found["fits"] is None:
        return f"needs {needed} a device; there is no chip to compare with"
    usable = size(found["memory"]["usable"])
    likely = "by estimate, " if found.get("planned") else ""
    if found["fits"]:
        share = total / found["memory"]["usable"]
        return f"{likely}fits: {needed} of {usable} a chip ({share:.0%})"
    return f"{likely}does not fit: {needed} of {usable} a chip; {advice(found)}"


def _memory(found: Mapping[str, Any]) -> Iterator[str]:
    memory = found["memory"]
    yield "memory of a device"
    for name, held in memory["parts"].items():
        note = " (among the temporaries)" if name == "caches" else ""
        yield f"  {name:<22} {size(held):>12}{note}"
    for name in ("arguments", "outputs", "aliased", "temporaries", "code", "total"):
        if memory.get(name) is not None:
            yield f"  {name:<22} {size(memory[name]):>12}"
    if "hbm" in memory:
        yield f"  {'of the chip':<22} {size(memory['hbm']):>12}"
        yield f"  {'usable by a program':<22} {size(memory['usable']):>12}"


def _work(found: Mapping[str, Any]) -> Iterator[str]:
    length = found["response_length"]
    yield f"work of a device in a step, decoding {length} tokens to the end"
    yield f"  {'matrix products':<22} {count(found['flops'])}FLOP"
    if "bytes_moved" in found:
        yield f"  {'bytes moved in HBM':<22} {size(found['bytes_moved'])}"
    for one in found.get("collectives", ()):
        group = one["group_size"] or "all"
        yield (
            f"  {one['kind'] + f' of {group}':<22} {one['count']:.0f} times, "
            f"{size(one['bytes'])}"
        )
    if "roofline" in found:
        limits = found["roofline"]
        yield (
            f"roofline: {seconds(limits['step_seconds'])} a step at least, bound by "
            f"{limits['bound_by']} (compute {seconds(limits['compute_seconds'])}, "
            f"memory {seconds(limits['memory_seconds'])}, "
            f"network {seconds(limits['network_seconds'])}"
            f"{_between_slices(found)}; {found['source']})"
        )


def _between_slices(found: Mapping[str, Any]) -> str:
    """Returns the time of what leaves a slice, or that nobody can say; "" for one."""
    if found["mesh"].get("slice", 1) == 1:
        return ""
    time = found["roofline"].get("slices_seconds", 0.0)
    if time:
        return f", between slices {seconds(time)}"
    return ", between slices not known: no bandwidth is published"


def report(found: Mapping[str, Any]) -> str:
    """Returns the whole report as text, the verdict last."""
    mesh = " x ".join(f"{name}={n}" for name, n in found["mesh"].items() if n > 1)
    lines = [
        f"{found['job']} on {found['target']}: {found['num_devices']} devices, mesh "
        f"{mesh or 'of one'}; batch {found['batch_size']} in "
        f"{found['num_microbatches']} parts, {found['rows_per_device']} rows a device; "
        f"prompts of {found['prompt_length']}, "
        f"responses of {found['response_length']} tokens",
        *_memory(found),
    ]
    if "flops" in found:
        lines += _work(found)
    if "compile" in found:
        took = found["compile"]
        lines.append(
            f"traced in {seconds(took['trace_seconds'])}, compiled in "
            f"{seconds(took['compile_seconds'])}"
        )
    if found["planned"]:
        lines.append(PLAN_ERROR)
    if "largest_batch" in found:
        lines.append(_largest(found))
    return "\n".join([*lines, verdict(found)])


def _largest(found: Mapping[str, Any]) -> str:
    largest = found["largest_batch"]
    if not largest:
        return "no batch fits, not even of one row a device and microbatch"
    rows = largest * found["rows_per_device"] // found["batch_size"]
    return f"the largest batch that fits is {largest}, {rows} rows a device"
