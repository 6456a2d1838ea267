# SPDX-License-Identifier: Apache-2.0
"""Figures as lines of text and as the table of README.md, and two runs side by side."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
REASONS, PAGE = HERE / "reasons.txt", HERE / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEAD = ("Row", "Median", "Least", "Largest", "Rounds", "Goal", "")
WORSE = 1.1  # a ratio that fell by more than a tenth is pointed out


def read_reasons(path: pathlib.Path = REASONS) -> dict[str, str]:
    """Returns row -> why its goal is not met, from lines `NAME = REASON`.

    Raises:
      ValueError: a line has no " = ".
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, reason = line.partition(" = ")
        if not equals:
            raise ValueError(
                f"{path.name}:{number} must be NAME = REASON, got {line!r}"
            )
        found[name.strip()] = reason.strip()
    return found


def cells(record: Mapping[str, Any], reasons: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the cells of one figure's line."""
    name, verdict = record["name"], record["verdict"]
    sign = ">=" if record["at_least"] else "<="
    goal = "-" if record["goal"] is None else f"{sign} {record['goal']:g}"
    if "values" not in record:
        note = reasons.get(name, record["missing"])
        return (name, "-", "-", "-", "0", goal, f"absent: {note}")
    middle = (f"{record[key]:.3g}" for key in ("median", "min", "max"))
    note = verdict
    if verdict == "missed":
        note = f"missed: {reasons.get(name, 'no reason is written down')}"
    return (name, *middle, str(len(record["values"])), goal, note)


def lines(
    records: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]
) -> list[str]:
    """Returns the table as Markdown, one line a figure."""
    found = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    return found + ["| " + " | ".join(cells(one, reasons)) + " |" for one in records]


def against(
    records: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns lines that compare medians with an earlier run's, figure by figure.

    Only figures of both runs, of the same size, are compared. Seconds are left to the
    reader: a machine changes, so it is ratios that should not have moved.
    """
    then = {(one["name"], one["size"]): one for one in earlier if "values" in one}
    found = []
    for now in records:
        old = then.get((now["name"], now["size"]))
        if old is None or "values" not in now:
            continue
        change = now["median"] / old["median"] if old["median"] else float("nan")
        better = change if now["at_least"] else 1 / change if change else float("inf")
        mark = "  WORSE" if better * WORSE < 1 else ""
        found.append(
            f"{now['name']}: {old['median']:.3g} -> {now['median']:.3g} "
            f"(x {change:.2f}){mark}"
        )
    return found


def described(results: Mapping[str, Any]) -> str:
    """Returns one sentence on when and where a run was made."""
    machine, peaks = results["machine"], results["peaks"]
    said = (
        f"{results['when'][:10]}, commit {results['commit']}, "
        f"size `{results['size']}`, "
        f"{machine['num_cores']} {machine['processor']} cores, load at start "
        f"{machine['load_at_start']:.1f}"
    )
    if peaks["flops_per_s"]:
        said += (
            f"; measured peaks {peaks['flops_per_s'] / 1e9:.0f} GFLOP/s and "
            f"{peaks['read_bytes_per_s'] / 1e9:.0f} GB/s"
        )
    return said + "."


def with_table(page: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page with the tables of some runs between its two marks.

    Raises:
      ValueError: the page lacks a mark.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page must hold {BEGIN} and {END}")
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    reasons, parts = read_reasons(), []
    for results in runs:
        table = "\n".join(lines(results["rows"], reasons))
        parts.append(f"{described(results)}\n\n{table}\n")
    return f"{before}{BEGIN}\n" + "\n".join(parts) + f"{END}{after}"
