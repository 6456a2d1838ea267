# SPDX-License-Identifier: Apache-2.0
"""Raters: the criteria word by word, exact antisymmetry, votes, and real cycles."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlhf_jax.checks import UserError
from nlhf_jax.preferences import raters
from nlhf_jax.preferences.raters import RaterPopulation

DOCUMENT = "load_table(path)\nThe table is read from disk and each row is parsed."
REFERENCE = "Read a table and parse its rows"


@pytest.mark.parametrize(
    "family",
    [
        "parse parses parsed parsing",
        "copy copies copied copying",
        "call calls called calling",
        "class classes",
        "value values valued",
        "get gets getting",
        "box boxes boxed boxing",
        "string strings",
        "status",
    ],
)
def test_forms_of_one_word_have_one_stem(family):
    assert len({raters.stem(word) for word in family.split()}) == 1


def test_different_words_keep_different_stems():
    words = (
        *("path", "table", "row", "read", "disk", "string", "class", "use"),
        *("set", "list", "is", "id", "free", "fit", "pass", "data"),
    )
    assert len({raters.stem(word) for word in words}) == len(words)


def test_content_words_of_identifiers():
    expected = {"load", "tabl", "data", "set", "v2"}
    assert raters.content_words("load_table the DataSet.v2 (table)") == expected
    assert raters.content_words("the of -- !") == frozenset()


def test_coverage_counts_the_reference():
    # Content of the reference: read, table, parse, row.
    assert raters.coverage("", REFERENCE, "parsing the rows") == 2 / 4
    assert raters.coverage("", REFERENCE, "rows rows rows") == 1 / 4
    assert raters.coverage("", REFERENCE, REFERENCE) == 1
    assert raters.coverage("", "the of", "rows") == 0


def test_faithfulness_counts_the_summary():
    assert raters.faithfulness(DOCUMENT, "", "parses rows of a spreadsheet") == 2 / 3
    assert raters.faithfulness(DOCUMENT, "", "reads the table") == 1
    assert raters.faithfulness(DOCUMENT, "", "of the") == 0


def test_brevity_is_best_at_three_words():
    scores = [raters.brevity("", "", " ".join("x" * n)) for n in range(8)]
    assert scores[:4] == [0, 0, 0, 1]
    assert all(a > b > 0 for a, b in itertools.pairwise(scores[3:]))


def test_an_empty_summary_is_worst_under_every_criterion():
    for name, criterion in raters.CRITERIA.items():
        assert criterion(DOCUMENT, REFERENCE, "") == 0, name
        assert criterion(DOCUMENT, REFERENCE, " \n") == 0, name
    some = ["reads a table", "x", "unrelated words entirely here"]
    p_B = RaterPopulation().preference([DOCUMENT] * 3, [REFERENCE] * 3, [""] * 3, some)
    assert (p_B <= 0.5).all() and p_B[0] == 0


words = st.text(alphabet="abc ", max_size=12)


@given(
    st.lists(st.tuples(words, words, words, words), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 10.0), min_size=3, max_size=3),
)
def test_antisymmetry_is_exact(rows, weights):
    population = RaterPopulation(dict(zip(raters.CRITERIA, weights, strict=True)))
    documents, references, firsts, seconds = map(list, zip(*rows, strict=True))
    forward_B = population.preference(documents, references, firsts, seconds)
    backward_B = population.preference(documents, references, seconds, firsts)
    assert forward_B.dtype == np.float64
    np.testing.assert_array_equal(forward_B + backward_B, np.ones(len(rows)))
    assert (forward_B >= 0).all() and (forward_B <= 1).all()
    same_B = population.preference(documents, references, firsts, firsts)
    np.testing.assert_array_equal(same_B, np.full(len(rows), 0.5))


def test_preference_is_the_weighted_share_of_groups():
    weights = {"coverage": 2.0, "faithfulness": 1.0, "brevity": 5.0}
    population = RaterPopulation(weights)
    # The first covers more (4/4 against 1/4), is as faithful (1), and is longer.
    p_B = population.preference(
        [DOCUMENT], [REFERENCE], ["read table parse row"], ["table is disk"]
    )
    np.testing.assert_allclose(p_B, [(2 + 1 / 2) / 8], atol=1e-15)


def test_a_group_of_weight_zero_says_nothing():
    population = RaterPopulation({"brevity": 1.0, "coverage": 0.0})
    p_B = population.preference(["d"], ["a b c"], ["a b c d e"], ["x y z"])
    np.testing.assert_array_equal(p_B, [0.0])


def test_scores_are_the_criteria():
    scores = RaterPopulation().scores([DOCUMENT], [REFERENCE], ["parsing the rows"])
    expected = {"coverage": 0.5, "faithfulness": 1.0, "brevity": 1.0}
    assert {name: score_B.tolist() for name, score_B in scores.items()} == {
        name: [score] for name, score in expected.items()
    }


def test_votes_average_to_the_preference():
    population = RaterPopulation({"coverage": 1.0, "faithfulness": 2.0, "brevity": 4.0})
    firsts = ["read table parse row", "reads the spreadsheet", "same words here"]
    seconds = ["table is disk", "parses a row of it", "same words here"]
    arguments = ([DOCUMENT] * 3, [REFERENCE] * 3, firsts, seconds)
    num_votes = 20_000
    share_B = population.votes(
        np.random.default_rng(0), *arguments, num_votes=num_votes
    )
    p_B = population.preference(*arguments)
    assert p_B[2] == 0.5 and len(set(p_B)) == 3
    standard_error_B = np.sqrt(p_B * (1 - p_B) / num_votes)
    assert (np.abs(share_B - p_B) <= 4 * standard_error_B).all()


def test_one_vote_is_zero_or_one_and_repeats_with_the_seed():
    population = RaterPopulation()
    arguments = ([DOCUMENT] * 9, [REFERENCE] * 9, ["a table row"] * 9, ["row x"] * 9)
    draws = [
        population.votes(np.random.default_rng(3), *arguments, num_votes=1)
        for _ in range(2)
    ]
    assert set(draws[0]) <= {0.0, 1.0}
    np.testing.assert_array_equal(*draws)


EQUAL = dict.fromkeys(raters.CRITERIA, 1.0)


def test_the_population_can_be_cyclic():
    summaries = [
        "quickly reads excel tables parsing rows",  # covers most, supported least
        "each table row is read from disk",  # all supported, longest
        "cached table disk path",  # shortest, covers least
    ]
    texts = ([DOCUMENT] * 3, [REFERENCE] * 3)
    ranks = {
        name: np.argsort(-score_B).tolist()
        for name, score_B in RaterPopulation().scores(*texts, summaries).items()
    }
    assert ranks == {
        "coverage": [0, 1, 2],
        "faithfulness": [1, 2, 0],
        "brevity": [2, 0, 1],
    }
    pairs = (summaries, summaries[1:] + summaries[:1])
    p_B = RaterPopulation(EQUAL).preference(*texts, *pairs)
    np.testing.assert_allclose(p_B, [2 / 3] * 3, atol=1e-15)
    assert (RaterPopulation().preference(*texts, *pairs) > 0.5).all()


def test_a_short_copy_is_beyond_defeat_only_among_equal_groups():
    copy, covering = "load table path", "the table is read and each row is parsed"
    arguments = ([DOCUMENT], [REFERENCE], [covering], [copy])
    assert RaterPopulation(EQUAL).preference(*arguments) == 0.5
    assert RaterPopulation().preference(*arguments) > 0.5


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"coverag": 1.0}, "did you mean 'coverage'"),
        ({"coverage": -1.0}, "weight of 'coverage' must be in"),
        ({"coverage": float("nan")}, "weight of 'coverage' must be in"),
        ({"coverage": float("inf")}, "weight of 'coverage' must be in"),
        ({"coverage": 0.0, "brevity": 0.0}, "positive sum"),
        ({}, "positive sum"),
    ],
)
def test_mistaken_weights_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        RaterPopulation(weights)


def test_mistaken_number_of_votes_is_refused():
    with pytest.raises(UserError, match="num_votes"):
        RaterPopulation().votes(
            np.random.default_rng(0), ["d"], ["r"], ["a"], ["b"], num_votes=0
        )
