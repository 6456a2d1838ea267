# SPDX-License-Identifier: Apache-2.0
"""The roll call before the runtime starts: all there, or one sentence for everyone."""

import concurrent.futures
import json
import socket
import time

import pytest

from nlhf_jax import roll_call
from nlhf_jax.checks import UserError
from nlhf_jax.discovery import Processes

FACTS = {"command": "sft"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one(coordinator, num_processes, process_id, facts=FACTS, seconds=20.0):
    """Returns what one process is told: hosts by number, or the sentence."""
    processes = Processes(coordinator, num_processes, process_id, "a test")
    try:
        roll = roll_call.call(processes, facts, seconds)
    except UserError as error:
        return str(error)
    others = set(range(num_processes)) - {0}
    assert set(roll.lines) == (others if process_id == 0 else {0})
    for line in roll.lines.values():
        assert line.fileno() >= 0, "the lines stay open"
        line.close()
    return roll.hosts


def all_of(*calls):
    """Runs processes as threads, the last one first; returns what each is told."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(one, *call) for call in reversed(calls)]
        return [future.result(timeout=60) for future in reversed(futures)]


@pytest.fixture
def where():
    return f"127.0.0.1:{free_port()}"


def test_all_learn_the_hosts_of_all_and_the_port_is_free_again(where):
    host = socket.gethostname()
    for _ in range(2):  # at once again, on the same port
        told = all_of(*((where, 3, number) for number in range(3)))
        assert told == [{0: host, 1: host, 2: host}] * 3


def test_who_is_missing_is_named_to_those_who_came(where):
    start = time.monotonic()
    first, third = all_of((where, 4, 0, FACTS, 1.0), (where, 4, 2, FACTS, 20.0))
    assert time.monotonic() - start < 10
    host = socket.gethostname()
    assert first == third
    assert first == (
        f"process 1, 3 of 4 did not come to {where} within 1 s; there are 0 on {host}, "
        f"2 on {host}"
    )


def test_without_process_0_nobody_waits_for_ever(where):
    told = one(where, 2, 1, seconds=0.5)
    assert f"found no process 0 at {where} within 0.5 s" in told


def test_counts_that_differ(where):
    first, second = all_of((where, 2, 0), (where, 3, 1))
    assert first == second
    assert "process 1 on" in first
    assert "was told of 3 processes" in first
    assert f"of 2 (coordinator {where})" in first


def test_two_of_the_same_number(where):
    told = all_of((where, 3, 0), (where, 3, 1), (where, 3, 1))
    assert set(told) == {told[0]}
    assert f"two processes came to {where} as number 1" in told[0]


def test_two_that_run_different_commands(where):
    first, second = all_of((where, 2, 0), (where, 2, 1, {"command": "train"}))
    assert first == second
    assert f"another command than process 0 at {where}: 'train', not 'sft'" in first


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_port_that_is_taken(host):
    with socket.socket() as holder:
        holder.bind((host, 0))
        holder.listen()
        where = f"127.0.0.1:{holder.getsockname()[1]}"
        told = one(where, 2, 0)
    assert f"cannot listen on {where}: Address already in use" in told


def test_a_program_that_is_no_process_0_is_not_taken_for_one():
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        where = f"127.0.0.1:{stranger.getsockname()[1]}"
        told = one(where, 2, 1, seconds=0.5)
    assert "not another program's" in told


def test_strangers_that_knock_are_not_counted(where):
    host, port = Processes(where, 2, 0).address
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(one, where, 2, 0)
        half = {"word": roll_call._WORD, "process_id": 1}
        for said in ([1], {}, half):
            _knock(host, port, json.dumps(said).encode() + b"\n")
        _knock(host, port, b"GET / HTTP/1.0\r\n")
        second = pool.submit(one, where, 2, 1)
        assert first.result(timeout=60) == second.result(timeout=60)
        assert set(first.result()) == {0, 1}


def _knock(host: str, port: int, said: bytes) -> None:
    for _ in range(200):
        try:
            with socket.create_connection((host, port), timeout=5) as line:
                line.sendall(said)
                return
        except OSError:
            time.sleep(0.02)  # process 0 does not listen yet
    raise AssertionError(f"nobody listens on {port}")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("10.0.0.1", False)],
)
def test_which_names_mean_this_machine(host, expected):
    assert roll_call.is_local(host) is expected
