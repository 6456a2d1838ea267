# SPDX-License-Identifier: Apache-2.0
"""`python -m nlhf_jax JOB ...` is `nlhf JOB ...`."""

import sys

from nlhf_jax import daemon_threads, huge_pages


def start() -> int:
    """Runs the command line in a process of its own; returns the exit code."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        huge_pages.start_again()
    # Imported late: what is imported before a second start is imported twice.
    from nlhf_jax.cli import main

    return daemon_threads.ended(main)


if __name__ == "__main__":
    sys.exit(start())
