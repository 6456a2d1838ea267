# SPDX-License-Identifier: Apache-2.0
"""The worker's half, run for real: the remote command lines in a home of their own."""

import fcntl
import importlib.metadata
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from launch import archive, here, remote, worker
from tests.launch_cloud_tools import tiny_tree

NAME = "run-1"
# In place of the installation: the job is this small program.
TRAINER = """
import os, pathlib, signal, sys, time
home = pathlib.Path(os.environ["HOME"])
words = sys.argv[1:]
if words == ["--version"]:
    sys.exit(0)
def save(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save if words[0] != "deaf" else signal.SIG_IGN)
with open(home / "started", "a") as file:
    file.write(f"{os.getpid()} {os.environ.get('NLHF_ATTEMPT')}\\n")
print("job", words, flush=True)
if words[0] == "exit":
    os._exit(int(words[1]))
if words[0] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
until = home / "finish"
while not until.exists():
    time.sleep(0.02)
print("finished", flush=True)
"""


@pytest.fixture
def home(tmp_path):
    """Returns a worker's home with the archive in it; nothing runs on in the end."""
    tree = tiny_tree(tmp_path / "tree")
    (tree / "launch" / "here.py").write_text(TRAINER)
    home = tmp_path / "home"
    home.mkdir()
    archive.write(tree, home / remote.archive_name(NAME))
    assert call(home, remote.prepare(NAME)).returncode == 0
    yield home
    call(home, remote.stop(NAME, 0))
    assert [pid for pid in pids(home) if alive(pid)] == []


def start(home: pathlib.Path, command: list[str]) -> subprocess.Popen:
    """Starts a remote command as ssh does: one string for the login shell."""
    return subprocess.Popen(
        ["bash", "-c", shlex.join(command)],
        cwd=home,
        env=dict(os.environ, HOME=str(home)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def call(home: pathlib.Path, command: list[str]) -> subprocess.CompletedProcess:
    """Runs a remote command to its end."""
    process = start(home, command)
    output, _ = process.communicate(timeout=30)
    return subprocess.CompletedProcess(command, process.returncode, output)


def run(attempt: int, *job: str) -> list[str]:
    """Returns the remote command of an attempt."""
    return remote.run(NAME, attempt, {"NLHF_ATTEMPT": str(attempt)}, list(job))


def pids(home: pathlib.Path) -> list[int]:
    """Returns the trainers that were ever started."""
    path = home / "started"
    return (
        [int(line.split()[0]) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition, seconds: float = 15.0) -> None:
    """Waits for a condition that must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def test_runs_to_the_end_and_gives_code_and_output(home):
    (home / "finish").write_text("")
    word = "--gin.X='a \"b\" $(touch oops) `touch oops`; touch oops'"
    done = call(home, run(1, "train", word))
    assert done.returncode == 0
    assert done.stdout == f"job {['train', word]!r}\nfinished\n"
    assert not list(home.rglob("oops")), "nothing of a word is executed"


@pytest.mark.parametrize(
    "job, code",
    [
        (("exit", "2"), 2),
        (("exit", "42"), 42),
        (("exit", "1"), 70),
        (("exit", "255"), 70),
        (("kill",), 137),
    ],
)
def test_exit_codes_say_what_the_job_meant(home, job, code):
    assert call(home, run(1, *job)).returncode == code
    # Asked once more, as gcloud does after a drop: the same answer, no second run.
    assert call(home, run(1, *job)).returncode == code
    assert len(pids(home)) == 1


def test_a_dropped_connection_changes_nothing(home):
    first = start(home, run(1, "train"))
    wait_until(lambda: pids(home))
    wait_until(lambda: (home / "nlhf_jobs/run-1/attempt_1/shown").exists())
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = start(home, run(1, "train"))
    (home / "finish").write_text("")
    output, _ = second.communicate(timeout=20)
    assert second.returncode == 0
    assert output == "finished\n", "only what the first connection had not shown"
    assert len(pids(home)) == 1
    first.stdout.close()


def test_two_connections_at_once_start_one_trainer(home):
    both = [start(home, run(1, "train")) for _ in range(2)]
    wait_until(lambda: pids(home))
    time.sleep(0.3)
    (home / "finish").write_text("")
    for process in both:
        process.communicate(timeout=20)
    assert [process.returncode for process in both] == [0, 0]
    assert len(pids(home)) == 1


def test_stop_lets_the_job_save(home):
    running = start(home, run(1, "train"))
    wait_until(lambda: pids(home))
    begin = time.monotonic()
    assert call(home, remote.stop(NAME, 20)).returncode == 0
    assert time.monotonic() - begin < 10
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 143
    assert output.endswith("saved\n")


def test_stop_ends_who_does_not_save(home):
    running = start(home, run(1, "deaf"))
    wait_until(lambda: pids(home))
    assert call(home, remote.stop(NAME, 0.3)).returncode == 0
    running.communicate(timeout=20)
    assert running.returncode == 137
    assert call(home, remote.stop(NAME, 0.3)).returncode == 0, "again: nothing to do"


def test_a_second_attempt_starts_beside_no_one(home):
    running = start(home, run(1, "train"))
    wait_until(lambda: pids(home))
    refused = call(home, run(2, "train"))
    assert refused.returncode == 70
    assert "attempt 1 still runs" in refused.stdout
    assert len(pids(home)) == 1
    call(home, remote.stop(NAME, 20))
    running.communicate(timeout=20)
    (home / "finish").write_text("")
    assert call(home, run(2, "train")).returncode == 0
    assert (home / "started").read_text().split()[1::2] == ["1", "2"]


def test_a_killed_keeper_does_not_free_the_place_of_its_trainer(home):
    running = start(home, run(1, "deaf"))
    record = home / "nlhf_jobs/run-1/attempt_1/pids"
    wait_until(record.exists)
    wait_until(lambda: pids(home))
    os.kill(json.loads(record.read_text())["keeper"], signal.SIGKILL)
    assert call(home, run(2, "train")).returncode == 70
    assert call(home, remote.stop(NAME, 0)).returncode == 0
    running.communicate(timeout=20)
    assert running.returncode == 137, "nobody was left to write a code down"


def test_stop_before_there_is_any_code(tmp_path):
    assert call(tmp_path, remote.stop(NAME, 5)).returncode == 0


def test_new_code_replaces_the_old_and_keeps_environment_and_runs(home):
    code = home / "nlhf_jobs" / NAME / "code"
    for path in (".venv/bin/python", "runs/a/step", "old_module.py", "old/file"):
        (code / path).parent.mkdir(parents=True, exist_ok=True)
        (code / path).write_text("")
    (code / "requirements.lock").write_text("changed")
    assert call(home, remote.prepare(NAME)).returncode == 0
    assert (code / ".venv/bin/python").exists()
    assert (code / "runs/a/step").exists()
    assert not (code / "old_module.py").exists()
    assert not (code / "old").exists()
    assert (code / "requirements.lock").read_text() == ""


def test_a_broken_archive_is_a_failure(home):
    (home / remote.archive_name(NAME)).write_bytes(b"not an archive")
    assert call(home, remote.prepare(NAME)).returncode not in (0, 255)


@pytest.fixture
def installing(tmp_path, monkeypatch):
    """Records what an installation runs; returns the list."""
    ran = []

    def call(words, **_):
        ran.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(worker.subprocess, "run", call)
    monkeypatch.setattr(worker, "has_tpu", lambda: False)
    return ran


def test_prepare_makes_the_environment(installing, monkeypatch):
    monkeypatch.setattr(worker.shutil, "which", lambda name: name)
    assert worker.prepare() == 0
    (made,) = installing
    assert made[1:] == [str(worker.CODE / "launch" / "here.py"), "--version"]


def test_prepare_installs_a_python_that_is_missing(installing, monkeypatch):
    monkeypatch.setattr(worker.shutil, "which", lambda name: None)
    assert worker.prepare() == 0
    assert [words[4] for words in installing[:2]] == ["update", "install"]
    assert "python3.11-venv" in installing[1]


def test_prepare_installs_libtpu_by_its_hash_where_there_is_a_tpu(
    installing, monkeypatch
):
    monkeypatch.setattr(worker.shutil, "which", lambda name: name)
    monkeypatch.setattr(worker, "has_tpu", lambda: True)
    assert worker.prepare() == 0
    assert installing[1][-3:] == ["--require-hashes", "-r", str(worker.TPU_LOCK)]


def test_libtpu_is_the_one_that_jax_asks_for():
    text = worker.TPU_LOCK.read_text()
    pinned = text[text.index("libtpu==") :].split()[0]
    wanted = [r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
    base = wanted[0].partition(";")[0].strip().removesuffix("*")
    assert pinned.startswith(base)
    assert text.count("--hash=sha256:") == 2


@pytest.mark.parametrize(
    "device, found", [("accel0", True), ("vfio/0", True), ("vfio/vfio", False)]
)
def test_a_tpu_is_known_by_its_devices(tmp_path, device, found):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).write_text("")
    assert worker.has_tpu(tmp_path) is found


def test_only_a_stale_lock_of_libtpu_is_removed(tmp_path):
    path = tmp_path / "libtpu_lockfile"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        worker._remove_stale_lock(path)
        assert path.exists()
    worker._remove_stale_lock(path)
    assert not path.exists()


def test_worker_and_bootstrap_need_the_standard_library_only():
    for name in ("worker", "here"):
        path = here.ROOT / "launch" / f"{name}.py"
        code = f"import runpy; runpy.run_path({str(path)!r})"
        done = subprocess.run(
            [sys.executable, "-IS", "-c", code], capture_output=True, cwd="/"
        )
        assert done.returncode == 0, done.stderr


def test_the_archive_holds_the_tree_and_no_more(tmp_path):
    tree = tiny_tree(tmp_path / "tree")
    for path in (
        ".venv/x",
        "runs/a/b",
        ".git/config",
        "pkg/__pycache__/m.pyc",
        "pkg/m.py",
    ):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text("text")
    (tree / "outside").symlink_to("/etc/hostname")
    (tree / "inside").symlink_to("pkg/m.py")
    assert archive.write(tree, tmp_path / "a.tar.gz") == 5
    archive.write(tree, tmp_path / "b.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        found = {entry.name: entry.uid for entry in tar}
    wanted = {"launch/here.py", "launch/worker.py", "requirements.lock"}
    assert found == dict.fromkeys(wanted | {"pkg/m.py", "inside"}, 0)


def test_the_archive_of_a_repository_leaves_out_what_git_ignores(tmp_path):
    tree = tiny_tree(tmp_path / "tree")
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tree / ".gitignore").write_text("secret\n")
    (tree / "secret").write_text("no")
    (tree / "deleted.py").write_text("")
    subprocess.run([*git, "add", "."], check=True)
    (tree / "deleted.py").unlink()
    (tree / "new.py").write_text("")
    assert set(archive.files(tree)) == {
        ".gitignore",
        "launch/here.py",
        "launch/worker.py",
        "new.py",
        "requirements.lock",
    }


def test_our_own_tree_can_be_sent():
    paths = archive.files(here.ROOT)
    assert {"setup.py", "launch/worker.py", "nlhf_jax/cli.py"} <= set(paths)
    assert not [path for path in paths if path.startswith((".venv", "runs", ".git/"))]
