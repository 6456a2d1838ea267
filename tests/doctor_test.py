# SPDX-License-Identifier: Apache-2.0
"""nlhf doctor: what it gathers of this machine, its lines, its exit codes."""

import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from nlhf_jax import cli
from nlhf_jax.jobs import doctor, host_checks, host_facts

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = """\
# by a tool
jax==0.10.2 \\
    --hash=sha256:00
flax==0.12.8 ; python_version < '3.12' \\
    --hash=sha256:00
flax==0.13.0 ; python_version >= '3.12'
Rouge_Score==0.1.2
pytest==9.0.0
"""
PINS = {
    "jax": ("0.10.2",),
    "flax": ("0.12.8", "0.13.0"),
    "rouge-score": ("0.1.2",),
    "pytest": ("9.0.0",),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Returns a folder with room; the cache of compiled programs is in it too."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("NLHF_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def run(capsys, *words):
    """Returns (exit code, standard output, standard error)."""
    code = cli.main(["doctor", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines_of(out: str) -> dict[str, str]:
    """Returns check -> level of a report."""
    return {line[9:].partition(":")[0]: line[:9].strip() for line in out.splitlines()}


def test_a_machine_like_this_passes(here, capsys):
    (here / "requirements.lock").write_text(f"jax=={jax.__version__}\n")
    number = len(jax.local_devices())
    words = [f"--model_dir={here}/run", f"--lock={here}/requirements.lock"]
    code, out, err = run(capsys, *words, f"--expected_devices={number}")
    found = lines_of(out)
    assert code == 0
    assert err == ""
    assert len(found) == len(out.splitlines()) == 11
    assert found["folder"] == found["packages"] == found["devices"] == "ok"
    # What was made and written to look is gone.
    assert not (here / "run").exists()


def test_a_folder_that_cannot_be_written_is_a_problem_with_its_fix(here, capsys):
    (here / "file").write_text("")
    code, out, _ = run(capsys, f"--model_dir={here}/file")
    assert code == 2
    (line,) = [text for text in out.splitlines() if "folder:" in text]
    assert line.startswith("problem")
    assert f"{here}/file cannot be written: " in line
    assert "; fix: " in line


def test_more_devices_expected_than_found(here, capsys):
    number = len(jax.local_devices()) + 8
    code, out, _ = run(capsys, f"--model_dir={here}", f"--expected_devices={number}")
    assert code == 2
    assert lines_of(out)["devices"] == "problem"
    assert f"device_count={number}" in out


def test_json_has_the_same_findings_and_the_facts(here, capsys):
    code, out, _ = run(capsys, f"--model_dir={here}", "--json")
    found = json.loads(out)
    assert found["exit_code"] == code
    assert {one["check"] for one in found["findings"]} >= {"devices", "clock"}
    (facts,) = found["hosts"]
    assert facts["name"] == socket.gethostname()
    assert facts["folder"]["path"] == str(here)
    # Back to the same facts: what other hosts send is read like this.
    rebuilt = host_facts.from_json(facts)
    assert json.loads(json.dumps(dataclasses.asdict(rebuilt))) == facts


@pytest.mark.parametrize("word", ["--json", "--expected_devices=0"])
def test_no_secret_of_the_environment_is_shown(here, capsys, monkeypatch, word):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "XLA_FLAGS_OF_MINE"):
        monkeypatch.setenv(name, "canary-4711")
    _, out, err = run(capsys, f"--model_dir={here}", word)
    assert "canary" not in out + err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--expected_devices=-1"], "expected_devices must be an integer of at least"),
        (["--expected_devices=four"], "invalid int value: 'four'"),
        (["--port=70000"], "port must be at most 65535, got 70000"),
        (["--timeout=0"], "timeout must be an integer of at least 1"),
        (["--lock=nowhere"], "'nowhere' is no file"),
        (["--modeldir=x"], "unrecognized arguments: --modeldir=x"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, words, said):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_port_in_use_is_seen(here, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = taken.getsockname()[1]
        code, out, _ = run(capsys, f"--model_dir={here}", f"--port={number}")
    assert code == 2
    assert lines_of(out)["port"] == "problem"
    assert host_facts.port_error(number) == ""  # it is free again


def test_pins_are_read_with_several_versions(tmp_path):
    (tmp_path / "lock").write_text(LOCK)
    assert host_facts.read_pins(tmp_path / "lock") == PINS
    assert host_facts.read_pins(tmp_path / "nowhere") == {}


def test_pins_of_the_project_are_what_is_installed_here():
    pins = host_facts.read_pins(host_facts.runs_lock())
    assert pins["jax"] == (jax.__version__,)
    assert host_facts.installed()["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"jax": "0.10.2", "flax": "0.13.0", "rouge-score": "0.1.2"}, ()),
        ({"jax": "0.10.2", "flax": "0.12.8", "rouge-score": "0.1.2"}, ()),
        (
            {"jax": "0.9.0", "flax": "0.12.0", "rouge-score": "0.1.2"},
            ("flax 0.12.0 (pinned 0.12.8 or 0.13.0)", "jax 0.9.0 (pinned 0.10.2)"),
        ),
        ({"jax": "0.10.2", "flax": "0.13.0"}, ("rouge-score missing",)),
    ],
)
def test_differences_from_the_pins(found, expected):
    # pytest is pinned for the tests alone: that it is missing is no difference.
    required = {"jax", "flax", "rouge-score", "httpx"}
    assert host_facts.differences(PINS, found, required) == expected


def test_the_projects_own_requirements_leave_extras_out():
    required = host_facts.required_directly()
    assert {"jax", "flax", "orbax-checkpoint"} <= required
    assert not {"pytest", "libtpu"} & required


@pytest.mark.parametrize(
    ("written", "expected"), [(10.5, 0.0), (10.0, 0.0), (14.0, 3.0), (7.5, -2.5)]
)
def test_skew_is_what_lies_outside_the_interval(written, expected):
    assert host_facts.skew(written, 10.0, 11.0) == expected


def test_a_probe_measures_a_folders_clock(tmp_path, monkeypatch):
    found = host_facts.probe(str(tmp_path))
    assert found.error == ""
    assert abs(found.clock_skew) < 1.0
    assert found.free_bytes == host_facts.disk_free(str(tmp_path)) or found.free_bytes
    # A host whose clock is an hour behind finds the folder's an hour ahead.
    now = host_facts.time.time
    monkeypatch.setattr(host_facts.time, "time", lambda: now() - 3600)
    assert host_facts.probe(str(tmp_path)).clock_skew == pytest.approx(3600, abs=1)


def test_a_probe_leaves_nothing_behind(tmp_path):
    (tmp_path / "runs").mkdir()
    found = host_facts.probe(str(tmp_path / "runs" / "nash" / "first"))
    assert found.error == "" and found.free_bytes
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_a_probe_of_nothing():
    assert host_facts.probe("").error == "no folder is set"
    assert host_facts.probe("/proc/nowhere/x").error == "No such file or directory"


class FakeBucket:
    """Stands for a path in a bucket; its client refuses with an error of its own."""

    def __init__(self, path):
        self.path = path

    def expanduser(self):
        return self

    def mkdir(self, **options):
        raise ConnectionError("403 Forbidden\nand a page of hints")


def test_a_bucket_that_refuses_is_one_line(monkeypatch):
    from etils import epath

    monkeypatch.setattr(epath, "Path", FakeBucket)
    found = host_facts.probe("gs://bucket/run")
    assert found == host_facts.FolderFacts("gs://bucket/run", "403 Forbidden")


HOLD = """
import sys, time
file = open(sys.argv[1], "a")
print("open", flush=True)
time.sleep(60)
"""


def test_a_process_that_holds_a_file_is_found_and_named(tmp_path):
    file = tmp_path / "libtpu_lockfile"
    file.write_text("")
    assert host_facts.holders([str(file)]) == ()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "open\n"
        (found,) = host_facts.holders([str(file), "/dev/accel0"])
        process.kill()
    assert (found.pid, found.file) == (process.pid, str(file))
    assert "python" in found.program
    assert host_facts.holders([str(file)]) == ()


def test_what_this_process_itself_holds_is_not_reported(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert host_facts.holders([file.name]) == ()


def test_devices_of_the_kernel_are_told_from_its_other_files(tmp_path):
    for name in ("accel0", "accel1", "nvidia0", "nvidiactl", "vfio/0", "vfio/vfio"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [pathlib.Path(name).name for name in host_facts.device_files(tmp_path)]
    assert found == ["accel0", "accel1", "nvidia0", "0"]


def test_memory_is_the_hosts_or_the_control_groups(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9 kB\nMemAvailable:    2048 kB\n")
    assert host_facts.available_memory(meminfo, tmp_path) == 2048 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert host_facts.available_memory(meminfo, tmp_path) == 2048 * 1024
    (tmp_path / "memory.max").write_text("51000\n")
    assert host_facts.available_memory(meminfo, tmp_path) == 50000


@pytest.mark.parametrize(("text", "number"), [("16", 16), ("", 0), ("many", 0)])
def test_nproc_is_a_number_or_not_set(text, number):
    assert host_facts._nproc(text) == number


def test_jax_that_cannot_start_is_a_problem_and_not_a_traceback(
    here, capsys, monkeypatch
):
    def fail():
        raise RuntimeError("TPU is already in use by process 17\nmore")

    monkeypatch.setattr(host_facts.jax, "local_devices", fail)
    code, out, _ = run(capsys, f"--model_dir={here}")
    assert code == 2
    assert "TPU is already in use by process 17" in out
    assert "more" not in out.splitlines()[0]


def test_facts_of_hosts_are_told_apart_by_their_lengths(here):
    facts = [host_facts.gather(str(here), "") for _ in range(2)]
    facts[1] = dataclasses.replace(facts[1], name="a-longer-name", process=1)
    texts = [json.dumps(dataclasses.asdict(one)).encode() for one in facts]
    lengths_P = np.asarray([len(text) for text in texts], np.int32)
    texts_PN = np.zeros((2, lengths_P.max()), np.uint8)
    for row_N, text in zip(texts_PN, texts, strict=True):
        row_N[: len(text)] = np.frombuffer(text, np.uint8)
    found = list(host_facts._from_texts(texts_PN, lengths_P))
    assert [one.name for one in found] == [facts[0].name, "a-longer-name"]
    assert found == facts


def in_a_process(code: str, *words: str, timeout: int = 120, **environment):
    """Runs Python code that prints its stacks if it takes too long."""
    stacks = f"import faulthandler; faulthandler.dump_traceback_later({timeout - 10})\n"
    return subprocess.Popen(
        [sys.executable, "-c", stacks + textwrap.dedent(code), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"} | environment,
    )


def test_hosts_that_do_not_answer_end_the_doctor(tmp_path):
    code = """
        import sys, time
        from nlhf_jax.jobs import doctor, host_facts
        host_facts.of_all_hosts = lambda mine: time.sleep(100)
        doctor.main(["--timeout=1", "--model_dir=" + sys.argv[1]])
    """
    process = in_a_process(code, str(tmp_path), timeout=60)
    out, err = process.communicate(timeout=60)
    assert process.returncode == host_checks.MACHINES, err
    assert out.startswith("problem  devices: JAX or another host has not answered")
    assert out.count("\n") == 1


PROCESS = """
    import sys
    import jax
    number, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(address, 2, number)
    from nlhf_jax.jobs import doctor, host_facts
    if number == 1:
        versions = host_facts.versions
        host_facts.versions = lambda: versions() | {"jax": "0.0.1"}
    sys.exit(doctor.main(["--json", "--expected_devices=2", "--model_dir=" + folder]))
"""


@pytest.mark.battery
def test_two_real_processes_compare_versions_and_count_devices_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    one_device = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        in_a_process(PROCESS, str(number), address, str(tmp_path), **one_device)
        for number in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    # The second says nothing; lines of the network's library are not ours.
    assert "findings" not in said[1][0]
    (line,) = [text for text in said[0][0].splitlines() if text.startswith("{")]
    found = {one["check"]: one for one in json.loads(line)["findings"]}
    assert found["devices"]["level"] == "ok"
    assert found["devices"]["text"] == "2 of cpu (cpu) in 2 process(es)"
    assert found["versions"]["level"] == "problem"
    assert found["versions"]["text"].startswith("jax differs: ")
    assert found["clock"]["level"] == "ok"
    assert "s between hosts" in found["clock"]["text"]
    assert [one["process"] for one in json.loads(line)["hosts"]] == [0, 1]


def test_the_doctor_is_a_command():
    from nlhf_jax.jobs import COMMANDS

    module, function = COMMANDS["doctor"].split(":")
    assert getattr(sys.modules[module], function) is doctor.main
