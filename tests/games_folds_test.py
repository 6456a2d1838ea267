# SPDX-License-Identifier: Apache-2.0
"""Vectors folded in halves: the same numbers as numpy's, at every length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.games import folds, methods

LENGTHS = [1, 2, 31, 32, 33, 34, 63, 64, 65, 99, 100, 127, 129, 1000, 1023, 1024, 1025]


@pytest.fixture(autouse=True)
def precise(float64):
    """Mathematics that is exact."""


def vector(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([length, seed]).normal(size=length)


@pytest.mark.parametrize("length", LENGTHS)
def test_sum_and_maximum_at_every_length(length):
    values_N = vector(length)
    np.testing.assert_allclose(
        folds.total(jnp.asarray(values_N)), values_N.sum(), atol=1e-12
    )
    assert folds.largest(jnp.asarray(values_N)) == values_N.max()


@pytest.mark.parametrize("length", [33, 63, 100, 127])
def test_every_place_counts_once(length):
    # A one in each place in turn: the sum sees it once, the maximum sees it.
    ones_NN = jnp.eye(length)
    np.testing.assert_array_equal(jax.vmap(folds.total)(ones_NN), np.ones(length))
    np.testing.assert_array_equal(jax.vmap(folds.largest)(ones_NN), np.ones(length))
    np.testing.assert_array_equal(jax.vmap(folds.largest)(-ones_NN), np.zeros(length))


@pytest.mark.parametrize("length", [5, 100, 129])
def test_the_gradient_of_the_sum_is_one_everywhere(length):
    found_N = jax.grad(folds.total)(jnp.asarray(vector(length)))
    np.testing.assert_array_equal(found_N, np.ones(length))


@pytest.mark.parametrize("length", [3, 32, 33, 100, 257, 1025])
@pytest.mark.parametrize("spread", [1.0, 500.0])
def test_a_payoff_is_the_product_with_the_softmax(length, spread):
    logits_N = spread * vector(length, 1)
    entry_NN = np.random.default_rng(length).random((length, length))
    matrix_NN = 0.5 + (entry_NN - entry_NN.T) / 2
    share_N = np.exp(logits_N - logits_N.max())
    game = methods.Game(jnp.asarray(matrix_NN), jnp.ones(length) / length, 0.1)
    found_N = methods.payoff(game, jnp.asarray(logits_N))
    np.testing.assert_allclose(
        found_N, matrix_NN @ (share_N / share_N.sum()), atol=1e-12
    )


def test_a_payoff_is_differentiable_through_the_fold():
    length = 100
    logits_N = jnp.asarray(vector(length, 2))
    matrix_NN = jnp.asarray(np.random.default_rng(0).random((length, length)))
    game = methods.Game(matrix_NN, jnp.ones(length) / length, 0.1)

    def plain(logits_N):
        return game.preference_NN @ jax.nn.softmax(logits_N)

    found_NN = jax.jacobian(lambda x_N: methods.payoff(game, x_N))(logits_N)
    np.testing.assert_allclose(found_NN, jax.jacobian(plain)(logits_N), atol=1e-12)


@pytest.mark.parametrize("length", [100, 1000])
def test_nothing_long_is_reduced_where_it_is_folded(length):
    # What XLA would cut into windows: a reduction of more than FEW entries.
    lowered = jax.jit(folds.total).lower(jnp.ones(length))
    assert "reduce-window" not in lowered.compile().as_text()
    plain = jax.jit(jnp.sum).lower(jnp.ones(length))
    assert "reduce-window" in plain.compile().as_text()
