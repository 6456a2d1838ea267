# SPDX-License-Identifier: Apache-2.0
"""What is found before a job starts: values that are wrong together, and the step."""

import json
import pathlib
import re

import jax
import pytest

from nlhf_jax import cli, gin_bindings
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import folders, rehearsal
from nlhf_jax.settings import LoopSettings, MeshSettings
from tests.faults import bad_input_test
from tests.faults.bad_input_test import one_sentence

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHIPPED = "nlhf_jax/pretrained/docstrings_t5"
SELF_PLAY = "--gin_file=configs/algorithms/self_play.gin"


def loop(**changes) -> LoopSettings:
    return LoopSettings(**{"train_steps": 100, "batch_size": 12} | changes)


@pytest.mark.parametrize(
    ("evaluate", "save"),
    [(0, 7), (5, 10), (10, 5), (7, 7), (7, 100), (7, 1000), (100, 7), (150, 40)],
)
def test_periods_that_meet_or_never_both_come_pass(evaluate, save):
    settings = loop(eval_period=evaluate, checkpoint_period=save)
    rehearsal.check("sft", {"loop": settings})


@pytest.mark.parametrize(("evaluate", "save"), [(3, 5), (5, 3), (10, 15), (99, 98)])
def test_periods_that_never_meet_are_refused(evaluate, save):
    settings = loop(eval_period=evaluate, checkpoint_period=save)
    with pytest.raises(UserError) as error:
        rehearsal.check("sft", {"loop": settings})
    assert str(error.value) == (
        "eval_period must divide checkpoint_period or be a multiple of it, so that a "
        f"checkpoint has an evaluation, got {evaluate} and {save}"
    )


@pytest.mark.parametrize(
    ("mesh", "microbatches", "unit"),
    [
        (MeshSettings(data=-1, fsdp=5), 1, 5),
        (MeshSettings(data=2, fsdp=4), 1, 8),
        (MeshSettings(data=2), 4, 8),
    ],
)
def test_a_batch_that_no_machine_could_split_is_refused(mesh, microbatches, unit):
    settings = loop(num_microbatches=microbatches)
    with pytest.raises(UserError, match=f"must be divisible by {unit} .*, got 12"):
        rehearsal.check_batch(settings, mesh)
    rehearsal.check_batch(settings, MeshSettings(data=-1, tensor=5))


@pytest.mark.parametrize("job", ["sft", "preference", "reward", "train", "collect"])
@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seeds_that_a_generator_refuses_are_refused_before(job, seed):
    with pytest.raises(UserError, match=r"seed must be in \[0, 2147483647\], got"):
        rehearsal.check(job, {"seed": seed})
    rehearsal.check("sample", {"seed": seed})  # checks its own


# --------------------------------------------------------------- through the lint


def words(tmp_path, *more: str) -> list[str]:
    return [
        "train",
        SELF_PLAY,
        f"--gin.MODEL_DIR={tmp_path}/out",
        f"--gin.REFERENCE_CHECKPOINT={SHIPPED}",
        f"--gin.PREFERENCE_CHECKPOINT={tmp_path}/judge",
        *more,
    ]


@pytest.fixture
def judge(tmp_path):
    """Describes a preference model; it has no parameters."""
    text = (ROOT / SHIPPED / "model.json").read_text()
    described = folders.ModelDescription.from_json(text)
    described = folders.dataclasses.replace(described, kind="preference")
    vocabulary = str(ROOT / SHIPPED / "vocabulary.model")
    folders.describe(tmp_path / "judge", described, vocabulary)
    return tmp_path


MISTAKES = {
    "--gin.TAU=-1.0": "tau must be in [0.0, inf), got -1.0 (--gin.TAU)",
    "--gin.TAU=1e999": "--gin.TAU: self_play.tau must be a number, got 1e999",
    "--gin.BATCH_SIZE=0": "batch_size must be an integer of at least 1, got 0 (--gin",
    "--gin.TRAIN_STEPS=0": "train_steps must be an integer of at least 1, got 0",
    "--gin.LoopSettings.keep_checkpoints=0": "keep_checkpoints must be an integer of",
    "--gin.OptimizerSettings.learning_rate=-0.1": "learning_rate must be in (0.0, inf)",
    "--gin.RANDOM_SEED=-1": "seed must be in [0, 2147483647], got -1 (--gin.RANDOM_",
    "--gin.MAX_DECODE_LENGTH=-3": "max_decode_length must be an integer of at least 0",
    "--gin.LoopSettings.num_microbatches=5": "num_microbatches must divide batch_size",
    "--num_gap_samples=1": "num_gap_samples must be 0 or at least 2, got 1",
    "--write_sets=('../x',)": "self_play has only its policy to write, got ('../x',)",
    "--gin.BETA=0.3": (
        "nothing reads the macro BETA: 'beta' is a parameter of convergence, ipo_md, "
        "nash_md_pg, sample, none of which is used here"
    ),
    "--gin.self_play.beta=0.3": "self_play has no parameter 'beta'; it has tau, clip",
    "--gin.ALGORITHM=@nash_md_pg()": "nothing in 'train' reads self_play.tau",
}


def test_what_the_best_are_chosen_by_is_a_metric_of_an_evaluation(capsys, tmp_path):
    flags = ["--gin.LoopSettings.keep_best=2", "--gin.LoopSettings.eval_period=50"]
    flags.append("--gin.LoopSettings.best_metric='eval/kll'")
    sentence = one_sentence(capsys, *words(tmp_path, *flags))
    assert "best_metric must be one of eval/" in sentence
    assert "got 'eval/kll' (did you mean 'eval/kl'?)" in sentence


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_wrong_value_is_found_before_a_job_starts(flag, capsys, tmp_path):
    for more in ((), ("--dry_run",)):
        assert MISTAKES[flag] in one_sentence(capsys, *words(tmp_path, flag), *more)
    assert not list(tmp_path.iterdir())


def test_the_place_of_a_wrong_value_is_its_line(capsys, tmp_path):
    (tmp_path / "run.gin").write_text(
        "include 'configs/algorithms/self_play.gin'\n\nLoopSettings.log_period = 0\n"
    )
    flags = words(tmp_path, f"--gin_file={tmp_path}/run.gin")
    flags.remove(SELF_PLAY)
    assert one_sentence(capsys, *flags) == (
        f"log_period must be an integer of at least 1, got 0 ({tmp_path}/run.gin:3)"
    )


def test_a_later_stage_is_checked_before_the_first_one_starts(capsys, tmp_path):
    more = ("--gin.nash_md_pg.beta=1.5", f"--model_dir={tmp_path}/run")
    sentence = one_sentence(capsys, "quickstart", *more)
    assert sentence.startswith("beta must be in [0")
    assert "(--gin.nash_md_pg.beta)" in sentence
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_runs_nothing_and_hands_over_what_the_job_gets(tmp_path):
    gin_bindings.load(
        "quickstart", ["configs/runs/quickstart.gin"], {"MODEL_DIR": str(tmp_path)}
    )
    found = gin_bindings.rehearse("quickstart")
    assert [job for job, _ in found].count("train") == 4
    algorithms = [said["algorithm"].name for job, said in found if job == "train"]
    assert algorithms == ["reward_pg", "self_play", "nash_md_pg", "best_response"]
    assert not list(tmp_path.iterdir())


def test_a_name_set_twice_in_one_file_is_warned_of(capsys, tmp_path):
    (tmp_path / "run.gin").write_text(
        "include 'configs/runs/sft.gin'\nTRAIN_STEPS = 3\nTRAIN_STEPS = 4\n"
    )
    file = f"--gin_file={tmp_path}/run.gin"
    assert cli.main(["sft", file, "--model_dir=x", "--dry_run"]) == 0
    assert capsys.readouterr().err == (
        f"nlhf: {tmp_path}/run.gin:3: TRAIN_STEPS is set in line 2 too; this one "
        "counts\n"
    )


def test_a_path_needs_no_quotes_of_its_own(tmp_path):
    folder = f"{tmp_path}/with blank, tau=0.1"
    gin_bindings.load("sft", ["configs/runs/sft.gin"], {"MODEL_DIR": folder})
    assert gin_bindings.rehearse("sft")[0][1]["model_dir"] == folder


# ------------------------------------------------------------------- the dry run


def test_a_dry_run_builds_the_step_without_one_parameter(judge, capsys, monkeypatch):
    monkeypatch.setattr(jax, "device_put", None)
    assert cli.main([*words(judge), "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    description = json.loads((ROOT / SHIPPED / "model.json").read_text())
    assert description["settings"]["vocab_size"] == 4096
    assert "its step was built from shapes alone: 3,934,848 parameters" in out
    assert "a batch of 32" in out
    assert not (judge / "out").exists()


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--gin.FSDP=3", "must be divisible by 3 (fsdp=3, num_microbatches=1), got 32"),
        ("--gin.PREFERENCE_CHECKPOINT=no/where", "'no/where' does not exist"),
        ("--gin.PREFERENCE_CHECKPOINT=''", "PREFERENCE_CHECKPOINT must name a model"),
        (f"--gin.PREFERENCE_CHECKPOINT={SHIPPED}", "must hold a preference model, got"),
        ("--gin.MIXTURE_OR_TASK_NAME=docstring", "(did you mean 'docstrings'?)"),
        ("--gin.MODEL_DIR=''", "MODEL_DIR must be a folder to write to"),
        (f"--gin.MODEL_DIR={__file__}/x", "is a file"),
        ("--gin.MODEL_DIR=/proc/none", "no file may be made in '/proc'"),
        ("--gin.MODEL_DIR=gs://bucket/run", "that every host mounts, got 'gs://"),
    ],
)
def test_what_only_the_model_shows_is_found_by_a_dry_run(judge, capsys, flag, expected):
    assert expected in one_sentence(capsys, *words(judge, flag), "--dry_run")


def test_an_error_of_shapes_is_one_sentence(judge, capsys, monkeypatch):
    def broken(*arguments):
        raise TypeError("add got incompatible shapes (3,), (4,)\n\nmore lines")

    real = rehearsal.programs.program

    def program(*given):
        found = real(*given)
        return rehearsal.programs.dataclasses.replace(
            found, step=found.step._replace(step_fn=broken)
        )

    monkeypatch.setattr(rehearsal.programs, "program", program)
    assert one_sentence(capsys, *words(judge), "--dry_run") == (
        "train: the step cannot be built: add got incompatible shapes (3,), (4,)"
    )


@pytest.mark.parametrize("job", ["preference", "reward"])
def test_a_judge_is_built_too(job, capsys, tmp_path):
    row = {"prompt": "p", "response_a": "a", "response_b": "b", "preference": 0.5}
    rows = [json.dumps(row | {"prompt": text}) for text in "pq"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    flags = [
        f"--gin_file=configs/runs/{job}.gin",
        f"--gin.MODEL_DIR={tmp_path}/out",
        f"--gin.TRAIN_FILE={tmp_path}/rows.jsonl",
        "--gin.GROUP_FIELD=prompt",
        f"--gin.INITIAL_CHECKPOINT_PATH={SHIPPED}",
    ]
    assert cli.main([job, *flags, "--dry_run"]) == 0
    assert "built from shapes alone" in capsys.readouterr().out


def test_a_job_of_another_kind_has_no_step():
    assert rehearsal.build("evaluate", {}) == ""


def test_the_document_has_every_row_and_its_sentence():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", text, flags=re.MULTILINE)
    listed = {name.strip(): sentence for name, sentence in rows}
    for name, (_, expected) in (bad_input_test.LINES | bad_input_test.FILES).items():
        assert expected in listed[name], name
    for flag, expected in MISTAKES.items():
        assert expected in listed[flag.removeprefix("--")], flag
