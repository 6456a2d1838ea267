# SPDX-License-Identifier: Apache-2.0
"""Jobs end to end through the command line, on a model of a few thousand numbers."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from nlhf_jax import checkpoints, cli
from nlhf_jax.jobs import folders

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 150

TINY = """
VOCAB_SIZE = 384
T5Settings.emb_dim = 16
T5Settings.num_heads = 2
T5Settings.head_dim = 8
T5Settings.mlp_dim = 16
T5Settings.num_encoder_layers = 1
T5Settings.num_decoder_layers = 1
"""
RUN = """
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 6}
MIXTURE_OR_TASK_NAME = 'jsonl'
VOCABULARY_PATH = 'byte'
BATCH_SIZE = 4
LoopSettings.eval_period = 0
"""
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")


def write_lines(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Returns a folder with gin files and data; compiled programs are kept in it."""
    folder = tmp_path_factory.mktemp("jobs")
    targets = [{"prompt": f"say {word}", "target": word[:4]} for word in WORDS]
    pairs = [
        {
            "prompt": f"say {word}",
            "response_a": word[:4],
            "response_b": "no",
            "preference": 0.9,
        }
        for word in WORDS
    ]
    for name, verb in (("train", "say"), ("evaluation", "tell")):
        for kind, rows in (("sft", targets), ("pairs", pairs)):
            asked = [r | {"prompt": r["prompt"].replace("say", verb)} for r in rows]
            write_lines(folder / f"{kind}_{name}.jsonl", asked)
    for run, data in (("sft", "sft"), ("preference", "pairs"), ("reward", "pairs")):
        files = (
            f"TRAIN_FILE = '{folder}/{data}_train.jsonl'\n"
            f"EVALUATION_FILE = '{folder}/{data}_evaluation.jsonl'\n"
        )
        include = f"include 'configs/runs/{run}.gin'\n"
        (folder / f"{run}.gin").write_text(include + TINY + RUN + files)
    for name in ("nash_md_pg", "reward_pg"):
        include = f"include 'configs/algorithms/{name}.gin'\n"
        files = (
            f"TRAIN_FILE = '{folder}/sft_train.jsonl'\n"
            f"EVALUATION_FILE = '{folder}/sft_evaluation.jsonl'\n"
            "MAX_DECODE_LENGTH = 6\ntrain.num_eval_examples = 4\nTRAIN_STEPS = 3\n"
        )
        (folder / f"{name}.gin").write_text(include + RUN + files)
    before = jax.config.jax_compilation_cache_dir
    os.environ["NLHF_CACHE"] = str(folder / "cache")
    yield folder
    del os.environ["NLHF_CACHE"]
    jax.config.update("jax_compilation_cache_dir", before)


def words_for(work: pathlib.Path, run: str, name: str, **macros) -> list[str]:
    job = "train" if run.endswith("_pg") else run
    macros = {"MODEL_DIR": work / name} | macros
    flags = [f"--gin.{key}='{value}'" for key, value in macros.items()]
    return [job, f"--gin_file={work / run}.gin", *flags]


def run_job(work: pathlib.Path, run: str, name: str, *more: str, **macros):
    """Runs a job in this process and returns its folder."""
    assert cli.main([*words_for(work, run, name, **macros), *more]) == 0
    return work / name


@pytest.fixture(scope="module")
def sft(work):
    return run_job(work, "sft", "sft", f"--gin.TRAIN_STEPS={STEPS}")


@pytest.fixture(scope="module")
def preference(work, sft):
    more = ("--gin.TRAIN_STEPS=3",)
    macros = {"INITIAL_CHECKPOINT_PATH": sft}
    return run_job(work, "preference", "preference", *more, **macros)


def test_sft_learns_and_leaves_a_folder_that_describes_itself(sft):
    rows = [row for row in read_lines(sft / "metrics.jsonl") if "loss/token_nll" in row]
    assert rows[-1]["loss/token_nll"] < 0.8 * rows[0]["loss/token_nll"]
    assert folders.kind_of(sft) == "language_model"
    assert folders.read_description(sft).feature_lengths == {"inputs": 16, "targets": 6}
    assert "TRAIN_STEPS" in (sft / "config.gin").read_text()
    assert "jax" in json.loads((sft / "versions.json").read_text())


def test_a_complete_run_does_nothing_more(work, sft):
    before = (sft / "metrics.jsonl").read_text()
    run_job(work, "sft", "sft", f"--gin.TRAIN_STEPS={STEPS}")
    assert (sft / "metrics.jsonl").read_text() == before


def wait_for_step(folder: pathlib.Path, step: int, process) -> None:
    """Waits until a run has logged a step; a hung run fails the test."""
    deadline = time.monotonic() + 120
    file = folder / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if file.is_file() and any(row["step"] >= step for row in read_lines(file)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {process.communicate()}")


@pytest.mark.battery
def test_a_signal_saves_the_run_and_the_same_command_ends_it_bit_for_bit(work, sft):
    more = [f"--gin.TRAIN_STEPS={STEPS}", "--gin.LoopSettings.log_period=1"]
    words = [*words_for(work, "sft", "stopped"), *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "nlhf_jax", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    wait_for_step(work / "stopped", 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    (line,) = [text for text in err.splitlines() if text.startswith("nlhf: ")]
    assert "Traceback" not in err
    stopped_at = int(line.split("at step ")[1].split(",")[0])
    assert 3 <= stopped_at < STEPS
    before = (work / "stopped" / "timing.jsonl").read_text()
    assert cli.main(words) == 0
    # A run that began anew would have written other times.
    assert (work / "stopped" / "timing.jsonl").read_text().startswith(before)
    steps = [
        row["step"]
        for row in read_lines(work / "stopped" / "metrics.jsonl")
        if "loss/token_nll" in row
    ]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    ours, theirs = (checkpoints.load_params(f) for f in (work / "stopped", sft))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.battery
def test_the_judges_start_from_the_policy(preference, sft):
    assert folders.kind_of(preference) == "preference"
    ours = folders.read_description(preference, "preference").settings
    assert ours == folders.read_description(sft).settings


@pytest.mark.battery
def test_nash_md_trains_against_the_learned_judge(work, sft, preference):
    judges = {"REFERENCE_CHECKPOINT": sft, "PREFERENCE_CHECKPOINT": preference}
    folder = run_job(work, "nash_md_pg", "nash", **judges)
    rows = read_lines(folder / "metrics.jsonl")
    assert max(row["step"] for row in rows) == 3
    found = set().union(*rows)
    assert {"eval/win_rate_reference", "eval/kl"} <= found
    assert all(
        np.isfinite(value)
        for row in rows
        for value in row.values()
        if value is not None
    )


def test_sample_prints_one_answer_a_line(work, sft, capsys):
    assert cli.main(["sample", f"--checkpoint={sft}", "--prompt=say alpha"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("run", "macros", "expected"),
    [
        ("nash_md_pg", {}, "PREFERENCE_CHECKPOINT must name a model folder, got ''"),
        ("reward_pg", {}, "REWARD_CHECKPOINT must name a model folder, got ''"),
        ("nash_md_pg", {"REFERENCE_CHECKPOINT": "nowhere"}, "'nowhere' does not exist"),
        ("nash_md_pg", {"PREFERENCE_CHECKPOINT": "{sft}"}, "must hold a preference"),
        ("sft", {"INITIAL_CHECKPOINT_PATH": "nowhere"}, "'nowhere' does not exist"),
        ("sft", {"TRAIN_FILE": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("sft", {"MODEL_DIR": ""}, "MODEL_DIR must be a folder to write to"),
        ("sft", {"MODEL_DIR": "/proc/x"}, "MODEL_DIR '/proc/x' cannot be written"),
        ("sft", {"VOCABULARY_PATH": "nowhere.model"}, "nowhere.model"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(
    work, sft, preference, capsys, run, macros, expected
):
    filled = {"REFERENCE_CHECKPOINT": sft, "PREFERENCE_CHECKPOINT": preference}
    filled = filled if run == "nash_md_pg" and macros else {}
    if run.endswith("_pg"):
        filled = {"REFERENCE_CHECKPOINT": sft} | filled
    given = {key: str(value).format(sft=sft) for key, value in macros.items()}
    code = cli.main(words_for(work, run, "wrong", **(filled | given)))
    err = capsys.readouterr().err
    assert code == 2
    assert err.splitlines()[-1].startswith("nlhf: ")
    assert expected in err
    assert "Traceback" not in err
