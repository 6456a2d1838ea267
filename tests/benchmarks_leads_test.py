# SPDX-License-Identifier: Apache-2.0
"""The benchmark of games against other ways: its sides agree, and its arithmetic."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks import games, games_leads
from nlhf_jax.games import nash, solutions

TINY = games_leads.SIZES["tiny"]


def seconds_of(monkeypatch, **seconds):
    """Every part of the benchmark takes these seconds, and is still called once."""

    def timed(parts, rounds):
        for part in parts.values():
            part()
        return {
            name: [seconds.get(name, 1.0) * n for n in range(1, rounds + 1)]
            for name in parts
        }

    monkeypatch.setattr(games_leads, "interleaved", timed)


@pytest.mark.parametrize(
    "values, goal, verdict",
    [
        ((5.0, 5.0, 5.0, 5.0, 5.0), 5.0, "met"),
        ((9.0, 9.0, 9.0, 9.0, 4.9), 5.0, "missed"),  # the least round decides
        ((9.0, 9.0, 9.0, 9.0), 5.0, "too few rounds"),
        ((9.0,), None, ""),
    ],
)
def test_the_least_round_decides(values, goal, verdict):
    lead = games_leads.Lead("x", values, goal)
    assert lead.verdict() == lead.record()["verdict"] == verdict
    assert lead.line().startswith(f"x: {min(values):.2f} / ")
    assert lead.line().endswith(verdict) and ("goal" in lead.line()) == bool(goal)


def test_a_lead_is_their_time_over_ours_for_the_same_work():
    seconds = {"ours": [1.0, 2.0], "slow": [3.0, 4.0]}
    assert games_leads.lead("x", seconds, "slow").values == (3.0, 2.0)
    # Ours did ten times the work meanwhile.
    lead = games_leads.lead("x", seconds, "slow", 5.0, share=10.0)
    assert lead.values == (30.0, 20.0) and lead.goal == 5.0
    record = games_leads.Lead("x", (3.0, 1.0, 2.0)).record()
    assert [record[k] for k in ("min", "median", "max", "rounds")] == [1, 2, 3, 3]


@pytest.mark.parametrize("method", ["highs", "highs-ipm"])
def test_the_linear_program_is_the_equilibrium(method):
    matrix = games_leads.random_matrix(9)
    found = games_leads.linear_program(matrix, method)
    np.testing.assert_allclose(found, nash.nash(matrix), rtol=0, atol=1e-7)


def test_an_equilibrium_that_is_not_exact_is_no_result(monkeypatch):
    seconds_of(monkeypatch, ours=1.0, highs=12.0)
    assert {lead.goal for lead in games_leads.exact_leads(TINY, 2)} == {None}
    monkeypatch.setattr(nash, "nash", lambda matrix: np.ones(5) / 5)
    with pytest.raises(AssertionError, match="ours leaves 0"):
        games_leads.exact_leads(TINY, 2)


def test_all_loops_take_the_same_steps(float64):
    matrix = games_leads.random_matrix(6)
    start, uniform = np.random.default_rng(1).dirichlet(np.ones(6)), np.ones(6) / 6
    policy = start
    for _ in range(4):
        mixture = solutions.geometric_mixture(policy, uniform, 0.1)
        policy = solutions.mirror_step(matrix, uniform, 0.1, 1.0, policy, mixture)
    found = games_leads.numpy_nash_md(matrix, start, 4)
    np.testing.assert_allclose(found, policy, rtol=0, atol=1e-12)


def test_steps_are_counted_and_the_absent_named(monkeypatch):
    absent = {"nobody": ("no_such_module", None, 3.0)}
    monkeypatch.setattr(games_leads, "LIBRARIES", absent)
    seconds_of(monkeypatch, ours=1.0, numpy=4.0)
    with jax.enable_x64(True):
        (row,), notes = games_leads.iteration_leads(TINY, 2)
    assert row.values == (4.0, 4.0) and row.goal == 5.0
    assert notes == ["nobody: no_such_module is not installed"]
    # A library does `num_slow` of 3 steps where ours does 5.
    absent = {"other": ("json", games_leads.numpy_nash_md, 3.0)}
    monkeypatch.setattr(games_leads, "LIBRARIES", absent)
    with jax.enable_x64(True):
        rows, notes = games_leads.iteration_leads(TINY, 1)
    assert rows[1].values == pytest.approx((5 / 3,)) and not notes


@pytest.mark.battery
def test_torch_takes_our_steps():
    pytest.importorskip("torch", reason="torch is not installed")
    matrix, start = games_leads.random_matrix(6), np.full(6, 1 / 6)
    found = games_leads.torch_nash_md(matrix, start, 5)
    known = games_leads.numpy_nash_md(matrix, start, 5)
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-12)


def test_runs_at_once_are_those_of_the_loop(monkeypatch):
    seconds_of(monkeypatch, ours=1.0, numpy=13.0)
    with jax.enable_x64(True):
        lead = games_leads.runs_lead(TINY, 5)
    assert lead.verdict() == "met" and lead.values == (13.0,) * 5
    assert lead.name.startswith("4 runs on one game")


def test_an_iteration_reads_the_matrix_once(monkeypatch):
    # Reading once takes 0.2 by the faster way, so three readings 0.6 of ours.
    seconds_of(monkeypatch, ours=1.0, XLA=0.4, numpy=0.2)
    lead = games_leads.bandwidth_lead(TINY, 5)
    assert lead.values == pytest.approx((0.6,) * 5) and lead.verdict() == "missed"


def test_one_half_alone_is_measured_and_written(monkeypatch, tmp_path, capsys):
    leads = [games_leads.Lead("x", (2.0,) * 5, 1.5)]
    monkeypatch.setattr(games_leads, "measure", lambda size, rounds: (leads, ["gone"]))
    path = tmp_path / "leads.json"
    words = ["--size", "tiny", "--only", "leads", "--output", str(path)]
    assert games.main(words) == 0
    out, written = capsys.readouterr().out, json.loads(path.read_text())
    assert "x: 2.00 / 2.00 / 2.00 x, goal >= 1.5: met\ngone\n" in out
    assert written["leads"] == [leads[0].record()] and written["figures"] == []
    assert written["notes"] == ["gone"]


@pytest.mark.battery
def test_everything_is_measured():
    leads, notes = games_leads.measure(TINY, 1)
    libraries = [
        name
        for name, (module, *_) in games_leads.LIBRARIES.items()
        if importlib.util.find_spec(module)
    ]
    assert len(leads) == 5 + len(libraries)
    assert len(notes) == len(games_leads.LIBRARIES) - len(libraries)
    assert all(value > 0 for lead in leads for value in lead.values)
