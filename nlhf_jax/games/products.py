# SPDX-License-Identifier: Apache-2.0
"""A game's matrix times a policy, in blocks of rows.

XLA computes one matrix-vector product on one core of a CPU, and a batch of them on all.
Cut into blocks of rows a large game is such a batch; each entry of the result is the
same sum as before. Numbers are in benchmarks/README.md.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

FEW_ROWS = 512  # below it handing out the blocks costs more than they save
BLOCKS = (8, 4, 2)


def product(
    matrix_NM: Float[Array, "N M"], vector_M: Float[Array, "M"]
) -> Float[Array, "N"]:
    """Returns the matrix times the vector, sum over j of matrix[i, j] vector[j]."""
    rows, columns = matrix_NM.shape
    blocks = next((count for count in BLOCKS if rows % count == 0), 1)
    if rows < FEW_ROWS or blocks == 1:
        return matrix_NM @ vector_M
    # The vector is repeated so that XLA sees a batch: without, it joins the rows again.
    parts_KRM = matrix_NM.reshape(blocks, rows // blocks, columns)
    vectors_KM = jnp.broadcast_to(vector_M, (blocks, columns))
    return jnp.einsum("krm,km->kr", parts_KRM, vectors_KM).reshape(rows)
