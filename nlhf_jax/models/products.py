# SPDX-License-Identifier: Apache-2.0
"""A product of activations with a kernel, whose gradient is laid out by us.

    y = x W,      dx = g W^T,      dW = x^T g

The transposition rule of a general product writes dW as (g^T x)^T. XLA then copies g
into transposed order on a CPU, together with all that g is computed from: a fifth of a
training step. Here dW is asked for in the order in which x and g lie.
"""

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


@jax.custom_vjp
def product(x: Float[Array, "... D"], kernel_DF: Float[Array, "D F"]) -> Array:
    """Returns x @ kernel, [..., F]."""
    return x @ kernel_DF


def _forward(x, kernel_DF):
    # Of what is not differentiated nothing is kept: x of a frozen kernel, say.
    kept = (
        x.value if kernel_DF.perturbed else None,
        kernel_DF.value if x.perturbed else None,
    )
    return x.value @ kernel_DF.value, kept


def _backward(kept, gradient):
    if isinstance(gradient, SymbolicZero):
        return None, None
    x, kernel_DF = kept
    last, rows = gradient.ndim - 1, tuple(range(gradient.ndim - 1))
    none = ((), ())
    dx = dkernel_DF = None
    if kernel_DF is not None:
        dx = jax.lax.dot_general(gradient, kernel_DF, (((last,), (1,)), none))
    if x is not None:
        dkernel_DF = jax.lax.dot_general(x, gradient, ((rows, rows), none))
    return dx, dkernel_DF


product.defvjp(_forward, _backward, symbolic_zeros=True)
