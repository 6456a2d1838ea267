# SPDX-License-Identifier: Apache-2.0
"""The paper's tables beside ours: orientation, agreement, and what is written."""

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.evaluation import reproduction
from nlhf_jax.games import published

NAMES = ("SFT", "RLHF", "MD1", "BR")


def table_of(mean, half=0.01, names=NAMES):
    mean = np.asarray(mean)
    return {
        "names": list(names),
        "mean": mean.tolist(),
        "low": (mean - half).tolist(),
        "high": (mean + half).tolist(),
    }


def papers(judge=published.munos_palm, names=NAMES):
    at = [published.POLICIES.index(name) for name in names]
    return judge()[np.ix_(at, at)]


def test_the_papers_own_table_agrees_with_itself():
    found = reproduction.comparison({"population": table_of(papers())})["population"]
    assert found["names"] == list(NAMES)
    np.testing.assert_array_equal(found["ours"], found["paper"])
    assert found["rank_correlation"] == pytest.approx(1.0)
    # Six pairs, all further than a hundredth from one half.
    assert found["decided"] == found["same_side"] == 6


def test_a_cell_is_the_preference_of_the_column_over_the_row():
    found = reproduction.comparison({"population": table_of(papers())})["population"]
    # Table 1: RLHF over SFT is 0.990, in the row of SFT.
    assert found["paper"][0][1] == 0.990 and found["paper"][1][0] == 0.010
    assert found["ours"][0][1] == 0.990
    text = reproduction.markdown({"population": found})
    row = next(line for line in text.splitlines() if line.startswith("| SFT"))
    assert row.split(" | ")[2] == "0.99 ± 0.01 (0.99)"


def test_the_opposite_of_the_paper_disagrees_everywhere():
    opposite = reproduction.comparison({"population": table_of(papers().T)})
    found = opposite["population"]
    assert found["rank_correlation"] == pytest.approx(-1.0)
    assert (found["decided"], found["same_side"]) == (6, 0)


def test_wide_intervals_decide_nothing():
    found = reproduction.comparison({"preference_model": table_of(papers(), half=0.6)})
    assert found["preference_model"]["decided"] == 0
    # The other judge has the other table.
    np.testing.assert_array_equal(
        found["preference_model"]["paper"], papers(published.munos_own).T
    )


def test_policies_stand_in_the_papers_order_and_others_are_left_out():
    shuffled = ("BR", "mine", "SFT", "MD1")
    rng = np.random.default_rng(0)
    upper = np.triu(rng.uniform(size=(4, 4)), 1)
    mean = upper + np.tril(1 - upper.T, -1) + np.eye(4) / 2
    found = reproduction.comparison({"population": table_of(mean, names=shuffled)})
    assert found["population"]["names"] == ["SFT", "MD1", "BR"]
    # Column MD1 over row SFT: the mean of MD1 against SFT.
    assert found["population"]["ours"][0][1] == mean[3, 2]


def test_too_few_of_the_papers_policies_are_refused():
    with pytest.raises(UserError, match="at least three policies must be"):
        reproduction.comparison(
            {"population": table_of(np.full((2, 2), 0.5), names=("SFT", "mine"))}
        )


@pytest.mark.parametrize(
    "first, second, known",
    [
        ([1, 2, 3, 4], [10, 20, 30, 35], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 (16 - 1)).
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        # Ties share the mean rank, 1.5: covariance 2 over the root of 2 * 1.5 and 2.
        ([1, 1, 2], [1, 2, 3], 1.5 / np.sqrt(1.5 * 2)),
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlation_by_hand(first, second, known):
    found = reproduction.rank_correlation(
        np.array(first, float), np.array(second, float)
    )
    assert found == pytest.approx(known, abs=1e-12)


def test_a_sweep_lists_each_value_against_the_baseline():
    names = ("SFT", "0.1", "0.2")
    mean = np.array([[0.5, 0.4, 0.3], [0.6, 0.5, 0.4], [0.7, 0.6, 0.5]])
    rates = dict.fromkeys(reproduction.JUDGES, table_of(mean, names=names))
    figures = {
        name: {"kl": kl, "kl_standard_error": 0.05}
        for name, kl in zip(names, (0.0, 1.0, 2.5), strict=True)
    }
    text = reproduction.sweep_table(["0.1", "0.2"], rates, figures, "SFT")
    assert text.splitlines()[2:] == [
        "| 0.1 | 0.600 [0.590, 0.610] | 0.600 [0.590, 0.610] | 1.00 ± 0.05 |",
        "| 0.2 | 0.700 [0.690, 0.710] | 0.700 [0.690, 0.710] | 2.50 ± 0.05 |",
    ]
