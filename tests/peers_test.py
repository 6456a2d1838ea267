# SPDX-License-Identifier: Apache-2.0
"""Who has died: three watches in one process, joined by lines that are cut."""

import queue
import socket
import subprocess
import sys
import threading

import pytest

from nlhf_jax import peers
from tests import process_toys

HOSTS = {0: "a", 1: "b", 2: "c"}
SECONDS = 10


class Gang:
    """Three watches; `heard[n]` gets what process n would end with."""

    def __init__(self):
        self.heard = {number: queue.Queue() for number in HOSTS}
        first, self.lines = {}, {}
        for number in (1, 2):
            first[number], self.lines[number] = socket.socketpair()
        self.watches = {0: self.watch(0, first)}
        for number, line in self.lines.items():
            self.watches[number] = self.watch(number, {0: line})

    def watch(self, number, lines):
        """Returns the watch of one process."""

        def on_loss(sentence, *, with_stacks):
            self.heard[number].put((sentence, with_stacks))

        return peers.Watch(number, HOSTS, lines, on_loss)

    def dies(self, number):
        """Breaks the lines of a process as the kernel does at its death."""
        watch = self.watches[number]
        watch._is_over = True
        for line in watch._lines.values():
            line.shutdown(socket.SHUT_RDWR)

    def hears(self, number):
        """Returns what a process hears, once."""
        return self.heard[number].get(timeout=SECONDS)

    def hears_nothing(self, *numbers):
        """Asserts that nobody has heard anything, after all watches have ended."""
        for watch in self.watches.values():
            watch.close()
        for number in numbers:
            assert self.heard[number].empty()


@pytest.fixture
def gang():
    together = Gang()
    yield together
    for watch in together.watches.values():
        watch.close()
    names = {thread.name for thread in threading.enumerate()}
    assert "watch of peers" not in names


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_who_dies_is_named_to_all_others(gang, dead):
    gang.dies(dead)
    for number in HOSTS:
        if number != dead:
            expected = f"process {dead} on {HOSTS[dead]} is gone"
            assert gang.hears(number) == (expected, False)
    gang.hears_nothing(dead)


@pytest.mark.parametrize("failing", [0, 2])
def test_who_fails_says_why_and_the_others_hear_it_when_it_has_ended(gang, failing):
    gang.watches[failing].failing("ValueError: shapes")
    others = [number for number in HOSTS if number != failing]
    assert all(gang.heard[number].empty() for number in others)
    gang.dies(failing)
    for number in others:
        said = f"process {failing} on {HOSTS[failing]} ended: ValueError: shapes"
        assert gang.hears(number) == (said, False)


def test_who_fails_is_not_ended_by_another(gang):
    gang.watches[0].failing("its own mistake")
    gang.dies(1)
    # The others are told all the same.
    assert gang.hears(2) == ("process 1 on b is gone", False)
    gang.hears_nothing(0)


@pytest.mark.parametrize("hanging", [0, 1])
def test_who_hangs_is_named_and_all_show_their_stacks(gang, hanging):
    gang.watches[hanging].hangs("process X hangs: a step")
    for number in HOSTS:
        if number != hanging:
            assert gang.hears(number) == ("process X hangs: a step", True)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_after_goodbye_a_broken_line_means_nothing(gang, order):
    for number in order:
        gang.watches[number].goodbye()
    for number in order:
        gang.watches[number].close()
    gang.hears_nothing(0, 1, 2)


def test_a_goodbye_of_one_is_none_of_another(gang):
    gang.watches[1].goodbye()
    gang.dies(1)
    gang.dies(2)
    assert gang.hears(0) == ("process 2 on c is gone", False)


def test_a_message_may_come_in_pieces_and_nonsense_is_passed_over(gang):
    line = gang.lines[1]
    for piece in (b'nonsense\n{"kind": "han', b'gs", "said": "by', b'te"}\n'):
        line.sendall(piece)
    assert gang.hears(0) == ("byte", True)
    assert gang.hears(2) == ("byte", True)


def test_a_loss_is_said_once(gang):
    gang.dies(1)
    gang.dies(2)
    gang.hears(0)
    gang.hears_nothing(0)


def test_lines_are_probed_by_the_kernel():
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()) as line:
        peers._keep_alive(line)
        assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            found = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert found == peers._FIRST_PROBE


END = """
import atexit, sys, threading, time
from nlhf_jax import peers
atexit.register(print, "atexit has run")
print("printed before", end="")
def hold():
    time.sleep(60)
threading.Thread(target=hold, name="a thread", daemon=True).start()
try:
    peers.end("process 3 on h is gone", with_stacks=True)
finally:
    print("finally has run")
"""


def test_the_end_is_at_once_with_the_sentence_and_every_stack():
    done = subprocess.run(
        [sys.executable, "-c", END],
        cwd=process_toys.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == peers.RESTART_EXIT == 42
    assert done.stdout == "printed before"
    assert done.stderr.startswith("nlhf: process 3 on h is gone\n")
    assert "in hold" in done.stderr and "in end" in done.stderr


def test_the_end_comes_also_where_nobody_reads():
    script = (
        "import os, sys\n"
        "from nlhf_jax import peers\n"
        "reader, writer = os.pipe()\n"
        "os.dup2(writer, 2)\n"
        "peers.end('x' * 1_000_000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=process_toys.ROOT, timeout=60
    )
    assert done.returncode == 42
