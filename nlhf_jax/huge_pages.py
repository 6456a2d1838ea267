# SPDX-License-Identifier: Apache-2.0
"""Memory in pages of 2 MiB: a step on a CPU asks the system for all of its at once.

XLA gives a step's temporaries back at its end, so that with pages of 4 KiB every step
begins with one fault for each of them: of a small training step on two cores, a sixth
of the processor's time. C's library asks for huge pages if it is told so before the
program starts, which is why the program starts itself again.

Standard library only, since nothing else may have been imported by then.
"""

import os
import pathlib
import sys
from collections.abc import Mapping

VARIABLE = "NLHF_HUGE_PAGES"
MARK = "NLHF_HUGE_PAGES_ASKED"  # of a second start, and of all that it starts
TUNABLES, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
FIRST_GLIBC = (2, 35)  # that knows the tunable
ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment(
    before: Mapping[str, str], library: str, enabled: str
) -> dict[str, str] | None:
    """Returns the environment under which memory comes in huge pages.

    Args:
      before: the environment as it is.
      library: name and version of C's library, such as "glibc 2.36"; "" if unknown.
      enabled: what the kernel says of huge pages, such as "always [madvise] never".

    Returns:
      None where nothing is to be changed: they were asked for or refused already (0 in
      NLHF_HUGE_PAGES, or a value of the tunable), this is a second start or was
      started by one (else it would go on for ever where something takes the tunable
      away), the library does not know how, or the kernel gives them to all or to
      nobody.
    """
    name, _, version = library.partition(" ")
    if before.get(VARIABLE) == "0" or TUNABLE in before.get(TUNABLES, ""):
        return None
    if MARK in before:
        return None
    if name != "glibc" or _numbers(version) < FIRST_GLIBC:
        return None
    if "[madvise]" not in enabled:
        return None
    said = [before[TUNABLES]] if before.get(TUNABLES) else []
    return dict(before) | {TUNABLES: ":".join([*said, f"{TUNABLE}=1"]), MARK: "1"}


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    return tuple(int(part) for part in parts) if all(map(str.isdigit, parts)) else ()


def here() -> dict[str, str] | None:
    """Returns what `environment` does for this process; None if it cannot be told."""
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
        return environment(os.environ, library, ENABLED.read_text())
    except (AttributeError, OSError, ValueError):
        return None


def start_again() -> None:
    """Starts this very command again with huge pages, where that changes anything.

    The process keeps its number, its arguments and its open files. What cannot be read
    or started leaves it as it is.
    """
    after = here()
    if after is None:
        return
    try:
        os.execve(sys.executable, sys.orig_argv, after)
    except (AttributeError, OSError, ValueError):
        return
