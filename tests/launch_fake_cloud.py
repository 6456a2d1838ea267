# SPDX-License-Identifier: Apache-2.0
"""A cloud on PATH: `gcloud` that keeps a state in a folder and follows a history.

The history says how the machines' states go on (`lives`: one list for each time they
are created; every look takes one step, the last state stays) and how calls answer
(`answers`: kind of call -> a list, one for each call; None is the usual answer). Every
call is logged. A trainer that runs on a worker runs on when its connection ends: it is
gone only when it ended by itself, was stopped, or its machine was deleted. A second
one beside it is a violation.
"""

import fcntl
import json
import os
import pathlib
import shlex
import signal
import sys
import time

NEW = {
    "life": -1,
    "seen": 0,
    "exists": False,
    "trainers": {},
    "counts": {},
    "extra": [],
}
READY = {"READY": "HEALTHY", "RUNNING": "HEALTHY"}


class Cloud:
    """The folder with the history, the state and the log; one call at a time."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.history = json.loads((folder / "history.json").read_text())
        self._file = open(folder / "state.json", "a+")  # noqa: SIM115

    def __enter__(self) -> dict:
        # A launcher ends calls by SIGTERM: never between two halves of the state.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.seek(0)
        self._state = json.loads(self._file.read() or "null") or self._first()
        return self._state

    def __exit__(self, *_) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(self._state))
        self._file.flush()
        fcntl.flock(self._file, fcntl.LOCK_UN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _first(self) -> dict:
        state = dict(NEW, exists=bool(self.history.get("exists")))
        state["life"] = 0 if state["exists"] else -1
        state["trainers"] = dict(self.history.get("trainers", {}))
        return state

    def log(self, kind: str, **facts) -> None:
        """Appends a line to the log."""
        with open(self.folder / "calls.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, "at": time.time(), **facts}) + "\n")

    def look(self, state: dict) -> str:
        """Returns the state of the machines, and lets a step go by."""
        lives = self.history.get("lives", [["READY"]])
        life = state.get("turn") or lives[min(state["life"], len(lives) - 1)]
        word = life[min(state["seen"], len(life) - 1)]
        state["seen"] += 1
        return word


def kind_of(words: list[str]) -> str:
    """Returns what a call is about, as histories and expectations name it."""
    group = " ".join(word for word in words[:5] if not word.startswith("-"))
    if " ssh" in group:
        command = next(w for w in words if w.startswith("--command="))
        remote = shlex.split(command.removeprefix("--command="))
        if remote[0] == "python3":
            return "run"
        return "stop" if "stop" in remote[2] else "prepare"
    if " scp" in group:
        return "copy"
    for noun, short in (
        ("queued-resources", "request"),
        ("tpu-vm", "node"),
        ("instance-groups", "group"),
        ("instance-templates", "template"),
        ("resource-policies", "policy"),
    ):
        if noun in group:
            verbs = ("create", "describe", "delete", "list-instances")
            return f"{short}-{next(verb for verb in verbs if verb in words)}"
    return "unknown"


def labels(history: dict) -> dict:
    """Returns the labels of the machines."""
    return {"made-by": "nlhf-submit"} if history.get("ours", True) else {}


def describe(cloud: Cloud, state: dict, kind: str) -> tuple[int, str, str]:
    """Answers a look at a request, a node or a group."""
    if not state["exists"]:
        return 1, "", "ERROR: (gcloud) NOT_FOUND: Resource not found."
    history, workers = cloud.history, cloud.history.get("workers", 2)
    if kind == "group-describe":
        mark = "made-by=nlhf-submit" if history.get("ours", True) else ""
        return 0, json.dumps({"targetSize": workers, "description": mark}), ""
    if kind == "request-describe":
        word, _, reason = cloud.look(state).partition(":")
        state["active"] = word
        found = {
            "state": {"state": word},
            "tpu": {"nodeSpec": [{"node": {"labels": labels(history)}}]},
        }
        if reason:
            found["state"]["failedData"] = {"error": {"message": reason}}
        return 0, json.dumps(found), ""
    if kind == "group-list-instances":
        word, _, doing = cloud.look(state).partition("/")
        rows = [("RUNNING", "NONE")] * (workers - 1) + [(word, doing or "NONE")]
        listed = [
            {"instance": f"zones/z/m-{i}", "instanceStatus": s, "currentAction": a}
            for i, (s, a) in enumerate(rows)
        ]
        return 0, json.dumps(listed), ""
    word, _, health = ("READY" if state.get("active") else cloud.look(state)).partition(
        "/"
    )
    found = {
        "state": word,
        "health": health or READY.get(word, ""),
        "labels": labels(history),
        "networkEndpoints": [{}] * workers,
    }
    return 0, json.dumps(found), ""


def change(cloud: Cloud, state: dict, kind: str) -> tuple[int, str, str]:
    """Answers creation and deletion of the machines and of what goes with them."""
    main = kind.split("-")[0] in ("request", "node", "group")
    if kind.endswith("create"):
        if state["exists"] if main else kind.split("-")[0] in state["extra"]:
            return 1, "", "ERROR: (gcloud) ALREADY_EXISTS: it already exists."
        if main:
            state["exists"], state["seen"] = True, 0
            state["life"] += 1
        else:
            state["extra"].append(kind.split("-")[0])
    elif main:
        if not state["exists"]:
            return 1, "", "ERROR: (gcloud) NOT_FOUND: Resource not found."
        state["exists"], state["trainers"] = False, {}
        state.pop("active", None)
        state.pop("turn", None)
    elif kind.split("-")[0] in state["extra"]:
        state["extra"].remove(kind.split("-")[0])
    else:
        return 1, "", "ERROR: (gcloud) The resource was not found"
    return 0, "", ""


def place_of(words: list[str]) -> str:
    """Returns machine and worker of an ssh call."""
    worker = [word for word in words if word.startswith("--worker=")]
    at = words.index("ssh")
    return (
        words[at + 1] + "/" + (worker[0].removeprefix("--worker=") if worker else "0")
    )


def begin_run(cloud: Cloud, state: dict, words: list[str]) -> str:
    """Notes a trainer's start; two at once is what must never be."""
    place = place_of(words)
    remote = shlex.split(next(w for w in words if w.startswith("--command=")))
    attempt = remote[remote.index("run") + 2]
    other = state["trainers"].get(place)
    if other and other != attempt:
        cloud.log("violation", text=f"{place}: {attempt} beside {other}")
    state["trainers"][place] = attempt
    return place


def wait_for_end(cloud: Cloud, place: str) -> int:
    """A trainer that runs until it is stopped or its machine is gone."""
    while True:
        with cloud as state:
            if not state["exists"]:
                return 255
            if place not in state["trainers"]:
                return 143
        time.sleep(0.02)


def stop(state: dict, words: list[str]) -> None:
    """Ends the trainers of a machine."""
    machine, _, worker = place_of(words).partition("/")
    for place in list(state["trainers"]):
        if place.startswith(f"{machine}/") and worker in ("all", place.split("/")[1]):
            del state["trainers"][place]


def answer(cloud: Cloud, kind: str, words: list[str]) -> tuple[int, str, str]:
    """Returns (exit code, standard output, standard error) of one call."""
    with cloud as state:
        count = state["counts"].get(kind, 0)
        state["counts"][kind] = count + 1
        scripted = cloud.history.get("answers", {}).get(kind, [])
        script = (scripted[count] if count < len(scripted) else None) or {}
        if "life" in script:  # until they are deleted, the machines go another way
            state["turn"], state["seen"] = script["life"], 0
        place = begin_run(cloud, state, words) if kind == "run" else ""
    time.sleep(script.get("seconds", 0))
    if script.get("hang"):
        return wait_for_end(cloud, place), "", ""
    code, errors = script.get("code", 0), script.get("errors", "")
    with cloud as state:
        if place and code != 255:
            state["trainers"].pop(place, None)
        if code or "output" in script:
            return code, script.get("output", ""), errors
        if kind == "stop":
            stop(state, words)
        if kind.endswith(("describe", "list-instances")):
            return describe(cloud, state, kind)
        if kind.endswith(("create", "delete")):
            return change(cloud, state, kind)
    return 0, "step 1\n" if kind == "run" else "", ""


def main() -> int:
    """Answers one call of gcloud."""
    cloud = Cloud(pathlib.Path(os.environ["FAKE_CLOUD"]))
    words = sys.argv[1:]
    kind = kind_of(words)
    cloud.log(kind, words=words)
    code, output, errors = answer(cloud, kind, words)
    sys.stdout.write(output)
    sys.stderr.write(errors)
    return code


if __name__ == "__main__":
    sys.exit(main())
