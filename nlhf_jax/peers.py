# SPDX-License-Identifier: Apache-2.0
"""Who is still there: a line between each process and process 0, watched by a thread.

A process that dies, however it dies, breaks its line: the kernel closes it. Process 0
then tells everybody else, and all end at once with a sentence that names who is gone.
JAX's runtime itself notices only where somebody sits in a collective with the dead
process, and otherwise after its heartbeat's minutes.
"""

import contextlib
import faulthandler
import json
import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Mapping

RESTART_EXIT = 42
_SEND = 1.0  # seconds for a message, which is far smaller than the kernel's buffers
_LAST_WORDS = 1.0  # seconds for what is printed before the end
_FIRST_PROBE, _PROBES = 10, 5  # seconds of silence, and then probes of the host


def end(sentence: str, *, with_stacks: bool = False) -> None:
    """Ends this process at once with 42, which asks for the whole job to start again.

    No `except`, `finally` or `atexit` runs: they may wait for who is gone.

    Args:
      sentence: for standard error, without `nlhf: `.
      with_stacks: whether the stack of every thread follows it.
    """
    # Standard error may be a pipe that nobody reads, and its lock somebody else's.
    last_resort = threading.Timer(_LAST_WORDS, os._exit, (RESTART_EXIT,))
    last_resort.daemon = True
    last_resort.start()
    with contextlib.suppress(Exception):
        say(sentence)
        if with_stacks:
            faulthandler.dump_traceback(2, all_threads=True)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(RESTART_EXIT)


def say(sentence: str) -> None:
    """Writes a line to standard error past Python's buffers and their locks."""
    os.write(2, f"nlhf: {sentence}\n".encode(errors="replace"))


class Watch:
    """Watches the lines of this process until all say goodbye.

    Messages are lines of JSON, `{"kind": ..., "said": ...}`: "goodbye" (all end, a line
    that breaks means nothing any more), "failing" (why the sender is about to end by an
    error of its own), "lost" and "hangs" (a process is gone, or stands still: all end).
    """

    def __init__(
        self,
        number: int,
        hosts: Mapping[int, str],
        lines: Mapping[int, socket.socket],
        on_loss: Callable[..., None] = end,
    ):
        """Starts to watch.

        Args:
          number: of this process.
          hosts: host name of each process.
          lines: see `roll_call.Roll`; they are closed by `close`.
          on_loss: called once, with the sentence and whether stacks are wanted.
        """
        self._number, self._hosts, self._on_loss = number, dict(hosts), on_loss
        self._lines = dict(lines)
        self._parts = dict.fromkeys(self._lines, b"")
        self._reasons: dict[int, str] = {}
        self._at_peace: set[int] = set()
        self._lock = threading.Lock()
        self._is_over = self._is_failing = False
        for line in self._lines.values():
            _keep_alive(line)
        self._thread = threading.Thread(
            target=self._listen, name="watch of peers", daemon=True
        )
        self._thread.start()

    def name_of(self, number: int) -> str:
        """Returns `process 1 on HOST`."""
        return f"process {number} on {self._hosts.get(number, '?')}"

    def goodbye(self) -> None:
        """Says that this process and all others end, and that all is well."""
        self._tell("goodbye")

    def failing(self, reason: str) -> None:
        """Says why this process is about to end; the others end when it has ended.

        From then on the end of another is no reason for this one to end.
        """
        self._is_failing = True
        self._tell("failing", f"{self.name_of(self._number)} ended: {reason}")

    def hangs(self, sentence: str) -> None:
        """Says that this process stands still, so that all end now."""
        self._tell("hangs", sentence)

    def close(self) -> None:
        """Stops watching and hangs up."""
        self._is_over = True
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for line in self._lines.values():
            line.close()

    def _tell(self, kind: str, said: str = "", besides: int | None = None) -> None:
        message = json.dumps({"kind": kind, "said": said}).encode() + b"\n"
        with self._lock:
            for number, line in self._lines.items():
                if number != besides:
                    with contextlib.suppress(OSError):
                        line.sendall(message)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, number)
            while selector.get_map() and not self._is_over:
                for key, _ in selector.select():
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)

    def _hear(self, number: int) -> bool:
        """Takes what one line has to say; returns whether it is whole."""
        try:
            text = self._lines[number].recv(1 << 16)
        except TimeoutError:
            return True
        except OSError:
            text = b""
        if not text:
            self._broken(number)
            return False
        *messages, self._parts[number] = (self._parts[number] + text).split(b"\n")
        for message in messages:
            with contextlib.suppress(ValueError):
                self._take(number, json.loads(message))
        return True

    def _take(self, number: int, message: Mapping[str, str]) -> None:
        kind, said = message["kind"], message["said"]
        if kind == "goodbye":
            self._at_peace.add(number)
        elif kind == "failing":
            self._reasons[number] = said
        else:
            self._lost(kind, said, number)

    def _broken(self, number: int) -> None:
        if number not in self._at_peace and not self._is_over:
            gone = f"{self.name_of(number)} is gone"
            self._lost("lost", self._reasons.get(number, gone), number)

    def _lost(self, kind: str, sentence: str, number: int) -> None:
        self._tell(kind, sentence, besides=number)
        if not self._is_failing and not self._is_over:
            self._is_over = True
            self._on_loss(sentence, with_stacks=kind == "hangs")


def _keep_alive(line: socket.socket) -> None:
    """Has the kernels probe a silent line, so that a host without power is noticed."""
    line.settimeout(_SEND)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _FIRST_PROBE),
        ("TCP_KEEPINTVL", _FIRST_PROBE),
        ("TCP_KEEPCNT", _PROBES),
    ):
        # Not every system has all three, and a local pair of sockets has none.
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
