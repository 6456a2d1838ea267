# SPDX-License-Identifier: Apache-2.0
"""Histories of a cloud: the calls that each needs, nothing left, one trainer."""

import pytest

from launch import submit
from tests.launch_cloud_tools import TPU, History, check_history
from tests.launch_cloud_tools import found_cloud as found_cloud

UP = "node-create"
SEND = "copy prepare"
RUN = "copy prepare run"
DOWN = "node-delete"
STOCKOUT = {"code": 1, "errors": "ERROR: There is no more capacity in the zone"}
BROKEN = {"code": 1, "errors": "ERROR: (gcloud) internal error 13"}
DROPPED = {"code": 255, "errors": "ssh: connect: timed out"}


def answers(**kinds) -> dict:
    """Returns the history in which some calls answer so; `_` stands for a dash."""
    return {"answers": {kind.replace("_", "-"): list(a) for kind, a in kinds.items()}}


def preempted(kind: str, code: int = 1) -> dict:
    """Returns the answer of a call during which the machines are taken away."""
    return {"code": code, "errors": "ERROR: gone", "life": ["PREEMPTED"]}


AGAIN = f"{DOWN} {UP} {RUN} {DOWN}"
REQUEST = ("--queued",)
HISTORIES = {
    "smooth": History({"lives": [["CREATING", "READY"]]}, f"{UP} {RUN} {DOWN}"),
    "kept": History({}, f"{UP} {RUN} stop", flags=("--keep",), remains=True),
    "already there": History({"exists": True}, f"stop {RUN} {DOWN}"),
    "already there with a trainer": History(
        {"exists": True, "trainers": {"run-1/0": "9", "run-1/1": "9"}},
        f"stop {RUN} {DOWN}",
    ),
    "somebody else's": History(
        {"exists": True, "ours": False}, f"stop {RUN} stop", remains=True
    ),
    "somebody else's, dead": History(
        {"exists": True, "ours": False, "lives": [["PREEMPTED"]]},
        "",
        code=2,
        says="was not made by this launcher",
        remains=True,
    ),
    "made by another call meanwhile": History(
        answers(
            node_describe=[{"code": 1, "errors": "NOT_FOUND"}],
        )
        | {"exists": True},
        f"{UP} stop {RUN} {DOWN}",
    ),
    "somebody else's, made meanwhile": History(
        answers(node_describe=[{"code": 1, "errors": "NOT_FOUND"}])
        | {"exists": True, "ours": False},
        f"{UP} stop {RUN} stop",
        remains=True,
    ),
    "quota refused": History(
        answers(
            node_create=[
                {"code": 1, "errors": "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUS'"}
            ]
        ),
        f"{UP} {DOWN}",
        code=2,
        says="Quota limit 'TPUS'",
    ),
    "not allowed": History(
        answers(node_create=[{"code": 1, "errors": "ERROR: PERMISSION_DENIED: no"}]),
        f"{UP} {DOWN}",
        code=2,
        says="PERMISSION_DENIED",
    ),
    "not allowed to look": History(
        answers(node_describe=[{"code": 1, "errors": "ERROR: PERMISSION_DENIED: no"}]),
        "",
        code=2,
        says="PERMISSION_DENIED",
    ),
    "no capacity at first": History(
        answers(node_create=[STOCKOUT]), f"{UP} {UP} {RUN} {DOWN}"
    ),
    "never capacity": History(
        answers(node_create=[STOCKOUT] * 9),
        f"{UP} {UP} {UP} {DOWN}",
        code=42,
        says="no restart is left after a preemption",
    ),
    "creation fails once": History(
        answers(node_create=[BROKEN]), f"{UP} {UP} {RUN} {DOWN}"
    ),
    "the state is not told once": History(
        answers(node_describe=[BROKEN, {"output": "<html>"}]), f"{UP} {RUN} {DOWN}"
    ),
    "preempted while it is made": History(
        {"lives": [["CREATING", "PREEMPTED"], ["READY"]]}, f"{UP} {AGAIN}"
    ),
    "preempted at the copy": History(
        answers(copy=[preempted("copy")] * 3) | {"lives": [["READY"]]},
        f"{UP} copy copy copy {DOWN} {UP} {RUN} {DOWN}",
    ),
    "preempted at the installation": History(
        answers(prepare=[preempted("prepare", 255)] * 3),
        f"{UP} copy prepare prepare prepare {DOWN} {UP} {RUN} {DOWN}",
    ),
    "preempted while running": History(
        answers(run=[{"hang": True}, {"hang": True, "life": ["PREEMPTED"]}]),
        f"{UP} {RUN} {AGAIN}",
        says="preempted",
    ),
    "preempted and the connection gone": History(
        answers(run=[preempted("run", 255), {"code": 255}]), f"{UP} {RUN} {AGAIN}"
    ),
    "terminated while running": History(
        answers(run=[{"hang": True, "life": ["TERMINATED"]}, {"hang": True}]),
        f"{UP} {RUN} {AGAIN}",
    ),
    "always preempted": History(
        answers(run=[{"hang": True, "life": ["READY", "READY", "PREEMPTED"]}] * 9),
        f"{UP} {RUN} {DOWN} {UP} {RUN} {DOWN} {UP} {RUN} {DOWN}",
        code=42,
        says="the same command goes on",
    ),
    "repaired under the job": History(
        answers(
            run=[{"hang": True, "life": ["REPAIRING"] * 3 + ["READY"]}, {"hang": True}]
        ),
        f"{UP} {RUN} stop {RUN} {DOWN}",
    ),
    "maintenance announced": History(
        answers(
            run=[
                {"hang": True, "life": ["READY/UNHEALTHY_MAINTENANCE"] * 2 + ["READY"]},
                {"hang": True},
            ]
        ),
        f"{UP} {RUN} stop stop {RUN} {DOWN}",
        says="maintenance: the job saves and stops",
    ),
    "a state nobody knows": History(
        {"lives": [["DREAMING", "READY", "DREAMING", "READY"]]},
        f"{UP} {RUN} {DOWN}",
        says="DREAMING (?)",
    ),
    "never up": History(
        {"lives": [["STOPPED"]]},
        f"{UP} {DOWN}",
        code=42,
        says="is STOPPED after",
        flags=("--wait_seconds=0.3",),
    ),
    "connection lost": History(
        answers(run=[DROPPED, DROPPED]), f"{UP} {RUN} stop {RUN} {DOWN}"
    ),
    "connection lost, not to be stopped": History(
        answers(run=[DROPPED, DROPPED], stop=[DROPPED] * 3),
        f"{UP} {RUN} stop stop stop {AGAIN}",
        says="not to be reached",
        flags=("--max_failures=3",),
    ),
    "copy fails twice": History(
        answers(copy=[BROKEN, BROKEN]), f"{UP} copy copy {RUN} {DOWN}"
    ),
    "copy never works": History(
        answers(copy=[BROKEN] * 99),
        f"{UP} copy copy copy stop copy copy copy stop copy copy copy {DOWN}",
        code=42,
        says="copying the code failed: ERROR: (gcloud) internal error 13",
    ),
    "installation refused": History(
        answers(prepare=[{"code": 2, "errors": "here: Python is needed"}]),
        f"{UP} {SEND} {DOWN}",
        code=2,
        says="installing failed: here: Python is needed",
    ),
    "deletion fails twice": History(
        answers(node_delete=[BROKEN, BROKEN]), f"{UP} {RUN} {DOWN} {DOWN} {DOWN}"
    ),
    "deletion never works": History(
        answers(node_delete=[BROKEN] * 9),
        f"{UP} {RUN} {DOWN} {DOWN} {DOWN}",
        code=1,
        says="NOT DELETED, it may cost money: gcloud compute tpus tpu-vm delete run-1",
        remains=True,
    ),
    "bad data": History(
        answers(run=[{"code": 65}, {"code": 65}]),
        f"{UP} {RUN} {DOWN}",
        code=65,
        says="exit code 65",
    ),
    "a defect": History(answers(run=[{"code": 70}] * 2), f"{UP} {RUN} {DOWN}", code=70),
    "killed once": History(
        answers(run=[{"code": 137}] * 2), f"{UP} {RUN} stop {RUN} {DOWN}"
    ),
    "asks for restarts for ever": History(
        answers(run=[{"code": 42}] * 99),
        f"{UP} {RUN} stop {RUN} stop {RUN} {DOWN}",
        code=42,
        says="no restart is left after a failure",
    ),
    "dies at the same step again and again": History(
        answers(run=[{"code": 137, "output": "train 12/500  0:41 left  x 1\n"}] * 9),
        f"{UP} {RUN} stop {RUN} stop {RUN} {DOWN}",
        code=137,
        says="exit code 137 after step 12 3 times in a row",
        flags=("--max_failures=9",),
    ),
    "dies, but further on each time": History(
        answers(
            run=[
                {"code": 137, "output": f"train {step}/500  0:41 left\n"}
                for step in range(12, 99)
            ]
        ),
        f"{UP} {RUN} stop {RUN} stop {RUN} stop {RUN} {DOWN}",
        code=42,
        says="no restart is left after a failure",
        flags=("--max_failures=3",),
    ),
    "loses its connection at the same step": History(
        answers(run=[DROPPED | {"output": "train 12/500  0:41 left\n"}] * 99),
        f"{UP} {RUN} stop {RUN} stop {RUN} stop {RUN} {DOWN}",
        code=42,
        says="no restart is left after a failure",
        flags=("--max_failures=3",),
    ),
    "one worker dies": History(
        answers(run=[{"hang": True}, {"code": 137}]),
        f"{UP} {RUN} stop {RUN} {DOWN}",
        says="ended with exit code 137",
    ),
    "waits in the queue": History(
        {"lives": [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]]},
        f"request-create {RUN} request-delete",
        flags=REQUEST,
    ),
    "the request fails": History(
        {"lives": [["CREATING", "FAILED:no such version"], ["ACTIVE"]]},
        f"request-create request-delete request-create {RUN} request-delete",
        says="FAILED: no such version",
        flags=REQUEST,
    ),
    "the request always fails": History(
        {"lives": [["FAILED:no such version"]]},
        "request-create request-delete request-create request-delete request-create "
        "request-delete",
        code=42,
        says="no restart is left after a failure: FAILED: no such version",
        flags=REQUEST,
    ),
    "the request is suspended": History(
        {"lives": [["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], ["ACTIVE"]]}
        | answers(run=[{"hang": True}, {"hang": True}]),
        f"request-create {RUN} request-delete request-create {RUN} request-delete",
        flags=REQUEST,
    ),
    "two slices": History(
        {"workers": 2, "lives": [["ACTIVE"]]},
        "request-create copy copy prepare prepare run request-delete",
        flags=("--slices=2",),
    ),
    "deleted by name": History(
        {"exists": True, "trainers": {"run-1/0": "3"}},
        "request-delete node-delete",
        flags=("--delete",),
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_history(name, found_cloud, capfd):
    check_history(found_cloud, TPU, HISTORIES[name], capfd)


def test_all_that_a_failed_step_said_is_kept(found_cloud, capfd):
    answer = {"code": 2, "output": "Collecting x", "errors": "one line\nanother line"}
    found_cloud.history(answers(prepare=[answer]))
    words = [*TPU, f"--log_dir={found_cloud.folder}/logs", "--", "train"]
    assert submit.main(words) == 2
    kept = (found_cloud.folder / "logs" / "run-1" / "last_failure.log").read_text()
    assert kept == "Collecting x\none line\nanother line\n"
