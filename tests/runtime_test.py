# SPDX-License-Identifier: Apache-2.0
"""What is done to JAX's runtime: aborts that wait a moment, signals that stay ours."""

import signal
import subprocess
import sys
import time

import pytest

from nlhf_jax import runtime
from tests import process_toys

ABORT = """
import ctypes, os, sys, threading, time
from nlhf_jax import runtime
runtime._abort_slowly()
# CDLL lets go of Python's lock, as a thread of the runtime that never had it.
threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
time.sleep({seconds})
os._exit(42)
"""


def abort(seconds, *flags):
    """Returns how a process ends that aborts in one thread and goes on in another."""
    return subprocess.run(
        [sys.executable, *flags, "-c", ABORT.format(seconds=seconds)],
        cwd=process_toys.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("flags", [(), ("-X", "faulthandler")])
def test_who_aborts_leaves_the_watch_time_to_say_why(flags):
    done = abort(1, *flags)
    assert done.returncode == 42, done.stderr
    assert ("Fatal Python error: Aborted" in done.stderr) is bool(flags)


@pytest.mark.battery
def test_an_abort_that_nobody_explains_is_one_still():
    start = time.monotonic()
    assert abort(50).returncode == -signal.SIGABRT
    assert time.monotonic() - start < 40


def test_the_handler_of_sigterm_stays_who_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with runtime._signals_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_the_service_nobody_is_preempted():
    assert not runtime.reached_preemption(3)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError"), ("a\nb", "a")],
)
def test_the_first_line_of_an_error(error, line):
    assert runtime.first_line(error) == line
