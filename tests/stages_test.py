# SPDX-License-Identifier: Apache-2.0
"""The order of a pipeline's stages, and the folders that each of them is given."""

import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.jobs import folders, stages
from nlhf_jax.jobs.quickstart import quickstart
from tests.jobs_pipeline_test import LENGTHS, MODEL

WHERE = {"sft": "run/sft", "preference": "run/judge", "reward": "run/reward"}


class Jobs:
    """Jobs that write down what they were given."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda **given: self.calls.append((name, given))


@pytest.fixture
def jobs():
    return Jobs()


def test_every_stage_follows_what_it_reads(jobs):
    todo = stages.first_stages(
        WHERE,
        "run/votes",
        sft=jobs.sft,
        collect=jobs.collect,
        preference=jobs.preference,
        reward=jobs.reward,
    )
    assert list(todo) == ["SFT", "votes", "reward model", "preference model"]
    stages.run_all(todo)
    begins = {"initial_checkpoint_path": "run/sft", "comparisons_dir": "run/votes"}
    assert jobs.calls == [
        ("sft", {"model_dir": "run/sft"}),
        ("collect", {"model_dir": "run/votes", "policy_checkpoint": "run/sft"}),
        ("reward", {"model_dir": "run/reward"} | begins),
        ("preference", {"model_dir": "run/judge"} | begins),
    ]


def test_stages_that_are_not_there_are_left_out(jobs):
    todo = stages.first_stages(
        WHERE,
        "run/votes",
        sft=None,
        collect=None,
        preference=jobs.preference,
        reward=None,
        judge_checkpoint="elsewhere",
    )
    assert list(todo) == ["preference model"]
    stages.run_all(todo)
    ((_, given),) = jobs.calls
    assert given["initial_checkpoint_path"] == "elsewhere"
    assert given["comparisons_dir"] == ""


def test_a_preference_model_may_go_on_from_the_reward_model(jobs):
    how = {"sft": None, "collect": None, "preference": jobs.preference}
    todo = stages.first_stages(
        WHERE, "", reward=jobs.reward, preference_starts_from="reward", **how
    )
    stages.run_all(todo)
    assert jobs.calls[1][1]["initial_checkpoint_path"] == "run/reward"
    with pytest.raises(UserError, match="needs a reward stage, got None"):
        stages.first_stages(
            WHERE, "", reward=None, preference_starts_from="reward", **how
        )


def model_folder(folder):
    folders.describe(
        folder,
        folders.ModelDescription("language_model", MODEL, LENGTHS),
        folders.BYTE_VOCABULARY,
    )
    return str(folder)


def pipeline(jobs, folder, **changes):
    given = {
        "model_dir": str(folder),
        "collect": jobs.collect,
        "preference": jobs.preference,
        "policies": {"nash": jobs.train},
        "evaluate": jobs.evaluate,
    }
    quickstart(**given | changes)


def test_a_pipeline_may_start_from_a_model_that_is_there(jobs, tmp_path):
    start, run = model_folder(tmp_path / "model"), tmp_path / "run"
    pipeline(jobs, run, start=start)
    assert [name for name, _ in jobs.calls] == [
        "collect",
        "preference",
        "train",
        "evaluate",
    ]
    given = dict(jobs.calls)
    assert given["collect"]["policy_checkpoint"] == start
    assert given["preference"]["initial_checkpoint_path"] == start
    assert given["train"]["reference_checkpoint"] == start
    assert given["train"]["reward_checkpoint"] == ""
    assert given["evaluate"]["policies"] == {
        "before": start,
        "nash": str(run / "policies" / "nash"),
    }
    assert given["evaluate"]["reward_checkpoint"] == ""


def test_a_pipeline_with_every_stage(jobs, tmp_path):
    pipeline(jobs, tmp_path, sft=jobs.sft, reward=jobs.reward)
    given = dict(jobs.calls)
    assert list(given["evaluate"]["policies"]) == ["SFT", "nash"]
    assert given["train"]["reward_checkpoint"] == str(tmp_path / "reward")
    assert given["train"]["reference_checkpoint"] == str(tmp_path / "sft")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "either a stage sft or a model folder in start, got neither"),
        ({"sft": print, "start": "x"}, "in start, got both"),
        ({"sft": print, "from_scratch": True}, "sft_from_scratch .* got neither"),
        ({"start": "nowhere"}, "'nowhere' does not exist"),
        ({"sft": print, "policies": {}}, "at least one training job"),
    ],
)
def test_a_pipeline_without_a_beginning_is_refused(jobs, tmp_path, changes, expected):
    with pytest.raises(UserError, match=expected):
        pipeline(jobs, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists() and not jobs.calls
