# SPDX-License-Identifier: Apache-2.0
"""Several responses to a prompt, decoded beside each other, read its keys once.

The N rows of a prompt lie beside each other (row p N + n), and ask the same keys: to
an attention they are N queries of one row. P counts prompts, R = P N rows.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def as_queries(
    x_RHQK: Float[Array, "R ... Q K"], num_prompts: int
) -> Float[Array, "P ... NQ K"]:
    """Returns each prompt's rows as queries of one row.

    Args:
      x_RHQK: what rows ask, with any axes between row and query.
      num_prompts: P, divides R.
    """
    each = x_RHQK.shape[0] // num_prompts
    if each == 1:
        return x_RHQK
    x = jnp.moveaxis(x_RHQK.reshape(num_prompts, each, *x_RHQK.shape[1:]), 1, -3)
    return x.reshape(*x.shape[:-3], each * x.shape[-2], x.shape[-1])


def as_rows(
    x_PHQK: Float[Array, "P ... NQ K"], num_rows: int
) -> Float[Array, "R ... Q K"]:
    """Undoes `as_queries`; `num_rows` is R."""
    each = num_rows // x_PHQK.shape[0]
    if each == 1:
        return x_PHQK
    x = x_PHQK.reshape(*x_PHQK.shape[:-2], each, -1, x_PHQK.shape[-1])
    x = jnp.moveaxis(x, -3, 1)
    return x.reshape(num_rows, *x.shape[2:])
