# SPDX-License-Identifier: Apache-2.0
"""The product of a large game's matrix, in blocks of rows: the numbers of numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.games import products


@pytest.fixture(autouse=True)
def precise(float64):
    """Mathematics that is exact."""


def problem(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng([rows, columns])
    matrix_NM = rng.normal(size=(rows, columns))
    return jnp.asarray(matrix_NM), jnp.asarray(rng.normal(size=columns))


# Below and above FEW_ROWS; rows that 8, 4, 2 and none of them divide; not square.
@pytest.mark.parametrize(
    ("rows", "columns"),
    [*((n, n) for n in (1, 3, 511, 512, 514, 515, 516)), (1000, 7), (7, 1000)],
)
def test_product_is_numpys(rows, columns):
    matrix_NM, vector_M = problem(rows, columns)
    found_N = jax.jit(products.product)(matrix_NM, vector_M)
    np.testing.assert_allclose(found_N, matrix_NM @ vector_M, atol=1e-12)


def test_games_side_by_side():
    matrix_NM, vector_M = problem(512, 512)
    both = jnp.stack([matrix_NM, -2 * matrix_NM])
    found_BN = jax.vmap(products.product, in_axes=(0, None))(both, vector_M)
    wanted_N = matrix_NM @ vector_M
    np.testing.assert_allclose(found_BN[0], wanted_N, atol=1e-12)
    np.testing.assert_allclose(found_BN[1], -2 * wanted_N, atol=1e-12)


def test_gradient_is_the_transposes_product():
    matrix_NM, vector_M = problem(512, 512)
    weight_N = np.arange(512.0)
    found_M = jax.grad(lambda v: products.product(matrix_NM, v) @ weight_N)(vector_M)
    np.testing.assert_allclose(found_M, weight_N @ matrix_NM, rtol=1e-11)


@pytest.mark.parametrize(("rows", "blocks"), [(1000, 8), (516, 4), (514, 2)])
def test_a_large_product_is_a_batch(rows, blocks):
    matrix_NM, vector_M = problem(rows, rows)
    text = jax.jit(products.product).lower(matrix_NM, vector_M).as_text()
    assert f"{blocks}x{rows // blocks}x{rows}" in text


@pytest.mark.parametrize("rows", [100, 511, 515])
def test_a_small_or_odd_one_is_one_product(rows):
    matrix_NM, vector_M = problem(rows, rows)
    text = jax.jit(products.product).lower(matrix_NM, vector_M).as_text()
    assert "batching_dims" not in text
