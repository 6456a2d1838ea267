# SPDX-License-Identifier: Apache-2.0
"""Several processes as one job: start, barriers that name the late, one end.

JAX's own runtime does the work; every process runs the same program. What is asked
here is who writes, whether all are there, and when all stop. With one process each
function is the obvious thing and costs nothing.
"""

import dataclasses
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

from nlhf_jax import roll_call
from nlhf_jax.checks import UserError, check_range
from nlhf_jax.discovery import Processes

RESTART_EXIT = 42
LEAVE_SECONDS = 1.0
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
    hosts = roll_call.call(processes, facts or {}, patience.start)
    _initialize(processes, patience)
    from jax._src import distributed

    _job.processes, _job.patience, _job.hosts = processes, patience, hosts
    _job.client = distributed.global_state.client


def _initialize(processes: Processes, patience: Patience) -> None:
    import jax

    # Its handler would swallow SIGTERM, which our loop turns into a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host, port = processes.address
    bind = f"{host}:{port}" if roll_call.is_local(host) else f"[::]:{port}"
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.num_processes,
            processes.process_id,
            cluster_detection_method="deactivate",
            coordinator_bind_address=bind,
            initialization_timeout=int(patience.start),
            heartbeat_timeout_seconds=int(patience.heartbeat),
            shutdown_timeout_seconds=30,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the processes of {processes.coordinator} could not be joined by process "
            f"{processes.process_id} on {socket.gethostname()}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    count = _job.rounds[name] = _job.rounds.get(name, 0) + 1
    folder = f"nlhf/{name}/{count}"
    try:
        client.key_value_set(f"{folder}/{_job.processes.process_id}", text)
        client.wait_at_barrier(folder, int(seconds * 1000))
        said = _read(folder)
        if is_first() and count > 1:
            # All have come to this round, so nobody reads the one before any more.
            client.key_value_delete(f"nlhf/{name}/{count - 1}")
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
        return f"barrier {name!r}: process 0 is gone ({_first_line(error)})"
    late = [
        f"process {number} on {_job.hosts.get(number, '?')}"
        for number in range(num_processes())
        if number not in there
    ]
    if not late and "DEADLINE_EXCEEDED" in str(error):
        this = f"process {_job.processes.process_id}"
        return f"barrier {name!r}: {this} came when others had given up waiting for it"
    if not late:
        return f"barrier {name!r}: {_first_line(error)}"
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


class Stop:
    """When all processes stop, after one of them was asked to.

    Processes run at most one step apart, since each waits for its step before the last
    and a step needs all of them. So who is asked after step s writes s + 2 into the
    store that all share, and nobody has gone past s + 2 without having looked.
    """

    def __init__(self):
        """Starts a run; all processes start as many, in the same order."""
        self._at: int | None = None
        self.was_asked = False
        count = _job.rounds["stop"] = _job.rounds.get("stop", 0) + 1
        self._key = f"nlhf/stop/{count}"

    def __call__(self, is_asked: bool, done: int) -> bool:
        """Whether to stop now.

        Args:
          is_asked: whether this process was asked to.
          done: steps done; every process calls it after each of them.

        Raises:
          PeerLost: process 0 is gone.
        """
        if num_processes() == 1:
            self.was_asked = is_asked
            return is_asked
        if self._at is None:
            self._at = self._agreed(done + 2 if is_asked else None)
        return self._at is not None and done >= self._at

    def _agreed(self, proposal: int | None) -> int | None:
        import jax

        try:
            if proposal is not None:
                _job.client.key_value_set(self._key, str(proposal))
                return proposal
        except jax.errors.JaxRuntimeError as error:
            # Another process was asked at the same time, and its step counts.
            if "ALREADY_EXISTS" not in str(error):
                raise PeerLost(f"process 0 is gone: {_first_line(error)}") from error
        try:
            return int(_job.client.key_value_try_get(self._key))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise PeerLost(f"process 0 is gone: {_first_line(error)}") from error


def is_peer_loss(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone, not that one is wrong."""
    if isinstance(error, PeerLost):
        return True
    text = f"{type(error).__name__}: {error}"
    signs = r"Gloo|UNAVAILABLE|Connection (reset|closed|refused)|heartbeat|Broken pipe"
    return num_processes() > 1 and re.search(signs, text) is not None


def leave(code: int) -> None:
    """Ends this process's part; with several processes and an error, the process too.

    After success all wait for each other. After an error they wait a second, in which
    others may find the same: one that sits in a collective would hold them for minutes.
    """
    if num_processes() == 1:
        return
    import jax

    try:
        barrier(f"end with code {code}", None if _is_success(code) else LEAVE_SECONDS)
        jax.distributed.shutdown()
        _job.__init__()
    except (PeerLost, jax.errors.JaxRuntimeError) as error:
        if _is_success(code):
            print(f"nlhf: {_first_line(error)}", file=sys.stderr)
            code = RESTART_EXIT
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_success(code: int) -> bool:
    return code in (0, 128 + 15)
