# SPDX-License-Identifier: Apache-2.0
"""One checkpoint on its way to the disk, in the background and in every process."""

import logging
import pathlib
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from nlhf_jax import daemon_threads, distributed, manifests
from nlhf_jax.stored_states import STATE, reason, together
from nlhf_jax.types import TrainState

_log = logging.getLogger(__name__)


class Save:
    """One checkpoint on its way to the disk, and in the end what came of it.

    Attributes:
      step, state, meta: what is saved; the state until it is on the disk.
      attempt: 1 for the first one, more for those that follow a failure.
      key: under which processes agree on `retry_at`.
      retry_at: step after which to try again, once that is known.
      error: why it failed; None while it is under way and where it did not.
      failed_at: when it did, by the monotonic clock.
    """

    def __init__(
        self, step: int, state: TrainState, meta: Mapping[str, Any], attempt: int
    ):
        self.step, self.state, self.meta = step, state, meta
        self.attempt = attempt
        self.key = distributed.new_key("save again")
        self.retry_at: int | None = None
        self.error: Exception | None = None
        self.failed_at = 0.0
        self._thread: threading.Thread | None = None

    def start(self, finish: Callable[[], None]) -> None:
        """Lets `finish` run in the background."""

        def work() -> None:
            try:
                finish()
                self.state = None  # else its memory would stay
            except Exception as error:
                self.fail(error)

        # A daemon, so that a save that never ends cannot hold a process that has.
        self._thread = daemon_threads.start(work, "checkpoint")

    def fail(self, error: Exception) -> None:
        """Notes the end of this attempt."""
        self.failed_at, self.error = time.monotonic(), error

    def join(self) -> Exception | None:
        """Waits for the end, and returns why it failed."""
        if self._thread is not None:
            self._thread.join()
        return self.error

    @property
    def is_on_disk(self) -> bool:
        """Whether it is over and did not fail."""
        return self.state is None and self.error is None

    @property
    def can_be_repeated(self) -> bool:
        """Whether the state is still what it was: no step has taken its memory."""
        leaves = jax.tree.leaves(self.state)
        return bool(leaves) and not any(leaf.is_deleted() for leaf in leaves)


class Writing:
    """The files of one checkpoint while they are written, up to its manifest.

    All processes go through the same barriers, also where one of them fails.
    """

    def __init__(
        self,
        place: pathlib.Path,
        facts: Mapping[str, Any],
        named: Mapping[str, Any],
        checksums: Callable[[], Sequence[Any]],
    ):
        self._place, self._facts, self._checksums = place, facts, checksums
        # Views: the next step finds these arrays in use, and writes elsewhere.
        self._pieces = {n: manifests.host_pieces(leaf) for n, leaf in named.items()}
        self._shapes = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in named.items()
        }
        self._wait: Callable[[], None] = lambda: None

    def start(self, orbax: ocp.AsyncCheckpointer, state: TrainState) -> None:
        """Begins to write the arrays; an error is that of `commit`.

        Raises:
          PeerLost: another process is gone.
        """
        try:
            orbax.save(self._place / STATE, args=ocp.args.StandardSave(state))
            self._wait = orbax.wait_until_finished
        except Exception as error:
            if distributed.is_peer_loss(error):
                raise
            self._wait = _raising(error)

    def commit(self) -> None:
        """Waits for the arrays and writes the manifest.

        Raises:
          CheckpointError: what one process could not do.
          PeerLost: another process is gone.
        """
        pieces = manifests.digests_of_pieces(self._pieces)
        self._pieces = {}
        # Who fails alone waits here for those that wait for it in orbax, as long.
        patience = 2 * distributed.barrier_seconds()
        together("checkpoint written", self._wait_for_arrays, patience)
        mine = together("checkpoint described", lambda: self._describe(pieces))
        together("checkpoint committed", lambda: self._write_manifest(mine))

    def _wait_for_arrays(self) -> None:
        try:
            self._wait()
        except Exception as error:
            # The first one speaks for all once all are here, which may take minutes.
            if not distributed.is_first() and not distributed.is_peer_loss(error):
                _log.warning(
                    "process %d could not write its part of %s: %s",
                    jax.process_index(),
                    self._place,
                    reason(error),
                )
            raise

    def _describe(self, pieces: dict[str, Any]) -> dict[str, Any]:
        """What this process can tell; the first one reads it in the folder."""
        files = manifests.describe_files(self._place, _is_mine)
        mine = {"pieces": pieces, "files": files}
        if not distributed.is_first():
            manifests.write_part(self._place, jax.process_index(), mine)
        return mine

    def _write_manifest(self, mine: dict[str, Any]) -> None:
        if not distributed.is_first():
            return
        others = range(1, distributed.num_processes())
        parts = [mine, *(manifests.take_part(self._place, n) for n in others)]
        pieces = {
            name: [piece for part in parts for piece in part["pieces"][name]]
            for name in self._shapes
        }
        arrays = manifests.describe_arrays(self._shapes, self._checksums(), pieces)
        files = {name: facts for p in parts for name, facts in p["files"].items()}
        manifests.commit(self._place, {**self._facts, "arrays": arrays, "files": files})


def _raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def _is_mine(name: str) -> bool:
    """Whether this process looks at a file: at its own, and the first at the rest."""
    number = re.search(r"process_(\d+)", name)
    return (int(number[1]) if number else 0) == jax.process_index()


def appointment(key: str, is_asked: bool, done: int) -> int | None:
    """Returns the step after which all processes act, once one of them asks.

    They run at most one step apart, so nobody has gone past the step after next
    without having looked.
    """
    if distributed.num_processes() == 1:
        return done if is_asked else None
    said = distributed.first_word(key, str(done + 2) if is_asked else "")
    return int(said) if said else None


class _NoTracebacks(logging.Filter):
    """Drops libraries' own records of what failed, since ours says it in a sentence.

    One is orbax's; the other comes from asyncio when what was being written beside it
    failed as well and nobody is left to ask.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        return "orbax" not in record.pathname and "OCDBT" not in str(record.exc_info[1])


def _keep_tracebacks_from_the_screen() -> None:
    """Hides what libraries print of a failed write."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    if any(isinstance(one, _NoTracebacks) for one in loggers[0].filters):
        return
    for logger in loggers:
        logger.addFilter(_NoTracebacks())
    show = sys.unraisablehook

    def show_others(found: Any) -> None:
        # Writes beside the one that failed report to a loop that is over by then.
        if str(found.exc_value) != "Event loop is closed":
            show(found)

    sys.unraisablehook = show_others


def array_writer() -> ocp.AsyncCheckpointer:
    """Returns what writes the arrays of one checkpoint after another."""
    _keep_tracebacks_from_the_screen()
    limit = max(int(distributed.barrier_seconds()), 1)
    options = ocp.AsyncOptions(
        timeout_secs=limit, create_directories_asynchronously=False
    )
    # Who failed alone has been at fewer of orbax's barriers than the others; under new
    # names all have been at none.
    names = ocp.options.MultiprocessingOptions(
        barrier_sync_key_prefix=distributed.new_key("array writer").replace("/", "_")
    )
    return ocp.AsyncCheckpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=names),
        async_options=options,
        multiprocessing_options=names,
    )
