# SPDX-License-Identifier: Apache-2.0
"""Sides that do next to nothing, each wrong in a way of its own."""

import itertools
import mmap
import os
import sys
import time

from benchmarks.protocol import MARK, Absent, Work, main


def noisy(size):
    """Prints between its answers: on both streams, past Python's, and between lines.

    It also reserves a GiB that it never touches, which is no resident memory.
    """
    print("loading")
    os.write(answers(), b"a library's own words\n")
    reserved = mmap.mmap(-1, 2**30)

    def unit():
        print("half way", file=sys.stderr)
        os.write(1, b"progress 50 % and no end of the line")
        return {"half": 0.125 * bool(reserved)}

    return Work(unit, lambda: {"steps": size.num_layers})


def slow(size):
    """Takes a tenth of a second a unit."""
    return Work(lambda: time.sleep(0.1))


def dies(size):
    """Ends in its fifth unit: two warm it up."""
    turn = itertools.count(1)

    def unit():
        if next(turn) == 5:
            raise RuntimeError("out of paper")

    return Work(unit)


def killed(size):
    """Is gone without a word."""
    os._exit(9)


def absent(size):
    """Needs a package that there is not."""
    import no_such_package  # noqa: F401


def forgetful(size):
    """Needs a package that it did not declare."""
    import no_such_dependency  # noqa: F401


def unwilling(size):
    """Cannot run here."""
    raise Absent("it is on no index")


def babbles(size):
    """Says something else than what is due."""
    os.write(answers(), f"{MARK}hello {{}}\n".encode())
    return Work(dict)


def answers() -> int:
    """Returns the descriptor of this process's answers: the newest pipe."""
    return max(int(name) for name in os.listdir("/proc/self/fd") if is_pipe(name))


def is_pipe(name: str) -> bool:
    """Whether a descriptor is an output that is neither standard one."""
    path = f"/proc/self/fd/{name}"
    return int(name) > 2 and os.path.exists(path) and "pipe" in os.readlink(path)


def hangs(size):
    """Never gets ready."""
    time.sleep(60)


VARIANTS = {
    one.__name__: one
    for one in (
        noisy,
        slow,
        dies,
        killed,
        absent,
        forgetful,
        unwilling,
        babbles,
        hangs,
    )
}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, ["no-such-package", "numpy"]))
