# SPDX-License-Identifier: Apache-2.0
"""`nlhf games`: what it prints, and one sentence for every mistake."""

import json

import numpy as np
import pytest

from nlhf_jax import cli
from nlhf_jax.games import catalogue, matrices, solutions

TABLE = ",Ann,Bob,Cy\nAnn,0.5,0.7,0.2\nBob,0.3,0.5,0.6\nCy,0.8,0.4,0.5\n"


@pytest.fixture
def games(capsys):
    def run(*words):
        assert cli.main(["games", *words]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def test_the_usage_names_the_command(capsys):
    assert cli.main(["--help"]) == 0
    assert "  games " in capsys.readouterr().out


def test_list_prints_every_named_game(games):
    printed = games("list")
    assert all(f"{name}: " in printed for name in catalogue.NAMED)


def test_solve_prints_full_precision_as_json(games):
    found = json.loads(
        games("solve", "skew", "--tau", "0.1", "--reference", "0.5,0.3,0.2", "--json")
    )
    known = solutions.regularised_nash(matrices.skew(), np.array([0.5, 0.3, 0.2]), 0.1)
    assert found["names"] == ["first", "second", "third"]
    assert found["regularised_policy"] == known.tolist()
    np.testing.assert_allclose(found["policy"], [1 / 6, 1 / 2, 1 / 3], atol=1e-8)
    assert (found["value"], found["unique"]) == (0.5, True)
    # Table of vectors: KL(pi*, mu) and exploitability of this game, twelve decimals.
    assert found["kl_to_reference"] == pytest.approx(0.138343337305, abs=1e-12)
    assert found["regularised_exploitability"] == pytest.approx(
        0.059355002523, abs=1e-12
    )


def test_solve_reads_a_file_and_prints_a_table(games, tmp_path):
    path = tmp_path / "wins.csv"
    path.write_text(TABLE)
    printed = games("solve", str(path))
    lines = [line.split() for line in printed.splitlines()]
    assert ["Bob", "0.500000", "0.366378"] in lines
    assert "value 0.5" in printed


def test_several_equilibria_are_said_to_be(games, tmp_path):
    path = tmp_path / "ties.csv"
    path.write_text(",a,b\na,0.5,0.5\nb,0.5,0.5\n")
    assert "largest entropy among several" in " ".join(
        games("solve", str(path)).split()
    )


def test_a_sweep_is_each_setting_alone(games):
    words = ("--method=mmd", "--taus=0.1,1", "--step_sizes=0.3,0.5", "--steps=30")
    found = json.loads(games("sweep", "skew", *words, "--json"))
    settings = [(run["tau"], run["step_size"]) for run in found["runs"]]
    assert settings == [(0.1, 0.3), (0.1, 0.5), (1, 0.3), (1, 0.5)]
    reference = np.ones(3) / 3
    for run in found["runs"]:
        policy = reference
        for _ in range(30):
            policy = solutions.mirror_step(
                matrices.skew(), reference, *list(run.values())[:2], policy, policy
            )
        np.testing.assert_allclose(run["policy"], policy, rtol=0, atol=1e-12)
        gap = solutions.regularised_gap(matrices.skew(), reference, run["tau"], policy)
        assert run["gap"] == pytest.approx(gap, abs=1e-12)
    printed = games("sweep", "skew", "--taus=0.1,0", "--method=mwu", "--steps=9")
    lines = [line.split() for line in printed.splitlines()]
    assert ["0.1", "usual"] in [line[:2] for line in lines]
    assert "mwu, after 9 steps" in printed


def test_compare_ends_at_the_equilibrium_and_plots(games, tmp_path):
    figure = tmp_path / "curves.png"
    words = (
        "compare",
        "skew",
        "--steps",
        "200",
        "--methods",
        "nash_md,extragradient,mwu",
    )
    found = json.loads(games(*words, "--plot", str(figure), "--json"))
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert found["methods"]["mwu"]["policy"] != found["equilibrium"]
    gaps = {name: run["gap"] for name, run in found["methods"].items()}
    assert gaps["extragradient"][-1] < 1e-12
    assert gaps["nash_md"][-1] < 1e-5 < gaps["mwu"][-1]
    # The theorem's bound with the sharper constant (docs/math.md (14)).
    kl = np.array(found["methods"]["nash_md"]["kl_from_equilibrium"])
    assert (kl <= 1 / (2 * 0.1**2 * np.arange(2, 202))).all()
    printed = games(*words)
    assert "gap after steps" in printed and "200" in printed


def test_compare_measures_from_the_equilibrium(games):
    words = ("compare", "skew", "--reference", "0.5,0.3,0.2", "--methods", "nash_md")
    run = json.loads(games(*words, "--steps", "10", "--json"))["methods"]["nash_md"]
    # Decreasing Nash-MD at tau 0.1, computed independently (numpy, float64).
    assert run["kl_from_equilibrium"][0] == pytest.approx(0.13264633353301, abs=1e-12)
    assert run["kl_from_equilibrium"][9] == pytest.approx(0.0077836977508, abs=1e-12)
    assert run["gap"][9] == pytest.approx(0.0017996984856765, abs=1e-12)


def test_analyze_says_who_wins_and_who_circles(games):
    found = json.loads(games("analyze", "skew", "--json"))
    assert found["condorcet_winner"] is None
    assert (found["num_cyclic_triples"], found["num_strict_triples"]) == (1, 1)
    assert found["strongest_cycles"] == [["first", "second", "third"]]
    assert sum(found["alpha_rank"]) == pytest.approx(1, abs=1e-12)
    printed = games("analyze", "munos_palm")
    assert "beats all others: MD1" in printed
    assert printed.index("MD1") < printed.index("SFT")


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "command"),
        (("solv", "skew"), "invalid choice: 'solv'"),
        (("solve",), "game"),
        (("solve", "skw"), "no game 'skw' (did you mean 'skew'?)"),
        (("solve", "skew", "--tau", "0"), "tau must be in (0.0, 1000000.0], got 0.0"),
        (("sweep", "skew", "--taus=0.1,x"), "taus must be numbers separated by commas"),
        (("sweep", "skew", "--taus=-1"), "taus must be in"),
        (("sweep", "skew", "--step_sizes=20"), "step_size must be above 0 and at most"),
        (("sweep", "skew", "--step_sizes=0"), "step_size must be above 0 and at most"),
        (("sweep", "skew", "--method=nash_mdd"), "did you mean 'nash_md'"),
        (("sweep", "skew", "--steps=0"), "steps must be an integer"),
        (("sweep", "skew", "--steps=100000000000"), "steps must be in [1, 100000000]"),
        (
            ("sweep", "skew", "--taus=0.1,1", "--steps=50000001"),
            "steps must be in [1, 50000000]",
        ),
        (("solve", "skew", "--tau", "-1"), "tau must be in (0.0, 1000000.0], got -1.0"),
        (("solve", "skew", "--tau", "nan"), "tau must be in"),
        (("solve", "skew", "--tau", "x"), "invalid float value: 'x'"),
        (("solve", "skew", "--tau=0.1", "--tau", "0.2"), "--tau is given twice"),
        (
            ("solve", "skew", "--reference", "0.5,0.5,0"),
            "3 numbers above 0 that sum to 1",
        ),
        (
            ("solve", "skew", "--reference", "0.5,0.5"),
            "3 numbers above 0 that sum to 1",
        ),
        (("solve", "skew", "--reference", "half"), "got 'half'"),
        (("solve", "skew", "--nonsense"), "--nonsense"),
        (("solve", "absent.csv"), "no table 'absent.csv'"),
        (("compare", "skew", "--methods", "nash_mdd"), "nash_md"),
        (("compare", "skew", "--steps", "0"), "steps must be an integer of at least 1"),
        (("compare", "skew", "--step_size", "100"), "step_size must be above 0"),
        (
            ("compare", "skew", "--steps", "3", "--plot", "x.pdf"),
            "must be a file that ends in .png",
        ),
        (("compare", "skew", "--steps", "3", "--plot", "no/x.png"), "no folder 'no'"),
        (("compare", "skew", "--steps", "999999999999999"), "steps must be in"),
        (("compare", "skew", "--methods", "mwu,nash_mdd"), "nash_md"),
        (("solve", "skew", "--tau", "inf"), "tau must be in"),
        (("solve", "skew", "--tau", "1e-300"), "too small to solve"),
        (("solve", "skew", "--js"), "--js"),
        (("solve", "skew", "--fill", "half"), "fill is for files"),
        (("solve", "~nosuchuser/x.csv"), "no table"),
        (("analyze", "skew", "--alpha", "inf"), "alpha must be in"),
        (("analyze", "skew", "--alpha", "0"), "alpha must be in (0.0, 1000000.0]"),
    ],
)
def test_every_mistake_is_one_sentence(capsys, words, said):
    assert cli.main(["games", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.startswith("nlhf: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "text, said",
    [
        (",a,b\na,0.5,0.7\nb,0.4,0.5\n", "must sum to 1"),
        (",a,b\na,0.5,0.7\n", "must be square"),
        (",a,b\na,0.5,nan\nb,0.5,0.5\n", "must be a number"),
        (",a,b\na,0.5,7\nb,3,0.5\n", "cells=wins"),
        (",a,\na,0.5,0.5\n,0.5,0.5\n", "no name for player 2"),
        (",a,b\na,,\nb,,\n", "no result for a against b"),
    ],
)
def test_a_bad_file_is_one_sentence(capsys, tmp_path, text, said):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    assert cli.main(["games", "analyze", str(path)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1
