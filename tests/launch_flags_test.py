# SPDX-License-Identifier: Apache-2.0
"""The launcher's flags, names, exit codes and pauses; each mistake is one sentence."""

import ast
import pathlib
import random
import re
import shlex
import subprocess
import sys

import pytest

from launch import backends, errors, flags, names, processes, retries, submit
from launch.errors import SubmitError

ROOT = pathlib.Path(__file__).resolve().parent.parent
TPU = ["--backend=tpu_vm", "--zone=z", "--accelerator_type=v4-8", "--version=v"]
LOCAL = ["--backend", "local"]
JOB = ["--", "train", "--gin_file=a.gin"]


def refused(words: list[str], capsys) -> str:
    """Returns the one sentence that refuses a command line."""
    assert submit.main(words) == 2
    output, lines = capsys.readouterr()
    assert output == ""
    (line,) = lines.splitlines()
    assert line.startswith("submit: ")
    return line


@pytest.mark.parametrize(
    "words, says",
    [
        (["--backend=lokal", *JOB], "gce, gke; got 'lokal' (did you mean 'local'?)"),
        (JOB, "--backend is missing: one of local, tpu_vm, gce, gke"),
        (LOCAL, "say what to run, after --"),
        ([*LOCAL, "--"], "say what to run, after --"),
        ([*LOCAL, "train"], "unexpected word 'train': the job stands after --"),
        (
            [*LOCAL, "--proceses=2", *JOB],
            "no flag --proceses (did you mean 'processes'?)",
        ),
        ([*LOCAL, "--processes=0", *JOB], "must be an integer of at least 1, got '0'"),
        ([*LOCAL, "--processes=two", *JOB], "an integer of at least 1, got 'two'"),
        ([*LOCAL, "--processes", *JOB], "an integer of at least 1, got 'true'"),
        ([*LOCAL, "--grace_seconds=nan", *JOB], "a number of at least 0, got 'nan'"),
        ([*LOCAL, "--grace_seconds=inf", *JOB], "a number of at least 0, got 'inf'"),
        (
            [*LOCAL, "--dry_run=maybe", *JOB],
            "--dry_run must be true or false, got 'maybe'",
        ),
        ([*LOCAL, "--name=", *JOB], "--name must be text without control characters"),
        ([*LOCAL, "--name=a", "--name=b", *JOB], "--name is given twice"),
        (
            [*LOCAL, "--", "train", "a\nb"],
            "must not hold control characters, got 'a\\nb'",
        ),
        (
            ["--backend=tpu_vm", *JOB],
            "also needs --accelerator_type, --version, --zone",
        ),
        (
            ["--backend=gce", *JOB],
            "also needs --machine_type, --image_family, --image_p",
        ),
        (["--backend=gke", *JOB], "gke also needs --image, --accelerator, --topology"),
        (["--backend=tpu_vm", "--delete"], "also needs --zone, --name, to delete it"),
        (
            [*TPU[:2], "--accelerator_type=v4-33", *TPU[3:], *JOB],
            "got 'v4-33' (did you mean 'v4-32'?)",
        ),
        (
            [*TPU[:2], "--accelerator_type=v5e-16", *TPU[3:], *JOB],
            "(did you mean 'v5litepod-16'?)",
        ),
        ([*TPU[:2], "--accelerator_type=gpu", *TPU[3:], *JOB], "got 'gpu'"),
        ([*TPU, "--zone=b", *JOB], "--zone is given twice"),
        ([*TPU[:1], "--zone=;ls", *TPU[2:], *JOB], "--zone must be letters, digits"),
        (
            [*TPU, "--spot", "--reserved", *JOB],
            "--spot and --reserved exclude each other",
        ),
        ([*TPU, "--valid_for=6h", *JOB], "--valid_for is for a queued request"),
    ],
)
def test_a_mistake_is_one_sentence(words, says, capsys):
    assert says in refused(words, capsys)


@pytest.mark.parametrize(
    "backend, program", [("tpu_vm", "gcloud"), ("gce", "gcloud"), ("gke", "kubectl")]
)
def test_a_missing_program_is_one_sentence(
    backend, program, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    gce = ["--zone=a-b-c", "--machine_type=m", "--image_family=f", "--image_project=p"]
    gke = ["--image=i", "--accelerator=tpu-v6e-slice", "--topology=2x2"]
    words = {
        "tpu_vm": TPU,
        "gce": ["--backend=gce", *gce],
        "gke": ["--backend=gke", *gke],
    }[backend]
    said = refused([*words, f"--log_dir={tmp_path}", *JOB], capsys)
    assert f"{program} is not on PATH" in said
    assert submit.main([*words, f"--log_dir={tmp_path}", "--dry_run", *JOB]) == 0


def test_an_interrupt_before_anything_runs_is_one_line(monkeypatch, capsys):
    def interrupted(options, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(backends.load("local"), "submit", interrupted)
    assert submit.main([*LOCAL, *JOB]) == 130
    assert capsys.readouterr().err == "submit: interrupted\n"


def test_whoever_reads_no_more_is_no_error():
    command = f"{shlex.quote(sys.executable)} launch/submit.py --backend gke --image=i"
    command += (
        " --accelerator=tpu-v6e-slice --topology=4x4 --dry_run -- train | head -1"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kubectl ")


def test_a_log_folder_that_cannot_be_is_one_sentence(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = [*LOCAL, f"--log_dir={tmp_path}/file", f"--python={sys.executable}"]
    assert "cannot be written: Not a directory" in refused([*words, *JOB], capsys)


@pytest.mark.parametrize(
    ("python", "why"),
    [
        ("/bin/true", "it runs no Python"),
        ("/nowhere/python", "No such file or directory"),
        ("OLD", "it is Python 2.7"),
    ],
)
def test_a_wrong_python_is_one_sentence_and_no_log(python, why, capsys, tmp_path):
    if python == "OLD":
        python = str(tmp_path / "python")
        pathlib.Path(python).write_text("#!/bin/sh\necho it is Python 2.7\n")
        pathlib.Path(python).chmod(0o755)
    words = [*LOCAL, f"--log_dir={tmp_path}/logs", f"--python={python}", *JOB]
    line = refused(words, capsys)
    assert "--python must be an interpreter of Python 3.11 or later" in line
    assert line.endswith(f"got {python}: {why}")
    assert not (tmp_path / "logs").exists()


def test_what_stands_after_the_dashes_is_the_jobs():
    words = [
        *LOCAL,
        "--processes",
        "2",
        "--name=x",
        "--",
        "train",
        "--name=y",
        "--",
        "z",
    ]
    backend, options, job = flags.parse(words)
    assert backend == "local"
    assert (options.processes, options.name) == (2, "x")
    assert job == ["train", "--name=y", "--", "z"]


def test_every_flag_has_its_default_type_and_meaning():
    for name in backends.BACKENDS:
        shown = [flag.name for flag in (*backends.load(name).FLAGS, *flags.COMMON)]
        assert len(set(shown)) == len(shown)
        for flag in backends.load(name).FLAGS:
            assert isinstance(flag.default, (bool, int, float, str))
            assert not (flag.required and flag.default)
            assert f"--{flag.name}" in flags.usage(name)


def test_the_document_lists_every_flag_with_its_default():
    text = (ROOT / "docs" / "launching.md").read_text()
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", text, re.M | re.S))
    for name, wanted in [
        ("common", flags.COMMON),
        *((name, backends.load(name).FLAGS) for name in backends.BACKENDS),
    ]:
        rows = re.findall(r"^\| `--(\w+)` \| (.*) \|$", sections[name], re.M)
        assert rows == [(flag.name, flags.describe(flag)) for flag in wanted], name


def test_help(capsys):
    assert submit.main([]) == 2
    assert "BACKEND --help prints the flags" in capsys.readouterr().out
    assert submit.main(["--backend=tpu_vm", "-h"]) == 0
    assert "--accelerator_type" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "It's my run",
        "a;ls",
        "$(touch x)",
        "-rf",
        "..",
        "x" * 300,
        "Ä",
        "ends-",
        "9lives",
    ],
)
def test_names_are_made_safe(text):
    safe = names.safe_name(text)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])", safe)
    assert safe != names.safe_name(text + "'"), "two names never become one"
    assert names.safe_name(safe) == safe


def test_names_that_are_safe_are_kept():
    assert names.job_name("run-1", ["train"]) == "run-1"
    assert names.job_name("", ["train"]) == "nlhf-train"


@pytest.mark.parametrize(
    "kind, hosts",
    [
        ("v2-8", 1), ("v3-32", 4), ("v4-8", 1), ("v4-32", 4), ("v5litepod-8", 1),
        ("v5litepod-16", 4), ("v5litepod-256", 64), ("v5p-16", 2), ("v6e-1", 1),
    ],
)  # fmt: skip
def test_hosts_of_a_slice(kind, hosts):
    assert names.num_hosts(kind) == hosts


def test_chips():
    assert names.num_chips("4x4") == 16
    assert names.num_chips("4x4x8") == 128
    for bad in ("", "4", "4x", "4x4x4x4", "3x4", "0x4", "axb", "4X4", "16-16"):
        with pytest.raises(SubmitError, match="--topology must be"):
            names.num_chips(bad)
    with pytest.raises(SubmitError, match="AxBxC like 4x4x8"):
        names.num_chips("4x4", (3,))
    assert names.chips_of_machine("ct6e-standard-4t") == 4
    assert names.chips_of_machine("tpu7x-standard-4t") == 4
    assert names.chips_of_machine("n2-standard-8") == 0


@pytest.mark.parametrize(
    "code, shown", [(0, 0), (2, 2), (-9, 137), (-15, 143), (1, 70), (255, 70), (42, 42)]
)
def test_codes_of_the_contract(code, shown):
    assert errors.shell_code(code) == shown


def test_which_codes_are_tried_again():
    again = [code for code in range(256) if not errors.is_final(code)]
    assert again == [42, *range(127, 255)]


@pytest.mark.parametrize(
    "codes, one",
    [
        ([0, 0], 0),
        ([0, 137], 137),
        ([70, 137, 0], 137),
        ([137, 2], 2),
        ([70, 65], 65),
        ([143, 143], 143),
        ([143, 137], 137),
        ([70, 143], 143),
        ([70, 0], 70),
        ([42, 70], 42),
        ([42, 74], 74),
    ],
)
def test_the_code_that_says_most(codes, one):
    assert errors.decisive(codes) == one
    assert errors.decisive(reversed(codes)) == one


class _Middle(random.Random):
    """No jitter."""

    def uniform(self, low, high):
        return (low + high) / 2


def test_pauses_double_up_to_a_limit_and_counts_are_apart():
    budget = retries.RetryBudget(8, 2, 10.0, _Middle())
    pauses = [budget.spend(retries.FAILURE) for _ in range(8)]
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600]
    assert budget.spend(retries.FAILURE) is None
    assert [budget.spend(retries.PREEMPTION) for _ in range(3)] == [10, 10, None]


def test_a_long_attempt_sets_the_pause_back_and_not_the_count():
    budget = retries.RetryBudget(3, 0, 10.0, _Middle())
    assert [budget.spend(retries.FAILURE) for _ in range(2)] == [10, 20]
    assert budget.spend(retries.FAILURE, lasted=retries.STABLE_SECONDS) == 10
    assert budget.spend(retries.FAILURE) is None


def test_how_long_is_long_can_be_said():
    budget = retries.RetryBudget(4, 0, 10.0, _Middle(), stable_seconds=5.0)
    pauses = [budget.spend(retries.FAILURE, lasted) for lasted in (1, 4.9, 5, 1)]
    assert pauses == [10, 20, 10, 20]


def test_jitter_stays_in_its_bounds():
    for seed in range(20):
        pause = retries.RetryBudget(1, 0, 10.0, random.Random(seed)).spend("failure")
        assert 8 <= pause <= 12


def test_attempts_are_numbered_on(tmp_path):
    assert processes.next_attempt(tmp_path) == 1
    for name in ("attempt_2", "attempt_10", "attempt_x", "other"):
        (tmp_path / name).mkdir()
    assert processes.next_attempt(tmp_path) == 11


def test_local_dry_run_prints_every_process(capsys):
    words = [*LOCAL, "--processes=3", "--dry_run", "--python=/opt/my python"]
    assert submit.main([*words, "--", "train", "--gin.X='a b'"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["env"] * 3
    tail = ["/opt/my python", "-u", "-m", "nlhf_jax", "train", "--gin.X='a b'"]
    assert all(line[-6:] == tail for line in lines)
    settings = [dict(w.split("=", 1) for w in line[1:-6]) for line in lines]
    assert [s["NLHF_PROCESS_ID"] for s in settings] == ["0", "1", "2"]
    assert len({s["NLHF_COORDINATOR"] for s in settings}) == 1


def test_the_program_itself_runs_a_job_from_anywhere(tmp_path):
    words = [*LOCAL, f"--python={sys.executable}", f"--log_dir={tmp_path}/logs"]
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *words]
    done = subprocess.run(
        [*command, "--", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nlhf_jax ")
    done = subprocess.run(
        [*command, "--name=b", "--", "trian"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "did you mean 'train'" in done.stdout
    assert {p.name for p in (tmp_path / "logs").iterdir()} == {"nlhf-version", "b"}


def test_the_launcher_needs_the_standard_library_only():
    # The bill of materials is made inside the environment, of what it holds.
    inside = {"bill_of_materials.py": {"packaging"}}
    for path in (ROOT / "launch").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module]
            tops = {name.split(".")[0] for name in found}
            allowed = {"launch", *inside.get(path.name, ())}
            assert tops <= {*sys.stdlib_module_names, *allowed}, path


def test_no_shell_string_is_built_by_hand():
    for path in (ROOT / "launch").glob("*.py"):
        text = path.read_text()
        assert "shell=True" not in text, path
        assert "os.system" not in text, path
