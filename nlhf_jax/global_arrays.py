# SPDX-License-Identifier: Apache-2.0
"""Arrays that several processes hold together: put there, made of rows, fetched.

A process can only touch the parts on its own devices. It puts those of a value that it
has in its own memory, and fetches by asking for a whole copy first. With one process
the functions are the plain ones.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Int, PyTree


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns the tree with every array where its sharding says.

    Args:
      tree: numpy arrays, or arrays of this process that are the same in every other
        one; an array that lies where it should is returned as it is.
      shardings: a tree of the same structure.
    """
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    there = getattr(leaf, "sharding", None)
    if there is not None and there.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if there is not None and not leaf.is_fully_addressable:
        return jax.jit(_same, out_shardings=sharding)(leaf)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def _same(leaf):
    return leaf


def fetch(tree: PyTree) -> PyTree:
    """Returns the tree as numpy arrays, whole in every process.

    Every process must call it, in the same order: what another one holds is sent.
    """
    return jax.device_get(jax.tree.map(_whole, tree))


def _whole(leaf: Any) -> Any:
    is_remote = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if not is_remote or leaf.is_fully_replicated:
        return leaf
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax.jit(_same, out_shardings=everywhere)(leaf)


def rows_here(sharding: Sharding, num_rows: int) -> Int[np.ndarray, "R"]:
    """Returns which rows of an array of `num_rows` lie on this process's devices.

        8 rows over 4 devices, 2 processes      process 0: 0 1 2 3   process 1: 4 5 6 7

    Rows that two processes hold, as where `tensor` goes across them, are in both.
    """
    parts = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[part] for part in parts]))


def from_rows(
    batch: PyTree, rows: Int[np.ndarray, "R"], num_rows: int, sharding: Sharding
) -> PyTree:
    """Returns the whole batch, of which this process gives its own rows.

    Args:
      batch: numpy arrays of R rows, those that `rows` counts.
      rows: see `rows_here`.
      num_rows: rows of the whole batch.
      sharding: splits the rows.
    """

    def one(leaf: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(num_rows)
            return leaf[np.searchsorted(rows, np.arange(start, stop))]

        shape = (num_rows, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, batch)
