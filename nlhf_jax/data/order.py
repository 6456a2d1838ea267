# SPDX-License-Identifier: Apache-2.0
"""Which examples a batch holds: a pure function of (seed, step), without an iterator.

Epoch e of a seed is a permutation drawn from (seed, e). The letter E counts examples.
"""

import functools

import numpy as np
from jaxtyping import Bool, Int

from nlhf_jax.checks import check_integer


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0]).permutation(num_examples)


@functools.lru_cache(maxsize=16)
def swaps(seed: int, epoch: int, num_examples: int) -> Bool[np.ndarray, "E"]:
    """Returns of which comparisons an epoch exchanges the two responses."""
    return np.random.default_rng([seed, epoch, 1]).random(num_examples) < 0.5


def example_order(
    seed: int, step: int, batch_size: int, num_examples: int
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]]:
    """Returns (epochs_B, indices_B) of the examples of a batch.

    Position p = step * batch_size + row lies in epoch p // num_examples and is entry
    p % num_examples of that epoch's permutation; every epoch reads every example once.

        num_examples 3, batch_size 2      step 0   step 1   step 2
        epochs                             0 0      0 1      1 1

    Raises:
      UserError: `seed` or `step` is negative or `batch_size` is less than 1.
    """
    check_integer("seed", seed)
    check_integer("step", step)
    check_integer("batch_size", batch_size, 1)
    positions_B = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs_B, entries_B = np.divmod(positions_B, num_examples)
    indices_B = np.empty_like(entries_B)
    for epoch in np.unique(epochs_B):
        here_B = epochs_B == epoch
        order_E = _permutation(seed, int(epoch), num_examples)
        indices_B[here_B] = order_E[entries_B[here_B]]
    return epochs_B, indices_B
