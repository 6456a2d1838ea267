# SPDX-License-Identifier: Apache-2.0
"""TPU VMs of the Cloud TPU API: a node at once, or a queued request for slices.

The states and flags are those of the Cloud CLI's own help. That API is in maintenance:
newer TPUs come through Compute Engine and GKE only.
"""

import shlex
from types import SimpleNamespace

from launch import calls, names, supervisor
from launch.errors import SubmitError
from launch.flags import Flag
from launch.machines import (
    MACHINE_FLAGS,
    MISSING,
    OWNER_LABEL,
    Action,
    Call,
    Command,
    Seen,
)

FLAGS = (
    Flag(
        "accelerator_type", "", "the slice, as in v4-32 or v5litepod-16", required=True
    ),
    Flag("version", "", "the machine image, as in tpu-ubuntu2204-base", required=True),
    Flag("queued", False, "wait in the queue for capacity, rather than fail without"),
    Flag("slices", 1, "how many slices; more than one are always queued", least=1),
    Flag("reserved", False, "take them from the project's reservation"),
    Flag("valid_for", "", "how long a queued request may wait, as in 6h"),
    *MACHINE_FLAGS,
)
REQUEST = ["gcloud", "compute", "tpus", "queued-resources"]
NODE = ["gcloud", "compute", "tpus", "tpu-vm"]

REQUEST_STATES = {
    "CREATING": Action.WAIT,
    "ACCEPTED": Action.WAIT,
    "WAITING_FOR_RESOURCES": Action.WAIT,
    "PROVISIONING": Action.WAIT,
    "ACTIVE": Action.RUN,
    "SUSPENDING": Action.WAIT,
    "SUSPENDED": Action.REPLACE,
    "FAILED": Action.REPLACE,
    "DELETING": Action.WAIT,
}
# A node that somebody stopped or hid is waited for, not deleted: that was deliberate.
NODE_STATES = {
    "READY": Action.RUN,
    "PREEMPTED": Action.REPLACE,
    "TERMINATED": Action.REPLACE,
    **dict.fromkeys(
        (
            "CREATING",
            "RESTARTING",
            "REIMAGING",
            "DELETING",
            "REPAIRING",
            "STOPPED",
            "STOPPING",
            "STARTING",
            "HIDING",
            "HIDDEN",
            "UNHIDING",
        ),
        Action.WAIT,
    ),
}
GONE_SOON = "UNHEALTHY_MAINTENANCE"


def submit(options: SimpleNamespace, job: list[str]) -> int:
    """Runs the job on TPU VMs; returns the exit code.

    Raises:
      SubmitError: a flag's value cannot be right, or gcloud is not there.
    """
    num_hosts = 1 if options.delete else names.num_hosts(options.accelerator_type)
    for flag in ("zone", "project", "version", "service_account"):
        if getattr(options, flag):
            names.check_place(flag, getattr(options, flag))
    if options.spot and options.reserved:
        raise SubmitError("--spot and --reserved exclude each other")
    if options.valid_for and not (options.queued or options.slices > 1):
        raise SubmitError("--valid_for is for a queued request: add --queued")
    if options.valid_for:
        names.check_place("valid_for", options.valid_for)
    name = names.job_name(options.name, job)
    return supervisor.submit(TpuVms(name, options, num_hosts), options, job)


class TpuVms:
    """The nodes of one submission, and the request they come from if they queue."""

    def __init__(self, name: str, options: SimpleNamespace, num_hosts: int):
        self.name, self._options, self._num_hosts = name, options, num_hosts
        self._queued = options.queued or options.slices > 1

    def nodes(self) -> list[str]:
        """Returns the nodes' names; several have a number behind."""
        if self._options.slices == 1:
            return [self.name]
        return [f"{self.name}-{index}" for index in range(self._options.slices)]

    def planned_workers(self) -> tuple[tuple[str, int], ...]:
        """Returns the workers that the accelerator type promises."""
        hosts = range(self._num_hosts)
        return tuple((node, host) for node in self.nodes() for host in hosts)

    def _where(self) -> Command:
        project = self._options.project
        return [
            f"--zone={self._options.zone}",
            *[f"--project={project}"][: bool(project)],
        ]

    def create(self) -> list[Command]:
        """Returns the one call that makes the node or files the request."""
        options = self._options
        common = [
            *self._where(),
            f"--accelerator-type={options.accelerator_type}",
            f"--labels={'='.join(OWNER_LABEL)}",
            *["--spot"][: options.spot],
            *["--reserved"][: options.reserved],
            *[f"--service-account={options.service_account}"][
                : bool(options.service_account)
            ],
            "--quiet",
        ]
        if not self._queued:
            return [
                [*NODE, "create", self.name, f"--version={options.version}", *common]
            ]
        several = [f"--node-count={options.slices}", f"--node-prefix={self.name}"]
        return [
            [
                *REQUEST,
                "create",
                self.name,
                *(several if options.slices > 1 else [f"--node-id={self.name}"]),
                f"--runtime-version={options.version}",
                *common,
                *[f"--valid-until-duration={options.valid_for}"][
                    : bool(options.valid_for)
                ],
                "--async",
            ]
        ]

    def stale(self, created: Command) -> Command | None:
        """Returns nothing: the machines are all that is made."""
        del created

    def delete(self) -> list[Command]:
        """Returns the call that deletes the request with its nodes, or the node.

        Both where only a name is given.
        """
        request = [*REQUEST, "delete", self.name, *self._where(), "--force", "--quiet"]
        node = [*NODE, "delete", self.name, *self._where(), "--quiet"]
        if self._options.delete:
            return [request, node]
        return [request if self._queued else node]

    def describe(self) -> Command:
        """Returns the call that asks for the request, or for the node."""
        return self._describe(REQUEST if self._queued else NODE, self.name)

    def _describe(self, kind: Command, name: str) -> Command:
        return [*kind, "describe", name, *self._where(), "--format=json"]

    def observe(self, call: Call) -> Seen | calls.Done:
        """Asks for the request first, then for its nodes; the worst state counts."""
        if not self._queued:
            return self._observe_nodes(call)
        done = call(self.describe())
        if done.problem == calls.Problem.MISSING:
            return MISSING
        found = done.json()
        if done.code or not isinstance(found, dict):
            return done
        seen = read_request(found)
        if seen.action != Action.RUN:
            return seen
        nodes = self._observe_nodes(call)
        if isinstance(nodes, Seen) and nodes.action == Action.CREATE:
            # An active request without its node: gone since, or not there yet.
            return Seen(Action.WAIT, "ACTIVE without its nodes")
        return nodes

    def _observe_nodes(self, call: Call) -> Seen | calls.Done:
        seen = []
        for node in self.nodes():
            done = call(self._describe(NODE, node))
            if done.problem == calls.Problem.MISSING:
                return MISSING
            found = done.json()
            if done.code or not isinstance(found, dict):
                return done
            seen.append(read_node(node, found))
        return worst(seen)

    def copy(self, workers, source: str, target: str) -> list[Command]:
        """Returns one call for each node: all its workers at once."""
        return [
            [
                *NODE,
                "scp",
                source,
                f"{node}:{target}",
                "--worker=all",
                *self._where(),
                "--quiet",
            ]
            for node in dict.fromkeys(node for node, _ in workers)
        ]

    def everywhere(self, workers, remote: Command) -> list[Command]:
        """Returns one call for each node: all its workers at once."""
        return [
            self._ssh(node, "all", remote)
            for node in dict.fromkeys(node for node, _ in workers)
        ]

    def on(self, worker, remote: Command) -> Command:
        """Returns a call of its own: calls to all show nothing until all have ended."""
        return self._ssh(worker[0], str(worker[1]), remote)

    def _ssh(self, node: str, worker: str, remote: Command) -> Command:
        return [
            *NODE,
            "ssh",
            node,
            f"--worker={worker}",
            *self._where(),
            f"--command={shlex.join(remote)}",
            "--quiet",
        ]

    def environment(self, worker, workers) -> dict[str, str]:
        """Returns nothing: JAX reads the metadata of a TPU VM by itself."""
        return {}


def read_request(found: dict) -> Seen:
    """Returns what a queued request's description means."""
    state = found.get("state", {})
    word = state.get("state", "UNKNOWN")
    reason = state.get("failedData", {}).get("error", {}).get("message", "")
    specs = found.get("tpu", {}).get("nodeSpec", [])
    labels = [spec.get("node", {}).get("labels", {}) for spec in specs]
    return Seen(
        REQUEST_STATES.get(word, Action.WAIT),
        f"{word}: {reason}" if reason else word,
        ours=any(_is_ours(each) for each in labels),
        failed=word == "FAILED",
        known=word in REQUEST_STATES,
        alive=word not in REQUEST_STATES,
    )


def read_node(node: str, found: dict) -> Seen:
    """Returns what a node's description means."""
    word, health = found.get("state", "UNKNOWN"), found.get("health", "")
    action = NODE_STATES.get(word, Action.WAIT)
    if word == "READY" and health == GONE_SOON:
        action = Action.LEAVE
    elif word == "READY" and health not in ("", "HEALTHY", "HEALTH_UNSPECIFIED"):
        action = Action.WAIT
    hosts = range(len(found.get("networkEndpoints", [])) or 1)
    return Seen(
        action,
        word if not health or word != "READY" else f"{word}, {health}",
        workers=tuple((node, host) for host in hosts),
        ours=_is_ours(found.get("labels", {})),
        known=word in NODE_STATES,
        alive=word == "READY" or word not in NODE_STATES,
    )


def _is_ours(labels: dict) -> bool:
    return labels.get(OWNER_LABEL[0]) == OWNER_LABEL[1]


def worst(seen: list[Seen]) -> Seen:
    """Returns the state of several nodes together: all run, or the worst one counts."""
    order = (Action.REPLACE, Action.LEAVE, Action.WAIT, Action.RUN)
    first = min(seen, key=lambda one: order.index(one.action))
    workers = tuple(worker for one in seen for worker in one.workers)
    return Seen(
        first.action,
        first.state,
        workers=workers,
        ours=all(one.ours for one in seen),
        failed=first.failed,
        known=all(one.known for one in seen),
        alive=all(one.alive for one in seen),
    )
