# SPDX-License-Identifier: Apache-2.0
"""How long our Nash-MD step compiles, in a fresh process: cold, and from the cache.

python -m benchmarks.ours_compile step --size small      # speaks the protocol
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.protocol import Work, timed
from benchmarks.protocol import main as serve_main
from benchmarks.sizes import SIZES, Size

INSIDE = "--inside"


def name_of(size: Size) -> str:
    """Returns the name of one of `SIZES`."""
    return next(name for name, one in SIZES.items() if one == size)


def compile_once(size: Size, cache: str) -> dict[str, float]:
    """Returns seconds of tracing and of compiling, with a persistent cache."""
    import jax

    from benchmarks import ours
    from nlhf_jax import compilation_cache

    # As `nlhf` sets it up.
    jax.config.update("jax_compilation_cache_dir", cache)
    least = compilation_cache.LEAST_SECONDS
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    run = ours.PolicyRun(size)
    lower_s, lowered = timed(lambda: run.compiled.lower(*run.arguments()))
    compile_s, compiled = timed(lowered.compile)
    return {"trace": lower_s, "compile": compile_s} | ours.counts(compiled)


def ask(size: Size, cache: str) -> dict[str, float]:
    """Returns the same of a fresh process."""
    words = [sys.executable, "-m", "benchmarks.ours_compile", INSIDE, cache]
    words += ["--size", name_of(size)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def step(size: Size) -> Work:
    """One unit compiles twice: with an empty cache, and with what that one left."""
    found: dict[str, float] = {}

    def unit():
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = ask(size, cache), ask(size, cache)
        names = ("flops", "temporary_mib", "argument_mib")
        found.update({name: cold[name] for name in names})
        return {
            "cold": cold["trace"] + cold["compile"],
            "warm": warm["trace"] + warm["compile"],
        }

    return Work(unit, lambda: dict(found), num_warm_ups=0)  # every process is fresh


VARIANTS = {"step": step}


def main(words: Sequence[str] | None = None) -> int:
    """Serves the side, or does its inside: one compilation, printed as JSON."""
    words = list(sys.argv[1:] if words is None else words)
    if INSIDE not in words:
        return serve_main(VARIANTS, ("jax", "jaxlib"), words)
    parser = argparse.ArgumentParser()
    parser.add_argument(INSIDE)
    parser.add_argument("--size", choices=sorted(SIZES))
    options = parser.parse_args(words)
    print(json.dumps(compile_once(SIZES[options.size], options.inside)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
