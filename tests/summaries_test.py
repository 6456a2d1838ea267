# SPDX-License-Identifier: Apache-2.0
"""ROUGE against its definition, and the other figures by hand."""

import math

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.evaluation import summaries


def _f_measure(matches, reference_length, text_length):
    precision, recall = matches / text_length, matches / reference_length
    return 2 * precision * recall / (precision + recall)


def test_rouge_is_its_definition():
    found = summaries.rouge(["the cat on the mat"], ["the cat sat on a mat"])
    # Words in common: the cat on mat (the second "the" has no partner); pairs: the cat.
    assert found["rouge1"] == pytest.approx(_f_measure(4, 6, 5))
    assert found["rouge2"] == pytest.approx(_f_measure(1, 5, 4))
    assert found["rougeL"] == pytest.approx(_f_measure(4, 6, 5))


def test_rouge_l_sees_order_and_rouge_1_does_not():
    found = summaries.rouge(["three two one"], ["one two three"])
    assert found["rouge1"] == 1
    assert found["rougeL"] == pytest.approx(1 / 3)
    assert found["rouge2"] == 0


def test_rouge_is_a_mean_and_does_not_stem():
    assert summaries.rouge(["parse it", ""], ["parse it", "parse"])["rouge1"] == 0.5
    assert summaries.rouge(["parses"], ["parse"])["rouge1"] == 0


def test_copied_share_by_hand():
    document = "Rows are read, then rows are parsed."
    assert summaries.copied_share(document, "rows are read") == 1
    assert summaries.copied_share(document, "rows are copied") == 1 / 2
    assert summaries.copied_share(document, "parsed rows") == 0
    assert math.isnan(summaries.copied_share(document, "rows"))
    assert math.isnan(summaries.copied_share(document, ""))


def test_description_of_three_summaries():
    found = summaries.describe(
        ["a b c d"] * 3, ["a b"] * 3, ["a b", "a b", "d"], [True, True, False]
    )
    assert (found.num_summaries, found.num_distinct) == (3, 2)
    assert found.words == pytest.approx(5 / 3)
    assert found.ended_share == pytest.approx(2 / 3)
    assert found.copied_share == 1  # the single word has no pair and is left out
    assert found.rouge1 == pytest.approx(2 / 3)


def test_what_is_not_known_is_nan():
    found = summaries.describe(["a b"], ["a"], ["a"])
    assert np.isnan([found.ended_share, found.copied_share]).all()


@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], ["a", "b"])])
def test_texts_must_match_references(texts, references):
    with pytest.raises(UserError, match="one per reference"):
        summaries.rouge(texts, references)
