# SPDX-License-Identifier: Apache-2.0
"""Compute Engine on a fake cloud, and what a dry run of each cloud backend prints."""

import itertools
import shlex

import pytest

from launch import calls, gce, submit, tpu_vm
from launch.machines import Action
from tests.launch_cloud_tools import JOB, QUICK, TPU, History, check_history
from tests.launch_cloud_tools import found_cloud as found_cloud
from tests.launch_fake_cloud import kind_of

GCE = (
    "--backend=gce",
    "--zone=us-central1-a",
    "--machine_type=n2-standard-8",
    "--size=2",
    "--image_family=debian-12",
    "--image_project=debian-cloud",
    "--name=run-1",
    *QUICK,
)
SLICE = ("--machine_type=ct6e-standard-4t", "--topology=2x4", "--size=2")
UP = "template-create group-create"
DOWN = "group-delete template-delete"
RUN = "copy copy prepare prepare run"
BROKEN = {"code": 1, "errors": "ERROR: (gcloud) internal error 13"}
HISTORIES = {
    "smooth": History({"lives": [["STAGING", "RUNNING"]]}, f"{UP} {RUN} {DOWN}"),
    "a slice": History(
        {"lives": [["RUNNING"]]},
        f"policy-create {UP} {RUN} {DOWN} policy-delete",
        flags=SLICE,
    ),
    "preempted": History(
        {
            "lives": [["RUNNING", "RUNNING", "STOPPING", "TERMINATED"], ["RUNNING"]],
            "answers": {"run": [{"hang": True}, {"hang": True}]},
        },
        f"{UP} {RUN} {DOWN} {UP} {RUN} {DOWN}",
        says="preempted",
    ),
    "the group makes a lost machine anew": History(
        {
            "lives": [
                ["RUNNING", "TERMINATED/RECREATING", "STAGING/CREATING", "RUNNING"]
            ],
            "answers": {"run": [{"hang": True}, {"hang": True}]},
        },
        f"{UP} {RUN} stop stop {RUN} {DOWN}",
    ),
    "a template was left": History(
        {
            "lives": [["RUNNING"]],
            "answers": {"template-create": [{"code": 1, "errors": "already exists"}]},
        },
        # It may be of other flags, and the group that it was for is not there.
        f"template-create template-delete {UP} {RUN} {DOWN}",
        says="deleting what an earlier launcher left: gcloud compute instance-templ",
    ),
    "somebody else's group needs the template": History(
        {
            "answers": {
                "template-create": [{"code": 1, "errors": "already exists"}],
                "template-delete": [
                    {"code": 1, "errors": "ERROR: PERMISSION_DENIED: in use"}
                ],
            },
        },
        f"template-create template-delete {DOWN}",
        code=2,
        says="gcloud refuses: ERROR: PERMISSION_DENIED: in use",
    ),
    "the template is refused": History(
        {
            "answers": {
                "template-create": [{"code": 1, "errors": "ERROR: Invalid value 'x'"}]
            }
        },
        f"template-create {DOWN}",
        code=2,
        says="Invalid value 'x'",
    ),
    "no capacity": History(
        {
            "lives": [["RUNNING"]],
            "answers": {
                "group-create": [
                    {"code": 1, "errors": "ERROR: ZONE_RESOURCE_POOL_EXHAUSTED"}
                ]
            },
        },
        # What exists already is no hindrance the second time.
        f"{UP} {UP} stop stop {RUN} {DOWN}",
    ),
    "somebody else's": History(
        {"exists": True, "ours": False, "lives": [["RUNNING"]]},
        f"stop stop {RUN} stop stop",
        remains=True,
    ),
    "deletion of the template fails once": History(
        {"lives": [["RUNNING"]], "answers": {"template-delete": [BROKEN]}},
        f"{UP} {RUN} {DOWN} {DOWN}",
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_history(name, found_cloud, capfd):
    check_history(found_cloud, GCE, HISTORIES[name], capfd)


@pytest.mark.parametrize("base", [TPU, GCE], ids=["tpu_vm", "gce"])
def test_every_word_of_a_job_arrives_as_it_was(base, found_cloud):
    found_cloud.history({"lives": [["READY" if base is TPU else "RUNNING"]]})
    job = ["train", "--a='it is'", '--b="x"', "--c=$(ls)", "--d=`ls`", "--e=a;b|c&d"]
    job += ["--f=\\", "--g=*", "--", "--h=a b", ""]
    words = [*base, f"--log_dir={found_cloud.folder}/logs", "--", *job]
    assert submit.main(words) == 0
    sent = [call["words"] for call in found_cloud.calls() if call["kind"] == "run"]
    assert len(sent) == 2
    for call in sent:
        (command,) = [word for word in call if word.startswith("--command=")]
        assert shlex.split(command.removeprefix("--command="))[-len(job) :] == job


def calls_of(text: str) -> list[list[str]]:
    """Returns the commands a dry run printed; a script in one is several lines."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " ", True, ""
    commands: list[list[str]] = [[]]
    for token in lexer:
        if set(token) == {"\n"}:
            commands.append([])
        else:
            commands[-1].append(token)
    return [command for command in commands if command]


@pytest.mark.parametrize(
    "words, lives",
    [
        (TPU, ["READY"]),
        ((*TPU, "--queued", "--valid_for=6h", "--spot"), ["ACTIVE"]),
        ((*TPU, "--project=my-project", "--service_account=me@x.iam"), ["READY"]),
        (GCE, ["RUNNING"]),
        ((*[w for w in GCE if "machine_type" not in w], *SLICE[:2]), ["RUNNING"]),
    ],
)
def test_a_dry_run_prints_what_a_smooth_run_calls(words, lives, found_cloud, capfd):
    found_cloud.history({"lives": [lives]})
    job = [*JOB, "--gin.NAME='it is \"quoted\"'"]
    words = [*words, f"--log_dir={found_cloud.folder}/logs"]
    assert submit.main([*words, "--dry_run", *job]) == 0
    assert found_cloud.calls() == [], "a dry run calls nothing"
    planned = calls_of(capfd.readouterr().out)
    assert submit.main([*words, *job]) == 0
    made = [["gcloud", *call["words"]] for call in found_cloud.calls()]
    assert changing(planned) == changing(made)


def changing(commands: list[list[str]]) -> list[list[str]]:
    """Returns the calls other than looks; those that start together, sorted."""
    series = itertools.groupby(map(known, commands), lambda c: kind_of(c[1:]))
    return [
        command
        for kind, together in series
        for command in sorted(together)
        if not kind.endswith(("describe", "list-instances"))
    ]


def known(command: list[str]) -> list[str]:
    """Returns a call without what is known only when it is made."""
    text = "\0".join(command)
    for index in range(2):
        text = text.replace(f"run-1-{index:04d}", f"m-{index}")
    words = text.split("\0")
    return [w.rpartition("/")[2] if w.endswith(".tar.gz") else w for w in words]


@pytest.mark.parametrize(
    "changed, says",
    [
        (("--size=3", *SLICE[:2]), "has 2 hosts, got --size=3"),
        (("--topology=2x4",), "--topology is for TPU machine types"),
        (("--machine_type=ct6e-standard-4t",), "give its --topology, in place of"),
        (("--machine_type=ct6e-standard-8t", "--topology=2x2"), "no multiple of the 8"),
        (("--topology=3x5", SLICE[0]), "each side 1, 2 or a multiple of 4, got '3x5'"),
        (("--zone=us",), "--zone must be a zone like us-central1-a, got 'us'"),
        (("--zone=-rf",), "--zone must be letters, digits"),
        (("--image_family=a b",), "--image_family must be letters"),
        (("--disk_gb=9",), "--disk_gb must be an integer of at least 10, got '9'"),
    ],
)
def test_bad_flags_are_one_sentence(changed, says, found_cloud, capfd):
    own = {word.partition("=")[0] for word in changed}
    words = [word for word in GCE if word.partition("=")[0] not in own]
    assert submit.main([*words, *changed, *JOB]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert says in line
    assert found_cloud.calls() == []


@pytest.mark.parametrize(
    "status, doing, action",
    [
        ("RUNNING", "NONE", Action.RUN),
        ("RUNNING", "VERIFYING", Action.WAIT),
        ("TERMINATED", "NONE", Action.REPLACE),
        ("TERMINATED", "RECREATING", Action.WAIT),
        (None, "CREATING", Action.WAIT),
        ("DREAMING", "NONE", Action.WAIT),
    ],
)
def test_what_a_machine_asks_for(status, doing, action):
    found, word = gce.read_machine({"instanceStatus": status, "currentAction": doing})
    assert found == action
    assert (status or "PENDING") in word


def test_a_machines_error_is_told():
    errors = {"errors": {"errors": [{"message": "no such image"}]}}
    found = {"currentAction": "CREATING", "lastAttempt": errors}
    assert gce.read_machine(found)[1] == "PENDING, CREATING: no such image"


def test_a_group_that_lacks_machines_is_waited_for():
    row = {"instance": "z/m-1", "instanceStatus": "RUNNING", "currentAction": "NONE"}
    assert gce.read_group([row], 2, True).action == Action.WAIT
    seen = gce.read_group([row, row | {"instance": "z/m-0"}], 2, True)
    assert seen.action == Action.RUN
    assert seen.workers == (("m-0", 0), ("m-1", 1)), "by name, whatever the order"


def test_machines_that_are_no_tpus_are_told_of_each_other(found_cloud):
    found_cloud.history({"lives": [["RUNNING"]]})
    submit.main([*GCE, f"--log_dir={found_cloud.folder}/logs", *JOB])
    commands = [c["words"][-2] for c in found_cloud.calls() if c["kind"] == "run"]
    assert len(commands) == 2
    for command in commands:
        assert "--env=NLHF_COORDINATOR=m-0:8476" in command
        assert "--env=NLHF_NUM_PROCESSES=2" in command
    assert {
        f"--env=NLHF_PROCESS_ID={i}" in c for i, c in enumerate(sorted(commands))
    } == {True}


@pytest.mark.parametrize("state", sorted(tpu_vm.NODE_STATES))
def test_every_state_of_a_node_has_its_action(state):
    wanted = {
        "READY": Action.RUN,
        "PREEMPTED": Action.REPLACE,
        "TERMINATED": Action.REPLACE,
    }
    seen = tpu_vm.read_node("n", {"state": state})
    assert seen.action == wanted.get(state, Action.WAIT)
    assert seen.alive == (state == "READY")
    assert seen.known


@pytest.mark.parametrize(
    "health, action, alive",
    [
        ("HEALTHY", Action.RUN, True),
        ("TIMEOUT", Action.WAIT, True),
        ("UNHEALTHY_TENSORFLOW", Action.WAIT, True),
        ("UNHEALTHY_MAINTENANCE", Action.LEAVE, True),
    ],
)
def test_health_decides_at_the_start_and_ends_no_running_job(health, action, alive):
    seen = tpu_vm.read_node("n", {"state": "READY", "health": health})
    assert (seen.action, seen.alive) == (action, alive)


@pytest.mark.parametrize("state", sorted(tpu_vm.REQUEST_STATES))
def test_every_state_of_a_request_has_its_action(state):
    wanted = {
        "ACTIVE": Action.RUN,
        "SUSPENDED": Action.REPLACE,
        "FAILED": Action.REPLACE,
    }
    seen = tpu_vm.read_request({"state": {"state": state}})
    assert seen.action == wanted.get(state, Action.WAIT)
    assert seen.failed == (state == "FAILED")


def test_several_nodes_are_as_good_as_the_worst():
    nodes = [
        tpu_vm.read_node(n, {"state": s})
        for n, s in (("a", "READY"), ("b", "PREEMPTED"))
    ]
    seen = tpu_vm.worst(nodes)
    assert (seen.action, seen.state, seen.alive) == (Action.REPLACE, "PREEMPTED", False)


@pytest.mark.parametrize(
    "errors, problem",
    [
        ("ERROR: RESOURCE_EXHAUSTED: Quota limit 'x' has been exceeded", "REFUSED"),
        ("ERROR: RESOURCE_EXHAUSTED: no room", "CAPACITY"),
        ("There is no more capacity in the zone", "CAPACITY"),
        ("NOT_FOUND: Resource 'x' was not found", "MISSING"),
        ("The resource 'x' already exists", "EXISTS"),
        ("You do not currently have an active account selected.", "REFUSED"),
        ("something else", "OTHER"),
    ],
)
def test_what_a_failed_call_means(errors, problem):
    assert calls.Done(1, "", errors).problem == calls.Problem[problem]
    assert calls.Done(255, "", errors).problem == calls.Problem.CONNECTION
    assert calls.Done(0, "", errors).problem == calls.Problem.NONE
