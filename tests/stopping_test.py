# SPDX-License-Identifier: Apache-2.0
"""Signals that are noted, counted and given back; runs that stop as one."""

import signal
import subprocess
import sys
import threading

import pytest

from nlhf_jax import distributed, stopping
from nlhf_jax.stopping import Request, Stop
from tests import process_toys


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_the_first_signal_is_noted_and_the_handlers_are_given_back(number):
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with Request() as request:
        assert signal.getsignal(number) in before, "it does not listen yet"
        request.listen()
        request.listen()
        assert not request
        signal.raise_signal(number)
        assert request
        assert request.signal == number
        # A second one acts as it would without us.
        assert [signal.getsignal(n) for n in stopping.SIGNALS] == before
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
    assert request, "what came counts after the end too"
    assert "second signal" not in {thread.name for thread in threading.enumerate()}


def test_other_threads_cannot_listen_and_need_not():
    found = []

    def listen():
        with Request() as request:
            request.listen()
            found.append(bool(request))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_second_ctrl_c_is_what_python_makes_of_it():
    with pytest.raises(KeyboardInterrupt), Request() as request:
        request.listen()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


TWICE = """
import ctypes, os, signal, subprocess, sys
from nlhf_jax import stopping
with stopping.Request() as request:
    request.listen()
    send = f"import os, time; time.sleep(0.2); {sends}"
    subprocess.Popen([sys.executable, "-SE", "-c", send])
    # In the library no handler of Python's runs: two signals are one for it.
    ctypes.CDLL(None).{wait}
    print("went on after", request.signal)
"""


def twice(sends, wait="poll(None, 0, 20000)"):
    """Returns how a process ends that gets signals while it waits in a library."""
    script = TWICE.replace("{wait}", wait).replace("{sends}", sends)
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=process_toys.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_second_signal_ends_a_process_that_waits_in_a_library(number):
    kill = f"os.kill({{os.getpid()}}, {number.value})"
    script = f"{kill}; time.sleep(0.2); {kill}"
    # A mutex that is held already: pthread waits on after a signal.
    lock = (
        "pthread_mutex_lock(m := ctypes.create_string_buffer(64)); "
        "ctypes.CDLL(None).pthread_mutex_lock(m)"
    )
    done = twice(script, lock)
    assert done.returncode == 128 + number, done.stderr
    assert f"nlhf: {number.name} came twice: ended without a save" in done.stderr


def test_one_signal_does_not():
    done = twice(f"os.kill({{os.getpid()}}, {signal.SIGTERM.value})")
    assert done.returncode == 0, done.stderr
    assert "went on after 15" in done.stdout or "SIGTERM" in done.stdout


# --------------------------------------------------------------------- all as one


def test_alone_a_run_stops_at_once():
    stop = Stop()
    asked = [False, False, True]
    assert [stop(one, done) for done, one in enumerate(asked, 1)] == asked
    assert stop.was_asked


def test_alone_who_is_asked_after_the_last_step_was_asked():
    stop = Stop()
    assert not stop(False, 1)
    assert not stop.settle(False, 1)
    assert stop.settle(True, 1)
    assert stop.was_asked


class Others:
    """Stands for the store and the other processes of `distributed`."""

    def __init__(self, monkeypatch):
        self.words, self.said, self.preempted_at = {}, {}, None
        given = {
            "num_processes": lambda: 3,
            "new_key": lambda name: f"{name}/{len(self.words)}",
            "first_word": self.first_word,
            "is_preempted": lambda step: step == self.preempted_at,
            "exchange": lambda name, text: self.said | {0: text},
        }
        for name, function in given.items():
            monkeypatch.setattr(distributed, name, function)

    def first_word(self, key, proposal=""):
        return self.words.setdefault(key, proposal) or self.words.pop(key)


@pytest.fixture
def others(monkeypatch):
    return Others(monkeypatch)


def test_all_stop_two_steps_after_the_first_who_was_asked(others):
    first, second = Stop(), Stop()
    assert first._key == second._key
    assert [first(True, 4), second(False, 4)] == [False, False]
    assert first.was_asked and second.was_asked
    for done, stops in ((5, False), (6, True)):
        assert first(False, done) is second(False, done) is stops
    late = Stop()
    late._key = first._key
    assert late(True, 5) is False
    assert late(False, 6) is True


def test_what_jax_hears_of_is_a_stop_at_the_step_it_says(others):
    stop = Stop()
    others.preempted_at = 5
    assert [stop(False, done) for done in (3, 4, 5)] == [False, False, True]
    assert stop.settle(False, 5)


def test_jax_may_say_it_earlier_than_a_signal_would(others):
    stop = Stop()
    assert not stop(True, 4)
    others.preempted_at = 5
    assert stop(False, 5)


@pytest.mark.parametrize("asked", [0, 1, "jax"])
def test_who_is_asked_in_the_last_steps_counts_for_all(others, asked):
    stop = Stop()
    assert not stop(False, 7)
    others.said = {1: "stop" if asked == 1 else "", 2: ""}
    others.preempted_at = 8 if asked == "jax" else None
    assert stop.settle(asked == 0, 7)
    assert stop.was_asked


def test_nobody_asked(others):
    stop = Stop()
    assert not stop(False, 7)
    others.said = {1: "", 2: ""}
    assert not stop.settle(False, 7)
    assert not stop.was_asked
