# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the layers of docs/design.md, enforced on the syntax tree."""

import ast
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nlhf_jax"

# From the bottom up, with the layer's number in docs/design.md: a room imports from
# the lines before its own, and from itself. Beside each room, what it may import
# besides Python's library and EVERYWHERE.
LAYERS = (
    (0, {"types": (), "checks": (), "huge_pages": ()}),
    (1, {"sequences": (), "settings": (), "global_arrays": ()}),
    (1, {"t5_settings": ()}),
    (1, {"decoder_settings": ()}),
    (1, {"discovery": (), "compilation_cache": ()}),
    (1, {"roll_call": ()}),
    (1, {"peers": (), "daemon_threads": ()}),
    (1, {"runtime": (), "watchdog": ()}),
    (1, {"distributed": ()}),
    (1, {"stopping": (), "prefetch": ()}),
    (
        2,
        {
            "games": ("scipy",),
            "mixture": (),
            "losses": (),
            "parameter_sets": (),
            "selection": (),
        },
    ),
    (3, {"partitioning": ()}),
    (3, {"constraints": ()}),
    (
        3,
        {
            "decoding": (),
            "optimizers": ("optax",),
            "models": ("flax",),
            "data": (
                "jinja2",
                "sentencepiece",
                "seqio",
                "tensorflow",
                "tensorflow_datasets",
                "tokenizers",
                "tqdm",
            ),
        },
    ),
    (3, {"preferences": ("flax", "httpx"), "scale": ()}),
    (
        3,
        {
            "conversion": (
                "gguf",
                "msgpack",
                "sentencepiece",
                "tensorstore",
                "tokenizers",
                "peft",
                "torch",
                "transformers",
            )
        },
    ),
    (3, {"flops": ()}),
    (4, {"algorithms": (), "collapse": (), "guards": ()}),
    (4, {"loss_gradient": ()}),
    (5, {"train_step": ("optax",), "supervised_step": ("optax",)}),
    (5, {"outside_step": ("optax",)}),
    (
        6,
        {
            "event_files": ("tensorboard",),
            "parameter_files": ("safetensors",),
            "evaluation": ("jinja2", "matplotlib", "optax", "rouge_score"),
        },
    ),
    (6, {"checksums": (), "metric_table": (), "divergence": ()}),
    (6, {"metrics": ()}),
    (6, {"alarms": ()}),
    (6, {"manifests": ("xxhash",), "progress": ("rich",)}),
    (6, {"retention": ()}),
    (6, {"stored_states": ("etils", "orbax")}),
    (6, {"saving": ("orbax",)}),
    (6, {"checkpoints": ()}),
    (6, {"profiling": (), "speed": ()}),
    (7, {"loop": ()}),
    (8, {"jobs": ("etils", "rich")}),
    (9, {"gin_files": (), "gin_types": ()}),
    (9, {"gin_lint": ()}),
    (9, {"gin_bindings": ("gin",)}),
    (9, {"cli": ("absl",)}),
    (9, {"compile_command": (), "replay_command": ()}),
    (9, {"__main__": ()}),
)
EVERYWHERE = ("jax", "numpy", "jaxtyping")
FENCED = ("gin", "orbax", "flax", "seqio", "tensorflow", "tensorflow_datasets")
HEAVY = ("tensorflow", "torch", "transformers", "seqio")

LAYER_OF = {room: i for i, (_, rooms) in enumerate(LAYERS) for room in rooms}
THIRD_PARTY = {room: names for _, rooms in LAYERS for room, names in rooms.items()}


def room_of(path: pathlib.Path) -> str:
    """Returns the folder or the file directly under the package that `path` is in."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports_of(source: str) -> list[str]:
    """Returns every dotted name a source imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the direction"
            # `from nlhf_jax import losses` names a room, like `nlhf_jax.losses`.
            whole = node.module == "nlhf_jax"
            names = [f"nlhf_jax.{alias.name}" for alias in node.names]
            found += names if whole else [node.module]
    return found


def violations(room: str, source: str) -> list[str]:
    """Returns what is wrong with a room's imports, one sentence each."""
    if room not in LAYER_OF:
        return [f"{room} stands in no layer"]
    wrong = []
    for name in imports_of(source):
        top, _, rest = name.partition(".")
        if top in sys.stdlib_module_names or name == "nlhf_jax.__version__":
            continue
        if top == "nlhf_jax":
            other = rest.split(".")[0]
            if other not in LAYER_OF:
                wrong.append(f"{room} imports {other!r}, which stands in no layer")
            elif other != room and LAYER_OF[other] >= LAYER_OF[room]:
                wrong.append(f"{room} imports {other}, which is not below it")
        elif top not in (*EVERYWHERE, *THIRD_PARTY[room]):
            wrong.append(f"{room} imports {top}, which is not allowed there")
    return wrong


def sources() -> list[pathlib.Path]:
    """Returns the package's files, its own `__init__` left out."""
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    assert violations(room_of(path), path.read_text()) == []


def test_layers_are_those_of_the_design():
    table = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    drawn = {
        room.rstrip("/"): int(number)
        for number, rooms in re.findall(r"^\| (\d) \| ([^|]*) \|", table, re.MULTILINE)
        for room in re.findall(r"`([^`]+)`", rooms)
    }
    held = {room: number for number, rooms in LAYERS for room in rooms}
    assert drawn == {room: n for room, n in held.items() if room != "__main__"}


def test_every_room_of_the_layers_exists():
    assert {room_of(path) for path in sources()} == set(LAYER_OF)


def test_package_itself_imports_nothing():
    assert imports_of((PACKAGE / "__init__.py").read_text()) == []


@pytest.mark.parametrize(
    "room, source, complaint",
    [
        ("losses", "from nlhf_jax import decoding", "decoding, which is not below"),
        ("losses", "import nlhf_jax.mixture", "mixture, which is not below"),
        ("types", "from nlhf_jax.jobs.runs import run", "jobs, which is not below"),
        ("models", "def f():\n    import optax", "optax, which is not allowed"),
        ("losses", "from flax import linen", "flax, which is not allowed"),
        ("shed", "import jax", "shed stands in no layer"),
        ("jobs", "from nlhf_jax.shed import x", "'shed', which stands in no layer"),
    ],
)
def test_every_kind_of_violation_is_seen(room, source, complaint):
    (found,) = violations(room, source)
    assert complaint in found


def test_own_folder_and_lower_layers_are_fine():
    source = (
        "import os\nimport jax.numpy as jnp\nfrom flax import linen\n"
        "from nlhf_jax.models import layers\nfrom nlhf_jax import settings"
    )
    assert violations("models", source) == []


@pytest.mark.parametrize("framework", FENCED)
def test_frameworks_live_in_few_rooms(framework):
    rooms = [room for room, names in THIRD_PARTY.items() if framework in names]
    where = {
        "gin": ["gin_bindings"],
        "orbax": ["stored_states", "saving"],
        "flax": ["models", "preferences"],
    }
    assert rooms == where.get(framework, ["data"])


def _modules_after(statements: str) -> tuple[set[str], float]:
    """Runs statements in a fresh interpreter: (top-level modules, seconds)."""
    code = (
        "import json, sys, time\n"
        "start = time.perf_counter()\n"
        f"{statements}\n"
        "seconds = time.perf_counter() - start\n"
        "names = sorted({name.split('.')[0] for name in sys.modules})\n"
        "print(json.dumps([names, seconds]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    names, seconds = json.loads(done.stdout.splitlines()[-1])
    return set(names), seconds


def test_import_is_quick_and_light():
    names, seconds = _modules_after("import nlhf_jax")
    assert not names & {*HEAVY, "jax", "numpy"}
    assert seconds < 2.0


def test_no_module_outside_the_data_room_brings_tensorflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources()
        if room_of(path) not in ("data", "__main__")
    ]
    names, _ = _modules_after("\n".join(f"import {name}" for name in modules))
    assert "jax" in names
    assert not names & set(HEAVY)


def test_data_room_brings_tensorflow_only_when_it_reads():
    names, _ = _modules_after("import nlhf_jax.data.batches, nlhf_jax.data.tasks")
    assert not names & set(HEAVY)
