# SPDX-License-Identifier: Apache-2.0
"""Test-wide settings; the environment is set before anything imports jax."""

import os
import pathlib
import signal

# Without it XLA's CPU client deadlocks on fake devices when there are two cores.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# What is compiled once serves all tests, the processes they start, and the next run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# A shell that starts the tests in the background has Ctrl-C ignored; they send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Drops a file's compiled programs after it; together they fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def compiled_quickly():
    """For many small programs that run a moment: what is compiled is not tuned."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def float64():
    """Runs one test in float64, for mathematics that is exact."""
    with jax.enable_x64(True):
        yield
