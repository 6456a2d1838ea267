# SPDX-License-Identifier: Apache-2.0
"""The product with a kernel: its gradient by hand, what is kept, and no transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.models.products import product


def plain(x, kernel_DF):
    return x @ kernel_DF


def made(rows=(3, 5), width=4, features=6, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = ((*rows, width), (width, features), (*rows, features))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def gradients(fn, x, kernel_DF, weights, wanted=(0, 1)):
    def loss(x, kernel_DF):
        return (jnp.sin(fn(x, kernel_DF)) * weights).sum()

    return jax.grad(loss, wanted)(x, kernel_DF)


@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_value_and_gradient_are_those_of_the_plain_product(rows, wanted, float64):
    x, kernel_DF, weights = made(rows)
    np.testing.assert_array_equal(product(x, kernel_DF), x @ kernel_DF)
    found = gradients(product, x, kernel_DF, weights, wanted)
    for ours, theirs in zip(
        found, gradients(plain, x, kernel_DF, weights, wanted), strict=True
    ):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13)


def test_the_gradient_by_finite_differences(float64):
    x, kernel_DF, weights = made((3,))
    step, (_, found) = 1e-6, gradients(product, x, kernel_DF, weights)
    for place in ((0, 0), (3, 5)):
        moved = [kernel_DF.at[place].add(sign * step) for sign in (1, -1)]
        up, down = ((jnp.sin(x @ k) * weights).sum() for k in moved)
        slope = float(up - down) / (2 * step)
        assert float(found[place]) == pytest.approx(slope, abs=1e-8)


def test_no_gradient_is_written_transposed():
    x, kernel_DF, weights = made(dtype=np.float32)

    def said(fn):
        return str(jax.make_jaxpr(lambda *a: gradients(fn, *a))(x, kernel_DF, weights))

    assert "transpose[" in said(plain)  # or there is nothing to avoid
    assert "transpose[" not in said(product)


@pytest.mark.parametrize("which, kept", [(0, (4, 6)), (1, (3, 5, 4))])
def test_what_is_not_differentiated_leaves_nothing_behind(which, kept):
    given = made(dtype=np.float32)[:2]

    def of_one(part):
        return product(*(part if i == which else g for i, g in enumerate(given)))

    _, back = jax.vjp(of_one, given[which])
    shapes = [leaf.shape for leaf in jax.tree.leaves(back) if leaf.ndim]
    assert shapes == [kept]


@pytest.mark.parametrize("inside", ["scan", "checkpoint", "jit"])
def test_it_may_stand_inside_other_transformations(inside, float64):
    x, kernel_DF, weights = made((3,), 4, 4)

    def thrice(fn):
        def one(x, _):
            return jnp.tanh(fn(x, kernel)), None

        def loss(k):
            nonlocal kernel
            kernel = k
            if inside == "scan":
                return (jax.lax.scan(one, x, length=3)[0] * weights).sum()
            step = {"checkpoint": jax.checkpoint, "jit": jax.jit}[inside]
            made = x
            for _ in range(3):
                made = step(lambda x: one(x, None)[0])(made)
            return (made * weights).sum()

        kernel = None
        return jax.grad(loss)(kernel_DF)

    np.testing.assert_allclose(thrice(product), thrice(plain), rtol=1e-12)


def test_a_gradient_of_zero_goes_no_further():
    x, kernel_DF, _ = made(dtype=np.float32)
    found = jax.grad(lambda x: jax.lax.stop_gradient(product(x, kernel_DF)).sum())(x)
    np.testing.assert_array_equal(found, np.zeros_like(x))
