# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline by its functions: each job on what the job before it wrote."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nlhf_jax import algorithms, checkpoints, metrics
from nlhf_jax.checks import UserError
from nlhf_jax.data import batches as data_batches
from nlhf_jax.jobs import folders
from nlhf_jax.jobs.collect import collect, propose
from nlhf_jax.jobs.evaluate import evaluate
from nlhf_jax.jobs.policies import load_policy
from nlhf_jax.jobs.sample import sample
from nlhf_jax.jobs.supervised import preference, reward, sft
from nlhf_jax.jobs.train import train
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.preferences.raters import RaterPopulation
from nlhf_jax.settings import DataSettings, LoopSettings, OptimizerSettings
from nlhf_jax.t5_settings import T5Settings

# The first test waits for all jobs before its own; tests/jobs_test.py is the suite's.
pytestmark = [pytest.mark.timeout(280), pytest.mark.battery]

LENGTHS = {"inputs": 24, "targets": 8}
MODEL = T5Settings(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
ADAM = OptimizerSettings(name="adamw", learning_rate=1e-2)
WORDS = ("map", "sum", "log", "cut", "add", "pad", "mix", "key")
ALGORITHMS = {
    "nash_md_pg": algorithms.nash_md_pg(tau=0.1, beta=0.25),
    "reward_pg": algorithms.reward_pg(tau=0.1),
}


def write_lines(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(model_dir: pathlib.Path) -> list[dict]:
    """Returns the lines of metrics of a run."""
    text = (model_dir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def data_in(folder: pathlib.Path, **changes) -> DataSettings:
    """Returns settings of a small corpus written to `folder`."""
    rows = [{"prompt": f"{w}\nthe {w} of two", "target": f"{w} it"} for w in WORDS]
    fields = {
        "train_file": write_lines(folder / "train.jsonl", rows),
        "evaluation_file": write_lines(folder / "evaluation.jsonl", rows[:4]),
        "vocabulary_path": "byte",
        "task_feature_lengths": LENGTHS,
    }
    return DataSettings("jsonl", **(fields | changes))


def steps(count: int, **changes) -> LoopSettings:
    fields = {"train_steps": count, "batch_size": 4, "log_period": 1}
    return LoopSettings(**(fields | changes))


def run_sft(folder: pathlib.Path, data: DataSettings, loop: LoopSettings, **more):
    more = {"model": MODEL, "optimizer": ADAM} | more
    sft(model_dir=str(folder), data=data, loop=loop, num_eval_examples=4, **more)
    return folder


def assert_same_params(one: pathlib.Path, other: pathlib.Path) -> None:
    ours, theirs = (checkpoints.load_params(folder) for folder in (one, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Returns a folder; equal programs of different jobs are compiled once."""
    changed = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in changed}
    compilation_cache.reset_cache()
    for name, value in changed.items():
        jax.config.update(name, value)
    yield tmp_path_factory.mktemp("pipeline")
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def data(work):
    return data_in(work)


@pytest.fixture(scope="module")
def policy(work, data):
    return run_sft(work / "sft", data, steps(30, eval_period=15))


@pytest.fixture(scope="module")
def comparisons(work, data, policy):
    collect(
        model_dir=str(work / "comparisons"),
        policy_checkpoint=str(policy),
        data=data,
        raters=RaterPopulation(),
        num_prompts=8,
        num_eval_prompts=4,
        pairs_per_prompt=2,
        batch_size=4,
    )
    return work / "comparisons"


def train_judge(job, folder, data, policy, comparisons):
    job(
        model_dir=str(folder),
        data=data,
        optimizer=ADAM,
        loop=steps(3),
        comparisons_dir=str(comparisons),
        initial_checkpoint_path=str(policy),
        num_eval_examples=4,
    )
    return folder


@pytest.fixture(scope="module")
def preference_model(work, data, policy, comparisons):
    return train_judge(preference, work / "preference", data, policy, comparisons)


@pytest.fixture(scope="module")
def reward_model(work, data, policy, comparisons):
    return train_judge(reward, work / "reward", data, policy, comparisons)


@pytest.fixture(scope="module")
def run_train(data, policy, preference_model, reward_model):
    def run(folder, name="nash_md_pg", loop=None, **changes):
        fields = {
            "data": data,
            "optimizer": ADAM,
            "reference_checkpoint": str(policy),
            "preference_checkpoint": str(preference_model),
            "reward_checkpoint": str(reward_model),
            "num_eval_examples": 4,
            "num_gap_samples": 2,
            "algorithm": ALGORITHMS[name],
        }
        train(model_dir=str(folder), loop=loop or steps(2), **(fields | changes))
        return folder

    return run


# ---------------------------------------------------------------------- the pipeline


def test_sft_learns(policy):
    loss = [
        row["loss/token_nll"] for row in read_rows(policy) if "loss/token_nll" in row
    ]
    assert len(loss) == 30
    assert np.mean(loss[-5:]) < 0.8 * np.mean(loss[:5])


def test_sft_writes_an_answer_to_each_held_out_prompt_at_each_evaluation(policy):
    for step in (15, 30):
        text = (policy / "samples" / f"step_{step}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["target"] for row in rows] == [f"{w} it" for w in WORDS[:4]]
        assert {*rows[0]} == {"prompt", "target", "response"}


def test_collect_writes_votes_of_a_single_rater_for_each_pair(comparisons):
    for split, num_prompts in (("train", 8), ("evaluation", 4)):
        text = (comparisons / f"{split}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert num_prompts <= len(rows) <= 2 * num_prompts
        assert {row["preference"] for row in rows} <= {0.0, 1.0}
        assert all(row["response_a"] != row["response_b"] for row in rows)
    cyclicity = json.loads((comparisons / "cyclicity.json").read_text())
    assert all(np.isfinite(value) for value in cyclicity.values())


def test_collect_again_writes_nothing(work, data, policy, comparisons):
    before = {path: path.stat().st_mtime_ns for path in comparisons.glob("*.jsonl")}
    collect(
        model_dir=str(comparisons),
        policy_checkpoint=str(policy),
        data=data,
        raters=RaterPopulation(),
    )
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_collect_writes_the_same_from_the_same_seed(work, data, policy, comparisons):
    collect(
        model_dir=str(work / "again"),
        policy_checkpoint=str(policy),
        data=data,
        raters=RaterPopulation(),
        num_prompts=8,
        num_eval_prompts=4,
        pairs_per_prompt=2,
        batch_size=4,
    )
    for name in ("train.jsonl", "evaluation.jsonl", "cyclicity.json"):
        assert (work / "again" / name).read_text() == (comparisons / name).read_text()


def test_candidates_are_as_long_as_is_asked(data, policy):
    trained = load_policy(str(policy))
    found = propose(
        trained,
        data_batches.load_supervised(data, "evaluation", trained.vocabulary),
        num_prompts=4,
        temperatures=(0.5, 1.0),
        leading_words=(),
        batch_size=4,
        seed=0,
        max_decode_length=2,
    )
    drawn = [text for texts in found.texts for text in texts[:2]]
    assert max(len(text.encode()) for text in drawn) == 2


def test_the_judges_describe_what_they_are(preference_model, reward_model):
    assert folders.kind_of(preference_model) == "preference"
    assert folders.kind_of(reward_model) == "reward"
    for folder in (preference_model, reward_model):
        *_, last = read_rows(folder)
        assert last["step"] == 3
        loss = [last[name] for name in last if name.startswith("eval/loss")]
        assert np.isfinite(loss).all() and len(loss) == 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_compares_and_what_rates_trains_and_is_evaluated(work, run_train, name):
    folder = run_train(work / name, name)
    rows = read_rows(folder)
    assert rows[-1]["step"] == 2
    found = set().union(*rows)
    assert {"eval/kl", "eval/length", "decode/steps", "alarm/kl"} <= found
    assert {"eval/win_rate_reference", "eval/duality_gap", "eval/eos_rate"} <= found
    assert metrics.read_metrics(folder)["compile/count"][1].max() == 1
    assert folders.kind_of(folder) == "language_model"


def test_a_player_beside_the_policy_is_trained_saved_and_resumed(work, run_train):
    enpo = algorithms.enpo(tau=0.1, step_size=4.0, num_comparators=1, period=2)
    more = {"algorithm": enpo, "num_gap_samples": 0}
    whole = run_train(work / "enpo", loop=steps(3), **more)
    again = work / "enpo_resumed"
    run_train(again, loop=steps(1), **more)
    run_train(again, loop=steps(3), **more)
    assert_same_params(whole, again)
    trained = [row for row in read_rows(again) if "loss/policy" in row]
    assert [row["step"] for row in trained] == [1, 2, 3]
    assert all(np.isfinite(row["adversary/kl"]) for row in trained)


def test_sets_and_updates_of_a_run_are_the_users_choice(work, run_train, policy):
    ema = algorithms.nash_ema_pg(tau=0.1, decay=0.5)
    more = {"algorithm": ema, "write_sets": ("average",), "num_gap_samples": 2}
    loop = steps(2, eval_period=1)
    folder = run_train(work / "ema", loop=loop, num_updates_per_rollout=2, **more)
    average = folder / "sets" / "average"
    assert folders.kind_of(average) == "language_model"
    one, other, start = (
        checkpoints.load_params(f)["decoder"]["decoder_norm"]["scale"]
        for f in (average, folder, policy)
    )
    assert 0 < abs(one - start).max() < abs(other - start).max()
    evaluations = [row for row in read_rows(folder) if "eval/duality_gap" in row]
    assert [row["step"] for row in evaluations] == [1, 2]
    # The first has no answers of an earlier evaluation to compare with.
    assert ["eval/win_rate_last" in row for row in evaluations] == [False, True]
    assert all(0 <= row["eval/duality_gap_error"] < 0.5 for row in evaluations)
    assert all(
        0 < row["policy/effective_share"] <= 1 + 1e-6
        for row in read_rows(folder)
        if "policy/effective_share" in row
    )


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"num_gap_samples": 1}, "num_gap_samples must be 0 or at least 2, got 1"),
        ({"num_updates_per_rollout": 0}, "num_updates_per_rollout must be an integer"),
        ({"write_sets": ("averag",)}, "nash_md_pg has only its policy to write"),
    ],
)
def test_settings_of_a_run_are_checked_first(work, run_train, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        run_train(work / "never", **changes)
    assert not (work / "never").exists()


def test_the_report_names_every_policy(
    work, data, policy, preference_model, reward_model, comparisons, run_train
):
    policies = {"sft": str(policy)}
    for name in ("nash_md_pg", "reward_pg"):
        if not (work / name).exists():
            run_train(work / name, name)
        policies[name] = str(work / name)
    evaluate(
        model_dir=str(work / "evaluation"),
        policies=policies,
        data=data,
        raters=RaterPopulation({"coverage": 0.5, "brevity": 0.5}),
        reference_checkpoint=str(policy),
        preference_checkpoint=str(preference_model),
        reward_checkpoint=str(reward_model),
        comparisons_dir=str(comparisons),
        rlhf=("reward_pg",),
        nash=("nash_md_pg",),
        num_prompts=4,
        num_examples=2,
        max_decode_length=3,
        batch_size=4,
    )
    lines = (work / "evaluation/samples/tournament.jsonl").read_text().splitlines()
    answers = [
        text for line in lines for text in json.loads(line)["responses"].values()
    ]
    assert max(len(text.encode()) for text in answers) == 3
    page = (work / "evaluation" / "report.html").read_text()
    assert all(name in page for name in policies)
    table = json.loads((work / "evaluation/tournament/tournament.json").read_text())
    assert table["win_rates"]["population"]["names"] == list(policies)
    for judged in table["win_rates"].values():
        mean_NN = np.asarray(judged["mean"])
        np.testing.assert_allclose(mean_NN + mean_NN.T, 1.0, atol=1e-6)
    # The reference is the first policy: nothing separates it from itself.
    assert table["figures"]["sft"]["kl"] == 0.0


# ----------------------------------------------------------------- resuming a run


def test_the_same_command_again_does_nothing(work, data, policy):
    before = (policy / "metrics.jsonl").read_text()
    run_sft(policy, data, steps(30, eval_period=15))
    assert (policy / "metrics.jsonl").read_text() == before


def test_three_steps_and_three_more_are_six(work, data, capsys):
    whole = run_sft(work / "six", data, steps(6))
    parts = run_sft(work / "three_and_three", data, steps(3))
    assert "continuing" not in capsys.readouterr().err
    run_sft(parts, data, steps(6))
    assert f"sft: continuing from step 3 in {parts}" in capsys.readouterr().err
    assert_same_params(whole, parts)


# ------------------------------------------------------------- the user's mistakes


def test_a_policy_is_no_judge_and_a_judge_no_policy(
    tmp_path, run_train, policy, preference_model
):
    folder = tmp_path / "out"
    expected = "must hold a preference model, got a language_model model"
    with pytest.raises(UserError, match=expected):
        run_train(folder, preference_checkpoint=str(policy))
    expected = "must hold a language_model model, got a preference model"
    with pytest.raises(UserError, match=expected):
        run_train(folder, reference_checkpoint=str(preference_model))
    assert not folder.exists()


@pytest.mark.parametrize(
    "argument",
    ["reference_checkpoint", "preference_checkpoint", "initial_checkpoint_path"],
)
def test_a_missing_folder_is_named(tmp_path, run_train, argument):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="'nowhere' does not exist"):
        run_train(folder, **{argument: "nowhere"})
    assert not folder.exists()


def test_an_algorithm_says_which_judge_it_needs(tmp_path, run_train):
    with pytest.raises(UserError, match=r"reward_pg rates .* REWARD_CHECKPOINT"):
        run_train(tmp_path / "out", "reward_pg", reward_checkpoint="")
    with pytest.raises(UserError, match=r"nash_md_pg compares .* PREFERENCE_CHECK"):
        run_train(tmp_path / "out", "nash_md_pg", preference_checkpoint="")


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path, data):
    small = T5Settings(100, 8, 1, 8, 8, 1, 1)
    with pytest.raises(UserError, match=r"but the model has only 100 rows"):
        run_sft(tmp_path / "out", data, steps(1), model=small)
    assert not (tmp_path / "out").exists()


def test_a_line_that_is_not_json_is_named(tmp_path, data):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "target": "b"}\n{"prompt": \n')
    broken = data_in(tmp_path, train_file=str(path))
    with pytest.raises(UserError, match=r"broken\.jsonl line 2: is not JSON"):
        run_sft(tmp_path / "out", broken, steps(1))
    assert not (tmp_path / "out").exists()


def test_judges_need_what_collect_wrote(tmp_path, data, policy):
    with pytest.raises(UserError, match=r"comparisons_dir has no file .*train\.jsonl"):
        train_judge(preference, tmp_path / "out", data, policy, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_tournament_needs_two_policies_and_known_names(
    tmp_path, data, policy, preference_model
):
    def play(policies, **more):
        evaluate(
            model_dir=str(tmp_path / "out"),
            policies=policies,
            data=data,
            raters=RaterPopulation(),
            reference_checkpoint=str(policy),
            preference_checkpoint=str(preference_model),
            **more,
        )

    with pytest.raises(UserError, match="at least two"):
        play({"sft": str(policy)})
    both = {"sft": str(policy), "other": str(policy)}
    with pytest.raises(UserError, match="did you mean 'other'"):
        play(both, baseline="othr")
    with pytest.raises(UserError, match="must hold a language_model"):
        play({"sft": str(policy), "judge": str(preference_model)})
    assert not (tmp_path / "out").exists()


def test_policies_of_another_shape_are_refused(
    tmp_path, data, policy, preference_model
):
    narrow = tmp_path / "narrow"
    other = dataclasses.replace(folders.read_description(policy).settings, mlp_dim=8)
    described = folders.ModelDescription("language_model", other, LENGTHS)
    folders.describe(narrow, described, "byte")
    params = jax.jit(t5_language_model(other).init)(jax.random.key(0))
    checkpoints.save_params(narrow, params, "float32")
    with pytest.raises(UserError, match="'narrow' must have the reference's shape"):
        evaluate(
            model_dir=str(tmp_path / "out"),
            policies={"sft": str(policy), "narrow": str(narrow)},
            data=data,
            raters=RaterPopulation(),
            reference_checkpoint=str(policy),
            preference_checkpoint=str(preference_model),
            num_prompts=4,
        )
    assert not (tmp_path / "out" / "report.html").exists()


def test_long_prompts_are_cut_and_counted(tmp_path, data):
    rows = [{"prompt": "x" * length, "target": "y"} for length in (80, 1, 2, 3)]
    long = data_in(tmp_path, train_file=write_lines(tmp_path / "long.jsonl", rows))
    folder = run_sft(tmp_path / "out", long, steps(1))
    (first,) = [row for row in read_rows(folder) if row["step"] == 0]
    assert first["data/truncated_prompts"] == 1
    assert first["data/truncated_share"] == 0.25


# ------------------------------------------------------------------------ sampling


def test_sample_prints_every_answer(policy, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("map\nsum\n")
    sample(
        checkpoint=str(policy),
        prompts_file=str(prompts),
        num_samples=2,
        temperature=1.0,
        reference_checkpoint=str(policy),
        beta=0.5,
    )
    assert capsys.readouterr().out.count("\n") >= 4


def test_sample_says_when_a_prompt_was_cut(policy, capsys):
    sample(checkpoint=str(policy), prompt="x" * 80, num_samples=2)
    err = capsys.readouterr().err
    assert "1 prompt(s) longer than 24 tokens were truncated" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"prompt": "  "}, "prompt 1 is empty"),
        ({}, "exactly one of --prompt and --prompts_file"),
        ({"prompt": "a", "prompts_file": "b"}, "exactly one of"),
        ({"prompts_file": "nowhere"}, "'nowhere' does not exist"),
        ({"prompt": "a", "beta": 0.5}, "reference_checkpoint must name"),
        ({"prompt": "a", "beta": 1.5}, r"beta must be in \[0.0, 1.0\]"),
        ({"prompt": "a", "mixture": {"nowhere": 0.5}}, "'nowhere' does not exist"),
        ({"prompt": "a", "mixture": {"b": float("inf")}}, "weight of 'b' must be in"),
        ({"prompt": "a", "num_samples": 0}, "num_samples must be an integer"),
        ({"prompt": "a", "temperature": -1.0}, "temperature must be in"),
    ],
)
def test_sample_refuses_what_makes_no_sense(policy, arguments, expected):
    with pytest.raises(UserError, match=expected):
        sample(checkpoint=str(policy), **arguments)
