# SPDX-License-Identifier: Apache-2.0
"""Regret where the best response is rare: the game, the sums, the command."""

import numpy as np
import pytest

from nlhf_jax import cli
from nlhf_jax.evaluation import exploration
from nlhf_jax.games import matrices, solutions

FEW = ["--train_steps=20", "--num_seeds=2"]


def curve(gaps, method="m", tau=0.1):
    gaps = np.asarray(gaps, float)
    steps = np.arange(gaps.shape[1]) * 10
    return exploration.Curve(method, tau, steps, gaps, gaps[:, -1], 0.5)


def test_the_game_is_one_whose_best_response_is_rare():
    game = np.array(exploration.PREFERENCE)
    matrices.check_preference_matrix(game)
    assert (np.delete(game[2], 2) > 0.5).all(), "C beats both"
    reference = np.array([0.66, 0.33, 0.01])
    shares = [
        solutions.regularised_nash(game, reference, tau)[2]
        for tau in (0.2, 0.05, 0.025)
    ]
    # The smaller tau, the more the equilibrium is C.
    assert shares[0] < 0.1 and shares == sorted(shares) and shares[-1] > 0.99


def test_regret_is_the_sum_of_the_gaps_over_steps():
    found = curve([[0.3, 0.2, 0.1], [0.1, 0.1, 0.1]]).regret_SK
    np.testing.assert_allclose(found, [[0, 3, 5], [0, 1, 2]], atol=1e-12)


def test_intervals_are_of_the_mean_over_seeds():
    mean, half = exploration.mean_and_half(np.array([1.0, 3.0]))
    # Deviation sqrt(2), error 1.
    assert (mean, half) == pytest.approx((2.0, 1.96))


def test_the_table_has_a_line_per_method_and_tau():
    text = exploration.table([curve([[0.3, 0.1], [0.3, 0.3]]), curve([[0.0, 0.0]] * 2)])
    head, _, first, second = text.splitlines()
    assert head.startswith("| tau | method | regret |")
    assert "| 0.1 | m | 3 ± 0 | 0.2 ± 0.2 | 0.500 |" in first
    assert "| 0 ± 0 |" in second


def test_the_figure_has_a_panel_per_tau():
    drawn = exploration.figure(
        [curve([[0.3, 0.1]] * 2, tau=tau) for tau in (0.1, 0.2, 0.3)]
    )
    assert [axis.get_title() for axis in drawn.axes] == [
        "tau 0.1",
        "tau 0.2",
        "tau 0.3",
    ]


@pytest.mark.battery
def test_the_command_prints_every_method(tmp_path, capsys):
    plot = tmp_path / "regret.png"
    words = ["exploration", *FEW, "--taus=(0.1,)", f"--plot={plot}"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(exploration.methods_at(0.1))
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    "flag, complaint",
    [
        ("--taus=()", "taus must name at least one tau"),
        ("--taus=(0.0,)", "tau must be in (0.0, inf), got 0.0"),
        ("--rarity=1.0", "rarity must be in (0.0, 1.0), got 1.0"),
        ("--num_seeds=1", "num_seeds must be an integer of at least 2, got 1"),
        ("--train_steps=0", "train_steps must be an integer of at least 1, got 0"),
        ("--plot=no/such/folder.png", "plot: there is no folder 'no/such'"),
        ("--plot=x.xyz", "plot must be a file that ends in .png, got 'x.xyz'"),
    ],
)
def test_mistakes_are_one_sentence(flag, complaint, capsys):
    assert cli.main(["exploration", flag]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
