# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, and parameters alone in one portable file.

    MODEL_DIR/checkpoints/<step>/state/    the whole train state (orbax)
    MODEL_DIR/checkpoints/<step>/manifest.json    what it consists of; written last
    MODEL_DIR/checkpoints/<step>.pinned    made by the user: this one is never deleted
    MODEL_DIR/checkpoints/params.safetensors    parameters alone, for an export

Nothing else is needed to resume: data order and random keys are functions of (seed,
step). The format itself does not notice a flipped bit, so the manifest has a digest of
every file and array; a state with a NaN in it is never written.
"""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from nlhf_jax import distributed, manifests, retention
from nlhf_jax.checks import CheckpointError, UserError, check_integer, check_range
from nlhf_jax.checksums import begin_checksums, finite
from nlhf_jax.parameter_files import names_of, save_params
from nlhf_jax.retention import Retention
from nlhf_jax.saving import Save, Writing, appointment, array_writer
from nlhf_jax.stored_states import (
    STEPS_FOLDER,
    damage,
    load_params,
    name_strangers,
    reason,
    restore_state,
    together,
)
from nlhf_jax.types import TrainState

__all__ = [
    "STEPS_FOLDER",
    "CheckpointError",
    "Checkpointer",
    "Retention",
    "load_params",
    "save_params",
]

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the train state of one run; at most one run per folder.

    Each process writes the parts on its own devices into one checkpoint, which any
    number of processes restores; all must call each method.

    Saving is asynchronous: `save` returns when the state may be changed. What fails
    then is said in one sentence at once, and `retry_is_due` asks for another save some
    seconds later; the run goes on meanwhile. If the newest save failed, and trying it
    again did not help, `wait` and `close` raise. A caller that ends without `close` may
    lose its last checkpoint unnoticed.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *,
        keep: int | Retention = 2,
        attempts: int = 3,
        retry_seconds: float | int = 10.0,
        beside: Sequence[pathlib.Path] = (),
    ):
        """Opens (or makes) the folder, and deletes there what a killed run left.

        Args:
          folder: of the steps.
          keep: which checkpoints stay; a number is that many of the newest.
          attempts: how often a save is tried in all, at least 1.
          retry_seconds: from a failure to the next attempt.
          beside: files that grow with the run; each manifest tells their bytes.

        Raises:
          UserError: an argument is out of its range, or the folder cannot be made.
        """
        if not isinstance(keep, Retention):
            keep = Retention(check_integer("keep", keep, 1))
        check_integer("save_attempts", attempts, 1)
        check_range("save_retry_seconds", retry_seconds, 0.0, high_open=True)
        self.folder = pathlib.Path(folder).expanduser().absolute()
        self._keep, self._beside = keep, tuple(beside)
        self._attempts, self._retry_seconds = attempts, retry_seconds
        self._newest: Save | None = None
        self._evaluations: dict[int, Mapping[str, float]] = {}
        distributed.first_does("checkpoint folder", lambda: _open(self.folder))
        self._orbax = array_writer()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        if distributed.is_peer_loss(exception[1]):
            return  # a save that needs who is gone never ends
        try:
            self.close()
        except Exception as error:
            # The error that ended the block is the one to show.
            if exception[0] is None:
                raise
            _log.error("%s", error)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, oldest first: those process 0 sees."""
        said = distributed.exchange(
            "checkpoint steps", json.dumps(retention.committed(self.folder))
        )
        return json.loads(said[0])

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None without any."""
        return max(self.steps(), default=None)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the facts saved beside the state of `step`: its manifest's."""
        manifest = manifests.read(self.folder / str(step))
        return {k: v for k, v in manifest.items() if k not in ("arrays", "files")}

    def save(
        self, step: int, state: TrainState, meta: Mapping[str, Any] | None = None
    ) -> None:
        """Begins to write the state after `step` updates, with facts JSON can hold.

        Args:
          step: later than that of any checkpoint.
          state: it may be donated as soon as this returns.
          meta: `evaluation`, if there is one, holds the figures `keep` chooses by.

        Raises:
          CheckpointError: a number is not finite, or the step is not newer than the
            newest checkpoint.
          PeerLost: another process is gone.
        """
        previous = self._newest
        is_retry = previous is not None and previous.retry_at is not None
        self._join()
        self._newest = None
        attempt = previous.attempt + 1 if is_retry else 1
        # A save may be due before all have heard of the retry's step.
        said = distributed.exchange("attempt of a save", str(attempt))
        attempt = max(map(int, said.values()))
        self._begin(Save(step, state, meta or {}, attempt))

    def retry_is_due(self, done: int) -> bool:
        """Whether the newest save failed and is to be tried again after this step.

        Args:
          done: updates done; to be asked after each of them. All processes get the same
            answer.

        Raises:
          PeerLost: process 0 is gone.
        """
        save = self._newest
        if save is None or save.is_on_disk:
            return False
        if save.retry_at is None:
            waited = time.monotonic() - save.failed_at
            is_asked = save.error is not None and save.attempt < self._attempts
            is_asked = is_asked and waited >= self._retry_seconds
            save.retry_at = appointment(save.key, is_asked, done)
        return save.retry_at is not None and done >= save.retry_at

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        The newest save is tried again, where it failed and its state still exists.

        Raises:
          CheckpointError: the newest save failed, and so did what was tried then.
          PeerLost: another process is gone.
        """
        while (error := self._join()) is not None:
            save = self._newest
            if save.attempt >= self._attempts or not save.can_be_repeated:
                self._newest = None  # it is said once
                raise CheckpointError(
                    f"checkpoint {save.step} in {self.folder} could not be written: "
                    f"{reason(error)}"
                ) from error
            time.sleep(self._retry_seconds)
            self._begin(Save(save.step, save.state, save.meta, save.attempt + 1))

    def close(self) -> None:
        """Waits as `wait` does, and lets the folder go."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _join(self) -> Exception | None:
        """Waits for the newest save, and returns why it failed.

        Raises:
          PeerLost: it needs a process that is gone.
        """
        error = None if self._newest is None else self._newest.join()
        if distributed.is_peer_loss(error):
            raise error
        if error is not None:
            self._orbax.close()
            self._orbax = array_writer()
        return error

    def _begin(self, save: Save) -> None:
        """Refuses what must not be written, and starts what may."""
        where = f"checkpoint {save.step} in {self.folder}"
        latest = self.latest_step()
        if latest is not None and save.step <= latest:
            raise CheckpointError(
                f"{where} not written: checkpoint {latest} is there already"
            )
        named = names_of(save.state)
        each = zip(named, finite(save.state), strict=True)
        bad = [name for name, is_good in each if not is_good]
        if bad:
            raise CheckpointError(
                f"{where} not written: {bad[0]} has numbers that are not finite"
            )
        self._newest = save
        facts = {**save.meta, "step": save.step, "positions": self._positions()}
        try:
            together("checkpoint", lambda: self._prepare(save.step))
        except CheckpointError as error:
            self._failed(save, error)
            return
        checksums = begin_checksums(save.state)
        writing = Writing(self.folder / str(save.step), facts, named, checksums)
        writing.start(self._orbax, save.state)
        save.start(lambda: self._finish(save, writing))

    def _positions(self) -> dict[str, int]:
        """Bytes of the files that grow with the run, as they are at this step."""
        there = [path for path in self._beside if path.is_file()]
        return {path.name: path.stat().st_size for path in there}

    def _prepare(self, step: int) -> None:
        """Makes the step's folder; what a failed save left there goes."""
        if not distributed.is_first():
            return
        place = self.folder / str(step)
        try:
            if manifests.is_leftover(place):
                retention.delete(self.folder, step)
            elif place.exists():
                retention.set_aside(self.folder, step)
            manifests.begin(place)
        except OSError as error:
            raise CheckpointError(f"{place} cannot be made: {error}") from error

    def _finish(self, save: Save, writing: Writing) -> None:
        """Ends a save in the background: the manifest, then what goes for it."""
        try:
            writing.commit()
        except Exception as error:
            self._failed(save, error)
            if not distributed.is_peer_loss(error):
                # Process 0 deletes for a while; whoever gave up now would end first,
                # and have the others end with 42.
                distributed.barrier("failed save deleted")
            raise
        if distributed.is_first():
            self._delete_old(save.step, save.meta)

    def _failed(self, save: Save, error: Exception) -> None:
        """Says that a save failed, and frees the room it took."""
        save.fail(error)
        if distributed.is_peer_loss(error) or not distributed.is_first():
            return
        retention.discard(self.folder, save.step)
        where = f"checkpoint {save.step} in {self.folder}"
        if save.attempt == self._attempts:
            _log.warning(
                "%s could not be written: %s; given up after attempt %d, "
                "until the next one is due",
                where,
                reason(error),
                save.attempt,
            )
        elif save.attempt == 1:
            _log.warning(
                "%s could not be written: %s; tried again in %g s",
                where,
                reason(error),
                self._retry_seconds,
            )

    def _delete_old(self, step: int, meta: Mapping[str, Any]) -> None:
        """Deletes the checkpoints that no rule keeps; a failure is only said."""
        try:
            figures = self._figures(step, meta)
            steps = retention.committed(self.folder)
            pinned = retention.pinned_steps(self.folder)
            for old in retention.to_delete(steps, self._keep, figures, pinned):
                retention.delete(self.folder, old)
        except (OSError, CheckpointError) as error:
            _log.warning("old checkpoints in %s stay: %s", self.folder, reason(error))

    def _figures(self, step: int, meta: Mapping[str, Any]) -> dict[int, float]:
        """Returns step -> the value that the best checkpoints are chosen by."""
        if not self._keep.best:
            return {}
        self._evaluations[step] = meta.get("evaluation", {})
        for other in retention.committed(self.folder):
            if other not in self._evaluations:
                # One that is damaged is none of the best; a restore names it.
                with contextlib.suppress(CheckpointError):
                    found = self.read_meta(other).get("evaluation", {})
                    self._evaluations[other] = found
        name = self._keep.metric
        return {s: e[name] for s, e in self._evaluations.items() if name in e}

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns the state saved at `step`, or at the newest good one before it.

        A damaged checkpoint is named in a warning and, once an older one has been
        read, renamed to `<step>.damaged`, so that the run can save that step again.

        Args:
          step: usually `latest_step()`.
          like: a state, concrete or abstract, with the structure, shapes, dtypes and
            (where its leaves have one) shardings that the result gets.

        Raises:
          UserError: there is no such checkpoint, it belongs to another model or
            optimiser, or none up to `step` is good; each is named with what is wrong.
          PeerLost: another process is gone.
        """
        steps = self.steps()
        if step not in steps:
            raise UserError(
                f"no checkpoint {step} in {str(self.folder)!r}; steps there: {steps}"
            )
        abstract = jax.tree.map(_abstract, like)
        damaged: dict[int, str] = {}
        for candidate in [s for s in reversed(steps) if s <= step]:
            place = self.folder / str(candidate)
            try:
                state = restore_state(place, abstract)
            except UserError:
                raise
            except Exception as error:
                if distributed.is_peer_loss(error):
                    raise
                _log.warning("%s", damage(place, error))
                damaged[candidate] = reason(error)
                continue
            self._set_aside(list(damaged))
            return state
        each = "; ".join(f"{number}: {wrong}" for number, wrong in damaged.items())
        raise UserError(f"no readable checkpoint in {str(self.folder)!r}: {each}")

    def _set_aside(self, steps: list[int]) -> None:
        def rename() -> None:
            for step in steps:
                retention.set_aside(self.folder, step)

        if steps:
            distributed.first_does("damaged checkpoints", rename)


def _open(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        retention.remove_leftovers(folder)
    except OSError as error:
        raise UserError(
            f"checkpoint folder {str(folder)!r} cannot be made: {error.strerror}"
        ) from error
    name_strangers(folder)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What an array is to be like, and where it is to lie."""
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
    )
