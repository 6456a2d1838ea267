# SPDX-License-Identifier: Apache-2.0
"""Mixtures, temperature and truncation against plain numpy on probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import mixture
from nlhf_jax.checks import UserError
from nlhf_jax.games.solutions import geometric_mixture
from nlhf_jax.types import POLICY, REFERENCE, Speaker

PROBS = np.array([[0.4, 0.05, 0.25, 0.3], [0.1, 0.6, 0.1, 0.2]])
OTHER = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])


def two(first=PROBS, second=OTHER):
    with np.errstate(divide="ignore"):
        return {
            POLICY: jnp.asarray(np.log(first)),
            REFERENCE: jnp.asarray(np.log(second)),
        }


def probabilities(logits):
    return np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))


@pytest.mark.parametrize("beta", [0.0, 0.125, 0.5, 1.0])
def test_two_sets_give_the_geometric_mixture(beta, float64):
    mixed = mixture.mix(two(), {POLICY: 1 - beta, REFERENCE: beta})
    for row, policy, reference in zip(probabilities(mixed), PROBS, OTHER, strict=True):
        expected = geometric_mixture(policy, reference, beta)
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


def test_it_is_no_arithmetic_mixture(float64):
    mixed = probabilities(mixture.mix(two(), {POLICY: 0.5, REFERENCE: 0.5}))
    assert np.abs(mixed - (PROBS + OTHER) / 2).max() > 0.01


def test_three_sets_multiply_their_powers(float64):
    third = np.array([[0.7, 0.1, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1]])
    logits = two() | {"average": jnp.asarray(np.log(third))}
    weights = {POLICY: 0.5, REFERENCE: 0.2, "average": 0.3}
    product = PROBS**0.5 * OTHER**0.2 * third**0.3
    expected = product / product.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        probabilities(mixture.mix(logits, weights)), expected, rtol=0, atol=1e-12
    )


def test_raw_logits_serve_as_well_as_log_probabilities(float64):
    shifted = {name: logits + 7.0 for name, logits in two().items()}
    weights = {POLICY: 0.75, REFERENCE: 0.25}
    np.testing.assert_allclose(
        probabilities(mixture.mix(shifted, weights)),
        probabilities(mixture.mix(two(), weights)),
        rtol=0,
        atol=1e-12,
    )


def test_the_order_of_the_sets_does_not_matter(float64):
    weights = {POLICY: 0.75, REFERENCE: 0.25}
    turned = dict(reversed(two().items()))
    np.testing.assert_allclose(
        mixture.mix(turned, weights), mixture.mix(two(), weights), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_set_of_weight_zero_has_no_say_even_where_it_forbids(is_traced):
    forbidding = two(second=np.array([[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    mix = jax.jit(mixture.mix) if is_traced else mixture.mix
    mixed = mix(forbidding, {POLICY: 1.0, REFERENCE: 0.0})
    np.testing.assert_allclose(probabilities(mixed), PROBS, rtol=0, atol=1e-6)


def test_a_token_that_one_set_forbids_is_never_said():
    forbidding = two(second=np.array([[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    mixed = probabilities(mixture.mix(forbidding, {POLICY: 0.9, REFERENCE: 0.1}))
    assert np.isfinite(mixed).all()
    np.testing.assert_array_equal(mixed == 0, [[1, 0, 0, 1], [0, 1, 1, 1]])


def test_a_single_set_is_handed_through_untouched():
    logits = two()[POLICY]
    assert mixture.mix({POLICY: logits}, {POLICY: 1.0}) is logits
    assert mixture.process(logits, Speaker({POLICY: 1.0})) is logits


def test_weights_follow_their_schedules():
    speaker = Speaker({POLICY: lambda step: 1 - step / 10, REFERENCE: lambda s: s / 10})
    assert mixture.speaker_weights(speaker, 0) == {POLICY: 1.0, REFERENCE: 0.0}
    assert mixture.speaker_weights(speaker, 5) == {POLICY: 0.5, REFERENCE: 0.5}
    traced = jax.jit(lambda step: mixture.speaker_weights(speaker, step))(jnp.array(2))
    np.testing.assert_allclose(traced[REFERENCE], 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "weights",
    [{POLICY: 0.5}, {POLICY: 0.5, REFERENCE: 0.4}, {POLICY: 1.0, REFERENCE: 1.0}],
)
def test_fixed_weights_that_do_not_sum_to_one_are_refused(weights):
    with pytest.raises(UserError, match=r"must sum to 1, got .*params"):
        mixture.speaker_weights(Speaker(weights), 0)


def test_weights_written_in_decimal_pass():
    weights = {name: 0.1 for name in "abcdefghij"}  # the sum is 0.9999999999999999
    assert mixture.speaker_weights(Speaker(weights), 0) == weights


def processed(probs=PROBS, **how):
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(probs))
    return probabilities(mixture.process(logits, Speaker({POLICY: 1.0}, **how)))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature, float64):
    power = PROBS ** (1 / temperature)
    expected = power / power.sum(axis=1, keepdims=True)
    found = processed(temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def plain_top_k(row, k):
    kept = np.argsort(-row)[:k]
    result = np.zeros_like(row)
    result[kept] = row[kept]
    return result / result.sum()


def plain_top_p(row, p):
    total, result = 0.0, np.zeros_like(row)
    for index in np.argsort(-row):
        if total >= p:
            break
        result[index] = row[index]
        total += row[index]
    return result / result.sum()


def random_rows(seed, size=12):
    return np.random.default_rng(seed).dirichlet(np.ones(size), size=6)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_top_k_keeps_the_k_most_likely(k, float64):
    rows = random_rows(k)
    expected = [plain_top_k(row, k) for row in rows]
    np.testing.assert_allclose(processed(rows, top_k=k), expected, rtol=0, atol=1e-12)


def test_a_top_k_beyond_the_vocabulary_keeps_everything(float64):
    np.testing.assert_allclose(processed(top_k=99), PROBS, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, float64):
    rows = random_rows(17)
    expected = [plain_top_p(row, p) for row in rows]
    np.testing.assert_allclose(processed(rows, top_p=p), expected, rtol=0, atol=1e-12)


def test_top_p_stops_exactly_where_p_is_reached(float64):
    # 1/2 + 1/4 reaches 3/4 without rounding: the third token is not needed.
    rows = np.array([[0.125, 0.5, 0.125, 0.25]])
    np.testing.assert_array_equal(processed(rows, top_p=0.75) > 0, [[0, 1, 0, 1]])
    np.testing.assert_array_equal(processed(rows, top_p=0.76) > 0, [[1, 1, 1, 1]])


def test_temperature_comes_before_top_p(float64):
    # At temperature 1/2 the likely tokens hold more, so fewer reach 0.7.
    found = processed(temperature=0.5, top_p=0.7)
    sharp = PROBS**2 / (PROBS**2).sum(axis=1, keepdims=True)
    expected = [plain_top_p(row, 0.7) for row in sharp]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    late = np.array([plain_top_p(row, 0.7) for row in PROBS])
    assert ((found > 0).sum(axis=1) < (late > 0).sum(axis=1)).any()


def test_top_k_comes_before_top_p(float64):
    # Two tokens are left with shares 4/7 and 3/7; the first alone reaches 0.55, while
    # 0.4 of the whole would not.
    rows = np.array([[0.4, 0.3, 0.2, 0.1]])
    np.testing.assert_array_equal(
        processed(rows, top_k=2, top_p=0.55) > 0, [[1, 0, 0, 0]]
    )


def test_truncation_comes_after_mixing(float64):
    # Each set's own favourite differs from the mixture's.
    first = np.array([[0.5, 0.45, 0.05]])
    second = np.array([[0.05, 0.45, 0.5]])
    mixed = mixture.mix(two(first, second), {POLICY: 0.5, REFERENCE: 0.5})
    kept = mixture.process(mixed, Speaker({POLICY: 1.0}, top_k=1))
    np.testing.assert_array_equal(probabilities(kept) > 0, [[0, 1, 0]])
