# SPDX-License-Identifier: Apache-2.0
"""Who is there, before JAX's own runtime starts, which aborts where one is missing.

Process 0 listens on the coordinator's port; the others say who they are. When all are
there and agree, everyone is told so and the port is let go for the runtime; the lines
over which they came stay, for `peers.Watch`. Else everyone is told the same sentence.
"""

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from nlhf_jax.checks import UserError
from nlhf_jax.discovery import Processes

_WORD = "nlhf roll call"
_MEMBER = {"word", "process_id", "num_processes", "host", "facts"}
_PAUSE = 0.1  # seconds between two attempts to reach process 0
_READ = 1.0  # seconds for one line of somebody who has connected


@dataclasses.dataclass(frozen=True)
class Roll:
    """Who is there.

    Attributes:
      hosts: the host name of each process, by number.
      lines: open connections by number: in process 0 one to each other process, in the
        others one to process 0.
    """

    hosts: dict[int, str]
    lines: dict[int, socket.socket]


def call(processes: Processes, facts: Mapping[str, str], seconds: float | int) -> Roll:
    """Waits for all processes and returns who and where they are.

    Args:
      processes: all of them, and which one this is.
      facts: what must be the same in all, by name.
      seconds: how long to wait for the last one.

    Raises:
      UserError: the port is taken, a process is missing after `seconds`, two have the
        same number, or what they were told differs.
    """
    deadline = time.monotonic() + seconds
    own = {
        "word": _WORD,
        "process_id": processes.process_id,
        "num_processes": processes.num_processes,
        "host": socket.gethostname(),
        "facts": dict(facts),
    }
    take_part = _gather if processes.process_id == 0 else _report
    return take_part(processes, own, deadline, seconds)


def is_local(host: str) -> bool:
    """Whether a host name means this machine only."""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _listen(processes: Processes) -> socket.socket:
    host, port = processes.address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host if is_local(host) else "", port))
        server.listen(processes.num_processes)
    except OSError as error:
        server.close()
        raise UserError(
            f"process 0 on {socket.gethostname()} cannot listen on "
            f"{processes.coordinator}: {error.strerror}; is the port taken by another "
            "program or an earlier run?"
        ) from error
    return server


def _gather(processes, own, deadline, seconds) -> Roll:
    """Process 0's part."""
    with contextlib.ExitStack() as stack:
        members: dict[int, dict[str, Any]] = {0: own}
        lines: dict[int, socket.socket] = {}
        callers: list[socket.socket] = []
        with _listen(processes) as server:
            try:
                while len(members) < processes.num_processes:
                    line, said = _next_member(server, deadline)
                    if line is None:
                        raise UserError(_who_is_missing(processes, members, seconds))
                    callers.append(stack.enter_context(line))
                    _check_member(processes, members, said)
                    number = said["process_id"]
                    members[number], lines[number] = said, line
            except UserError as error:
                _tell(callers, {"error": str(error)})
                _let_hang_up(callers)
                raise
        hosts = {str(number): members[number]["host"] for number in sorted(members)}
        _tell(callers, {"hosts": hosts})
        stack.pop_all()  # the lines stay open
    return Roll({int(number): host for number, host in hosts.items()}, lines)


def _next_member(server, deadline) -> tuple[socket.socket | None, dict]:
    """Returns the next connection that speaks our language, None after the deadline."""
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            line, _ = server.accept()
        except TimeoutError:
            break
        said = _read(line, min(_READ, left))
        if said.get("word") == _WORD and said.keys() >= _MEMBER:
            return line, said
        line.close()  # a stranger, or one that gave up
    return None, {}


def _who_is_missing(processes, members, seconds) -> str:
    missing = [n for n in range(processes.num_processes) if n not in members]
    here = ", ".join(f"{n} on {members[n]['host']}" for n in sorted(members))
    numbers = ", ".join(map(str, missing))
    return (
        f"process {numbers} of {processes.num_processes} did not come to "
        f"{processes.coordinator} within {seconds:g} s; there are {here}"
    )


def _check_member(processes, members, said) -> None:
    number, host = said["process_id"], said["host"]
    who = f"process {number} on {host}"
    if said["num_processes"] != processes.num_processes:
        raise UserError(
            f"{who} was told of {said['num_processes']} processes, process 0 on "
            f"{members[0]['host']} of {processes.num_processes} (coordinator "
            f"{processes.coordinator}); num_processes must be the same everywhere"
        )
    if number in members:
        raise UserError(
            f"two processes came to {processes.coordinator} as number {number}, from "
            f"{members[number]['host']} and {host}; each process_id must be given once"
        )
    for name, value in members[0]["facts"].items():
        if said["facts"].get(name) != value:
            raise UserError(
                f"{who} has another {name} than process 0 at {processes.coordinator}: "
                f"{said['facts'].get(name)!r}, not {value!r}"
            )


def _tell(lines: list[socket.socket], answer: dict) -> None:
    for line in lines:
        with contextlib.suppress(OSError):
            line.sendall(json.dumps(answer).encode() + b"\n")


def _let_hang_up(lines: list[socket.socket]) -> None:
    """Waits until the others have closed their ends, so that the port is free."""
    for line in lines:
        with contextlib.suppress(OSError):
            line.settimeout(_READ)
            line.recv(1)


def _report(processes, own, deadline, seconds) -> Roll:
    """The part of every other process."""
    for line in _attempts(processes, deadline):
        answer = _introduce(line, own, deadline)
        if "hosts" in answer:
            hosts = {int(n): host for n, host in answer["hosts"].items()}
            return Roll(hosts, {0: line})
        line.close()
        if "error" in answer:
            raise UserError(answer["error"])
        time.sleep(_PAUSE)
    raise UserError(
        f"process {processes.process_id} on {own['host']} found no process 0 at "
        f"{processes.coordinator} within {seconds:g} s; is it running, and is the port "
        "reachable and not another program's?"
    )


def _introduce(line: socket.socket, own: dict, deadline: float) -> dict[str, Any]:
    try:
        line.sendall(json.dumps(own).encode() + b"\n")
    except OSError:
        return {}
    return _read(line, max(deadline - time.monotonic(), 0) + _READ)


def _attempts(processes, deadline) -> Iterator[socket.socket]:
    while (left := deadline - time.monotonic()) > 0:
        try:
            yield socket.create_connection(processes.address, timeout=left)
        except OSError:
            # Process 0 may not listen yet, and its host may not be known yet.
            time.sleep(_PAUSE)


def _read(line: socket.socket, seconds: float | int) -> dict[str, Any]:
    """Returns one line of JSON; empty where there is none in time."""
    try:
        line.settimeout(seconds)
        with line.makefile("r", encoding="utf-8") as file:
            said = json.loads(file.readline(1 << 20))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
