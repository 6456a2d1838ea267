# SPDX-License-Identifier: Apache-2.0
"""A job on machines of a cloud: bring up, send, run, resume after faults, delete.

One loop for every backend that has machines. Before an attempt on machines that were
used, every trainer there is stopped; where that cannot be done the machines are
deleted. So there are never two trainers.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from types import SimpleNamespace

from launch import archive, calls, here, processes, remote, sessions
from launch.calls import Caller, Done, Problem, Stopped
from launch.errors import (
    AGAIN,
    CONNECTION_LOST,
    DONE,
    LEFT_BEHIND,
    SAVED,
    SubmitError,
    is_final,
)
from launch.machines import MISSING, Action, Machines, Seen
from launch.processes import Signals, say
from launch.repeats import Repeats
from launch.retries import FAILURE, PREEMPTION, RetryBudget

# How often a call that may be repeated is, before the attempt counts as failed.
TRIES = 3


def submit(machines: Machines, options: SimpleNamespace, job: list[str]) -> int:
    """Runs the job on the machines, or prints what would be run.

    Raises:
      SubmitError: nothing was started, for a reason only the user can remove.
    """
    if options.dry_run:
        for command in plan(machines, options, job):
            print(calls.shown(command))
        return DONE
    calls.need_program("gcloud", options.dry_run)
    folder = pathlib.Path(options.log_dir).expanduser() / machines.name
    with processes.locked(folder, machines.name), Signals() as signals:
        return Supervisor(machines, options, job, folder, signals).run()


def plan(machines: Machines, options: SimpleNamespace, job: list[str]) -> list:
    """Returns the calls of a run without faults, in order; none is made."""
    workers = machines.planned_workers()
    if options.delete:
        return [*machines.delete(), machines.describe()]
    source = remote.archive_name(machines.name)
    return [
        machines.describe(),
        *machines.create(),
        machines.describe(),
        *machines.copy(workers, source, source),
        *machines.everywhere(workers, remote.prepare(machines.name)),
        *(_start(machines, worker, workers, 1, job) for worker in workers),
        *([] if options.keep else [*machines.delete(), machines.describe()]),
    ]


def _start(machines, worker, workers, attempt, job) -> list[str]:
    environment = machines.environment(worker, workers) | {"NLHF_ATTEMPT": str(attempt)}
    words = remote.run(machines.name, attempt, environment, job)
    return machines.on(worker, words)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How an attempt ended: `code` for the user, `kind` of retry or None for none."""

    code: int
    kind: str | None
    reason: str


def _may_pass(code: int) -> bool:
    """Whether a step that ended so may work the next time; 1 is gcloud's own code."""
    passing = (1, calls.TIMED_OUT, CONNECTION_LOST)
    return code in passing or not is_final(code)


class GaveUp(Exception):
    """No attempt is left; the sentence says after what."""


class Supervisor:
    """The life of one submission."""

    def __init__(self, machines, options, job, folder, signals):
        self._machines, self._options, self._job = machines, options, job
        self._folder, self._signals = folder, signals
        self._call = Caller(signals, options.call_seconds)
        self._pauses = RetryBudget(
            options.max_failures, options.max_preemptions, options.pause_seconds
        )
        self._repeats = Repeats()
        # Calls that made something: what they find there later is of these flags.
        self._made: list[list[str]] = []
        # Whether this launcher, now or before it was killed, made what is there; None
        # until a look has been taken.
        self._ours: bool | None = None
        self._shown = ""
        # The attempt that ended so has spent for what the next look will find.
        self._counted = False
        self._used = False

    def run(self) -> int:
        """Runs to the end, whatever the end is, and cleans up."""
        code = LEFT_BEHIND
        try:
            code = DONE if self._options.delete else self._attempts()
        except (Stopped, KeyboardInterrupt):
            say(f"{self._signals.received[0].name}: stopped")
            code = 128 + self._signals.received[0]
        except GaveUp as trouble:
            say(f"{trouble}; the same command goes on")
            code = AGAIN
        except SubmitError as error:
            say(str(error))
            code = error.code
        finally:
            is_clean = self._clean_up()
        return code if is_clean else LEFT_BEHIND

    def _attempts(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(folder) / remote.archive_name(self._machines.name)
            count = archive.write(here.ROOT, source)
            say(f"{count} files, {source.stat().st_size / 1e6:.1f} MB, to be sent")
            while True:
                start = time.monotonic()
                verdict = self._attempt(str(source))
                if verdict.code != DONE:
                    say(verdict.reason)
                if verdict.kind is None:
                    return verdict.code
                if self._signals.received:
                    raise Stopped
                self._spend(verdict.kind, verdict.reason, time.monotonic() - start)
                self._counted = True

    def _spend(self, kind: str, reason: str, lasted: float = 0.0) -> None:
        """Pauses before another try, or gives up."""
        pause = self._pauses.spend(kind, lasted)
        if pause is None:
            raise GaveUp(f"no restart is left after a {kind}: {reason}")
        say(f"next try in {pause:.0f} s")
        self._call.sleep(pause)

    # Bringing machines up.

    def _bring_up(self) -> Seen:
        """Returns machines that are ready; makes and replaces them as needed."""
        deadline = time.monotonic() + self._options.wait_seconds
        while True:
            seen = self._look()
            if seen.action == Action.RUN:
                self._counted = False
                return seen
            if seen.action == Action.CREATE:
                self._create()
            elif seen.action == Action.REPLACE:
                self._replace(seen.state)
                if not self._counted:
                    self._spend(FAILURE if seen.failed else PREEMPTION, seen.state)
                self._counted = False
            if time.monotonic() > deadline:
                raise GaveUp(
                    f"{self._machines.name} is {seen.state} after "
                    f"{self._options.wait_seconds:g} s"
                )
            self._call.sleep(self._options.poll_seconds)

    def _look(self) -> Seen:
        """Asks for the state until the cloud gives it; says it where it is new.

        Raises:
          SubmitError: the cloud refuses, or the machines are somebody else's and dead.
          GaveUp: it did not answer often enough.
        """
        while isinstance(seen := self._machines.observe(self._call), Done):
            if seen.problem == Problem.REFUSED:
                raise SubmitError(f"gcloud refuses: {seen.complaint}")
            say(f"the state is not known: {seen.complaint}")
            self._spend(FAILURE, seen.complaint)
        if seen.state != self._shown:
            say(f"{self._machines.name}: {seen.state}" + ("" if seen.known else " (?)"))
            self._shown = seen.state
        if seen.action != Action.CREATE and self._ours is None:
            self._ours, self._used = seen.ours, True
        if seen.action == Action.REPLACE and not self._ours:
            raise SubmitError(
                f"{self._machines.name} is {seen.state} and was not made by this "
                "launcher: delete it, or give this job another --name"
            )
        return seen

    def _create(self) -> None:
        """Makes the machines as far as the cloud lets it; a look tells how far."""
        self._ours, self._used = True, False
        for command in self._machines.create():
            done = self._call(command, self._options.wait_seconds)
            if done.problem == Problem.EXISTS and command not in self._made:
                done = self._renewed(command) or done
            if done.problem == Problem.NONE:
                self._made.append(command)
            if done.problem in (Problem.NONE, Problem.EXISTS):
                if done.problem == Problem.EXISTS:
                    # Whose it is, its label says at the next look.
                    self._ours, self._used = None, True
                continue
            if done.problem == Problem.REFUSED:
                raise SubmitError(f"gcloud refuses: {done.complaint}")
            say(done.complaint)
            kind = PREEMPTION if done.problem == Problem.CAPACITY else FAILURE
            self._spend(kind, done.complaint)
            return

    def _renewed(self, command: list[str]) -> Done | None:
        """Makes anew what a killed launcher left and may be of other flags, if so."""
        delete = self._machines.stale(command)
        if delete is None:
            return None
        say(f"deleting what an earlier launcher left: {calls.shown(delete)}")
        done = self._call(delete)
        if done.problem not in (Problem.NONE, Problem.MISSING):
            return done
        return self._call(command, self._options.wait_seconds)

    def _replace(self, why: str) -> None:
        say(f"{self._machines.name} is {why}: deleted and made again")
        if not self._delete():
            raise GaveUp(f"{self._machines.name} could not be deleted")

    # One attempt.

    def _attempt(self, source: str) -> Verdict:
        seen = self._bring_up()
        workers = seen.workers
        if self._used and not self._stop_trainers(workers):
            if not self._ours:
                return Verdict(
                    AGAIN, FAILURE, "an earlier trainer could not be stopped"
                )
            self._replace("not to be reached")
            return Verdict(AGAIN, FAILURE, "the machines were not to be reached")
        self._used = True
        target = remote.archive_name(self._machines.name)
        prepare = remote.prepare(self._machines.name)
        for step, commands in (
            ("copying the code", self._machines.copy(workers, source, target)),
            ("installing", self._machines.everywhere(workers, prepare)),
        ):
            say(f"{step} on {len(workers)} workers")
            done = self._repeated(commands)
            if done.code != DONE:
                return self._step_failed(step, done)
        return self._run(workers)

    def _repeated(self, commands: list[list[str]]) -> Done:
        """Runs calls side by side, those that fail a few times; returns the worst."""
        for _ in range(TRIES):
            answers = self._call.together(commands)
            failed = [(c, a) for c, a in zip(commands, answers, strict=True) if a.code]
            if not failed:
                return Done(DONE)
            worst = failed[0][1]
            if not _may_pass(worst.code):
                break
            commands = [command for command, _ in failed]
        return worst

    def _step_failed(self, step: str, done: Done) -> Verdict:
        reason = f"{step} failed: {done.complaint}"
        # The sentence is one line of it; the rest may be what helps.
        with contextlib.suppress(OSError):
            log = self._folder / "last_failure.log"
            log.write_text(f"{done.output}\n{done.errors}\n")
        if self._gone():
            return Verdict(AGAIN, PREEMPTION, f"preempted while {step}")
        if not _may_pass(done.code):
            return Verdict(done.code, None, reason)
        return Verdict(AGAIN, FAILURE, reason)

    def _gone(self) -> bool:
        """Whether the machines cannot run the job any more; False if nobody says."""
        seen = self._machines.observe(self._call)
        return isinstance(seen, Seen) and not seen.alive

    def _run(self, workers) -> Verdict:
        number = processes.next_attempt(self._folder)
        folder = self._folder / f"attempt_{number}"
        say(f"attempt {number} on {len(workers)} workers; logs in {folder}")
        commands = {
            worker: _start(self._machines, worker, workers, number, self._job)
            for worker in workers
        }
        attempt = sessions.Sessions(folder, commands, self._options, self._signals)
        code, how = attempt.run(self._watch, lambda: self._ask_to_stop(workers))
        if how == sessions.GONE or (code and self._gone()):
            return Verdict(AGAIN, PREEMPTION, "preempted")
        if self._signals.received:
            return Verdict(
                code, None if code == SAVED or is_final(code) else FAILURE, how
            )
        if not _may_pass(code):
            return Verdict(code, None, how)
        if code == SAVED:
            return Verdict(code, PREEMPTION, how)
        # gcloud's own failures say nothing of the job.
        is_the_jobs = code not in (calls.TIMED_OUT, CONNECTION_LOST, 1)
        if is_the_jobs and (repeated := self._repeats.note(code, attempt.log)):
            return Verdict(code, None, f"{how}; {repeated}")
        return Verdict(code, FAILURE, how)

    def _watch(self) -> Action:
        """What the machines' state asks of a running job: RUN, LEAVE or REPLACE."""
        seen = self._machines.observe(self._call)
        if isinstance(seen, Done):
            return Action.RUN
        if seen.state != self._shown:
            say(f"{self._machines.name}: {seen.state}" + ("" if seen.known else " (?)"))
            self._shown = seen.state
        if seen.action == Action.LEAVE:
            return Action.LEAVE
        return Action.RUN if seen.alive else Action.REPLACE

    def _ask_to_stop(self, workers) -> list[list[str]]:
        stop = remote.stop(self._machines.name, self._options.grace_seconds)
        return self._machines.everywhere(workers, stop)

    def _stop_trainers(self, workers) -> bool:
        """Whether no trainer of this job is left on the workers."""
        return self._repeated(self._ask_to_stop(workers)).code == DONE

    # Leaving nothing behind.

    def _delete(self) -> bool:
        """Deletes all that was made; returns whether it is seen to be gone."""
        for _ in range(TRIES):
            answers = [self._call(command) for command in self._machines.delete()]
            fine = (Problem.NONE, Problem.MISSING)
            if all(done.problem in fine for done in answers) and self._is_gone():
                self._ours, self._used = None, False
                return True
            time.sleep(min(self._options.poll_seconds, 10))
        return False

    def _is_gone(self) -> bool:
        end = time.monotonic() + self._options.call_seconds
        while time.monotonic() < end:
            seen = self._machines.observe(self._call)
            if seen == MISSING:
                return True
            time.sleep(self._options.poll_seconds)
        return False

    def _clean_up(self) -> bool:
        """Deletes what is ours unless told to keep it; whether nothing is in doubt."""
        self._call.shielded = True
        if self._options.delete:
            self._ours = True
        if self._ours is None:
            return True
        if self._options.keep or not self._ours:
            with contextlib.suppress(OSError):
                self._leave_idle()
            say(f"{self._machines.name} is left there")
            return True
        say(f"deleting {self._machines.name}")
        if self._delete():
            return True
        for command in self._machines.delete():
            say(f"NOT DELETED, it may cost money: {calls.shown(command)}")
        return False

    def _leave_idle(self) -> None:
        """Machines that stay must not run on with a job nobody watches."""
        seen = self._machines.observe(self._call)
        if isinstance(seen, Seen) and seen.alive and seen.workers and self._used:
            self._stop_trainers(seen.workers)
