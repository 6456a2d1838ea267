# SPDX-License-Identifier: Apache-2.0
"""A stack of equal layers: run one after the other, recomputed, or as one loop.

Parameters keep the names of separate layers, `layers_0`, `layers_1`, ...: a checkpoint
does not depend on how a pass is run.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def through_layers(
    block: Any,
    layer_class: type[nn.Module],
    x,
    shared: tuple,
    use_dropout: bool,
    own: tuple = (),
) -> jax.Array:
    """Returns x after all of a block's layers, as its memory settings say.

    With `scan_layers` the weights of all layers are stacked inside the compiled
    program, and a loop runs over them: one layer is compiled instead of many, for one
    more copy of the weights while the pass lasts.

    Args:
      block: a bound module with `settings`, `memory` and equal `layers`.
      layer_class: of the layers; (x, *own, *shared, use_dropout) -> x.
      x: activations that go in.
      shared: what every layer reads besides.
      use_dropout: whether the layers drop.
      own: arrays whose first axis is the layer; each layer reads its entry.
    """
    if block.is_initializing():
        for index, layer in enumerate(block.layers):
            x = layer(x, *(leaf[index] for leaf in own), *shared, use_dropout)
        return x
    # Unbound: its weights are handed to it.
    network = layer_class(block.settings, block.memory, parent=None)
    num_layers = len(block.layers)
    weights = [
        {kind: tree.get(f"layers_{i}", {}) for kind, tree in block.variables.items()}
        for i in range(num_layers)
    ]
    seed = block.make_rng("dropout") if use_dropout else jax.random.key(0)
    keys = jax.random.split(seed, num_layers)

    def one(x, given):
        variables, key, mine = given
        rngs = {"dropout": key} if use_dropout else None
        return network.apply(variables, x, *mine, *shared, use_dropout, rngs=rngs)

    memory = block.memory
    if memory.remat in REMAT_POLICIES:
        policy = REMAT_POLICIES[memory.remat]
        # A loop is no place for common subexpressions; elsewhere they would undo it.
        one = jax.checkpoint(one, policy=policy, prevent_cse=not memory.scan_layers)
    if memory.scan_layers:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
        through = (stacked, keys, own)
        return jax.lax.scan(lambda x, given: (one(x, given), None), x, through)[0]
    for i in range(num_layers):
        x = one(x, (weights[i], keys[i], tuple(leaf[i] for leaf in own)))
    return x
