# SPDX-License-Identifier: Apache-2.0
"""Compute Engine: a managed instance group, of a TPU slice or of any machine type.

Three objects: for a slice a workload policy that names its topology; an instance
template; the group. They are deleted in the reverse order.
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
    Flag("machine_type", "", "of each host, as in ct6e-standard-4t", required=True),
    Flag("topology", "", "of a TPU slice, as in 4x4; gives the number of hosts"),
    Flag("size", 1, "how many machines, where they are no TPU slice", least=1),
    Flag("image_family", "", "the machine image", required=True),
    Flag("image_project", "", "the project the image is from", required=True),
    Flag("disk_gb", 100, "size of the boot disk", least=10),
    *MACHINE_FLAGS,
)
GROUP = ["gcloud", "compute", "instance-groups", "managed"]
TEMPLATE = ["gcloud", "compute", "instance-templates"]
POLICY = ["gcloud", "compute", "resource-policies"]
PORT = 8476

# An instance's own status, while the group is doing nothing about it.
STATUSES = {
    "RUNNING": Action.RUN,
    "PROVISIONING": Action.WAIT,
    "STAGING": Action.WAIT,
    "REPAIRING": Action.WAIT,
    "STOPPING": Action.WAIT,
    "SUSPENDING": Action.WAIT,
    "DEPROVISIONING": Action.WAIT,
    "PENDING": Action.WAIT,
    "PENDING_STOP": Action.WAIT,
    "STOPPED": Action.REPLACE,
    "TERMINATED": Action.REPLACE,
    "SUSPENDED": Action.REPLACE,
}


def submit(options: SimpleNamespace, job: list[str]) -> int:
    """Runs the job on a group of machines; returns the exit code.

    Raises:
      SubmitError: a flag's value cannot be right, or gcloud is not there.
    """
    for flag in (
        "zone",
        "project",
        "machine_type",
        "image_family",
        "image_project",
        "service_account",
    ):
        if getattr(options, flag):
            names.check_place(flag, getattr(options, flag))
    if options.zone.count("-") < 2:
        raise SubmitError(
            f"--zone must be a zone like us-central1-a, got {options.zone!r}"
        )
    size = 1 if options.delete else num_machines(options)
    name = names.job_name(options.name, job)
    return supervisor.submit(Group(name, options, size), options, job)


def num_machines(options: SimpleNamespace) -> int:
    """Returns how many hosts the topology or `--size` asks for.

    Raises:
      SubmitError: they don't go together with the machine type.
    """
    per_host = names.chips_of_machine(options.machine_type)
    if not options.topology:
        if per_host and options.size > 1:
            raise SubmitError(
                f"several {options.machine_type} are a slice: give its --topology, in "
                "place of --size"
            )
        return options.size
    chips = names.num_chips(options.topology)
    if not per_host:
        raise SubmitError(
            f"--topology is for TPU machine types like ct6e-standard-4t, got "
            f"--machine_type={options.machine_type}"
        )
    if chips % per_host:
        raise SubmitError(
            f"--topology {options.topology} has {chips} chips, which is no multiple of "
            f"the {per_host} of a {options.machine_type}"
        )
    hosts = chips // per_host
    if options.size not in (1, hosts):
        raise SubmitError(
            f"--topology {options.topology} on {options.machine_type} has {hosts} "
            f"hosts, got --size={options.size}"
        )
    return hosts


class Group:
    """The managed instance group of one submission."""

    def __init__(self, name: str, options: SimpleNamespace, size: int):
        self.name, self._options, self._size = name, options, size

    def planned_workers(self) -> tuple[tuple[str, int], ...]:
        """Returns stand-ins: the group gives its machines names with random ends."""
        return tuple((f"{self.name}-{i:04d}", i) for i in range(self._size))

    def _project(self) -> Command:
        return [f"--project={self._options.project}"][: bool(self._options.project)]

    def _zone(self) -> Command:
        return [f"--zone={self._options.zone}", *self._project()]

    def _region(self) -> Command:
        return [f"--region={self._options.zone.rpartition('-')[0]}", *self._project()]

    def create(self) -> list[Command]:
        """Returns the calls that make policy, template and group."""
        policy = [
            *POLICY,
            *("create", "workload-policy", self.name, "--type=HIGH_THROUGHPUT"),
            f"--accelerator-topology={self._options.topology}",
            *self._region(),
            "--quiet",
        ]
        group = [
            *(*GROUP, "create", self.name, f"--size={self._size}"),
            f"--template={self.name}",
            f"--description={'='.join(OWNER_LABEL)}",
            *[f"--workload-policy={self.name}"][: bool(self._options.topology)],
            *self._zone(),
            "--quiet",
        ]
        return [*[policy][: bool(self._options.topology)], self._template(), group]

    def _template(self) -> Command:
        options = self._options
        spot = ["--provisioning-model=SPOT", "--instance-termination-action=DELETE"]
        return [
            *(*TEMPLATE, "create", self.name),
            f"--machine-type={options.machine_type}",
            "--maintenance-policy=TERMINATE",
            *(spot if options.spot else []),
            f"--image-family={options.image_family}",
            f"--image-project={options.image_project}",
            f"--boot-disk-size={options.disk_gb}GB",
            f"--labels={'='.join(OWNER_LABEL)}",
            *[f"--service-account={options.service_account}"][
                : bool(options.service_account)
            ],
            "--scopes=cloud-platform",
            *self._project(),
            "--quiet",
        ]

    def stale(self, created: Command) -> Command | None:
        """Returns the deletion of a template: it may be of other flags."""
        if created[: len(TEMPLATE)] != TEMPLATE:
            return None
        return [*TEMPLATE, "delete", self.name, *self._project(), "--quiet"]

    def delete(self) -> list[Command]:
        """Returns the calls that delete group, template and policy."""
        policy = [*POLICY, "delete", self.name, *self._region(), "--quiet"]
        return [
            [*GROUP, "delete", self.name, *self._zone(), "--quiet"],
            [*TEMPLATE, "delete", self.name, *self._project(), "--quiet"],
            *[policy][: bool(self._options.topology or self._options.delete)],
        ]

    def describe(self) -> Command:
        """Returns the call that asks for the group."""
        return [*GROUP, "describe", self.name, *self._zone(), "--format=json"]

    def observe(self, call: Call) -> Seen | calls.Done:
        """Asks for the group, then for its machines; the worst state counts."""
        done = call(self.describe())
        if done.problem == calls.Problem.MISSING:
            return MISSING
        found = done.json()
        if done.code or not isinstance(found, dict):
            return done
        ours = found.get("description", "") == "=".join(OWNER_LABEL)
        done = call(
            [*GROUP, "list-instances", self.name, *self._zone(), "--format=json"]
        )
        listed = done.json()
        if done.code or not isinstance(listed, list):
            return done
        return read_group(listed, found.get("targetSize", self._size), ours)

    def copy(self, workers, source: str, target: str) -> list[Command]:
        """Returns a call for each machine."""
        scp = ["gcloud", "compute", "scp"]
        return [
            [*scp, source, f"{machine}:{target}", *self._zone(), "--quiet"]
            for machine, _ in workers
        ]

    def everywhere(self, workers, remote: Command) -> list[Command]:
        """Returns a call for each machine."""
        return [self.on(worker, remote) for worker in workers]

    def on(self, worker, remote: Command) -> Command:
        """Returns the call for one machine."""
        ssh = ["gcloud", "compute", "ssh", worker[0], *self._zone()]
        return [*ssh, f"--command={shlex.join(remote)}", "--quiet"]

    def environment(self, worker, workers) -> dict[str, str]:
        """Returns who the others are; on TPUs nothing: JAX reads the metadata."""
        if names.chips_of_machine(self._options.machine_type) or len(workers) == 1:
            return {}
        return {
            "NLHF_COORDINATOR": f"{workers[0][0]}:{PORT}",
            "NLHF_NUM_PROCESSES": str(len(workers)),
            "NLHF_PROCESS_ID": str(worker[1]),
        }


def read_group(listed: list[dict], size: int, ours: bool) -> Seen:
    """Returns what a group's list of machines means; they run together or not at all.

    A machine the group is working on is waited for, whatever its status; one that is
    stopped with nothing done about it is not coming back.
    """
    machines = sorted(each.get("instance", "").rpartition("/")[2] for each in listed)
    workers = tuple((machine, index) for index, machine in enumerate(machines))
    if len(listed) != size:
        state = f"{len(listed)} of {size} machines"
        return Seen(Action.WAIT, state, workers, ours)
    states = [read_machine(each) for each in listed]
    order = (Action.REPLACE, Action.WAIT, Action.RUN)
    action, word = min(states, key=lambda state: order.index(state[0]))
    status = word.partition(",")[0]
    known = status in STATUSES
    alive = action == Action.RUN or not known
    return Seen(action, word, workers, ours, known=known, alive=alive)


def read_machine(found: dict) -> tuple[Action, str]:
    """Returns what to do about one machine, and its state for the user."""
    status = found.get("instanceStatus") or "PENDING"
    doing = found.get("currentAction", "NONE")
    errors = found.get("lastAttempt", {}).get("errors", {}).get("errors", [])
    reason = f": {errors[0].get('message', '')}" if errors else ""
    if doing != "NONE":
        return Action.WAIT, f"{status}, {doing}{reason}"
    return STATUSES.get(status, Action.WAIT), f"{status}{reason}"
