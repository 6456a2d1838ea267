# SPDX-License-Identifier: Apache-2.0
"""GKE: the manifest against schemas, and the follower against a fake kubectl."""

import copy
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from launch import gke, manifest, submit
from tests.jobset_schema import JOBSET, complaints
from tests.launch_cloud_tools import put_on_path

ROOT = pathlib.Path(__file__).resolve().parent.parent
GKE = (
    "--backend=gke",
    "--image=europe-docker.pkg.dev/p/r/nlhf:1",
    "--accelerator=tpu-v5-lite-podslice",
    "--topology=4x4",
    "--name=run-1",
    "--poll_seconds=0.02",
    "--max_failures=3",
)
JOB = ("--", "train", "--gin.X='it is \"quoted\" $(HOME)'")
# Answers of `get jobset` one after the other, the last for ever; everything is logged.
KUBECTL = """
import json, os, pathlib, sys, time
folder = pathlib.Path(os.environ["FAKE_CLOUD"])
history = json.loads((folder / "history.json").read_text())
verb = next(w for w in sys.argv[1:] if not w.startswith("-"))
kind = "pods" if "pods" in sys.argv else verb
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps([kind, sys.argv[1:]]) + chr(10))
seen = [json.loads(line)[0] for line in open(folder / "calls.jsonl")].count(kind)
answers = history.get(kind, [{}])
answer = answers[min(seen, len(answers)) - 1]
time.sleep(answer.get("seconds", 0))
sys.stderr.write(answer.get("errors", ""))
if kind == "get":
    print(json.dumps(answer.get("output", {})))
elif kind == "pods":
    ends = [{"state": {"terminated": {"exitCode": c}}} for c in answer["codes"]]
    pods = [{"status": {"containerStatuses": [end]}} for end in ends]
    print(json.dumps({"items": pods}))
elif kind == "logs":
    print("[pod/run-1-slice-0-0] step 1")
sys.exit(answer.get("code", 0))
"""


def pods(**changed) -> manifest.Pods:
    """Returns the settings of a manifest."""
    values = {
        "name": "run-1",
        "namespace": "default",
        "queue": "",
        "image": "image:1",
        "command": ("nlhf", "train"),
        "accelerator": "tpu-v6e-slice",
        "topology": "4x4",
        "slices": 2,
        "hosts": 4,
        "chips": 4,
        "max_restarts": 10,
        "grace_seconds": 300,
    }
    return manifest.Pods(**values | changed)


@pytest.mark.parametrize("queue", ["", "team-queue"])
def test_the_manifest_fits_our_schema(queue):
    found = manifest.jobset(pods(queue=queue))
    assert complaints(found, JOBSET) == []
    labels = found["metadata"]["labels"]
    assert labels.get("kueue.x-k8s.io/queue-name", "") == queue


def wrong(change) -> list[str]:
    """Returns what our schema says of a manifest after a change."""
    found = copy.deepcopy(manifest.jobset(pods()))
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    change(found, job, job["template"]["spec"])
    return complaints(found, JOBSET)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s, j, p: p.update(restartPolcy="Never"), "restartPolcy is not known"),
        (lambda s, j, p: p.update(restartPolicy="OnFailure"), "'OnFailure' is none of"),
        (lambda s, j, p: j.update(backoffLimit=3), "3 is none of [0]"),
        (lambda s, j, p: j.pop("completions"), "completions is missing"),
        (lambda s, j, p: p["containers"][0].update(image=""), "does not match"),
        (lambda s, j, p: p["containers"][0].update(command=[1]), "1 is no string"),
        (lambda s, j, p: p["containers"].clear(), "0 items"),
        (lambda s, j, p: s["metadata"].update(name="Run 1"), "'Run 1' does not match"),
        (lambda s, j, p: s["spec"]["failurePolicy"].update(maxRestarts="3"), "integer"),
        (lambda s, j, p: s["spec"]["failurePolicy"].update(maxRestarts=-1), "range"),
        (lambda s, j, p: s.update(apiVersion="batch/v1"), "'batch/v1' is none of"),
        (
            lambda s, j, p: j["podFailurePolicy"]["rules"][1]["onExitCodes"].update(
                values=[42, 41]
            ),
            "not increasing",
        ),
    ],
)
def test_our_schema_sees_every_kind_of_mistake(change, complaint):
    (found,) = wrong(change)
    assert complaint in found


@pytest.mark.parametrize("version", ["1.29", "1.32", "1.37"])
def test_the_inner_job_fits_the_schemas_of_kubernetes(version):
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "run-1-slice-0"},
        "spec": manifest.job_spec(pods()),
    }
    assert validator.validate(job, version, strict=True) == version
    job["spec"]["template"]["spec"]["restartPolcy"] = "Never"
    with pytest.raises(validator.ValidationError, match="restartPolcy"):
        validator.validate(job, version, strict=True)


def test_what_restarts_and_what_does_not():
    spec = manifest.job_spec(pods())
    count, fail = spec["podFailurePolicy"]["rules"]
    # The first rule that fits decides, and a preempted pod has an exit code too.
    assert count["onPodConditions"][0]["type"] == "DisruptionTarget"
    codes = fail["onExitCodes"]
    final = [c for c in range(1, 256) if c not in codes["values"]]
    assert {1, 2, 65, 66, 70} <= set(final)
    assert not {42, 134, 137, 143} & set(final)
    policy = manifest.jobset(pods())["spec"]["failurePolicy"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["rules"][0]["action"] == "FailJobSet"
    assert policy["restartStrategy"] == "BlockingRecreate"


@pytest.mark.parametrize(
    "accelerator, topology, per_host, hosts, chips",
    [
        ("tpu-v5-lite-podslice", "4x4", 4, 4, 4),
        ("tpu-v5-lite-podslice", "2x4", 8, 1, 8),
        ("tpu-v6e-slice", "1x1", 4, 1, 1),
        ("tpu-v4-podslice", "4x4x4", 4, 16, 4),
    ],
)
def test_hosts_and_chips(accelerator, topology, per_host, hosts, chips, capsys):
    changed = [f"--accelerator={accelerator}", f"--topology={topology}"]
    base = [word for word in GKE if not word.startswith(("--acc", "--top"))]
    words = [*base, *changed, f"--chips_per_host={per_host}", "--dry_run", *JOB]
    assert submit.main(words) == 0
    output = capsys.readouterr().out
    found = json.loads(output[output.index("{\n") :])
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    container = job["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}


@pytest.mark.parametrize(
    "changed, says",
    [
        ("--accelerator=tpu-v6e", "(did you mean 'tpu-v6e-slice'?)"),
        ("--topology=4x4x4", "--topology must be AxB like 4x4"),
        ("--topology=1x2", ""),
        ("--chips_per_host=3", "no multiple of --chips_per_host=3"),
        ("--image=a b", "--image must be letters"),
        ("--image=-rm", "beginning with a letter or digit"),
    ],
)
def test_bad_flags_are_one_sentence(changed, says, capsys):
    base = [word for word in GKE if word.partition("=")[0] not in changed]
    code = submit.main([*base, changed, "--dry_run", *JOB])
    errors = capsys.readouterr().err
    assert says in errors
    assert (code, len(errors.splitlines())) == ((2, 1) if says else (0, 0))


class Cluster:
    """A fake kubectl on PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.bin = put_on_path(folder, "kubectl", KUBECTL)

    def history(self, **kinds) -> None:
        """Sets the answers of each kind of call."""
        (self.folder / "history.json").write_text(json.dumps(kinds))

    def calls(self) -> list:
        """Returns (kind, words) of every call."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def story(self) -> str:
        """Returns the calls that change something, or ask how it ended."""
        return " ".join(kind for kind, _ in self.calls() if kind not in ("get", "logs"))

    def environment(self) -> dict:
        """What a launcher must find in its environment."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return dict(os.environ, PATH=path, FAKE_CLOUD=str(self.folder))


def state(word: str = "", **status) -> dict:
    """Returns an answer about the JobSet."""
    done = [{"type": word, "status": "True"}] if word else []
    return {"output": {"spec": {}, "status": {"conditions": done} | status}}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Returns a cluster whose kubectl the launcher finds."""
    found = Cluster(tmp_path)
    for name in ("PATH", "FAKE_CLOUD"):
        monkeypatch.setenv(name, found.environment()[name])
    return found


HISTORIES = {
    "completes": (
        {"get": [state(), state(), state("Completed")]},
        (),
        (0, "apply delete", "run-1: Completed"),
    ),
    "fails by a mistake": (
        {"get": [state("Failed")], "pods": [{"codes": [0, 70, 65, 137]}]},
        (),
        (65, "apply pods delete", "run-1: Failed"),
    ),
    "fails without a code": (
        {"get": [state("Failed")], "pods": [{"codes": []}]},
        (),
        (70, "apply pods delete", ""),
    ),
    "restarts": (
        {"get": [state(), state(restarts=1), state("Completed")]},
        (),
        (0, "apply delete", "run-1: Running (restarts: 1)"),
    ),
    "waits in the queue": (
        {"get": [{"output": {"spec": {"suspend": True}}}, state("Completed")]},
        (),
        (0, "apply delete", "waits in the queue"),
    ),
    "kept": ({"get": [state("Completed")]}, ("--keep",), (0, "apply", "")),
    "detached": ({}, ("--detach",), (0, "apply", "run-1 is applied")),
    "only deleted": ({}, ("--delete",), (0, "delete", "")),
    "refused": (
        {"apply": [{"code": 1, "errors": "Error from server (Forbidden): no"}]},
        (),
        (2, "apply delete", "kubectl refuses: Error from server (Forbidden): no"),
    ),
    "apply fails once": (
        {"apply": [{"code": 1, "errors": "timeout"}, {}], "get": [state("Completed")]},
        (),
        (0, "apply apply delete", ""),
    ),
    "deleted by someone": (
        {"get": [state(), {"code": 1, "errors": 'jobsets "run-1" not found'}]},
        (),
        (42, "apply delete", "was deleted by someone else"),
    ),
    "does not answer for a while": (
        {"get": [state(), *[{"code": 1, "errors": "EOF"}] * 3, state("Completed")]},
        (),
        (0, "apply delete", ""),
    ),
    "does not answer": (
        {"get": [{"code": 1, "errors": "EOF"}]},
        (),
        (42, "apply delete", "the cluster does not answer: EOF"),
    ),
    "deletion fails": (
        {"get": [state("Completed")], "delete": [{"code": 1, "errors": "EOF"}]},
        (),
        (1, "apply" + " delete" * 5, "NOT DELETED, it may cost money: kubectl"),
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_history(name, cluster, capfd):
    answers, changed, (code, story, says) = HISTORIES[name]
    # A failed `get` says nothing on standard output.
    for answer in answers.get("get", []):
        answer.setdefault("output", "")
    cluster.history(**answers)
    words = [*GKE, f"--log_dir={cluster.folder}/logs", *changed, *JOB]
    found = submit.main(words)
    errors = capfd.readouterr().err
    assert (found, cluster.story()) == (code, story), errors
    assert says in errors
    assert "Traceback" not in errors


def test_what_is_applied_and_what_is_shown(cluster, capfd):
    cluster.history(get=[state()] * 15 + [state("Completed")])
    chosen = ("--context=my-cluster", "--namespace=team", "--queue=q")
    words = [*GKE, f"--log_dir={cluster.folder}/logs", *chosen]
    assert submit.main([*words, *JOB]) == 0
    assert "[pod/run-1-slice-0-0] step 1" in capfd.readouterr().out
    file = cluster.folder / "logs" / "run-1" / "jobset.json"
    head = ["--context=my-cluster", "--namespace=team"]
    assert cluster.calls()[0] == ["apply", [*head, "apply", f"--filename={file}"]]
    found = json.loads(file.read_text())
    assert complaints(found, JOBSET) == []
    assert found["metadata"]["namespace"] == "team"
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    # Kubernetes reads $$( as a plain $(: no variable is put in its place.
    wanted = ["nlhf", "train", "--gin.X='it is \"quoted\" $$(HOME)'"]
    assert pod["containers"][0]["command"] == wanted
    assert "--timeout=360s" in cluster.calls()[-1][1]


def test_a_dry_run_prints_the_calls_and_the_manifest(cluster, capfd):
    cluster.history(get=[state("Failed")], pods=[{"codes": [70]}])
    words = [*GKE, f"--log_dir={cluster.folder}/logs"]
    assert submit.main([*words, "--dry_run", *JOB]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert not (cluster.folder / "calls.jsonl").exists()
    planned = [shlex.split(line)[1:] for line in lines[: lines.index("{")]]
    submit.main([*words, *JOB])
    made = [call for _, call in cluster.calls()]
    # The order of the followers' looks is a matter of time.
    assert sorted(map(tuple, planned)) == sorted(set(map(tuple, made)))
    assert (planned[0], planned[-1]) == (made[0], made[-1])


@pytest.mark.parametrize("flags", [(), ("--keep",)])
def test_a_signal_deletes_so_that_the_pods_save(cluster, flags):
    cluster.history(get=[state()])
    words = [*GKE, f"--log_dir={cluster.folder}/logs", *flags, *JOB]
    code = "import sys; from launch import submit; sys.exit(submit.main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, *words],
        cwd=ROOT,
        env=cluster.environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as running:
        end = time.monotonic() + 20
        while not (cluster.folder / "calls.jsonl").exists() or "get" not in str(
            cluster.calls()
        ):
            assert time.monotonic() < end
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
        assert "SIGINT: stopped" in running.stderr.read()
    assert cluster.story() == "apply delete"


def test_the_state_of_a_jobset():
    assert gke.read_jobset({}) == "Running"
    waiting = {"status": {"conditions": [{"type": "Completed", "status": "False"}]}}
    assert gke.read_jobset(waiting) == "Running"
