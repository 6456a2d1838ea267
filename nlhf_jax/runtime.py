# SPDX-License-Identifier: Apache-2.0
"""JAX's own runtime of several processes, started so that its ends are ours.

By itself it swallows SIGTERM, and where process 0 is lost it aborts the others (134 to
a shell) without a word about who it was.
"""

import contextlib
import ctypes
import faulthandler
import signal
import socket
import threading
from collections.abc import Iterator

from nlhf_jax import roll_call
from nlhf_jax.checks import UserError
from nlhf_jax.discovery import Processes


def start(processes: Processes, patience: float | int, heartbeat: float | int) -> None:
    """Joins the runtime; all processes are there already.

    Args:
      processes: all of them, and which one this is.
      patience: seconds to wait for the others.
      heartbeat: seconds without a sign of life, before a process counts as dead.

    Raises:
      UserError: they do not come together.
    """
    _abort_slowly()
    with _signals_kept():
        _initialize(processes, patience, heartbeat)


def first_line(error: object) -> str:
    """Returns the first line of an error's text, or else what kind of error it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reached_preemption(step: int) -> bool:
    """Whether JAX's preemption service, where it runs, wants a stop at this step."""
    from jax._src import distributed

    manager = distributed.global_state.preemption_sync_manager
    return manager is not None and manager.reached_sync_point(step)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Undoes the handler that JAX's preemption service sets: it swallows SIGTERM.

    The service itself stays on, so that a notice which reaches it counts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


def _initialize(processes, patience, heartbeat) -> None:
    import jax

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
            initialization_timeout=int(patience),
            heartbeat_timeout_seconds=int(heartbeat),
            shutdown_timeout_seconds=30,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the processes of {processes.coordinator} could not be joined by process "
            f"{processes.process_id} on {socket.gethostname()}: {first_line(error)}"
        ) from error


def _abort_slowly() -> None:
    """Has an abort of this process wait some seconds in the thread that calls it.

    Where process 0 dies, a thread of the runtime aborts the others at the moment at
    which their watches hear of it. So that these can say who it was and end with 42,
    the handler of SIGABRT becomes the C library's `sleep`, which is called with the
    signal's number, 6. It needs neither Python nor memory; then the abort goes on.
    """
    shows_stacks = faulthandler.is_enabled()
    faulthandler.disable()
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = 2 * [ctypes.c_void_p], None
    sleep = ctypes.cast(library.sleep, ctypes.c_void_p)
    library.signal(ctypes.c_void_p(signal.SIGABRT.value), sleep)
    if shows_stacks:
        faulthandler.enable()  # calls our handler after its own
