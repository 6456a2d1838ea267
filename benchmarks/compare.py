# SPDX-License-Identifier: Apache-2.0
"""Our side and the peers', in turns: ratios of one round, goals, one table.

    python -m benchmarks.compare --size tiny --rounds 5 --only 'ours.*'
    python -m benchmarks.compare --size small --peers /path/of/environments
    python -m benchmarks.compare --page benchmarks/results/A.json     writes README.md

A peer that is not installed is reported as absent; one that ends is named with the last
line it wrote, and the rest goes on.
"""

import argparse
import datetime
import fnmatch
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import table
from benchmarks.figures import Measured
from benchmarks.rows import GROUPS, ROWS
from benchmarks.sides import ROOT, START_S, UNIT_S, Running, Side, in_turns
from benchmarks.sizes import SIZES
from nlhf_jax import huge_pages

RESULTS = ROOT / "benchmarks" / "results"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}


def cores() -> list[int]:
    """Returns the cores that this process may use; all of them where nobody says."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def keep_to(num_threads: int) -> None:
    """Keeps this process and the sides it starts to as many cores.

    XLA has a thread for each core that it may use.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[:num_threads])


def machine() -> dict[str, Any]:
    """Returns what the figures depend on, before anything was started."""
    return {
        "processor": platform.machine(),
        "num_cores": len(cores()),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
    }


def commit() -> str:
    """Returns the short name of the commit, with a + if files differ from it."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def variables(platform_name: str, num_threads: int) -> dict[str, str]:
    """Returns the environment variables that every side gets.

    Memory comes in huge pages to all of them, as our command line asks for.
    """
    threads, pages = str(num_threads), huge_pages.here() or os.environ
    tunables = {k: v for k, v in pages.items() if k == huge_pages.TUNABLES}
    return (
        tunables
        | OFFLINE
        | {
            "JAX_PLATFORMS": platform_name,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
    )


def chosen(groups: Sequence[str], only: Sequence[str], skip: Sequence[str]):
    """Returns group -> its sides whose name fits a pattern, in order."""

    def fits(side: Side) -> bool:
        is_skipped = any(fnmatch.fnmatch(side.name, one) for one in skip)
        return not is_skipped and any(fnmatch.fnmatch(side.name, one) for one in only)

    found = {name: [one for one in GROUPS[name] if fits(one)] for name in groups}
    return {name: sides for name, sides in found.items() if sides}


def run_group(
    sides: Sequence[Side], options: argparse.Namespace, logs: pathlib.Path
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns the rounds of some sides, and what each told besides.

    They are started one after the other, so that none is compiled beside another.
    """
    shared = variables(options.platform, options.threads)
    running = []
    try:
        for side in sides:
            command = side.command(options.size, options.peers)
            log = logs / f"{side.name}.log"
            one = Running(side, command, log, shared | dict(side.variables))
            running.append(one)
            one.start(options.start_limit)
            print(f"{side.name}: {one.state} {one.why}".rstrip(), flush=True)
        ready = [one for one in running if one.state == "ready"]
        rounds = in_turns(ready, options.rounds, limit_s=options.limit)
        for one in ready:
            if one.state == "crashed":
                print(f"{one.side.name}: crashed {one.why}", flush=True)
            one.end(options.limit)
    finally:
        for one in running:
            one.stop()
    return rounds, {one.side.name: one.record() for one in running}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the results of a whole run."""
    found = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "size": options.size,
        "machine": machine(),
    }
    keep_to(options.threads)  # sides inherit it
    rounds, told = {}, {}
    groups = chosen(options.groups, options.only, options.skip)
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or pathlib.Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        for name, sides in groups.items():
            rounds[name], more = run_group(sides, options, logs)
            told |= more
    measured = Measured(SIZES[options.size], rounds, told)
    figures = [
        measured.figure(row, options.size)
        for row in ROWS
        if all(name in told for name in row.sides)
    ]
    found["machine"]["device"] = (
        told.get("peaks.jax", {}).get("facts", {}).get("device")
    )
    peaks = {name: measured.peak(name) for name in ("flops_per_s", "read_bytes_per_s")}
    return found | {
        "peaks": peaks,
        "rows": [figure.record() for figure in figures],
        "sides": told,
        "rounds": rounds,
    }


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for verdicts")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of sides")
    parser.add_argument("--skip", nargs="+", default=[], help="patterns of sides")
    parser.add_argument("--peers", type=pathlib.Path, help="folder of environments")
    parser.add_argument("--platform", default="cpu", help="JAX_PLATFORMS of every side")
    parser.add_argument("--threads", type=int, default=2, help="cores for every side")
    parser.add_argument("--limit", type=float, default=UNIT_S, help="seconds a unit")
    parser.add_argument("--start-limit", type=float, default=START_S)
    parser.add_argument("--logs", type=pathlib.Path, help="folder; else none is kept")
    parser.add_argument("--output", type=pathlib.Path, help="JSON; else by its commit")
    parser.add_argument("--baseline", type=pathlib.Path, help="an earlier run's JSON")
    parser.add_argument("--page", type=pathlib.Path, nargs="+", help="write README.md")
    options = parser.parse_args(words)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.peers:
        if not options.peers.is_dir():
            parser.error(
                f"--peers must be a folder of environments, got {options.peers}"
            )
        options.peers = options.peers.absolute()
    for path in [*(options.page or []), *filter(None, [options.baseline])]:
        if not path.is_file():
            parser.error(f"there are no results in {path}")
    return options


def write(results: dict[str, Any], path: pathlib.Path | None) -> pathlib.Path:
    """Writes the results, by their date and commit if no path is given."""
    if path is None:
        name = f"{results['when'][:10]}-{results['commit']}-{results['size']}.json"
        path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints the table and writes the results; or writes the page."""
    options = parse(words)
    if options.page:
        runs = [json.loads(path.read_text()) for path in options.page]
        table.PAGE.write_text(table.with_table(table.PAGE.read_text(), runs))
        return 0
    results = measure(options)
    path = write(results, options.output)
    print(table.described(results))
    print("\n".join(table.lines(results["rows"], table.read_reasons())))
    if options.baseline:
        earlier = json.loads(options.baseline.read_text())
        print("\n".join(table.against(results["rows"], earlier["rows"])))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
