# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run and count right; nothing here depends on how fast anything is."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import common, rollout

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def found():
    return rollout.measure(rollout.SIZES["tiny"], 1)


def test_everything_is_compiled_once(found):
    assert set(found["compilations"].values()) == {1}
    assert {"fused", "policy", "mixture", "step", "score", "update"} <= {
        *found["compilations"]
    }


def test_no_decode_ends_early(found):
    length = rollout.SIZES["tiny"].response_length
    assert found["decode_steps"].pop("twice_as_long") == 2 * length
    assert set(found["decode_steps"].values()) == {length}


def test_each_goal_has_a_figure_of_one_ratio_a_round(found):
    goals = [figure.goal for figure in found["figures"]]
    assert goals == [1.0, 1.1, 2.2, None]
    assert all(len(figure.values) == 1 for figure in found["figures"])
    assert all(figure.median > 0 for figure in found["figures"])


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
        assert f"{figure['name']}: {figure['median']:.3f} (" in out
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


def test_the_median_decides_and_few_rounds_decide_nothing():
    values = (0.9, 0.95, 1.0, 3.0, 4.0)
    assert common.Figure("x / y", values, 1.0).verdict() == "met"
    assert common.Figure("x / y", values, 0.99).verdict() == "missed"
    assert common.Figure("x / y", values[:4], 1.0).verdict() == "too few rounds"
    assert common.Figure("x / y", values).verdict() == ""
    expected = "x / y: 1.000 (0.900 to 4.000), goal <= 1: met"
    assert common.Figure("x / y", values, 1.0).line() == expected
    assert common.Figure("x / y", (2.0,)).line() == "x / y: 2.000 (2.000 to 2.000)"
    record = common.Figure("x / y", values, 1.0).record()
    assert (record["min"], record["median"], record["max"]) == (0.9, 1.0, 4.0)
    assert record["rounds"] == 5


def test_compilations_are_counted_per_shape():
    double = common.Counted("double", lambda x: 2 * x)
    for size in (3, 3, 4, 4):
        assert double(jnp.ones(size)).shape == (size,)
    assert double.num_compilations == 2


def test_no_path_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common.write_results("", {"a": 1})
    assert list(tmp_path.iterdir()) == []
