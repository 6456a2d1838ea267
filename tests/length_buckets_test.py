# SPDX-License-Identifier: Apache-2.0
"""Batches as wide as their prompts need: few widths, the same order and meaning."""

import dataclasses

import jax
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.data import batches
from nlhf_jax.data.length_buckets import bucket, first_columns
from nlhf_jax.settings import DataSettings
from nlhf_jax.types import (
    ComparisonBatch,
    PromptBatch,
    Responses,
    SupervisedBatch,
)
from tests import decoder_only_toys

LENGTHS = np.array([1, 3, 4, 5, 2, 8, 7, 4, 4, 2, 1, 3])
WIDTH, BUCKETS = 8, (2, 4)


def prompts():
    mask = np.arange(WIDTH)[None] < LENGTHS[:, None]
    tokens = np.where(mask, 5 + np.arange(len(LENGTHS))[:, None], 0)
    return PromptBatch(tokens.astype(np.int32), mask)


def responses():
    shape = (len(LENGTHS), 3)
    return Responses(np.full(shape, 7, np.int32), np.ones(shape, bool))


def supervised(buckets=BUCKETS):
    texts = [str(length) for length in LENGTHS]
    data = SupervisedBatch(prompts(), responses())
    return batches.SupervisedData(data, texts, texts, 0, 0, buckets)


def comparisons(buckets=BUCKETS):
    texts = [str(length) for length in LENGTHS]
    preferences = np.linspace(0, 1, len(texts)).astype(np.float32)
    data = ComparisonBatch(prompts(), responses(), responses(), preferences)
    return batches.ComparisonData(
        data, *(texts,) * 3, preferences.tolist(), 0, 0, buckets
    )


@pytest.mark.parametrize(
    "rows, width",
    [([0], 2), ([0, 4], 2), ([0, 1], 4), ([2, 7, 8], 4), ([3, 0], 8), ([5], 8)],
)
def test_the_first_bucket_that_holds_the_longest(rows, width):
    assert bucket(prompts(), np.array(rows), BUCKETS) == width
    assert bucket(prompts(), np.array(rows), ()) == WIDTH


@pytest.mark.parametrize("make", [supervised, comparisons])
def test_order_and_texts_are_those_without_buckets(make):
    for step in range(12):
        plain = make(()).batch(3, step, 2)
        found = make().batch(3, step, 2)
        width = found.prompts.tokens_BS.shape[1]
        assert width in (*BUCKETS, WIDTH)
        for one, two in zip(found.prompts, plain.prompts, strict=True):
            np.testing.assert_array_equal(one, two[:, :width])
        assert not plain.prompts.mask_BS[:, width:].any()
        for one, two in zip(
            jax.tree.leaves(found[1:]), jax.tree.leaves(plain[1:]), strict=True
        ):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("make", [supervised, comparisons])
def test_every_process_finds_the_width_of_the_whole_batch(make):
    data, widths = make(), set()
    for step in range(12):
        whole = data.batch(3, step, 4).prompts.tokens_BS
        for rows in (np.array([0, 1]), np.array([2, 3])):
            part = data.batch(3, step, 4, rows).prompts.tokens_BS
            np.testing.assert_array_equal(part, whole[rows])
        widths.add(whole.shape[1])
    assert len(widths) > 1


def test_a_step_is_compiled_once_for_each_width_and_no_more():
    data, traces = supervised(), []

    @jax.jit
    def step(batch):
        traces.append(batch.prompts.tokens_BS.shape[1])
        return batch.prompts.tokens_BS.sum()

    for number in range(60):
        step(data.batch(0, number, 2))
    assert sorted(traces) == [2, 4, 8]


@pytest.mark.parametrize("family", ["llama_3", "gemma_3"])
def test_a_row_says_the_same_at_any_width(family):
    model = decoder_only_toys.decoder_only_language_model(
        decoder_only_toys.FAMILIES[family]
    )
    params = decoder_only_toys.parameters(decoder_only_toys.FAMILIES[family])
    tokens_BT = decoder_only_toys.random_responses()
    wide = first_columns(prompts(), WIDTH)
    short = jax.tree.map(lambda leaf: leaf[[0, 1, 2]], wide)
    logits = jax.jit(model.logits)
    np.testing.assert_allclose(
        logits(params, first_columns(short, 4), tokens_BT),
        logits(params, short, tokens_BT),
        atol=1e-5,
    )


def settings(**given):
    return DataSettings("jsonl", {"inputs": WIDTH, "targets": 3}, **given)


@pytest.mark.parametrize("buckets", [(0, 2), (4, 2), (2, 2), (2, 8), (2, 9), (-1,)])
def test_buckets_that_make_no_sense_are_refused(buckets):
    said = "length_buckets must be integers that rise from at least 1 and stay below 8"
    with pytest.raises(UserError, match=said):
        settings(length_buckets=buckets)


@pytest.mark.parametrize("buckets", [(), (1,), (2, 4, 7)])
def test_rising_buckets_are_taken(buckets):
    assert dataclasses.replace(settings(), length_buckets=buckets)
