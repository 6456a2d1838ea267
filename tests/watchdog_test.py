# SPDX-License-Identifier: Apache-2.0
"""What stands still is named and ended, with and without Python's own lock."""

import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from nlhf_jax import watchdog
from nlhf_jax.checks import UserError
from nlhf_jax.settings import LoopSettings
from nlhf_jax.watchdog import Watchdog
from tests import process_toys

SECONDS = 20


class Heard:
    """Stands for the peers and for the end of the process."""

    def __init__(self):
        self.told, self.ended = queue.Queue(), queue.Queue()

    def dog(self, seconds):
        """Returns a watchdog that ends nothing."""

        def end(sentence, *, with_stacks):
            self.ended.put((sentence, with_stacks))

        return Watchdog(seconds, "process 1 on b", self.told.put, end)


@pytest.fixture
def heard():
    return Heard()


def test_what_takes_too_long_is_named_to_the_peers_and_ends_the_process(heard):
    with heard.dog(0.2) as dog:
        dog.now("batch")
        dog.now("batch", "making the batch of step 7")
        sentence, with_stacks = heard.ended.get(timeout=SECONDS)
    assert heard.told.get_nowait() == sentence
    assert with_stacks
    assert sentence == (
        "process 1 on b hangs: making the batch of step 7 has taken 0.2 s, the limit "
        "(NLHF_HANG_SECONDS); start all processes again"
    )


def test_the_first_of_a_kind_may_take_four_times_as_long(heard, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = heard.dog(10)
    for kind, expected in (("a", 140), ("b", 140), ("a", 110), ("b", 110)):
        dog.now(kind)
        assert dog._deadline == expected
    dog.pause()
    assert dog._deadline == float("inf")


def test_what_goes_on_is_left_alone(heard):
    with heard.dog(0.2) as dog:
        dog.now("step")
        for step in range(20):
            dog.now("step", str(step))
            threading.Event().wait(0.02)
        dog.pause()
        threading.Event().wait(0.5)
    assert heard.ended.empty()
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_who_waits_for_another_lets_that_one_speak_first(heard, monkeypatch):
    monkeypatch.setattr(watchdog, "_WAITING", (__name__,))
    release = threading.Event()
    with heard.dog(0.2) as dog:
        dog.now("step")
        dog.now("step")
        # In this module itself, and so "waiting", for longer than the limit.
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            pass
        assert heard.ended.empty()
        # In another module: what hangs here is nobody else.
        release.wait(0.5)
        assert heard.ended.get(timeout=SECONDS)


def test_who_waits_speaks_when_nobody_else_does(heard, monkeypatch):
    monkeypatch.setattr(watchdog, "_WAITING", ("threading",))
    with heard.dog(0.2) as dog:
        dog.now("step")
        dog.now("step")
        threading.Event().wait(0.2 + watchdog.PATIENCE + 1.0)
    assert not heard.ended.empty()


def test_zero_watches_nothing(heard):
    with heard.dog(0) as dog:
        dog.now("step")
        dog.now("step")
        assert not dog._thread.is_alive()
    assert heard.ended.empty()


def test_it_ends_with_what_it_watches_also_by_an_error(heard):
    with pytest.raises(KeyError), heard.dog(0.2) as dog:
        dog.now("step")
        raise KeyError
    assert not dog._thread.is_alive()


def test_the_variable_counts_more_than_the_setting():
    assert watchdog.limit(30.0, {}) == 30.0
    assert watchdog.limit(30.0, {"NLHF_HANG_SECONDS": "2.5"}) == 2.5
    assert watchdog.limit(30.0, {"NLHF_HANG_SECONDS": "0"}) == 0.0


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_variable_that_is_no_number(text):
    with pytest.raises(UserError, match="NLHF_HANG_SECONDS must be"):
        watchdog.limit(30.0, {"NLHF_HANG_SECONDS": text})


def test_the_setting_checks_itself():
    assert LoopSettings(1, 1).hang_seconds > 0
    assert LoopSettings(1, 1, hang_seconds=0.0).hang_seconds == 0
    with pytest.raises(UserError, match="hang_seconds must be in"):
        LoopSettings(1, 1, hang_seconds=-1.0)


HANG = """
import ctypes, sys, time
from nlhf_jax import watchdog
watchdog.own_process()
with watchdog.Watchdog(0.5) as dog:
    dog.now("step")
    dog.now("step", "step 3")
    {how}
"""


def hang(how):
    """Returns how a process ends that stands still."""
    return subprocess.run(
        [sys.executable, "-c", HANG.format(how=how)],
        cwd=process_toys.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_process_that_sleeps_shows_its_stacks_and_asks_to_start_again():
    done = hang("time.sleep(60)")
    assert done.returncode == 42
    assert "nlhf: this process hangs: step 3 has taken 0.5 s" in done.stderr
    assert 'File "<string>", line 8 in <module>' in done.stderr


@pytest.mark.parametrize(
    "first",
    [pytest.param("", marks=pytest.mark.battery), "time.sleep(0.4); "],
)
def test_a_process_that_keeps_pythons_lock_is_ended_without_it(first):
    # PyDLL keeps the lock while the C library sleeps: no thread of Python's runs.
    done = hang(f"{first}ctypes.PyDLL(None).sleep(60)")
    assert done.returncode == -14
    assert "Timeout (" in done.stderr
    assert 'File "<string>", line 8 in <module>' in done.stderr


@pytest.mark.battery
def test_timers_are_off_when_it_is_over():
    script = "pass\ntime.sleep(3.5)\nprint('alive')"
    done = hang(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alive\n"
    assert done.stderr == ""


def test_an_alarm_that_is_somebody_elses_stays_theirs():
    before = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        watchdog.own_process()
        assert not watchdog._owns_process
        assert callable(signal.getsignal(signal.SIGALRM))
    finally:
        signal.signal(signal.SIGALRM, before)
