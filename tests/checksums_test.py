# SPDX-License-Identifier: Apache-2.0
"""One number per array that sees any flipped bit; and whether all is finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import checksums

FLOATS = ("float32", "bfloat16", "float16")
SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksum_sees_any_one_flipped_bit(dtype):
    random = np.random.default_rng(0)
    array = random.integers(0, 2, size=(3, 5)).astype(dtype)
    before = int(checksums.checksum(jnp.asarray(array)))
    raw = np.frombuffer(array.tobytes(), np.uint8)
    # A bool has one bit that counts.
    bits = range(0, 8 * raw.size, 8) if dtype == "bool" else range(8 * raw.size)
    for bit in bits:
        flipped = raw.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        other = np.frombuffer(flipped.tobytes(), array.dtype).reshape(array.shape)
        assert int(checksums.checksum(jnp.asarray(other))) != before


def test_checksum_by_hand():
    words = np.asarray([[3, 5, 2**31], [7, 11, 13]], np.uint32)
    expected = sum(int(w) * (2 * i + 1) for i, w in enumerate(words.ravel())) % 2**32
    assert int(checksums.checksum(jnp.asarray(words))) == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "bool"])
def test_checksum_is_that_of_the_words_in_their_order(dtype, shape):
    random = np.random.default_rng(1)
    array = np.asarray(random.integers(0, 9, size=shape)).astype(jnp.dtype(dtype))
    raw = np.ascontiguousarray(array).reshape(-1)
    words = raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[raw.itemsize])
    expected = sum(int(w) * (2 * i + 1) for i, w in enumerate(words)) % 2**32
    (found,) = checksums.begin_checksums([jnp.asarray(array)])()
    assert int(found) == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_number_that_is_not_finite_is_seen_wherever_it_is(dtype, shape):
    largest = np.full(shape, jnp.finfo(dtype).max).astype(jnp.dtype(dtype))
    assert checksums.finite([jnp.asarray(largest), jnp.asarray(-largest)]) == [1, 1]
    for place in np.ndindex(shape):
        for value in (np.nan, np.inf, -np.inf):
            broken = largest.copy()
            broken[place] = value
            assert checksums.finite([jnp.asarray(broken), jnp.asarray(3)]) == [0, 1]


def test_checksums_are_those_of_the_arrays_before_they_were_donated():
    array = jnp.arange(100_000, dtype=jnp.float32).reshape(100, 1000)
    expected = int(checksums.checksum(array))
    read = checksums.begin_checksums({"w": array})
    jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert [int(found) for found in read()] == [expected]


# XLA's maximum of 4,096 numbers and more drops NaN on a CPU.
LARGE = ((4095,), (4096,), (64, 64), (3, 5000), (300, 7), (2, 64, 64))


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_of_many_is_seen(shape, dtype, bad):
    random = np.random.default_rng(0)
    for place in (0, -1, int(random.integers(np.prod(shape)))):
        array = np.ones(shape, np.float32)
        array.reshape(-1)[place] = bad
        assert checksums.finite([jnp.asarray(array, dtype)]) == [False]
    assert checksums.finite([jnp.full(shape, bad, dtype)]) == [False]


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(shape, dtype):
    most = jnp.finfo(dtype).max
    assert checksums.finite([jnp.full(shape, most, dtype)]) == [True]
    assert checksums.finite([jnp.full(shape, -most, dtype)]) == [True]
