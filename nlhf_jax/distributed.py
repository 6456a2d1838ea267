# SPDX-License-Identifier: Apache-2.0
"""Several processes as one job: start, barriers that name the late, one end.

JAX's own runtime does the work; every process runs the same program. What is asked
here is who writes, whether all are there, and when all stop. With one process each
function is the obvious thing and costs nothing.
"""

import dataclasses
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from nlhf_jax import peers, roll_call, runtime
from nlhf_jax.checks import UserError, check_range
from nlhf_jax.discovery import Processes
from nlhf_jax.peers import RESTART_EXIT
from nlhf_jax.runtime import first_line

LEAVE_SECONDS = 0.5
LONGEST_WAIT = 604_800  # a week, in seconds
Result = TypeVar("Result")


class PeerLost(RuntimeError):
    """Another process is late or gone; the whole job must be started again."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to wait for others, in seconds.

    Attributes:
      start: for the last process at the start.
      barrier: for the last process at a barrier.
      heartbeat: for a sign of life, before a process counts as dead.
    """

    start: float | int = 300.0
    barrier: float | int = 600.0
    heartbeat: float | int = 100.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name = f"NLHF_{field.name.upper()}_SECONDS"
            check_range(name, getattr(self, field.name), 1, LONGEST_WAIT)

    @classmethod
    def from_variables(cls, environment: Mapping[str, str] | None = None) -> "Patience":
        """Reads NLHF_START_SECONDS, NLHF_BARRIER_SECONDS, NLHF_HEARTBEAT_SECONDS.

        Raises:
          UserError: one of them is not a number from 1 to a week.
        """
        environment = os.environ if environment is None else environment
        given = {}
        for field in dataclasses.fields(cls):
            name = f"NLHF_{field.name.upper()}_SECONDS"
            if environment.get(name):
                try:
                    given[field.name] = float(environment[name])
                except ValueError:
                    text = environment[name]
                    raise UserError(f"{name} must be a number, got {text!r}") from None
        return cls(**given)


@dataclasses.dataclass
class _Job:
    """What this process knows of its job."""

    processes: Processes = Processes()  # noqa: RUF009 frozen, so it can be shared
    patience: Patience = Patience()
    hosts: Mapping[int, str] = dataclasses.field(default_factory=dict)
    client: object = None
    watch: peers.Watch | None = None
    rounds: dict[str, int] = dataclasses.field(default_factory=dict)


_job = _Job()


def start(
    processes: Processes,
    facts: Mapping[str, str] | None = None,
    patience: Patience | None = None,
) -> None:
    """Joins the other processes; to be called before any device is touched.

    Args:
      processes: see `discovery.find`; a single one starts nothing.
      facts: what must be the same in all processes, by name.
      patience: from the environment if None.

    Raises:
      UserError: the processes do not come together; see `roll_call.call`.
    """
    if processes.num_processes == 1:
        return
    patience = Patience.from_variables() if patience is None else patience
    roll = roll_call.call(processes, facts or {}, patience.start)
    # From here on nobody can die unnoticed, not even while the runtime starts.
    watch = peers.Watch(processes.process_id, roll.hosts, roll.lines)
    runtime.start(processes, patience.start, patience.heartbeat)
    from jax._src import distributed

    _job.processes, _job.patience, _job.hosts = processes, patience, roll.hosts
    _job.client, _job.watch = distributed.global_state.client, watch


def num_processes() -> int:
    """Returns how many processes the job has."""
    return _job.processes.num_processes


def is_first() -> bool:
    """Whether this is process 0, which alone writes what is not a checkpoint."""
    return _job.processes.process_id == 0


def exchange(name: str, text: str = "", seconds: float | int | None = None):
    """Waits for all processes and returns what each of them says, by number.

    It is a barrier: every process calls it as often, with the same names.

    Args:
      name: of the barrier, for messages.
      text: what this process says.
      seconds: how long to wait for the last one; `Patience.barrier` if None.

    Raises:
      PeerLost: names the processes, and their hosts, that did not come.
    """
    if num_processes() == 1:
        return {0: text}
    import jax

    client, seconds = _job.client, seconds or _job.patience.barrier
    folder = new_key(name)
    try:
        client.key_value_set(f"{folder}/{_job.processes.process_id}", text)
        client.wait_at_barrier(folder, int(seconds * 1000))
        said = _read(folder)
        if is_first() and _job.rounds[name] > 1:
            # All have come to this round, so nobody reads the one before any more.
            client.key_value_delete(f"nlhf/{name}/{_job.rounds[name] - 1}")
    except jax.errors.JaxRuntimeError as error:
        raise PeerLost(_who_is_late(name, folder, seconds, error)) from error
    return said


def _read(folder: str) -> dict[int, str]:
    pairs = _job.client.key_value_dir_get(folder)
    return {int(key.rpartition("/")[2]): value for key, value in pairs}


def _who_is_late(name, folder, seconds, error) -> str:
    import jax

    try:
        there = _read(folder)
    except jax.errors.JaxRuntimeError:
        return f"barrier {name!r}: process 0 is gone ({first_line(error)})"
    late = [
        f"process {number} on {_job.hosts.get(number, '?')}"
        for number in range(num_processes())
        if number not in there
    ]
    if not late and "DEADLINE_EXCEEDED" in str(error):
        this = f"process {_job.processes.process_id}"
        return f"barrier {name!r}: {this} came when others had given up waiting for it"
    if not late:
        return f"barrier {name!r}: {first_line(error)}"
    return f"barrier {name!r}: {', '.join(late)} did not come within {seconds:g} s"


def barrier(name: str, seconds: float | int | None = None) -> None:
    """Waits until all processes are here.

    Raises:
      PeerLost: as `exchange`.
    """
    exchange(name, "", seconds)


def all_do(name: str, action: Callable[[], Result]) -> Result:
    """Returns `action()`; an error of one process is an error of all.

    Raises:
      UserError: the first one that a process met, in every process.
      PeerLost: as `exchange`.
    """
    if num_processes() == 1:
        return action()
    result, wrong, reason = None, None, ""
    try:
        result = action()
    except UserError as error:
        wrong, reason = error, str(error)
    said = exchange(name, reason)
    if wrong is not None:
        raise wrong
    for number, reason in sorted(said.items()):
        if reason:
            raise UserError(f"{reason} (process {number} on {_job.hosts[number]})")
    return result


def first_does(name: str, action: Callable[[], object]) -> None:
    """Lets process 0 act while the others wait; its error is everyone's.

    Raises:
      UserError, PeerLost: as `all_do`.
    """
    all_do(name, lambda: action() if is_first() else None)


def first_then_others(name: str, action: Callable[[], Result]) -> Result:
    """Returns `action()`, which process 0 runs before all others.

    For what prepares files that everybody then reads.

    Raises:
      UserError, PeerLost: as `all_do`.
    """
    mine = all_do(name, lambda: action() if is_first() else None)
    return mine if is_first() else action()


def barrier_seconds() -> float | int:
    """Returns how long the processes wait for each other: see `Patience`."""
    return _job.patience.barrier


def new_key(name: str) -> str:
    """Returns a key of the store that all share; all processes ask for as many."""
    count = _job.rounds[name] = _job.rounds.get(name, 0) + 1
    return f"nlhf/{name}/{count}"


def first_word(key: str, proposal: str = "") -> str:
    """Returns what was said first under a key, if anything; waits for nobody.

    Args:
      key: see `new_key`.
      proposal: said now if nobody has said anything; empty says nothing.

    Raises:
      PeerLost: process 0 is gone.
    """
    import jax

    try:
        if proposal:
            _job.client.key_value_set(key, proposal)
            return proposal
    except jax.errors.JaxRuntimeError as error:
        # Another process said something at the same time, and that counts.
        if "ALREADY_EXISTS" not in str(error):
            raise PeerLost(f"process 0 is gone: {first_line(error)}") from error
    try:
        return _job.client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return ""
        raise PeerLost(f"process 0 is gone: {first_line(error)}") from error


def is_preempted(step: int) -> bool:
    """Whether JAX's preemption service wants all processes to stop at this step.

    True at the same step in all of them, each of which asks at every step; never where
    the service is off (JAX_ENABLE_PREEMPTION_SERVICE=0) and in a single process.
    """
    if num_processes() == 1:
        return False
    return runtime.reached_preemption(step)


def my_name() -> str:
    """Returns `process 1 on HOST`."""
    return f"process {_job.processes.process_id} on {socket.gethostname()}"


def tell_hang(sentence: str) -> None:
    """Tells all other processes that this one stands still; they end with 42."""
    if _job.watch is not None:
        _job.watch.hangs(sentence)


def is_peer_loss(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone, not that one is wrong."""
    if isinstance(error, PeerLost):
        return True
    text = f"{type(error).__name__}: {error}"
    signs = r"Gloo|UNAVAILABLE|Connection (reset|closed|refused)|heartbeat|Broken pipe"
    return num_processes() > 1 and re.search(signs, text) is not None


def leave(code: int, reason: str = "") -> None:
    """Ends this process's part; with several processes and an error, the process too.

    After success all wait for each other. After an error they wait half a second, in
    which others may find the same; then this process ends, and so all others with 42.

    Args:
      code: this process's exit code.
      reason: of an error, in a few words, for the others' logs.
    """
    if num_processes() == 1:
        return
    import jax

    is_success = code in (0, 128 + signal.SIGTERM)
    try:
        if code == RESTART_EXIT:
            # Whoever is gone, the watch is about to end this process and to name it.
            time.sleep(LEAVE_SECONDS)
            peers.end(reason or "another process is gone")
        if not is_success:
            _job.watch.failing(reason or f"exit code {code}")
        barrier(f"end with code {code}", None if is_success else LEAVE_SECONDS)
        _job.watch.goodbye()
        jax.distributed.shutdown()
        _job.watch.close()
        _job.__init__()
    except (PeerLost, jax.errors.JaxRuntimeError) as error:
        if is_success:
            peers.end(first_line(error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
