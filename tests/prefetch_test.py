# SPDX-License-Identifier: Apache-2.0
"""Batches made one step ahead: the same, in order, and errors where they belong."""

import subprocess
import sys
import threading

import pytest

from nlhf_jax import daemon_threads, prefetch


class Source:
    """Batches that note in which thread and in which order they were made."""

    def __init__(self, fails_at=None):
        self.made, self.threads = [], []
        self.fails_at = fails_at

    def __call__(self, step):
        self.made.append(step)
        self.threads.append(threading.current_thread().name)
        if step == self.fails_at:
            raise KeyError(f"no batch {step}")
        return 10 * step


def test_the_batches_are_those_of_the_function():
    source = Source()
    with prefetch.ahead(source, 5) as batches:
        assert [batches(step) for step in range(5)] == [0, 10, 20, 30, 40]
    assert source.made == [0, 1, 2, 3, 4]
    assert set(source.threads) == {"batch"}


def test_a_run_that_goes_on_begins_at_its_step():
    source = Source()
    with prefetch.ahead(source, 9) as batches:
        assert [batches(step) for step in (7, 8)] == [70, 80]
    assert source.made == [7, 8]


def test_any_step_may_be_asked_for():
    source = Source()
    with prefetch.ahead(source, 9) as batches:
        assert [batches(step) for step in (3, 1, 2, 2)] == [30, 10, 20, 20]


def test_the_next_one_is_made_while_this_step_is_under_way():
    begun = threading.Event()

    def source(step):
        if step == 1:
            begun.set()
        return step

    with prefetch.ahead(source, 3) as batches:
        batches(0)
        # Nobody has asked for batch 1 yet.
        assert begun.wait(timeout=60)


def test_one_and_no_more_is_made_ahead():
    source = Source()
    with prefetch.ahead(source, 9) as batches:
        batches(0)
    assert source.made == [0, 1]


def test_nothing_is_made_after_the_end():
    source = Source()
    with prefetch.ahead(source, 1) as batches:
        batches(0)
    assert source.made == [0]


def test_an_error_comes_where_its_batch_is_asked_for():
    source = Source(fails_at=2)
    with pytest.raises(KeyError, match="no batch 2"), prefetch.ahead(source, 5) as ask:
        assert [ask(0), ask(1)] == [0, 10]
        ask(2)
    assert source.made == [0, 1, 2]


def test_no_thread_is_left_behind():
    with prefetch.ahead(Source(), 5) as batches:
        batches(0)
    assert "batch" not in {thread.name for thread in threading.enumerate()}


def test_leaving_waits_no_longer_than_its_patience_for_a_batch(monkeypatch):
    monkeypatch.setattr(prefetch, "PATIENCE", 0.01)
    held, release = threading.Event(), threading.Event()

    def source(step):
        if step == 1:
            held.set()
            release.wait(timeout=60)
        return step

    with prefetch.ahead(source, 5) as ask:
        ask(0)
        assert held.wait(timeout=60)
    # Without a limit it would be here after a minute, and the batch be made.
    (left,) = [one for one in threading.enumerate() if one.name == "batch"]
    assert left.daemon and daemon_threads.are_left()
    release.set()
    left.join()
    assert not daemon_threads.are_left()


@pytest.mark.parametrize("code", [0, 2, 42, 70, 143])
def test_a_held_thread_changes_no_exit_code(code):
    assert ended_with(f"daemon_threads.ended(lambda: {code})") == (code, "said\n", "")


def test_a_traceback_is_shown_and_is_code_1():
    code, out, err = ended_with("daemon_threads.ended(lambda: 1 // 0)")
    assert (code, out) == (1, "said\n")
    assert err.endswith("ZeroDivisionError: integer division or modulo by zero\n")


def ended_with(words):
    """Runs a process that holds a thread, and would abort where Python's end ran."""
    text = (
        "import atexit, os, sys, threading\n"
        "from nlhf_jax import daemon_threads\n"
        "atexit.register(os.abort)\n"
        "daemon_threads.start(threading.Event().wait, 'held')\n"
        "print('said')\n"
        f"sys.exit({words})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_without_a_thread_a_process_ends_as_ever():
    assert daemon_threads.ended(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        daemon_threads.ended(lambda: 1 // 0)


def test_after_an_error_nobody_waits_for_a_batch():
    held, release = threading.Event(), threading.Event()

    def source(step):
        if step == 1:
            held.set()
            release.wait(timeout=60)
        return step

    with pytest.raises(ValueError, match="elsewhere"), prefetch.ahead(source, 5) as ask:
        ask(0)
        held.wait(timeout=60)
        raise ValueError("elsewhere")
    release.set()
