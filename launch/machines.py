# SPDX-License-Identifier: Apache-2.0
"""What a cloud backend is to the supervisor: states, and argument lists for each step.

A backend of this kind makes lists and reads answers; it decides nothing and runs
nothing but `describe`.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from launch.calls import Done
from launch.flags import Flag

Command = list[str]
Call = Callable[[Sequence[str]], Done]

OWNER_LABEL = "made-by", "nlhf-submit"
MACHINE_FLAGS = (
    Flag("project", "", "the project; else gcloud's own"),
    Flag("zone", "", "the zone, as in us-central2-b", required=True, names_it=True),
    Flag("spot", False, "capacity that may be taken away at any time"),
    Flag("service_account", "", "the account the machines run as; else the default"),
    Flag("keep", False, "leave the machines there at the end"),
    Flag("delete", False, "delete what a killed launcher left of NAME; run nothing"),
    Flag("poll_seconds", 30.0, "how often the machines' state is asked"),
    Flag("wait_seconds", 21600.0, "limit until the machines are there"),
    Flag("call_seconds", 900.0, "limit of one gcloud call other than the job"),
    Flag("pause_seconds", 10.0, "pause before the first restart; then it doubles"),
)


class Action(enum.Enum):
    """What a state asks for."""

    CREATE = "there is nothing"
    WAIT = "wait"
    RUN = "run"
    REPLACE = "delete and create again"
    LEAVE = "save and leave: the machine will go"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a look at the cloud gave.

    Attributes:
      action: what to do about it.
      state: the state in the cloud's own word, with its reason if it gives one.
      workers: (machine, index) of every host; empty while not known.
      ours: whether the label says that this launcher made it.
      failed: whether REPLACE is due to a failure and not to a preemption.
      known: False for a state that stands in no table; it is reported.
      alive: whether a job that runs there still can. An odd health does not end it.
    """

    action: Action
    state: str
    workers: tuple[tuple[str, int], ...] = ()
    ours: bool = True
    failed: bool = False
    known: bool = True
    alive: bool = False


MISSING = Seen(Action.CREATE, "not there")


class Machines(Protocol):
    """One submission's machines."""

    name: str

    def observe(self, call: Call) -> Seen | Done:
        """Returns what is there, or the failed call if the cloud does not say."""

    def planned_workers(self) -> tuple[tuple[str, int], ...]:
        """Returns the workers that `create` will make."""

    def describe(self) -> Command:
        """Returns the call that asks for the state."""

    def create(self) -> list[Command]:
        """Returns the calls that make the machines, in order."""

    def stale(self, created: Command) -> Command | None:
        """Returns the call that deletes what a call of `create` found there already.

        None where it is the machines themselves, or nothing that flags change.
        """

    def delete(self) -> list[Command]:
        """Returns the calls that delete everything `create` makes, in order."""

    def copy(self, workers, source: str, target: str) -> list[Command]:
        """Returns calls that together copy a file to every worker's home folder."""

    def everywhere(self, workers, remote: Command) -> list[Command]:
        """Returns calls that together run a command on every worker."""

    def on(self, worker, remote: Command) -> Command:
        """Returns the call that runs a command on one worker."""

    def environment(self, worker, workers) -> dict[str, str]:
        """Returns what the job must be told on one worker."""
