# SPDX-License-Identifier: Apache-2.0
"""A process that stands still is noticed: it shows its stacks and ends with 42.

Two lines of defence. A thread looks whether what the process does now has taken longer
than its limit; it prints what that was and every thread's stack, tells the peers, and
ends the process. Where no thread of Python can run any more, timers of the C library
that this thread keeps pushing ahead print the stacks and end the process by SIGALRM
(142 to a shell), which launchers take as a reason to start again too.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

from nlhf_jax import peers
from nlhf_jax.checks import UserError, check_range

VARIABLE = "NLHF_HANG_SECONDS"
# What is done for the first time is compiled, or reads what nobody has read.
FIRST_TIME = 4
LONGEST_TICK = 1.0
# Seconds after the limit: who waits for another lets that one speak first; then what
# needs no thread of Python's.
PATIENCE = 1.0
_STACKS_AFTER, _ALARM_AFTER = 1.4, 1.8
# Who stands in one of these waits for a process that hangs, more likely than not.
_WAITING = ("jax", "jaxlib", "orbax", "nlhf_jax.distributed")

_owns_process = False


def own_process() -> None:
    """Lets watchdogs use SIGALRM and the one timer of `faulthandler`.

    For a program that is this process and nothing else; called in the main thread.
    Where somebody handles SIGALRM already it is theirs.
    """
    global _owns_process
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, signal.SIG_IGN):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        _owns_process = True


def limit(
    seconds: float | int, environment: Mapping[str, str] | None = None
) -> float | int:
    """Returns how long something may take, in seconds; 0 for ever.

    Args:
      seconds: what the settings say; NLHF_HANG_SECONDS, where it is set, counts more.
      environment: this process's own if None.

    Raises:
      UserError: the variable is not a number of at least 0.
    """
    text = (os.environ if environment is None else environment).get(VARIABLE, "")
    if not text:
        return seconds
    try:
        given = float(text)
    except ValueError:
        raise UserError(f"{VARIABLE} must be a number, got {text!r}") from None
    return check_range(VARIABLE, given, 0.0, high_open=True)


class Watchdog:
    """Ends the process where one thing takes too long; a context manager.

    Between `now` and the next `now`, or `pause`, no more than the limit may pass; four
    times as much for the first of a kind, which may compile.
    """

    def __init__(
        self,
        seconds: float | int,
        who: str = "this process",
        tell: Callable[[str], None] = lambda sentence: None,
        end: Callable[..., None] = peers.end,
    ):
        """Watches nothing yet.

        Args:
          seconds: the limit; 0 watches nothing at all.
          who: names this process in the sentence.
          tell: told the sentence, for the other processes.
          end: ends this process, given the sentence and `with_stacks=True`.
        """
        self._seconds, self._who, self._tell, self._end = seconds, who, tell, end
        self._tick = min(LONGEST_TICK, seconds / 4)
        self._deadline = float("inf")
        self._doing, self._limit = "", seconds
        self._seen: set[str] = set()
        self._over = threading.Event()
        self._watched = 0
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        """Watches this thread from now on."""
        self._watched = threading.get_ident()
        if self._seconds:
            _arm(self._seconds * FIRST_TIME)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()
            _disarm()

    def now(self, kind: str, doing: str = "") -> None:
        """Says what begins; what was said before has ended.

        Args:
          kind: a word of the few that come again, as "batch".
          doing: the whole of it, as "making the batch of step 3"; `kind` if empty.
        """
        self._limit = self._seconds * (1 if kind in self._seen else FIRST_TIME)
        self._seen.add(kind)
        self._doing = doing or kind
        self._deadline = time.monotonic() + self._limit

    def pause(self) -> None:
        """Says that what comes now may take as long as it likes."""
        self._deadline = float("inf")

    def _look(self) -> None:
        pause = self._tick
        while not self._over.wait(pause):
            left = self._deadline - time.monotonic()
            if left <= 0 and (-left >= PATIENCE or not self._waits()):
                self._bark(self._doing, self._limit)
                return
            if left > 0:
                _arm(min(left, self._seconds * FIRST_TIME))
            pause = min(self._tick, left if left > 0 else PATIENCE / 10)

    def _waits(self) -> bool:
        """Whether the watched thread seems to wait for another process."""
        frame = sys._current_frames().get(self._watched)
        name = frame.f_globals.get("__name__", "") if frame else ""
        return any(name == one or name.startswith(f"{one}.") for one in _WAITING)

    def _bark(self, doing: str, seconds: float) -> None:
        sentence = (
            f"{self._who} hangs: {doing} has taken {seconds:g} s, the limit "
            f"({VARIABLE}); start all processes again"
        )
        self._tell(sentence)
        self._end(sentence, with_stacks=True)


def _arm(seconds: float) -> None:
    """Sets the timers that need no thread, from now on."""
    if _may_alarm():
        # The first process of a container is not ended by a signal: by an exit, then.
        faulthandler.dump_traceback_later(
            seconds + _STACKS_AFTER, exit=os.getpid() == 1, file=2
        )
        signal.setitimer(signal.ITIMER_REAL, seconds + _ALARM_AFTER)


def _disarm() -> None:
    if _may_alarm():
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _may_alarm() -> bool:
    return _owns_process and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
