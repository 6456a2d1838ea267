# SPDX-License-Identifier: Apache-2.0
"""GKE: a JobSet that the cluster supervises; this program applies it and follows.

Restarts are the cluster's (launch/manifest.py); the image holds code and environment.
"""

import json
import pathlib
import time
from types import SimpleNamespace

from launch import calls, manifest, names, processes
from launch.calls import Caller, Problem, Stopped
from launch.errors import (
    AGAIN,
    DONE,
    INTERNAL,
    LEFT_BEHIND,
    SubmitError,
    decisive,
    nearest,
    shell_code,
)
from launch.flags import Flag
from launch.processes import Signals, Tail, say

FLAGS = (
    Flag("image", "", "container image with nlhf and its environment", required=True),
    Flag(
        "accelerator", "", "of the node pool, as in tpu-v5-lite-podslice", required=True
    ),
    Flag("topology", "", "of a slice, as in 4x4", required=True),
    Flag("chips_per_host", 4, "chips of each machine of the node pool", least=1),
    Flag("slices", 1, "how many slices", least=1),
    Flag("queue", "", "Kueue's local queue; without, no queue"),
    Flag("namespace", "default", "where the JobSet lives"),
    Flag("context", "", "kubectl's context; else its current one"),
    Flag("detach", False, "apply and leave; the cluster does the rest"),
    Flag("keep", False, "leave the JobSet there at the end; it goes after 12 hours"),
    Flag("delete", False, "delete the JobSet NAME; run nothing"),
    Flag("poll_seconds", 10.0, "how often the JobSet's state is asked"),
    Flag("call_seconds", 120.0, "limit of one call of kubectl"),
)
FINISHED = {"Completed": DONE, "Failed": INTERNAL}
TRIES = 5


def submit(options: SimpleNamespace, job: list[str]) -> int:
    """Applies the JobSet and follows it to its end; returns the exit code.

    Raises:
      SubmitError: a flag's value cannot be right, or kubectl is not there.
    """
    for flag in ("image", "namespace", "context", "queue"):
        if getattr(options, flag):
            names.check_place(flag, getattr(options, flag))
    name = names.job_name(options.name, job)
    found = {} if options.delete else manifest.jobset(pods(options, name, job))
    folder = pathlib.Path(options.log_dir).expanduser() / name
    cluster = JobSet(name, options, folder / "jobset.json")
    if options.dry_run:
        for command in cluster.plan():
            print(calls.shown(command))
        if not options.delete:
            print(json.dumps(found, indent=2))
        return DONE
    calls.need_program("kubectl", options.dry_run)
    with processes.locked(folder, name), Signals() as signals:
        cluster.file.write_text(json.dumps(found, indent=2) + "\n")
        return Follower(cluster, options, folder, signals).run()


def pods(options: SimpleNamespace, name: str, job: list[str]) -> manifest.Pods:
    """Returns the settings of the manifest.

    Raises:
      SubmitError: no such node pool or topology.
    """
    pools = names.NODE_POOLS
    if options.accelerator not in pools:
        raise SubmitError(
            f"--accelerator must be one of {', '.join(pools)}, got "
            f"{options.accelerator!r}{nearest(options.accelerator, pools)}"
        )
    chips = names.num_chips(options.topology, (pools[options.accelerator],))
    per_host = min(chips, options.chips_per_host)
    if chips % per_host:
        raise SubmitError(
            f"--topology {options.topology} has {chips} chips, which is no multiple of "
            f"--chips_per_host={per_host}"
        )
    return manifest.Pods(
        name=name,
        namespace=options.namespace,
        queue=options.queue,
        image=options.image,
        # Kubernetes would put a variable's value in place of $(NAME).
        command=("nlhf", *(word.replace("$(", "$$(") for word in job)),
        accelerator=options.accelerator,
        topology=options.topology,
        slices=options.slices,
        hosts=chips // per_host,
        chips=per_host,
        max_restarts=options.max_failures,
        grace_seconds=int(options.grace_seconds),
    )


class JobSet:
    """The calls of kubectl about one JobSet."""

    def __init__(self, name: str, options: SimpleNamespace, file: pathlib.Path):
        self.name, self.file, self._options = name, file, options

    def _kubectl(self, *words: str) -> list[str]:
        context = [f"--context={self._options.context}"][: bool(self._options.context)]
        return ["kubectl", *context, f"--namespace={self._options.namespace}", *words]

    def apply(self) -> list[str]:
        """Returns the call that makes the JobSet, or finds it there."""
        return self._kubectl("apply", f"--filename={self.file}")

    def describe(self) -> list[str]:
        """Returns the call that asks for its state."""
        return self._kubectl("get", "jobset", self.name, "--output=json")

    def pods(self) -> list[str]:
        """Returns the call that asks for its pods and their exit codes."""
        chosen = f"--selector=jobset.sigs.k8s.io/jobset-name={self.name}"
        return self._kubectl("get", "pods", chosen, "--output=json")

    def logs(self) -> list[str]:
        """Returns the call that follows all hosts' output, each line with its pod."""
        return self._kubectl(
            "logs",
            f"--selector=jobset.sigs.k8s.io/jobset-name={self.name}",
            "--follow",
            "--prefix",
            "--tail=-1",
            "--max-log-requests=1000",
        )

    def delete(self) -> list[str]:
        """Returns the call that deletes it; its pods get SIGTERM and may save."""
        seconds = int(self._options.grace_seconds) + 60
        return self._kubectl(
            "delete", "jobset", self.name, "--ignore-not-found", f"--timeout={seconds}s"
        )

    def plan(self) -> list[list[str]]:
        """Returns the calls of a run without faults, in order."""
        if self._options.delete:
            return [self.delete()]
        if self._options.detach:
            return [self.apply()]
        follow = [self.apply(), self.describe(), self.logs(), self.pods()]
        return follow if self._options.keep else [*follow, self.delete()]


class Follower:
    """Follows a JobSet to its end and deletes it."""

    def __init__(self, cluster, options, folder, signals):
        self._cluster, self._options, self._signals = cluster, options, signals
        self._call = Caller(signals, options.call_seconds)
        number = processes.next_attempt(folder)
        self._log = folder / f"attempt_{number}" / "pods.log"
        self._tail = Tail(self._log)
        self._reader = None
        self._applied = options.delete

    def run(self) -> int:
        """Applies, follows, deletes; returns the exit code."""
        code = LEFT_BEHIND
        is_left = self._options.keep or self._options.detach
        try:
            code = DONE if self._options.delete else self._apply_and_follow()
        except (Stopped, KeyboardInterrupt):
            number = self._signals.received[0]
            say(f"{number.name}: stopped")
            code = 128 + number
        except SubmitError as error:
            say(str(error))
            code = error.code
        finally:
            if self._reader:
                processes.end_all([self._reader], 1.0)
            # Stopped by the user, a job that is kept would run on unwatched.
            was_stopped = bool(self._signals.received)
            is_clean = (is_left and not was_stopped) or self._delete()
        return code if is_clean else LEFT_BEHIND

    def _apply_and_follow(self) -> int:
        self._applied = True
        for _ in range(TRIES):
            done = self._call(self._cluster.apply())
            if done.code == DONE or done.problem == Problem.REFUSED:
                break
            self._call.sleep(self._options.poll_seconds)
        if done.code != DONE:
            raise SubmitError(f"kubectl refuses: {done.complaint}")
        say(f"{self._cluster.name} is applied; manifest {self._cluster.file}")
        return DONE if self._options.detach else self._follow()

    def _follow(self) -> int:
        shown, silent = "", 0
        while True:
            done = self._call(self._cluster.describe())
            found = done.json()
            silent = 0 if isinstance(found, dict) else silent + 1
            if done.problem == Problem.MISSING:
                say(f"{self._cluster.name} was deleted by someone else")
                return AGAIN
            if silent > self._options.max_failures:
                raise SubmitError(
                    f"the cluster does not answer: {done.complaint}", AGAIN
                )
            state = shown if silent else read_jobset(found)
            if state != shown:
                say(f"{self._cluster.name}: {state}")
                shown = state
            self._copy_logs()
            if state in FINISHED:
                return self._exit_code(FINISHED[state])
            self._call.sleep(self._options.poll_seconds)

    def _copy_logs(self) -> None:
        """Follows the pods; starts anew when they were restarted."""
        if self._reader is None or self._reader.code() is not None:
            if self._reader:
                self._reader.reap()
            command = self._cluster.logs()
            self._reader = processes.start("logs", command, self._log)
        self._tail.copy()

    def _exit_code(self, code: int) -> int:
        """The job's own exit code where a pod that failed still has it."""
        if code == DONE:
            return DONE
        found = self._call(self._cluster.pods()).json() or {}
        codes = list(exit_codes(found))
        return decisive(map(shell_code, codes)) or code

    def _delete(self) -> bool:
        """Deletes the JobSet; whether it is gone."""
        if not self._applied:
            return True
        self._call.shielded = True
        limit = self._options.grace_seconds + 90
        for _ in range(TRIES):
            done = self._call(self._cluster.delete(), limit)
            if done.problem in (Problem.NONE, Problem.MISSING):
                return True
            time.sleep(min(self._options.poll_seconds, 10))
        say(f"NOT DELETED, it may cost money: {calls.shown(self._cluster.delete())}")
        return False


def read_jobset(found: dict) -> str:
    """Returns the state in one word: Completed, Failed, Suspended or Running."""
    status = found.get("status", {})
    for condition in status.get("conditions", []):
        if condition.get("status") == "True" and condition.get("type") in FINISHED:
            return condition["type"]
    if found.get("spec", {}).get("suspend"):
        return "Suspended (waits in the queue)"
    restarts = status.get("restarts", 0)
    return f"Running (restarts: {restarts})" if restarts else "Running"


def exit_codes(found: dict):
    """Yields the exit codes of the containers in a list of pods."""
    for pod in found.get("items", []):
        for container in pod.get("status", {}).get("containerStatuses", []):
            ended = container.get("state", {}).get("terminated")
            if ended:
                yield ended.get("exitCode", INTERNAL)
