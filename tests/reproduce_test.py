# SPDX-License-Identifier: Apache-2.0
"""The paper's experiment at toy size: killed twice on the way, the same tables."""

import functools
import json

import pytest

from nlhf_jax import algorithms, checkpoints
from nlhf_jax.checks import UserError
from nlhf_jax.jobs.collect import collect
from nlhf_jax.jobs.evaluate import evaluate
from nlhf_jax.jobs.reproduce import reproduce
from nlhf_jax.jobs.supervised import preference, reward, sft
from nlhf_jax.jobs.train import train
from nlhf_jax.preferences.raters import RaterPopulation
from tests.jobs_pipeline_test import ADAM, MODEL, data_in, steps, work  # noqa: F401

pytestmark = pytest.mark.timeout(280)


class Killed(BaseException):
    """Ends the process's work at once, as a kill does; nobody catches it."""


def stages_of(data):
    """Returns the job's arguments: two trained policies, an average and a sweep."""
    common = {"data": data, "optimizer": ADAM}
    policy = functools.partial(
        train,
        loop=steps(3, checkpoint_period=1),
        num_eval_examples=4,
        num_gap_samples=0,
        **common,
    )
    tournament = functools.partial(
        evaluate, data=data, raters=RaterPopulation(), num_prompts=4
    )
    judge = {"loop": steps(2), "num_eval_examples": 4} | common
    return {
        "sft": functools.partial(
            sft, model=MODEL, loop=steps(2), num_eval_examples=4, **common
        ),
        "collect": functools.partial(
            collect,
            data=data,
            raters=RaterPopulation(),
            num_prompts=4,
            num_eval_prompts=2,
        ),
        "preference": functools.partial(preference, **judge),
        "reward": functools.partial(reward, **judge),
        "policies": {
            "MD1": functools.partial(
                policy, algorithm=algorithms.nash_md_pg(tau=0.1, beta=0.125)
            ),
            "EMA1": functools.partial(
                policy,
                algorithm=algorithms.nash_ema_pg(tau=0.1, decay=0.5),
                write_sets=("average",),
            ),
        },
        "averages": {"EMA1*": ("EMA1", "average")},
        "evaluate": tournament,
        "sweeps": {
            "tau": {
                "0.1": "MD1",
                "0.5": functools.partial(
                    policy, algorithm=algorithms.nash_md_pg(tau=0.5, beta=0.125)
                ),
            }
        },
        "evaluate_sweep": tournament,
    }


@pytest.fixture(scope="module")
def whole(work):  # noqa: F811
    """Returns the arguments and the folder of a run that nobody disturbed."""
    arguments = stages_of(data_in(work))
    reproduce(model_dir=str(work / "whole"), **arguments)
    return arguments, work / "whole"


@pytest.mark.battery
def test_it_writes_both_tables_and_the_sweep(whole):
    _, folder = whole
    text = (folder / "reproduction.md").read_text()
    assert text.count("| row \\ column | SFT | MD1 | EMA1 | EMA1* |") == 2
    assert "## tau" in text and "| 0.5 |" in text
    found = json.loads((folder / "reproduction.json").read_text())
    assert set(found) == {"population", "preference_model"}
    assert (folder / "report.html").is_file()
    assert (folder / "sweeps" / "tau" / "report.html").is_file()


@pytest.mark.battery
def test_the_average_is_another_policy_than_the_last(whole):
    _, folder = whole
    last = checkpoints.load_params(folder / "policies" / "EMA1")
    average = checkpoints.load_params(folder / "policies" / "EMA1" / "sets" / "average")
    one, other = (tree["encoder"]["encoder_norm"]["scale"] for tree in (last, average))
    assert abs(one - other).max() > 1e-6


def killed_at(monkeypatch, count):
    """Makes the `count`-th save of a checkpoint the last thing that happens."""
    save, saved = checkpoints.Checkpointer.save, []

    def dying(self, *arguments, **more):
        saved.append(1)
        if len(saved) == count:
            raise Killed
        return save(self, *arguments, **more)

    monkeypatch.setattr(checkpoints.Checkpointer, "save", dying)


@pytest.mark.battery
def test_killed_twice_it_ends_in_the_same_tables(whole, work, monkeypatch):  # noqa: F811
    arguments, folder = whole
    again = work / "again"
    # Saves: SFT and judges one each, then one per step of each policy. The first kill
    # is in the middle of MD1, the second in the middle of EMA1.
    for count in (5, 4):
        with monkeypatch.context() as patch:
            killed_at(patch, count)
            with pytest.raises(Killed):
                reproduce(model_dir=str(again), **arguments)
        assert not (again / "reproduction.md").exists()
    reproduce(model_dir=str(again), **arguments)
    for name in ("reproduction.md", "reproduction.json", "tournament/tournament.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.battery
def test_what_is_complete_is_not_played_again(whole, capsys):
    arguments, folder = whole
    before = (folder / "report.html").stat().st_mtime_ns
    reproduce(model_dir=str(folder), **arguments)
    assert capsys.readouterr().err.count("tournament: played already") == 2
    assert (folder / "report.html").stat().st_mtime_ns == before
    # Another number of prompts is another tournament.
    other = functools.partial(arguments["evaluate"], num_prompts=3)
    reproduce(model_dir=str(folder), **arguments | {"evaluate": other})
    assert capsys.readouterr().err.count("tournament: played already") == 1
    assert (folder / "report.html").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"policies": {}}, "policies must name at least one"),
        ({"averages": {"EMA9*": ("EMA9", "average")}}, "did you mean 'EMA1'"),
        ({"sweeps": {"tau": {"1": "MD9"}}}, "did you mean 'MD1'"),
        ({"evaluate_sweep": None}, "evaluate_sweep must be set"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(changes, complaint, tmp_path):
    arguments = stages_of(data_in(tmp_path)) | changes
    with pytest.raises(UserError, match=complaint):
        reproduce(model_dir=str(tmp_path / "none"), **arguments)
    assert not (tmp_path / "none").exists()
