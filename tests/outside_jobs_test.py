# SPDX-License-Identifier: Apache-2.0
"""`train` with a judge that is a Python function, through the command line."""

import os
import signal
import sys

import jax
import numpy as np
import pytest

from nlhf_jax import checkpoints, cli, metrics
from tests.jobs_test import RUN, TINY, WORDS, write_lines

MODULE = '''
import signal

import gin

calls = []
stop_at = fail_at = 0


@gin.configurable
def shorter(prompts, firsts, seconds):
    """Prefers the shorter one; raises a signal or an error in one of its calls."""
    calls.append((prompts, firsts, seconds))
    if len(calls) == stop_at:
        signal.raise_signal(signal.SIGTERM)
    if len(calls) == fail_at:
        raise ConnectionError("the service is gone")
    pairs = zip(firsts, seconds, strict=True)
    return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in pairs]


@gin.configurable
def loud(prompts, firsts, seconds):
    return [2.0] * len(prompts)
'''
TRAIN = """
include 'configs/algorithms/nash_md_pg.gin'
import judges_of_the_test
train.outside_judge = @OutsideJudge()
OutsideJudge.function = @judges_of_the_test.shorter
MAX_DECODE_LENGTH = 6
TRAIN_STEPS = 4
train.num_eval_examples = 4
train.num_gap_samples = 0
LoopSettings.log_period = 1
LoopSettings.checkpoint_period = 2
"""
ALLOWED = "--allow_import=judges_of_the_test"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Returns a folder with data, gin files and a module of judges."""
    folder = tmp_path_factory.mktemp("outside")
    rows = [{"prompt": f"say {word}", "target": word[:4]} for word in WORDS]
    for split in ("train", "evaluation"):
        write_lines(folder / f"{split}.jsonl", rows)
    files = (
        f"TRAIN_FILE = '{folder}/train.jsonl'\n"
        f"EVALUATION_FILE = '{folder}/evaluation.jsonl'\n"
    )
    include = "include 'configs/runs/sft.gin'\n"
    (folder / "sft.gin").write_text(include + TINY + RUN + files + "TRAIN_STEPS = 3\n")
    (folder / "train.gin").write_text(TRAIN + RUN + files)
    (folder / "judges_of_the_test.py").write_text(MODULE)
    before = jax.config.jax_compilation_cache_dir
    os.environ["NLHF_CACHE"] = str(folder / "cache")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    del os.environ["NLHF_CACHE"]
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def reference(work):
    words = [f"--gin_file={work}/sft.gin", f"--model_dir={work}/sft"]
    assert cli.main(["sft", *words]) == 0
    return work / "sft"


def words_for(work, name, *more):
    return [
        "train",
        f"--gin_file={work}/train.gin",
        f"--model_dir={work}/{name}",
        f"--reference_checkpoint={work}/sft",
        ALLOWED,
        *more,
    ]


@pytest.fixture
def judges(work, reference):
    """Returns the module of judges, as if it were new."""
    cli.main([*words_for(work, "none"), "--dry_run"])
    module = sys.modules["judges_of_the_test"]
    module.calls.clear()
    module.stop_at = module.fail_at = 0
    return module


def train(work, name, *more):
    assert cli.main(words_for(work, name, *more)) == 0
    return work / name


@pytest.fixture(scope="module")
def straight(work, reference):
    return train(work, "straight")


def same_bytes(one, other):
    for ours, theirs in zip(
        jax.tree.leaves(checkpoints.load_params(one)),
        jax.tree.leaves(checkpoints.load_params(other)),
        strict=True,
    ):
        assert ours.tobytes() == theirs.tobytes()
    name = "metrics.jsonl"
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_module_must_be_allowed(work, capsys):
    words = [word for word in words_for(work, "x", "--dry_run") if word != ALLOWED]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "--allow_import=judges_of_the_test" in said and said.count("\n") == 1
    assert not (work / "x").exists()


@pytest.mark.parametrize("name", ["reward_pg", "enpo"])
def test_an_algorithm_that_it_cannot_serve_is_refused_before_a_run(
    work, tmp_path, capsys, name
):
    text = (work / "train.gin").read_text().replace("nash_md_pg", name)
    (tmp_path / "other.gin").write_text(text)
    words = words_for(work, "x", "--dry_run")
    words[1] = f"--gin_file={tmp_path}/other.gin"
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nlhf: {name} ") and "OutsideJudge" in said
    assert said.count("\n") == 1


@pytest.mark.battery
def test_a_dry_run_builds_its_step(judges, work, capsys):
    assert cli.main(words_for(work, "x", "--dry_run")) == 0
    assert "its step was built from shapes alone" in capsys.readouterr().out
    assert judges.calls == []


@pytest.mark.battery
def test_it_trains_and_says_what_the_judge_cost(straight, capsys):
    found = metrics.read_metrics(straight)
    steps, judging = found["time/judging"]
    assert steps.tolist() == [1, 2, 3, 4]
    assert (judging >= found["time/judging_waited"][1]).all() and (judging > 0).all()
    assert found["compile/count"][1].tolist() == [1.0] * 4
    assert found["eval/win_rate_reference"][0].tolist() == [4]
    assert "time/judging" not in (straight / "metrics.jsonl").read_text()
    assert "@judges_of_the_test.shorter" in (straight / "config.gin").read_text()


@pytest.mark.battery
def test_taking_turns_gives_the_same_bytes(judges, work, straight, capsys):
    other = train(work, "turns", "--gin.OutsideJudge.overlaps=False")
    same_bytes(straight, other)
    # Two parts in each of four steps, and the evaluation at the end.
    assert len(judges.calls) == 9
    assert "judge " in capsys.readouterr().err
    words = {f"say {word}" for word in WORDS}
    assert all(words.issuperset(prompts) for prompts, _, _ in judges.calls)


@pytest.mark.battery
def test_a_run_that_was_stopped_while_the_judge_read_goes_on_bit_for_bit(
    judges, work, straight
):
    judges.stop_at = 5  # in step 3
    assert cli.main(words_for(work, "stopped")) == 128 + signal.SIGTERM
    assert judges.calls[4:6] and len(judges.calls) == 6
    same_bytes(straight, train(work, "stopped"))


@pytest.mark.battery
def test_an_error_of_the_function_ends_the_run_and_keeps_its_checkpoint(
    judges, work, straight
):
    judges.fail_at = 6  # in step 3
    with pytest.raises(ConnectionError, match="the service is gone"):
        cli.main(words_for(work, "failed"))
    kept = sorted(path.name for path in (work / "failed" / "checkpoints").iterdir())
    assert kept == ["2"]
    same_bytes(straight, train(work, "failed"))


@pytest.mark.battery
def test_a_number_that_is_no_preference_is_one_sentence(judges, work, capsys):
    text = (work / "train.gin").read_text().replace(".shorter", ".loud")
    (work / "loud.gin").write_text(text)
    words = words_for(work, "loud")
    words[1] = f"--gin_file={work}/loud.gin"
    assert cli.main(words) == 2
    (said,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("nlhf: ")
    ]
    assert "the outside judge must give" in said and "got 2.0 for pair 1" in said
    assert not np.any([p.is_dir() for p in (work / "loud" / "checkpoints").glob("*")])
