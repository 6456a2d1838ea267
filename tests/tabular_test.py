# SPDX-License-Identifier: Apache-2.0
"""The tabular language model: enumeration, its functions, and the judge beside it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.decoding import sample
from nlhf_jax.evaluation import exact
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import POLICY, REFERENCE, Algorithm, LossOutput, Speaker

EXACT = 1e-12
SHAPES = [(2, 1, -1), (3, 2, -1), (2, 4, -1), (2, 3, 1), (3, 2, 0), (4, 3, 2)]
each_shape = pytest.mark.parametrize("vocab_size, length, eos_id", SHAPES)


def by_hand(vocab_size, length, eos_id):
    """Every response as the tokens that count, grown one token at a time."""
    grown, ended = [()], []
    for _ in range(length):
        longer = [(*one, token) for one in grown for token in range(vocab_size)]
        ended += [one for one in longer if one[-1] == eos_id]
        grown = [one for one in longer if one[-1] != eos_id]
    return sorted(ended + grown, key=lambda one: (*one, *[0] * (length - len(one))))


def probability(table, response, vocab_size):
    """Plain numpy: a prefix's row is its tokens read as digits."""
    result, row = 1.0, 0
    for t, token in enumerate(response):
        weights = np.exp(np.asarray(table)[t, row])
        result *= weights[token] / weights.sum()
        row = row * vocab_size + token
    return result


@each_shape
def test_every_response_is_listed_once(vocab_size, length, eos_id):
    model = tabular.tabular_model(vocab_size, length, eos_id=eos_id)
    tokens, mask = map(np.asarray, tabular.all_responses(model, length))
    said = [
        tuple(int(token) for token in row[keep])
        for row, keep in zip(tokens, mask, strict=True)
    ]
    assert said == by_hand(vocab_size, length, eos_id)
    assert (tokens[~mask] == model.pad_id).all()
    before = vocab_size - 1 if eos_id >= 0 else vocab_size
    ended = sum(before**t for t in range(length)) if eos_id >= 0 else 0
    assert len(said) == ended + before**length


def test_the_example_of_the_docstring():
    tokens, mask = tabular.all_responses(tabular.tabular_model(2, 2, eos_id=1), 2)
    np.testing.assert_array_equal(tokens, [[0, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(mask, [[1, 1], [1, 1], [1, 0]])


@each_shape
def test_a_response_is_found_where_it_is_listed(vocab_size, length, eos_id):
    model = tabular.tabular_model(vocab_size, length, eos_id=eos_id)
    listed = tabular.all_responses(model, length)
    size = len(listed.tokens_BT)
    np.testing.assert_array_equal(tabular.index_of(model, listed), np.arange(size))
    # What stands behind the end has no say.
    dirty = jnp.where(listed.mask_BT, listed.tokens_BT, vocab_size - 1)
    found = tabular.index_of(model, listed._replace(tokens_BT=dirty))
    np.testing.assert_array_equal(found, np.arange(size))


@each_shape
def test_the_policy_is_the_product_of_its_rows(vocab_size, length, eos_id, float64):
    model = tabular.tabular_model(vocab_size, length, eos_id=eos_id)
    params = model.init(jax.random.key(0))
    policy = tabular.response_policy(model, params, length)
    known = [
        probability(params["table"], response, vocab_size)
        for response in by_hand(vocab_size, length, eos_id)
    ]
    np.testing.assert_allclose(policy, known, rtol=0, atol=EXACT)
    np.testing.assert_allclose(policy.sum(), 1.0, rtol=0, atol=EXACT)


@each_shape
def test_decoding_and_teacher_forcing_see_the_same_logits(vocab_size, length, eos_id):
    model = tabular.tabular_model(vocab_size, length, eos_id=eos_id)
    params = model.init(jax.random.key(0))
    tokens = np.array(list(itertools.product(range(vocab_size), repeat=length)))
    prompts = tabular.empty_prompts(len(tokens))
    forced = model.logits(params, prompts, jnp.asarray(tokens))
    last, cache = model.prefill(params, prompts, length)
    for t in range(length):
        logits, cache = model.decode_step(params, cache, last, t)
        np.testing.assert_array_equal(logits, forced[:, t])
        last = jnp.asarray(tokens[:, t])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_frequencies_of_the_decode_loop_are_the_exact_probabilities(beta):
    model, count = tabular.tabular_model(3, 3, eos_id=2), 20_000
    keys = jax.random.split(jax.random.key(5))
    sets = {POLICY: model.init(keys[0]), REFERENCE: model.init(keys[1])}
    weights = {POLICY: 1.0 - beta, REFERENCE: beta} if beta else {POLICY: 1.0}
    speaker = Speaker(weights)
    drawn = sample(
        model,
        sets,
        (speaker,),
        tabular.empty_prompts(count),
        jax.random.key(1),
        max_length=3,
    ).samples[0]
    known = np.exp(
        tabular.response_log_probs(
            model, sets, speaker, tabular.all_responses(model, 3)
        ),
        dtype=np.float64,
    )
    np.testing.assert_allclose(known.sum(), 1.0, rtol=0, atol=1e-6)
    counted = np.bincount(tabular.index_of(model, drawn.responses), minlength=15)
    standard_error = np.sqrt(known * (1 - known) / count)
    assert (np.abs(counted / count - known) < 4.5 * standard_error).all()


def test_rows_of_no_prefix_are_never_read():
    model = tabular.tabular_model(2, 3)
    table = np.array(model.init(jax.random.key(0))["table"])
    table[0, 1:] = np.nan
    table[1, 2:] = np.nan
    policy = tabular.response_policy(model, {"table": jnp.asarray(table)}, 3)
    np.testing.assert_allclose(np.asarray(policy).sum(), 1.0, rtol=1e-6)


def test_a_table_from_rows_has_the_shape_of_a_fresh_one():
    written = tabular.table([0.1, 0.2], np.ones((2, 2)), np.full((4, 2), 2.0))
    fresh = tabular.tabular_model(2, 3).init(jax.random.key(0))
    assert written["table"].shape == fresh["table"].shape == (3, 4, 2)
    np.testing.assert_array_equal(written["table"][0, 0], [0.1, 0.2])
    np.testing.assert_array_equal(written["table"][1, :2], 1.0)
    np.testing.assert_array_equal(written["table"][2], 2.0)


@pytest.mark.parametrize(
    "vocab_size, length, eos_id, complaint",
    [
        (10, 4, -1, r"must be at most 4096 .* got 10 \*\* 4"),
        (2, 13, -1, r"got 2 \*\* 13"),
        (32_000, 10**9, -1, r"got 32000 \*\* 1000000000"),
        (1, 2, -1, "vocab_size must be an integer of at least 2, got 1"),
        (3, 0, -1, "length must be an integer of at least 1, got 0"),
        (3, 2, 3, r"eos_id must be in \[-1, 2\], got 3"),
    ],
)
def test_sizes_that_cannot_be_enumerated_are_refused(
    vocab_size, length, eos_id, complaint
):
    with pytest.raises(UserError, match=complaint):
        tabular.tabular_model(vocab_size, length, eos_id=eos_id)


@pytest.mark.parametrize("vocab_size, length", [(2, 12), (16, 3), (4096, 1)])
def test_the_largest_sizes_are_accepted(vocab_size, length):
    model = tabular.tabular_model(vocab_size, length)
    assert len(tabular.all_responses(model, length).tokens_BT) == 4096


def test_the_judge_looks_up_row_and_column():
    model = tabular.tabular_model(2, 2, eos_id=1)
    game = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
    judge = table_judge(model, game, np.array([1.0, 2.0, 3.0]))
    listed = tabular.all_responses(model, 2)
    first = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 2])], listed)
    second = jax.tree.map(lambda leaf: leaf[jnp.array([1, 2, 2])], listed)
    prompts = tabular.empty_prompts(3)
    found = judge.preference({}, prompts, first, second)
    np.testing.assert_allclose(found, [0.9, 0.7, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(judge.reward({}, prompts, second), [2.0, 3.0, 3.0])


def counting(num_speakers):
    """An algorithm whose loss is one for every example."""
    return Algorithm(
        name="counting",
        speakers=(Speaker({POLICY: 1.0}),) * num_speakers,
        comparisons=(),
        ratings=(),
        trained_on=(0,),
        scored_under=(),
        loss=lambda samples, feedback: LossOutput(
            jnp.ones(samples[0].mask_BT.shape[0]) * samples[0].log_probs[POLICY][:, 0],
            {},
        ),
    )


def test_an_expectation_of_too_many_terms_is_refused():
    model = tabular.tabular_model(4, 4)
    judge = table_judge(model, np.full((256, 256), 0.5), np.zeros(256))
    sets = {POLICY: model.init(jax.random.key(0))}
    with pytest.raises(UserError, match=r"at most 1048576 terms, got 256 .* 3 sp"):
        exact.expected_gradient(model, counting(3), judge, sets, 4)


@pytest.mark.parametrize("num_speakers", [1, 2, 3])
def test_the_weights_of_the_draws_are_constants_that_sum_to_one(num_speakers, float64):
    # E[grad log pi] = 0: a constant factor has no expected gradient, but only if each
    # draw counts with its probability.
    model = tabular.tabular_model(3, 2, eos_id=0)
    judge = table_judge(model, np.full((7, 7), 0.5), np.zeros(7))
    sets = {POLICY: model.init(jax.random.key(0))}
    found = exact.expected_gradient(model, counting(num_speakers), judge, sets, 2)
    np.testing.assert_allclose(found["table"], 0.0, rtol=0, atol=EXACT)
