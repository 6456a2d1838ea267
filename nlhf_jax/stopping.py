# SPDX-License-Identifier: Apache-2.0
"""Being asked to stop: by a signal to one process, by JAX's own notice, all as one."""

import os
import signal
import socket
import threading

from nlhf_jax import distributed, peers

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AT_ONCE = 0.5  # seconds the main thread has to obey a second signal by itself


class Request:
    """Whether somebody asked this process to stop.

    The first SIGTERM or SIGINT is noted; a second one acts as it would without us, and
    ends the process also where it waits in a library and no handler of Python's runs.
    Outside the main thread signals cannot be caught, and the request never comes.

    Attributes:
      signal: the one that came, None before.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict = {}
        self._closed = threading.Event()

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "Request":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def listen(self) -> None:
        """Begins to note signals, until `close`."""
        is_main = threading.current_thread() is threading.main_thread()
        if self._previous or not is_main:
            return
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        # The C library writes every signal here, also those that Python makes one of.
        heard, self._spoken = socket.socketpair()
        self._spoken.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(
            self._spoken.fileno(), warn_on_full_buffer=False
        )
        self._counter = threading.Thread(
            target=self._count, args=(heard,), name="second signal", daemon=True
        )
        self._counter.start()
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def close(self) -> None:
        """Gives the signals back to who had them."""
        if not self._previous or self._closed.is_set():
            return
        self._closed.set()
        self._restore()
        signal.set_wakeup_fd(self._wakeup)
        self._spoken.close()
        self._counter.join()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        del frame
        self.signal = signal.Signals(number)
        self._restore()

    def _count(self, heard: socket.socket) -> None:
        """Ends the process after a second signal, if it does not end by itself."""
        with heard:
            came = 0
            while number := heard.recv(1):
                came += number[0] in SIGNALS
                if came >= 2 and not self._closed.wait(_AT_ONCE):
                    name = signal.Signals(number[0]).name
                    peers.say(f"{name} came twice: ended without a save")
                    os._exit(128 + number[0])


class Stop:
    """When all processes stop, after one of them was asked to.

    Processes run at most one step apart, since each waits for its step before the last
    and a step needs all of them. So who is asked after step s writes s + 2 into the
    store that all share, and nobody has gone past s + 2 without having looked.

    JAX's own notice of a preemption, where its service runs, is asked for at every step
    as well; it gives all processes the same step by itself.

    Attributes:
      was_asked: whether any process was asked to; the same in all after `settle`.
    """

    def __init__(self):
        """Starts a run; all processes start as many, in the same order."""
        self._at: int | None = None
        self.was_asked = False
        self._key = distributed.new_key("stop")

    def __call__(self, is_asked: bool, done: int) -> bool:
        """Whether to stop now.

        Args:
          is_asked: whether this process was asked to.
          done: steps done; every process calls it after each of them.

        Raises:
          PeerLost: process 0 is gone.
        """
        if distributed.num_processes() == 1:
            self.was_asked = is_asked
            return is_asked
        if distributed.is_preempted(done):
            self._at = done
        if self._at is None:
            said = distributed.first_word(self._key, str(done + 2) if is_asked else "")
            self._at = int(said) if said else None
        self.was_asked = self._at is not None
        return self.was_asked and done >= self._at

    def settle(self, is_asked: bool, done: int) -> bool:
        """Returns whether any process was asked, also in its last steps or after them.

        It is a barrier, to be called once all steps and saves are done.

        Args:
          is_asked: whether this process was asked to.
          done: steps done.

        Raises:
          PeerLost: as `distributed.exchange`.
        """
        is_asked = is_asked or self.was_asked or distributed.is_preempted(done + 1)
        said = distributed.exchange("end of the run", "stop" if is_asked else "")
        self.was_asked = any(said.values())
        return self.was_asked
