# SPDX-License-Identifier: Apache-2.0
"""What is declared, pinned and shipped: setup.py, requirements.lock and a wheel."""

import ast
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
import setuptools
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nlhf_jax
from nlhf_jax import gin_files

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")

INSTALL = "install_requires"

# Names to import by that differ from the names to install.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "gin": "gin-config",
    "jaxlib": "jax",
    "ml_dtypes": "ml-dtypes",
    "orbax": "orbax-checkpoint",
    "rouge_score": "rouge-score",
    "tensorflow_datasets": "tensorflow-datasets",
}
# Nobody imports them by name: a package of the list needs them at run time.
INDIRECT = {"importlib-resources", "tensorflow-text"}


@pytest.fixture(scope="module")
def declared():
    """Returns the keyword arguments of setup.py's call."""
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **words: said.update(words))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return said


def lock_entries(text: str = LOCK) -> dict[str, tuple[str, str, list[str]]]:
    """Returns name -> (version, marker, hashes) of a lock."""
    entries = {}
    for entry in re.split(r"\n(?=\S)", text.replace("\\\n", " ").strip()):
        if entry.startswith("#"):
            continue
        head, *hashes = entry.split(" --hash=")
        pin, _, marker = head.partition(";")
        name, _, version = pin.strip().partition("==")
        entries[name] = (version, marker.strip(), [h.strip() for h in hashes])
    return entries


def wanted(declared) -> dict[str, Requirement]:
    """Returns name -> requirement of the project and its tests."""
    lines = [*declared[INSTALL], *declared["extras_require"]["test"]]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def required(declared) -> set[str]:
    """Returns the names that the project itself requires."""
    return {canonicalize_name(Requirement(r).name) for r in declared[INSTALL]}


def imported() -> set[str]:
    """Returns the distributions whose packages the project imports."""
    found = set()
    for path in (ROOT / "nlhf_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    names = found - set(sys.stdlib_module_names) - {"nlhf_jax"}
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names}


def test_lock_reads_back():
    text = (
        "# by a tool\na-b==1.0 ; python_version < '4' \\\n    --hash=sha256:0\nc==2\n"
    )
    assert lock_entries(text) == {
        "a-b": ("1.0", "python_version < '4'", ["sha256:0"]),
        "c": ("2", "", []),
    }


def test_everything_imported_is_declared(declared):
    optional = {"gguf", "peft", "torch", "transformers"}
    assert imported() - required(declared) - optional == set()


def test_everything_declared_is_imported(declared):
    assert required(declared) - imported() - INDIRECT == set()


def test_python_versions(declared):
    assert declared["python_requires"] == ">=3.11"


def test_extras(declared):
    assert set(declared["extras_require"]) == {"tpu", "gpu", "hf", "test"}


def test_version_has_one_home(declared):
    assert declared["version"] == nlhf_jax.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {nlhf_jax.__version__}" in changelog


def test_licence(declared):
    assert declared["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_lock_pins_what_is_declared(declared):
    entries = lock_entries()
    for name, requirement in wanted(declared).items():
        assert name in entries, f"{name} is declared and not locked"
        version = entries[name][0]
        assert requirement.specifier.contains(version), f"{requirement}, not {version}"


def test_lock_holds_the_build_tools():
    # The project is built with what the lock has checked, not in isolation.
    requires = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    entries = lock_entries()
    for text in requires[1].split(","):
        requirement = Requirement(text.strip().strip('"'))
        assert requirement.specifier.contains(entries[requirement.name][0])


def test_every_pin_has_hashes():
    for name, (version, _, hashes) in lock_entries().items():
        assert re.fullmatch(r"[0-9][\w.+!]*", version), name
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes), name


def test_lock_names_no_place():
    for word in ("--index-url", "--extra-index", "--find-links", "://", " @ ", "-e "):
        assert word not in LOCK


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_lock_is_whole_on_both_pythons(declared, python):
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    here = {
        name
        for name, (_, marker, _) in lock_entries().items()
        if not marker or Marker(marker).evaluate(environment)
    }
    assert set(wanted(declared)) <= here
    elsewhere = set(lock_entries()) - here
    # For Windows, and for Python in a browser.
    assert elsewhere <= {"colorama", "nest-asyncio", "httpx2-jsfetch"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Returns the wheel of a copy of the tracked sources, unpacked."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    for name in ("nlhf_jax", "configs"):
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*command, *options, str(copy)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_wheel_holds_every_module_and_file(wheel):
    def modules(root):
        return {p.relative_to(root).as_posix() for p in root.glob("nlhf_jax/**/*.py")}

    assert modules(wheel) == modules(ROOT)
    assert (wheel / "nlhf_jax/evaluation/report.html.j2").is_file()
    assert (wheel / "nlhf_jax/pretrained/docstrings_t5/model.json").is_file()
    assert not (wheel / "tests").exists()


def test_wheel_holds_the_configs(wheel):
    def configs(root):
        return {p.relative_to(root).as_posix() for p in root.glob("configs/**/*.gin")}

    assert configs(wheel / "nlhf_jax") == configs(ROOT)
    assert configs(ROOT)


def test_wheel_has_the_command(wheel):
    (path,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "nlhf = nlhf_jax.__main__:start" in path.read_text()


def test_installed_wheel_finds_its_configs(wheel, tmp_path):
    code = (
        "import nlhf_jax, sys\n"
        "from nlhf_jax import gin_files\n"
        "found = gin_files.read('configs/runs/sft.gin', [gin_files.REPOSITORY], 'me')\n"
        "print(nlhf_jax.__file__, len(found), found[0].place)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    file, count, place = done.stdout.split()
    assert file.startswith(str(wheel))
    assert place.startswith(str(wheel / "nlhf_jax" / "configs"))
    assert int(count) > 10


def test_a_clone_finds_its_configs():
    assert gin_files.REPOSITORY == ROOT
    assert (gin_files.REPOSITORY / "configs" / "runs" / "quickstart.gin").is_file()


def test_the_lock_of_transformers_adds_what_the_extra_needs_and_no_more():
    def pinned(file):
        text = (ROOT / file).read_text()
        return set(re.findall(r"(?m)^([A-Za-z0-9_.-]+)==", text))

    base, added = pinned("requirements.lock"), pinned("requirements-hf.lock")
    assert not base & added
    assert {"gguf", "peft", "torch", "transformers"} <= added
