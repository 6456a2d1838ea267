# SPDX-License-Identifier: Apache-2.0
"""Masks and log-probabilities: drawn arrays, plain-numpy versions, finite values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import sequences

EOS, PAD = 1, 0


def masked(rows) -> np.ndarray:
    return np.asarray(sequences.response_mask(jnp.asarray(rows, jnp.int32), EOS))


def test_the_mask_ends_with_the_first_end_token():
    rows = [
        [5, EOS, PAD, PAD],  # ends by itself
        [5, EOS, 7, EOS],  # what follows the end does not count, another end neither
        [EOS, PAD, PAD, PAD],  # the empty response is its end token
        [5, 6, 7, EOS],
        [5, 6, 7, 8],  # cut at the length limit: no end token, all of it counts
    ]
    expected = [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    np.testing.assert_array_equal(masked(rows), np.array(expected, bool))


def test_padding_with_the_end_token_keeps_the_first_one():
    # Some vocabularies pad with their end token; it is told apart by its place only.
    np.testing.assert_array_equal(
        masked([[5, 6, EOS, EOS, EOS]]), [[True, True, True, False, False]]
    )


def test_padding_inside_a_response_counts():
    # A model may say the padding id before its end; the mask must not skip it.
    np.testing.assert_array_equal(
        masked([[5, PAD, 6, EOS, PAD]]), [[True, True, True, True, False]]
    )


def test_the_mask_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, size=(50, 9))
    expected = []
    for row in rows:
        alive, line = True, []
        for token in row:
            line.append(alive)
            alive = alive and token != EOS
        expected.append(line)
    np.testing.assert_array_equal(masked(rows), expected)


def plain_log_probs(logits, tokens, mask):
    """Numpy in float64, one token at a time."""
    found = np.zeros(tokens.shape)
    for place in np.argwhere(mask):
        row = logits[tuple(place)].astype(np.float64)
        probs = np.exp(row - row.max())
        found[tuple(place)] = np.log(probs[tokens[tuple(place)]] / probs.sum())
    return found


def example(dtype=np.float64, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(4, 5, 7))
    tokens = rng.integers(0, 7, size=(4, 5)).astype(np.int32)
    mask = np.arange(5)[None, :] < np.array([[1], [3], [5], [4]])
    return logits.astype(dtype), tokens, mask


def test_token_log_probs_are_those_of_the_softmax(float64):
    logits, tokens, mask = example()
    found = sequences.token_log_probs(*map(jnp.asarray, (logits, tokens, mask)))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(
        found, plain_log_probs(logits, tokens, mask), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_log_probs_of_narrow_logits_are_summed_in_float32(dtype):
    logits, tokens, mask = example()
    narrow = jnp.asarray(logits, jnp.float32).astype(dtype)
    found = sequences.token_log_probs(narrow, jnp.asarray(tokens), jnp.asarray(mask))
    assert found.dtype == jnp.float32
    # The logits were rounded, what is computed from them was not.
    expected = plain_log_probs(np.asarray(narrow, np.float64), tokens, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_log_probs_of_huge_logits_stay_finite():
    logits = jnp.array([[[1e4, -1e4, 0.0]]], jnp.float32)
    for token, expected in ((0, 0.0), (1, -2e4), (2, -1e4)):
        found = sequences.token_log_probs(
            logits, jnp.array([[token]]), jnp.ones((1, 1), bool)
        )
        assert float(found[0, 0]) == expected


def test_a_constant_added_to_the_logits_changes_nothing():
    logits, tokens, mask = example(np.float32)
    shift = np.random.default_rng(1).normal(size=(4, 5, 1)).astype(np.float32)
    one = sequences.token_log_probs(*map(jnp.asarray, (logits, tokens, mask)))
    other = sequences.token_log_probs(*map(jnp.asarray, (logits + shift, tokens, mask)))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def value_and_gradient(logits):
    _, tokens, mask = example()

    def total(logits):
        found = sequences.token_log_probs(logits, jnp.asarray(tokens), mask)
        return sequences.sequence_log_probs(found, mask).sum()

    mask = jnp.asarray(mask)
    return jax.value_and_grad(total)(jnp.asarray(logits))


@pytest.mark.parametrize("poison", [1e30, -np.inf, np.nan])
def test_logits_behind_the_mask_have_no_value(poison):
    logits, _, mask = example(np.float32)
    dirty = np.where(mask[:, :, None], logits, np.float32(poison))
    assert value_and_gradient(dirty)[0] == value_and_gradient(logits)[0]


def test_logits_behind_the_mask_have_no_gradient():
    logits, _, mask = example(np.float32)
    dirty = np.where(mask[:, :, None], logits, np.float32(1e30))
    found, expected = value_and_gradient(dirty)[1], value_and_gradient(logits)[1]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.asarray(found)[~mask], 0.0)


def test_the_gradient_is_one_hot_minus_the_probabilities(float64):
    logits, tokens, mask = example()

    def total(logits):
        return sequences.token_log_probs(
            logits, jnp.asarray(tokens), jnp.asarray(mask)
        ).sum()

    found = jax.grad(total)(jnp.asarray(logits))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs = weights / weights.sum(axis=-1, keepdims=True)
    expected = (np.eye(7)[tokens] - probs) * mask[:, :, None]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_sums_take_the_end_token_and_leave_the_padding():
    log_probs = jnp.array([[-1.0, -2.0, -4.0, -8.0], [-1.0, -2.0, -4.0, -8.0]])
    mask = jnp.array([[True, True, False, False], [True, True, True, True]])
    for function in (sequences.masked_sum, sequences.sequence_log_probs):
        np.testing.assert_array_equal(function(log_probs, mask), [-3.0, -15.0])
    np.testing.assert_array_equal(
        sequences.masked_sum(jnp.full((2, 4), jnp.nan), jnp.zeros((2, 4), bool)), 0.0
    )


def test_reward_to_go_adds_what_is_still_to_come():
    values = jnp.array([[1.0, 2.0, 4.0, 8.0], [1.0, -1.0, 0.0, 0.0]])
    expected = [[15.0, 14.0, 12.0, 8.0], [0.0, -1.0, 0.0, 0.0]]
    np.testing.assert_array_equal(sequences.reward_to_go(values), expected)


def test_lengths_count_tokens_in_float32():
    mask = jnp.array([[True, True, False], [False, False, False], [True, True, True]])
    found = sequences.lengths(mask)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [2.0, 0.0, 3.0])


def test_an_end_token_counts_only_where_the_mask_is_true():
    rows = jnp.array([[5, EOS, 7], [5, 6, 7], [5, 6, EOS], [5, 6, EOS]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_array_equal(
        sequences.has_eos(rows, mask, EOS), [True, False, True, False]
    )
