# SPDX-License-Identifier: Apache-2.0
"""The bootstrap, on a project and a lock of one tiny package made for the test."""

import ast
import hashlib
import importlib.util
import pathlib
import stat
import subprocess
import sys
import threading
import time
import zipfile

import pytest

HERE = pathlib.Path(__file__).resolve().parent.parent / "launch" / "here.py"

# A build backend without dependencies: an editable install is one .pth file.
BACKEND = """
import pathlib, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "project-1.0-py3-none-any.whl"
    info = "project-1.0.dist-info"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr("project.pth", str(pathlib.Path(__file__).parent))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: project\\n"
                       "Version: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\n"
                       "Root-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


@pytest.fixture(scope="module")
def here():
    """Returns launch/here.py as a module."""
    spec = importlib.util.spec_from_file_location("here", HERE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_wheel(folder: pathlib.Path) -> str:
    """Writes the wheel of a package `tiny` and returns its lock line."""
    folder.mkdir()
    path = folder / "tiny-1.0-py3-none-any.whl"
    info = "tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", "answer = 42\n")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
            "Tag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"tiny==1.0 \\\n    --hash=sha256:{digest}\n"


def write_project(root: pathlib.Path) -> pathlib.Path:
    """Writes a repository with a lock, a project to install and no environment."""
    root.mkdir(exist_ok=True)
    (root / "requirements.lock").write_text(write_wheel(root / "wheels"))
    (root / "setup.py").write_text("# read for the stamp only\n")
    (root / "backend.py").write_text(BACKEND)
    (root / "project.py").write_text("import tiny\n\nanswer = tiny.answer\n")
    (root / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\n"
        'build-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "project"\nversion = "1.0"\n'
    )
    return root


def offline(patch: pytest.MonkeyPatch, root: pathlib.Path) -> None:
    """Lets pip see the project's own wheels and nothing else."""
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(root / "wheels"))


@pytest.fixture(scope="module")
def prepared(here, tmp_path_factory):
    """Returns a repository whose environment was really installed."""
    root = write_project(tmp_path_factory.mktemp("clone"))
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, root)
        here.prepare(root)
    return root


@pytest.fixture
def steps(here, monkeypatch):
    """Records what would be run, in place of running it."""
    done = []

    def call(command, *_):
        done.append(command)
        if "venv" in command:
            pathlib.Path(command[-1]).mkdir()

    monkeypatch.setattr(here, "_call", call)
    monkeypatch.setattr(here, "_install", call)
    return done


def script(path: pathlib.Path, text: str) -> pathlib.Path:
    """Writes an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_installs_the_lock_and_the_project(prepared):
    python = prepared / ".venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-c", "import project; print(project.answer)"],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.stdout == "42\n", done.stderr


def test_second_call_installs_nothing(here, prepared, steps):
    python = here.prepare(prepared)
    assert steps == []
    assert python == prepared / ".venv" / "bin" / "python"


def test_a_changed_file_is_refused_and_leaves_no_stamp(here, tmp_path, monkeypatch):
    root = write_project(tmp_path / "clone")
    offline(monkeypatch, root)
    lock = root / "requirements.lock"
    right = lock.read_text()
    lock.write_text(right[:-2] + ("0" if right[-2] != "0" else "1") + "\n")
    with pytest.raises(here.SetupError, match=r"installing requirements\.lock failed"):
        here.prepare(root)
    assert (root / ".venv").is_dir()
    assert not (root / ".venv" / "installed.txt").exists()


@pytest.mark.parametrize("changed", ["requirements.lock", "setup.py"])
def test_changed_requirements_are_installed_anew(here, tmp_path, steps, changed):
    root = write_project(tmp_path / "clone")
    here.prepare(root)
    here.prepare(root)
    assert len(steps) == 3  # environment, lock, project: once
    leftover = root / ".venv" / "leftover.txt"
    leftover.write_text("of the old environment")
    (root / changed).write_text((root / changed).read_text() + "# changed\n")
    here.prepare(root)
    assert len(steps) == 6
    assert not leftover.exists()


def test_the_lock_is_checked_and_the_project_brings_nothing(here, tmp_path, steps):
    root = write_project(tmp_path / "clone")
    here.prepare(root)
    _, lock, project = steps
    assert "--require-hashes" in lock
    assert lock[-2:] == ["-r", str(root / "requirements.lock")]
    assert {"--no-deps", "--no-build-isolation"} <= set(project)
    assert project[-2:] == ["-e", str(root)]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_interrupted_installation_is_begun_anew(here, tmp_path, monkeypatch, failing):
    root = write_project(tmp_path / "clone")
    count = 0

    def call(command, *_):
        nonlocal count
        count += 1
        if "venv" in command:
            pathlib.Path(command[-1]).mkdir()
        if count == failing + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(here, "_call", call)
    monkeypatch.setattr(here, "_install", call)
    with pytest.raises(KeyboardInterrupt):
        here.prepare(root)
    assert not (root / ".venv" / "installed.txt").exists()
    here.prepare(root)
    assert count == failing + 1 + 3
    assert (root / ".venv" / "installed.txt").exists()


def test_two_calls_at_once_install_once(here, tmp_path, monkeypatch):
    root = write_project(tmp_path / "clone")
    running, most, count = 0, 0, 0

    def call(command, *_):
        nonlocal running, most, count
        running, count = running + 1, count + 1
        most = max(most, running)
        time.sleep(0.05)
        if "venv" in command:
            pathlib.Path(command[-1]).mkdir()
        running -= 1

    monkeypatch.setattr(here, "_call", call)
    monkeypatch.setattr(here, "_install", call)
    threads = [threading.Thread(target=here.prepare, args=(root,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, count) == (1, 3)


def test_stamp_depends_on_the_interpreter_and_the_place(here, tmp_path):
    one, two = (write_project(tmp_path / name) for name in ("one", "two"))
    python = script(tmp_path / "python", "echo 3.12")
    other = script(tmp_path / "other", "echo 3.11")
    stamps = {here.stamp_text(root, str(p)) for root in (one, two) for p in (python,)}
    assert len(stamps | {here.stamp_text(one, str(other))}) == 3


class _Version(tuple):
    """A stand-in for sys.version_info."""


def test_finds_another_python_on_the_path(here, tmp_path, monkeypatch):
    monkeypatch.setattr(here.sys, "version_info", _Version((3, 10, 1)))
    monkeypatch.setenv("PATH", str(tmp_path))
    script(tmp_path / "python3.11", "exit 1")  # a shim of a version not installed
    wanted = script(tmp_path / "python3.12", "echo 3.12")
    assert here.find_python() == str(wanted)


def test_no_supported_python_is_one_sentence(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(here.sys, "version_info", _Version((3, 10, 1)))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert here.main(["tests"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("here: Python 3.11 or 3.12 is needed, this is 3.10")


def test_inside_an_environment_its_own_python_is_taken(here, monkeypatch):
    monkeypatch.setattr(here.sys, "version_info", _Version((3, 11, 7)))
    monkeypatch.setattr(here.sys, "_base_executable", "base/python3.11", raising=False)
    assert here.find_python() == "base/python3.11"


def test_missing_venv_module_names_the_package(here, tmp_path, monkeypatch, capsys):
    root = write_project(tmp_path / "clone")
    python = script(
        tmp_path / "python", 'case "$2" in venv) exit 1;; esac\necho "3.11"'
    )
    monkeypatch.setattr(here, "find_python", lambda: str(python))
    with pytest.raises(here.SetupError, match="apt-get install python3-venv"):
        here.prepare(root)


@pytest.mark.parametrize(
    "words, command",
    [
        (["tests"], ["-m", "pytest"]),
        (["tests", "-k", "cli"], ["-m", "pytest"]),
        (["quickstart"], ["-m", "nlhf_jax", "quickstart"]),
        (["train", "--gin_file=a.gin"], ["-m", "nlhf_jax", "train"]),
    ],
)
def test_commands(here, words, command):
    found = here.command_for(pathlib.Path("python"), words)
    assert found[: 1 + len(command)] == ["python", *command]
    assert found[len(found) - len(words) + 1 :] == words[1:]


def test_main_becomes_the_command(here, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(here, "prepare", lambda: tmp_path / "python")
    monkeypatch.setattr(here.os, "chdir", seen.append)
    monkeypatch.setattr(here.os, "execve", lambda *words: seen.append(words))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    monkeypatch.delenv("NPROC", raising=False)
    here.main(["sample", "--num=3"])
    folder, (program, command, environment) = seen
    assert folder == HERE.parent.parent
    assert program == str(tmp_path / "python")
    assert command[1:] == ["-m", "nlhf_jax", "sample", "--num=3"]
    assert environment["NPROC"] == "16"
    assert environment["TF_CPP_MIN_LOG_LEVEL"] == "1"


def test_progress_is_a_few_lines(here, tmp_path, capsys):
    text = "".join(f"Collecting package{i}\\n  Using cached\\n" for i in range(40))
    pip = script(
        tmp_path / "pip", f"printf '{text}Installing collected packages: x\\n'"
    )
    here._install([str(pip)], 40, "no")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "here: 10 of about 40 packages found",
        "here: 20 of about 40 packages found",
    ]
    assert lines[4:] == ["here: all downloaded, unpacking"]


def test_packages_of_a_lock_are_counted(here):
    lock = (
        "# made by a tool, see x==y\n"
        "a==1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\n"
        "b==2 ; sys_platform == 'linux' \\\n    --hash=sha256:22\n"
    )
    assert here.count_packages(lock) == 2


@pytest.mark.parametrize("flags", [(), ("-I", "-S")])
def test_without_words_it_says_what_to_write(flags, tmp_path):
    done = subprocess.run(
        [sys.executable, *flags, str(HERE)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("here: say what to run: quickstart, tests")


def test_needs_the_standard_library_only():
    tree = ast.parse(HERE.read_text())
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    assert names <= set(sys.stdlib_module_names)
