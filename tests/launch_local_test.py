# SPDX-License-Identifier: Apache-2.0
"""Processes on this machine: real ones, with deaths, hangs and signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from launch import local, processes
from launch.errors import SubmitError
from launch.processes import Signals

ROOT = pathlib.Path(__file__).resolve().parent.parent
# From the first death to the last: what a user may count on.
LIMIT = 2.0

# A trainer: says hello in a file of its own, meets the others at the coordinator, then
# does what the words for its number and its attempt say.
TRAINER = """
import json, os, pathlib, signal, socket, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
behaviour = json.loads(sys.argv[2])
index, attempt = os.environ["NLHF_PROCESS_ID"], os.environ["NLHF_ATTEMPT"]
host, port = os.environ["NLHF_COORDINATOR"].split(":")
count = int(os.environ["NLHF_NUM_PROCESSES"])
acts = behaviour.get(f"{attempt}/{index}", behaviour.get(index, behaviour["all"]))
hello = {"pid": os.getpid(), "port": port, "at": time.time(), "count": count}
(folder / f"{attempt}_{index}.json").write_text(json.dumps(hello))

def save(*_):
    (folder / f"saved_{attempt}_{index}").write_text("")
    os._exit(143)

def meet():
    if index == "0":
        with socket.create_server((host, int(port))) as server:
            mine = socket.create_connection((host, int(port)))
            return [mine, *(server.accept()[0] for _ in range(count))]
    while True:
        try:
            return [socket.create_connection((host, int(port)))]
        except OSError:
            time.sleep(0.01)

def wait_for_all():
    while len(list(folder.glob(f"{attempt}_*.json"))) < count:
        time.sleep(0.01)

for act in acts:
    print("process", index, "attempt", attempt, act, flush=True)
    if act == "meet":
        sockets = meet()
    elif act == "wait":
        wait_for_all()
    elif act == "save":
        signal.signal(signal.SIGTERM, save)
    elif act == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif act == "child":
        deaf = "import signal, time; signal.signal(15, 1); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-SE", "-c", deaf])
        (folder / "child").write_text(str(child.pid))
    elif act == "hang":
        time.sleep(60)
    elif act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "pause":
        time.sleep(0.3)
    elif str(act).startswith("step"):
        pass  # it is printed, as every act is
    else:
        os._exit(act)
os._exit(0)
"""


def options(folder: pathlib.Path, **changed) -> SimpleNamespace:
    """Returns the launcher's flags for a test."""
    values = {
        "processes": 2,
        "devices_per_process": 0,
        "start_seconds": 20.0,
        "finish_seconds": 20.0,
        "pause_seconds": 0.01,
        "stable_seconds": 600.0,
        "grace_seconds": 10.0,
        "max_failures": 2,
        "max_preemptions": 2,
        "log_dir": str(folder / "logs"),
    }
    return SimpleNamespace(**values | changed)


def command(folder: pathlib.Path, **behaviour) -> list[str]:
    """Returns a trainer's command line; `p1` is process 1, `a2p1` that of attempt 2."""
    acts = {
        name.replace("a", "").replace("p", "/").lstrip("/")
        if name != "all"
        else name: act
        for name, act in behaviour.items()
    }
    return [sys.executable, "-SE", "-c", TRAINER, str(folder), json.dumps(acts)]


def hello(folder: pathlib.Path, attempt: int, index: int) -> dict:
    """Returns what a process wrote down when it started."""
    return json.loads((folder / f"{attempt}_{index}.json").read_text())


def attempts(folder: pathlib.Path) -> int:
    """Returns how many attempts there were; every one has all its processes."""
    return len(list(folder.glob("*_0.json")))


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie nobody has reaped does not."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def started(folder: pathlib.Path) -> list[int]:
    """Returns the numbers of all processes that were ever started."""
    return [json.loads(p.read_text())["pid"] for p in folder.glob("*_*.json")]


@pytest.fixture
def folder(tmp_path):
    """Returns a folder; in the end nothing that was started there runs."""
    yield tmp_path
    left = [pid for pid in started(tmp_path) if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_all_done(folder, capfd):
    words = command(folder, all=["meet", 0])
    assert local.supervise(options(folder, processes=3), "job", words) == 0
    assert attempts(folder) == 1
    found = [hello(folder, 1, index) for index in range(3)]
    assert {one["count"] for one in found} == {3}
    assert len({one["port"] for one in found}) == 1
    logs = folder / "logs" / "job" / "attempt_1"
    for index in range(3):
        text = (logs / f"process_{index}.log").read_text()
        assert f"process {index} attempt 1 meet" in text
    shown = capfd.readouterr().out
    assert "process 0 attempt 1 meet" in shown
    assert "process 1" not in shown, "only the first process is shown"


@pytest.mark.parametrize("dying", ["p0", "p1", "p2"])
def test_a_death_ends_all_within_two_seconds_and_all_start_again(folder, dying, capfd):
    # The others hear nothing: they ignore SIGTERM, and have a child that does.
    deaf = ["deaf", "child", "wait", "hang"]
    behaviour = {"all": deaf, f"a1{dying}": ["wait", "kill"]}
    behaviour |= {f"a2p{index}": [0] for index in range(3)}
    times = {}
    end_all = processes.end_all

    def timed(children, grace):
        times.setdefault("begin", time.monotonic())
        codes = end_all(children, grace)
        times.setdefault("end", time.monotonic())
        return codes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "end_all", timed)
        words = command(folder, **behaviour)
        assert local.supervise(options(folder, processes=3), "job", words) == 0
    # Noticed at the next look, settled, ended: the three parts of the promise.
    noticed = processes.TICK + local.SETTLE_SECONDS
    assert noticed + times["end"] - times["begin"] < LIMIT
    assert attempts(folder) == 2
    assert hello(folder, 1, 0)["port"] != hello(folder, 2, 0)["port"]
    assert not is_alive(int((folder / "child").read_text()))
    errors = capfd.readouterr().err
    assert f"process {dying[1]} ended (killed by signal 9)" in errors
    assert "all 3 processes start again" in errors


def test_measured_from_outside_all_are_dead_within_two_seconds(folder):
    words = command(folder, all=["deaf", "wait", "hang"])
    with launcher(folder, words, max_failures=0) as running:
        wait_until(lambda: len(started(folder)) == 2)
        wait_until(lambda: (folder / "logs/job/attempt_1/process_1.log").read_text())
        time.sleep(0.2)
        pids = started(folder)
        begin = time.monotonic()
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)))
        assert time.monotonic() - begin < LIMIT
        assert running.wait(10) == 137


def test_a_mistake_is_not_retried(folder, capfd):
    words = command(folder, all=["wait", "hang"], p1=["wait", 2])
    assert local.supervise(options(folder), "job", words) == 2
    assert attempts(folder) == 1
    assert "process 1 ended (exit 2)" in capfd.readouterr().err


@pytest.mark.parametrize("code, shown", [(1, 70), (65, 65), (66, 66), (70, 70)])
def test_final_codes_are_not_retried(folder, code, shown):
    words = command(folder, all=[code])
    assert local.supervise(options(folder, processes=1), "job", words) == shown
    assert attempts(folder) == 1


def test_retries_are_bounded(folder, capfd):
    words = command(folder, all=["kill"], a2p0=[139])
    assert local.supervise(options(folder, processes=1), "job", words) == 137
    assert attempts(folder) == 3
    assert "no restart is left after a failure" in capfd.readouterr().err


def test_three_deaths_at_one_step_are_the_jobs_own_doing(folder, capfd):
    # Process 1 dies; process 0 shows the steps, 7 the last each time.
    words = command(folder, all=["wait", "kill"], p0=["step 7", "wait", "hang"])
    chosen = options(folder, max_failures=9)
    assert local.supervise(chosen, "job", words) == 137
    assert attempts(folder) == 3
    *_, line = capfd.readouterr().err.splitlines()
    assert "exit code 137 after step 7 3 times in a row" in line
    assert str(folder / "logs/job/attempt_3/process_0.log") in line


def test_deaths_at_other_steps_are_bad_luck(folder, capfd):
    steps = {f"a{n}p0": [f"step {n // 2}", "kill"] for n in range(1, 5)}
    words = command(folder, all=[0], **steps)
    chosen = options(folder, processes=1, max_failures=9)
    assert local.supervise(chosen, "job", words) == 0
    assert attempts(folder) == 5


def test_deaths_before_the_first_step(folder, capfd):
    chosen = options(folder, processes=1, max_failures=9)
    words = command(folder, all=["kill"])
    assert local.supervise(chosen, "job", words) == 137
    assert attempts(folder) == 3
    assert "before its first step 3 times" in capfd.readouterr().err
    # Who asks for a restart before its first step waits for somebody.
    asks = options(folder, processes=1, max_failures=3)
    assert local.supervise(asks, "asks", command(folder, all=[42])) == 42
    assert "no restart is left" in capfd.readouterr().err


def test_preemptions_are_counted_apart(folder):
    chosen = options(folder, processes=1, max_failures=0, max_preemptions=1)
    words = command(folder, all=[143], a2p0=[0])
    assert local.supervise(chosen, "job", words) == 0
    assert attempts(folder) == 2


def test_who_saves_may_finish_though_another_has_left(folder):
    # Process 0 has saved and gone; process 1 needs longer than any settling time.
    slow = ["wait", "pause", "pause", "pause", 143]
    words = command(folder, all=slow, p0=["wait", 143], a2p0=[0], a2p1=[0])
    assert local.supervise(options(folder), "job", words) == 0
    log = folder / "logs" / "job" / "attempt_1" / "process_1.log"
    assert log.read_text().count("pause") == 3
    assert "process 1 attempt 1 143" in log.read_text()


def test_processes_that_do_not_meet_are_ended(folder, capfd):
    chosen = options(folder, start_seconds=0.5, max_failures=1)
    words = command(folder, all=["hang"], a2p0=["meet", 0], a2p1=["meet", 0])
    assert local.supervise(chosen, "job", words) == 0
    assert attempts(folder) == 2
    assert "only 0 of 2 processes met within 0.5 s" in capfd.readouterr().err


def test_once_met_the_start_has_no_limit(folder):
    chosen = options(folder, start_seconds=0.4, max_failures=0)
    words = command(folder, all=["meet", "wait", "pause", "pause", "pause", 0])
    assert local.supervise(chosen, "job", words) == 0


def test_an_early_end_is_no_end_of_the_others_time(folder, capfd):
    chosen = options(folder, finish_seconds=0.3, max_failures=0)
    words = command(folder, all=["hang"], p0=["wait", 0])
    assert local.supervise(chosen, "job", words) == 42
    said = "process 1 still ran 0.3 s after process 0 had ended"
    assert said in capfd.readouterr().err


def launcher(folder: pathlib.Path, words: list[str], **changed) -> subprocess.Popen:
    """Starts a launcher of its own process, for signals."""
    chosen = vars(options(folder, **changed))
    code = (
        "import sys, json; from types import SimpleNamespace\n"
        "from launch import local\n"
        "chosen = SimpleNamespace(**json.loads(sys.argv[1]))\n"
        "sys.exit(local.supervise(chosen, 'job', json.loads(sys.argv[2])))"
    )
    return subprocess.Popen(
        [sys.executable, "-S", "-c", code, json.dumps(chosen), json.dumps(words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition, seconds: float = 20.0) -> None:
    """Waits for a condition that must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def ready(folder: pathlib.Path, count: int = 2, act: str = "hang") -> None:
    """Waits until every process of the first attempt has come to an act."""
    logs = [folder / f"logs/job/attempt_1/process_{i}.log" for i in range(count)]
    wait_until(lambda: all(p.exists() and f" {act}\n" in p.read_text() for p in logs))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_job_save(folder, number):
    words = command(folder, all=["save", "wait", "hang"])
    with launcher(folder, words) as running:
        ready(folder)
        running.send_signal(number)
        assert running.wait(10) == 143
        assert f"{number.name}: the job saves and stops" in running.stdout.read()
    assert len(list(folder.glob("saved_1_*"))) == 2
    assert attempts(folder) == 1


def test_a_second_signal_kills(folder):
    words = command(folder, all=["deaf", "wait", "hang"])
    with launcher(folder, words) as running:
        ready(folder)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.poll() is None, "the job still has time to save"
        begin = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 143
        assert time.monotonic() - begin < LIMIT
        assert "killed before everything was saved" in running.stdout.read()


def test_saving_has_a_limit(folder):
    words = command(folder, all=["deaf", "wait", "hang"])
    with launcher(folder, words, grace_seconds=0.3) as running:
        ready(folder)
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 130


def test_a_signal_during_the_pause_starts_nothing(folder):
    words = command(folder, all=["kill"])
    with launcher(folder, words, processes=1, pause_seconds=30.0) as running:
        for line in running.stdout:
            if "starts again in" in line:
                break
        running.send_signal(signal.SIGTERM)
        assert running.wait(5) == 143
    assert attempts(folder) == 1


def test_a_killed_launcher_takes_its_processes_with_it(folder):
    words = command(folder, all=["save", "wait", "hang"])
    with launcher(folder, words) as running:
        ready(folder)
        running.kill()
        wait_until(lambda: not any(map(is_alive, started(folder))))
    assert len(list(folder.glob("saved_1_*"))) == 2


def test_no_second_job_of_a_name_while_a_process_of_the_first_lives(folder):
    words = command(folder, all=["deaf", "wait", "hang"])
    with launcher(folder, words, processes=1) as running:
        ready(folder, 1)
        with pytest.raises(SubmitError, match=f"launcher {running.pid}"):
            local.supervise(options(folder), "job", words)
        running.kill()
        running.wait()
    # The launcher is dead, its process is deaf to the SIGTERM that this sent.
    with pytest.raises(SubmitError, match="job is already running here"):
        local.supervise(options(folder), "job", words)
    (pid,) = started(folder)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))
    assert local.supervise(options(folder), "job", command(folder, all=[0])) == 0
    assert (folder / "logs/job/attempt_2").is_dir(), "the first logs are kept"


def test_a_command_that_is_not_there_is_one_sentence(folder):
    with pytest.raises(SubmitError, match="nowhere cannot be started: No such file"):
        local.supervise(options(folder), "job", [str(folder / "nowhere")])


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.sleep(5), "it returns at once"
    assert signals.received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_devices_each(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    monkeypatch.delenv("NPROC", raising=False)
    chosen = SimpleNamespace(processes=2, devices_per_process=2)
    found = local._environment(chosen, 1, 1234, 5)
    count = "--xla_force_host_platform_device_count=2"
    assert found["XLA_FLAGS"] == f"--xla_other {count}"
    assert found["NPROC"] == "16"
    assert found["NLHF_COORDINATOR"] == "127.0.0.1:1234"
    assert (found["NLHF_PROCESS_ID"], found["NLHF_ATTEMPT"]) == ("1", "5")
