# SPDX-License-Identifier: Apache-2.0
"""The direction of imports: lower layers only, frameworks only in their rooms."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "nlhf_jax"

# From the bottom up. A room imports itself and the rooms of the rows above its own.
LAYERS = (
    ("types", "checks"),
    ("sequences", "settings"),
    ("games", "mixture", "losses"),
    ("decoding", "partitioning", "optimizers", "models", "data"),
    ("preferences",),
    ("algorithms",),
    ("train_step", "supervised_step"),
    ("metrics", "parameter_files"),
    ("progress", "checkpoints", "evaluation", "interop"),
    ("loop",),
    ("jobs",),
    ("gin_files",),
    ("gin_lint",),
    ("gin_bindings",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}

EVERYWHERE = {"jax", "numpy", "jaxtyping"}
FRAMEWORKS = {
    "checkpoints": {"orbax"},
    "data": {"sentencepiece", "seqio", "tensorflow", "tensorflow_datasets", "tqdm"},
    "evaluation": {"jinja2", "matplotlib", "rouge_score", "scipy"},
    "games": {"scipy"},
    "gin_bindings": {"gin"},
    "interop": {"safetensors", "tensorstore"},
    "metrics": {"tensorboard"},
    "models": {"flax"},
    "optimizers": {"optax"},
    "parameter_files": {"safetensors"},
    "preferences": {"flax"},
    "progress": {"rich"},
    "supervised_step": {"optax"},
    "train_step": {"optax"},
}


def room_of(file: pathlib.Path, package: pathlib.Path = PACKAGE) -> str:
    return file.relative_to(package).with_suffix("").parts[0]


def imported_names(tree: ast.AST) -> list[tuple[int, str]]:
    """Returns (line, dotted name) of every import, also of those inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            literals = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found += [(node.lineno, name) for name in literals]
    return found


def complaint(room: str, name: str) -> str:
    """Returns what is wrong with `import name` in a room, or an empty string."""
    if name.startswith("."):
        return f"{name}: imports are absolute"
    top, _, rest = name.partition(".")
    if top in sys.stdlib_module_names:
        return ""
    if top != "nlhf_jax":
        allowed = EVERYWHERE | FRAMEWORKS.get(room, set())
        return "" if top in allowed else f"{room} may not import {top}"
    target = rest.split(".")[0]
    if target in ("", "__version__", room):
        return ""
    if target not in LAYER_OF:
        return f"{target} stands in no layer"
    lower = LAYER_OF[target] < LAYER_OF[room]
    return "" if lower else f"{room} imports {target}, which is not below it"


def complaints(package: pathlib.Path) -> list[str]:
    """Returns `file:line: what is wrong` for every file of a package."""
    found = []
    for file in sorted(package.rglob("*.py")):
        room = room_of(file, package)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if room == "__init__":
            found += [f"{file}:{n}: the package imports {m}" for n, m in _of(tree)]
        elif room not in LAYER_OF:
            found.append(f"{file}:1: {room} stands in no layer of imports_test.py")
        else:
            wrong = ((n, complaint(room, name)) for n, name in _of(tree))
            found += [f"{file}:{number}: {text}" for number, text in wrong if text]
    return found


_of = imported_names


def test_the_package_imports_downwards_and_its_frameworks_stay_in_their_rooms():
    assert not complaints(PACKAGE), "\n".join(complaints(PACKAGE))


def test_no_room_is_listed_twice_and_frameworks_belong_to_listed_rooms():
    rooms = [room for layer in LAYERS for room in layer]
    assert len(rooms) == len(set(rooms))
    assert set(FRAMEWORKS) <= set(rooms)


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("losses.py", "import tensorflow as tf", "losses may not import tensorflow"),
        ("losses.py", "import gin", "losses may not import gin"),
        ("loop.py", "import orbax.checkpoint", "loop may not import orbax"),
        ("train_step.py", "import flax.linen as nn", "may not import flax"),
        ("losses.py", "from nlhf_jax import loop", "loop, which is not below"),
        ("losses.py", "from nlhf_jax import mixture", "mixture, which is not below"),
        ("games/x.py", "from nlhf_jax.jobs.train import train", "jobs, which is not"),
        ("games/x.py", "from . import y", "imports are absolute"),
        ("losses.py", "def f():\n    import torch", "losses may not import torch"),
        ("losses.py", "importlib.import_module('torch')", "may not import torch"),
        ("kitchen.py", "", "kitchen stands in no layer"),
        ("loop.py", "import nlhf_jax.kitchen", "kitchen stands in no layer"),
        ("__init__.py", "import jax", "the package imports jax"),
    ],
)
def test_each_kind_of_wrong_import_is_seen(tmp_path, file, line, expected):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    (found,) = complaints(tmp_path)
    assert expected in found
    assert str(path) in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("losses.py", "from nlhf_jax.sequences import lengths"),
        ("games/x.py", "from nlhf_jax.games import y"),
        ("games/x.py", "import scipy.optimize"),
        ("preferences/x.py", "from nlhf_jax.models import t5"),
        ("cli.py", "from nlhf_jax import __version__"),
        ("loop.py", "import contextlib, jax.numpy as jnp"),
    ],
)
def test_right_imports_pass(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    assert not complaints(tmp_path)


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_quick_and_imports_no_framework():
    code = (
        "import sys, time; start = time.perf_counter(); import nlhf_jax; "
        "print(time.perf_counter() - start, 'jax' in sys.modules)"
    )
    seconds, has_jax = _run(code).split()
    assert float(seconds) < 2
    assert has_jax == "False"


def _modules_outside(rooms: set[str]) -> list[str]:
    names = []
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        if room_of(file) not in {*rooms, "__main__"}:
            names.append(".".join(p for p in parts if p != "__init__"))
    return sorted(names)


def test_no_module_outside_data_and_jobs_imports_a_heavy_framework():
    names = _modules_outside({"data", "jobs"})
    assert len(names) > 30
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "heavy = ('tensorflow', 'torch', 'transformers', 'seqio')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert _run(code).strip().splitlines()[-1] == "[]"


def test_jobs_and_gin_bindings_import_without_tensorflow():
    code = (
        "import sys, nlhf_jax.gin_bindings as b; b.register(); "
        "print([n for n in ('tensorflow', 'torch', 'seqio') if n in sys.modules])"
    )
    assert _run(code).strip() == "[]"
