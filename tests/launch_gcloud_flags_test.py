# SPDX-License-Identifier: Apache-2.0
"""Every generated gcloud call against the flags that gcloud knows.

A real gcloud checks a command line before it asks anybody: with one flag too many it
names that one and stops. It is never given a command line that it would carry out.
"""

import contextlib
import io
import os
import shutil
import subprocess

import pytest

from launch import flags, gce, tpu_vm
from launch.machines import Machines

UNKNOWN = "--no-such-flag-of-ours=1"
TPU = "--backend=tpu_vm --zone=us-central2-b --accelerator_type=v4-16 --version=v"
GCE = "--backend=gce --zone=us-central1-a --image_family=f --image_project=p"
SETTINGS = {
    "node": TPU,
    "node, all flags": f"{TPU} --spot --project=my-p --service_account=s@p.iam",
    "node, reserved": f"{TPU} --reserved",
    "request": f"{TPU} --queued --valid_for=6h --project=my-p",
    "request, reserved": f"{TPU} --queued --reserved --service_account=s@p.iam",
    "request of two": f"{TPU} --slices=2 --spot",
    "group": f"{GCE} --machine_type=n2-standard-8 --size=2 --project=my-p",
    "slice": f"{GCE} --machine_type=ct6e-standard-4t --topology=4x4 --spot",
    "slice, account": f"{GCE} --machine_type=tpu7x-standard-4t --service_account=s@p",
}
EVERYWHERE = {"--zone", "--project", "--quiet"}
# What the Cloud CLI 528 knows of the flags that we use, by command.
KNOWN = {
    "tpus tpu-vm create": {
        *("--accelerator-type", "--version", "--spot", "--reserved", "--labels"),
        "--service-account",
    },
    "tpus tpu-vm describe": {"--format"},
    "tpus tpu-vm delete": set(),
    "tpus tpu-vm scp": {"--worker"},
    "tpus tpu-vm ssh": {"--worker", "--command"},
    "tpus queued-resources create": {
        *("--accelerator-type", "--runtime-version", "--node-id", "--node-count"),
        *("--node-prefix", "--spot", "--reserved", "--labels", "--service-account"),
        *("--valid-until-duration", "--async"),
    },
    "tpus queued-resources describe": {"--format"},
    "tpus queued-resources delete": {"--force"},
    "resource-policies create workload-policy": {
        *("--type", "--accelerator-topology", "--region"),
    },
    "resource-policies delete": {"--region"},
    "instance-templates create": {
        *("--machine-type", "--maintenance-policy", "--provisioning-model"),
        *("--instance-termination-action", "--image-family", "--image-project"),
        *("--boot-disk-size", "--labels", "--service-account", "--scopes"),
    },
    "instance-templates delete": set(),
    "instance-groups managed create": {
        *("--size", "--template", "--workload-policy", "--description"),
    },
    "instance-groups managed describe": {"--format"},
    "instance-groups managed list-instances": {"--format"},
    "instance-groups managed delete": set(),
    "scp": set(),
    "ssh": {"--command"},
}


def machines(text: str) -> Machines:
    """Returns the machines that a command line asks for."""
    backend, options, _ = flags.parse([*text.split(), "--", "train"])
    if backend == "tpu_vm":
        return tpu_vm.TpuVms("run-1", options, 2)
    return gce.Group("run-1", options, gce.num_machines(options))


def commands_of(text: str) -> list[list[str]]:
    """Returns every kind of call these machines are ever given."""
    found = machines(text)
    workers = found.planned_workers()
    asked = []

    def ask(command):
        asked.append(command)
        return tpu_vm.calls.Done(0, '{"state": {"state": "ACTIVE"}}')

    # The fake's answer fits a request only; the others stop at what it has no word of.
    with contextlib.suppress(AttributeError, TypeError):
        found.observe(ask)
    return [
        *found.create(),
        *asked,
        *found.copy(workers[:1], "a.tar.gz", "a.tar.gz"),
        *found.everywhere(workers[:1], ["sh", "-c", 'echo "$1"', "sh", "it's"]),
        found.on(workers[0], ["python3", "x"]),
        *found.delete(),
    ]


def name_of(command: list[str]) -> str:
    """Returns which gcloud command it is; the longest name that fits."""
    words = " ".join(word for word in command[2:] if not word.startswith("-"))
    return max((name for name in KNOWN if words.startswith(name)), key=len)


def flags_of(command: list[str]) -> set[str]:
    """Returns the names of a call's flags."""
    return {w.partition("=")[0] for w in command if w.startswith("--")}


@pytest.mark.parametrize("setting", SETTINGS)
def test_only_flags_that_gcloud_has(setting):
    for command in commands_of(SETTINGS[setting]):
        assert command[:2] == ["gcloud", "compute"]
        used = flags_of(command)
        assert used <= KNOWN[name_of(command)] | EVERYWHERE | {"--region"}, command


def test_the_settings_use_every_command_and_flag_of_the_table():
    every = [c for text in SETTINGS.values() for c in commands_of(text)]
    for name, known in KNOWN.items():
        mine = [flags_of(c) for c in every if name_of(c) == name]
        if name == "instance-groups managed list-instances":
            continue  # asked only after the group's own answer
        assert mine, f"nothing calls {name}"
        assert known <= set().union(*mine), name


def test_a_request_names_one_node_or_counts_several():
    one, two = (
        flags_of(machines(SETTINGS[name]).create()[0])
        for name in ("request", "request of two")
    )
    assert ("--node-id" in one, "--node-count" in one) == (True, False)
    assert ("--node-id" in two, "--node-count" in two) == (False, True)


def distinct() -> dict[str, list[str]]:
    """Returns the generated calls, one of each command and set of flags."""
    found = {}
    for text in SETTINGS.values():
        for command in commands_of(text):
            found[f"{name_of(command)} {sorted(flags_of(command))}"] = command
    group = machines(SETTINGS["group"])
    listing = [*gce.GROUP, "list-instances", group.name, "--zone=z", "--format=json"]
    return found | {"list-instances": listing}


@pytest.mark.battery
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud on PATH")
@pytest.mark.parametrize("command", distinct().values(), ids=distinct())
def test_a_real_gcloud_refuses_nothing_but_the_flag_too_many(command, tmp_path):
    environment = dict(os.environ, CLOUDSDK_CONFIG=str(tmp_path))
    environment["CLOUDSDK_CORE_DISABLE_PROMPTS"] = "1"
    done = subprocess.run(
        [*command, UNKNOWN],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 2
    with io.StringIO(done.stderr) as lines:
        first = next(line for line in lines if line.startswith("ERROR"))
    assert f"unrecognized arguments: {UNKNOWN}" in first, done.stderr
    assert "flag" not in first.replace(UNKNOWN, "").replace("flag too", ""), first
