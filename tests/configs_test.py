# SPDX-License-Identifier: Apache-2.0
"""Every configuration that ships is complete, and does what its comments say."""

import pathlib
import re

import pytest

from nlhf_jax import cli, gin_bindings, gin_files
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.jobs import JOBS
from tests.battery import all_but

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = sorted(
    file
    for room in ("runs", "algorithms")
    for file in (ROOT / "configs" / room).iterdir()
)
ALL = sorted((ROOT / "configs").rglob("*.gin"))

DECODER_ONLY = (
    "gemma_2_2b",
    "gemma_3_1b",
    "llama_3_2_1b",
    "qwen_2_5_0_5b",
    "qwen_3_0_6b",
)
# Run -> the job it is for, where the file's own comment does not name it.
JOB_OF = {"train": "train", "paper_scale": "train"}
# A run that others include, with what they add to it.
PARTS = {"train": {"ALGORITHM": "@self_play()", "self_play.tau": "0.1"}}
REQUIRED = {
    "MODEL_DIR": "somewhere",
    "REFERENCE_CHECKPOINT": "a/reference",
    "TRAIN_FILE": "a.jsonl",
    "DATA_DIR": "a/folder",
    "SFT_CHECKPOINT": "a/model",
    "JUDGE_CHECKPOINT": "a/judge",
    "POLICY_CHECKPOINT": "a/policy",
    "START": "a/model",
    "INITIAL_CHECKPOINT_PATH": "a/model",
    "PREFERENCE_CHECKPOINT": "a/judge",
    "POLICIES": "{'SFT': 'a/model', 'Nash': 'a/policy'}",
}


def job_of(run: pathlib.Path) -> str:
    named = re.search(r"nlhf (\w+)", run.read_text(encoding="utf-8"))
    return JOB_OF.get(run.stem) or named[1]


def statements(file: pathlib.Path) -> list[gin_files.Statement]:
    return gin_files.read(str(file), [ROOT], "the test")


def required_macros(file: pathlib.Path) -> set[str]:
    last = {s.key: s.value for s in statements(file)}
    return {key for key, value in last.items() if value == "%gin.REQUIRED"}


def flags(run: pathlib.Path) -> list[str]:
    filled = {name: REQUIRED[name] for name in required_macros(run)}
    filled |= PARTS.get(run.stem, {})
    return [f"--gin.{name}={value}" for name, value in sorted(filled.items())]


def lint(job: str, *words: str) -> None:
    """Checks a configuration as a run begins; the folders it names need not exist."""
    arguments = cli.Arguments(job, words)
    gin_bindings.load(job, arguments.files, arguments.overrides)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_every_run_is_complete(run, capsys):
    lint(job_of(run), f"--gin_file={run.relative_to(ROOT)}", *flags(run))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_every_run_without_its_required_macros_names_them_all(run, capsys):
    missing = required_macros(run)
    if not missing:
        assert run.stem in ("quickstart", "reproduce_small")
        return
    parts = [f"--gin.{key}={value}" for key, value in PARTS.get(run.stem, {}).items()]
    file = f"--gin_file={run.relative_to(ROOT)}"
    assert cli.main([job_of(run), file, *parts, "--dry_run"]) == 2
    err = capsys.readouterr().err
    for name in missing:
        assert f"--gin.{name}=..." in err


def commands(file: pathlib.Path) -> list[str]:
    """Returns the `nlhf ...` command lines of a file's leading comment."""
    text = "\n".join(
        line.lstrip("# ")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    ).replace("\\\n", " ")
    return re.findall(r"^nlhf (\w+.*--gin_file.*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_the_command_in_each_runs_comment_works(run, capsys):
    import shlex

    for command in commands(run):
        words = shlex.split(command)
        assert f"--gin_file={run.relative_to(ROOT)}" in words
        lint(*words)
        assert capsys.readouterr().err == ""


def test_nearly_every_run_shows_its_command():
    shown = {run.stem for run in RUNS if commands(run)}
    assert shown >= {run.stem for run in RUNS} - {
        "train",
        "quickstart",
        "reproduce_small",
        "reproduce_paper",
    }


def test_every_file_begins_by_saying_what_it_is():
    for file in ALL:
        assert file.read_text(encoding="utf-8").startswith("# "), file


def test_every_file_is_a_run_or_part_of_one():
    included = set()
    for run in RUNS:
        included |= {s.place.rsplit(":", 1)[0] for s in statements(run)}
    included |= {str(run) for run in RUNS}
    idle = {str(f.relative_to(ROOT)) for f in ALL} - {
        str(pathlib.Path(name).resolve().relative_to(ROOT)) for name in included
    }
    # Sizes for the user to include in place of the small one, or to name to
    # `nlhf compile`.
    sizes = ("large", "xl", "xxl")
    known = {f"configs/models/t5_1_1_{size}.gin" for size in sizes}
    assert idle <= known | {f"configs/models/{name}.gin" for name in DECODER_ONLY}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_has_its_run(name):
    (algorithm,) = [
        s.value
        for s in statements(ROOT / "configs" / "algorithms" / f"{name}.gin")
        if s.key == "ALGORITHM"
    ]
    assert algorithm == f"@{name}()"


MODELS = sorted((ROOT / "configs" / "models").glob("*.gin"))


@pytest.mark.parametrize(
    "model", all_but(["t5_docstrings"], MODELS, lambda model: model.stem)
)
def test_every_model_fits_into_a_training_run(model, tmp_path, capsys):
    text = (ROOT / "configs" / "runs" / "sft.gin").read_text(encoding="utf-8")
    run = tmp_path / "run.gin"
    run.write_text(text.replace("t5_docstrings.gin", model.name))
    # Of equal layers one is traced for all.
    words = ["--model_dir=x", "--dry_run", "--gin.SCAN_LAYERS=True"]
    assert cli.main(["sft", f"--gin_file={run}", *words]) == 0
    assert capsys.readouterr().err == ""


def test_every_scalar_that_a_run_binds_is_a_value_its_settings_accept():
    """Settings check themselves when they are built; a dry run doesn't build them."""
    import gin

    for run in RUNS:
        overrides = dict(flag[len("--gin.") :].split("=", 1) for flag in flags(run))
        gin_bindings.load(job_of(run), [str(run)], overrides)
        for name in ("DataSettings", "LoopSettings", "OptimizerSettings"):
            for scope in scopes_of(run, name):
                with gin.config_scope(scope or None):
                    gin_bindings._bound[name]()


def scopes_of(run: pathlib.Path, name: str) -> set[str]:
    text = " ".join(s.value for s in statements(run))
    found = re.findall(rf"@(?:(\w+)/)?{name}\(\)", text)
    return set(found)


def test_every_job_but_the_readers_has_a_run():
    configured = {job_of(run) for run in RUNS}
    assert set(JOBS) - configured <= {"convergence", "exploration", "sample"}
