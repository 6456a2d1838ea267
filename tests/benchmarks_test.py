# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run and count right; nothing here depends on how fast anything is."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import common, games, rollout
from nlhf_jax.games import solutions, solvers

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def found():
    return rollout.measure(rollout.SIZES["tiny"], 1)


@pytest.mark.battery
def test_everything_is_compiled_once(found):
    assert set(found["compilations"].values()) == {1}
    assert {"fused", "policy", "mixture", "step", "score", "update"} <= {
        *found["compilations"]
    }


@pytest.mark.battery
def test_no_decode_ends_early(found):
    length = rollout.SIZES["tiny"].response_length
    assert found["decode_steps"].pop("twice_as_long") == 2 * length
    assert set(found["decode_steps"].values()) == {length}


@pytest.mark.battery
def test_each_goal_has_a_figure_of_one_ratio_a_round(found):
    goals = [figure.goal for figure in found["figures"]]
    assert goals == [1.0, 1.1, 2.2, None, None]
    assert all(len(figure.values) == 1 for figure in found["figures"])
    assert all(figure.median > 0 for figure in found["figures"])


@pytest.mark.battery
def test_the_program_prints_and_writes_what_was_measured(
    found, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(rollout, "measure", lambda size, rounds: found)
    path = tmp_path / "results.json"
    words = ["--size", "tiny", "--rounds", "1", "--output", str(path)]
    assert rollout.main(words) == 0
    out = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert {"size", "machine", "figures", "compilations"} <= {*results}
    for figure in results["figures"]:
        assert f"{figure['name']}: {figure['ratio']:.3f} (" in out
    assert "compilations per function and shape: 1, goal 1" in out


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--size", "vast"]])
def test_words_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        rollout.main(words)
    assert "--" in capsys.readouterr().err


def test_every_part_runs_once_a_round_and_the_first_one_turns():
    calls = []
    parts = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = common.interleaved(parts, 4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(
        "abc", 4
    )


def test_a_ratio_divides_sums_of_one_round():
    seconds = {"a": [1.0, 6.0], "b": [1.0, 2.0], "c": [3.0, 4.0]}
    assert common.ratios(seconds, ["a"], ["b", "c"]) == [0.25, 1.0]
    assert common.ratios(seconds, ["a", "b"], ["c"]) == [2 / 3, 2.0]


def test_the_least_times_decide_and_few_rounds_decide_nothing():
    seconds = {"x": [1.8, 1.0, 2.0, 6.0, 8.0], "y": [2.0, 1.0, 2.0, 2.0, 2.0]}
    figure = common.Figure.of("x / y", seconds, ["x"], ["y"], 1.0)
    assert figure.quiet == 1.0 and figure.values == (0.9, 1.0, 1.0, 3.0, 4.0)
    assert figure.verdict() == "met"
    assert common.Figure.of("x / y", seconds, ["x"], ["y"], 0.99).verdict() == "missed"
    few = {name: values[:4] for name, values in seconds.items()}
    assert common.Figure.of("", few, ["x"], ["y"], 1.0).verdict() == "too few rounds"
    assert common.Figure.of("", few, ["x"], ["y"]).verdict() == ""
    rounds = "(rounds 0.900 to 4.000, median 1.000)"
    assert figure.line() == f"x / y: 1.000 {rounds}, goal <= 1: met"
    record = figure.record()
    assert (record["min"], record["median"], record["max"]) == (0.9, 1.0, 4.0)
    assert (record["ratio"], record["rounds"]) == (1.0, 5)


def test_a_part_may_stand_for_more_than_was_timed():
    seconds = {"x": [2.0, 4.0], "y": [1.0, 4.0]}
    figure = common.Figure.of("x / y", seconds, ["x"], ["y"], share=0.1)
    assert figure.quiet == pytest.approx(0.2)
    assert figure.values == pytest.approx((0.2, 0.1))
    both = common.Figure.of("x / (x + y)", seconds, ["x"], ["x", "y"])
    assert both.quiet == pytest.approx(2 / 3)


def test_compilations_are_counted_per_shape():
    double = common.Counted("double", lambda x: 2 * x)
    for size in (3, 3, 4, 4):
        assert double(jnp.ones(size)).shape == (size,)
    assert double.num_compilations == 2


def test_no_path_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common.write_results("", {"a": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def games_found(monkeypatch):
    # Two libraries that never were: one takes its time, one is not installed.
    peers = {"slow": ("json", None), "absent": ("no_such_module", None)}
    monkeypatch.setattr(games, "PEERS", peers)
    monkeypatch.setattr(games, "peer_seconds", lambda name, n, limit_s: 1000.0)
    return games.measure(games.SIZES["tiny"], 1)


def test_games_have_their_goals_and_name_what_is_absent(
    games_found, monkeypatch, tmp_path, capsys
):
    goals = [figure.goal for figure in games_found["figures"]]
    assert goals == [1.5, 1.5, None, 1.5, 1.5, None, 0.02, 0.1]
    assert set(games_found["compilations"].values()) == {1}
    (note,) = games_found["notes"]
    assert note.startswith("absent is not installed")
    assert games_found["figures"][-1].name.startswith("equilibrium at tau")
    assert 0 < games_found["figures"][-1].median < 1
    monkeypatch.setattr(games, "measure", lambda size, rounds: games_found)
    path = tmp_path / "games.json"
    words = ["--size", "tiny", "--only", "figures", "--output", str(path)]
    assert games.main(words) == 0
    out, results = capsys.readouterr().out, json.loads(path.read_text())
    assert note in out and results["notes"] == [note]
    assert len(results["figures"]) == len(goals)


def test_the_numpy_loop_is_timed_on_its_share(monkeypatch):
    seconds = {"together": [1.0], "loop": [4.0]}
    monkeypatch.setattr(games, "interleaved", lambda parts, rounds: seconds)
    size = games.SIZES["tiny"]  # the loop solves 2 of 4: all would take 8 s
    assert games.batch_figure(size, 1).values == (1 / 8,)


def test_a_library_that_is_too_slow_is_given_smaller_games(monkeypatch):
    asked = []

    def slow(name, num_actions, limit_s):
        asked.append(num_actions)
        return None if num_actions > 6 else 1000.0

    monkeypatch.setattr(games, "PEERS", {"slow": ("json", None)})
    monkeypatch.setattr(games, "peer_seconds", slow)
    found, notes = games.equilibrium_figures(games.SIZES["tiny"], 2)
    assert asked == [12, 6, 6, 6]
    assert notes == ["slow found no equilibrium of 12 actions in 60 s"]
    assert found[0].name.endswith("n = 6") and len(found[0].values) == 2
    monkeypatch.setattr(games, "peer_seconds", lambda *args: None)
    found, notes = games.equilibrium_figures(games.SIZES["tiny"], 2)
    assert found == [] and len(notes) == 2


def test_a_library_that_fails_is_told_from_one_that_solves():
    # In a fresh process, where nothing of these tests is patched.
    assert games.peer_seconds("no such library", 3, 5.0) is None
    is_installed = importlib.util.find_spec("nashpy") is not None
    seconds = games.peer_seconds("nashpy", 3, 60.0)
    assert (seconds is not None) == is_installed
    assert not is_installed or 0 < seconds < 60


def test_numpys_nash_md_is_ours():
    with jax.enable_x64(True):
        game = solvers.make_game(games.random_matrix(5), np.full(5, 0.2), games.TAU)
        known = solvers.solve(
            "nash_md", game, np.full(5, 0.2), step_size=games.STEP_SIZE, num_steps=20
        )
        logits = games.numpy_nash_md(
            games.random_matrix(5), np.log(np.full(5, 0.2)), 20
        )
        np.testing.assert_allclose(
            solutions.normalise(logits), known[-1], rtol=0, atol=1e-12
        )
