# SPDX-License-Identifier: Apache-2.0
"""Threads that cannot hold a process that has ended, nor end it with another code."""

import contextlib
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable

_started: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def start(work: Callable[[], None], name: str) -> threading.Thread:
    """Runs `work` in a daemon thread that `ended` knows of; returns the thread."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    _started.add(thread)
    thread.start()
    return thread


def are_left() -> bool:
    """Whether one of these threads is still at work."""
    return any(thread.is_alive() for thread in _started)


def ended(run: Callable[[], int]) -> int:
    """Returns the exit code of `run`, or ends the process with it at once.

    At once where a thread is still at work: one that wakes in C++ while Python is being
    taken down aborts the process, with code 134 in place of the one that says why.

    Args:
      run: all that the process does; a traceback is code 1, as Python has it.
    """
    try:
        code = run()
    except Exception:
        if not are_left():
            raise
        traceback.print_exc()
        code = 1
    if are_left():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code
