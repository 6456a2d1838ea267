# SPDX-License-Identifier: Apache-2.0
"""The compiled part of what notices numbers that are not finite, and of skipping them.

A step measures every tensor that it makes by one number, the largest absolute value in
it, or NaN where one of its numbers is none. All of them go to the host as one vector
with the metrics, so a step costs two more passes over gradients and state and sends
nothing else. N counts these tensors.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from nlhf_jax.types import POLICY, TrainState

# Stands among the metrics of a step, and is taken out before they are written.
LARGEST = "guard/largest"
SKIPPED = "optimizer/skipped_steps"


# Times any float32 and added up over any tensor, it stays below the largest float32.
SMALL = 2.0**-40


def all_finite(array: Array) -> Bool[Array, ""]:
    """Returns whether no number of an array is NaN or infinite.

    A maximum cannot tell: XLA's of many numbers on a CPU drops NaN. A product with
    small constants keeps NaN and infinity, and takes a quarter of the time that asking
    each number does.
    """
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return jnp.asarray(True)
    if array.dtype == jnp.float16:  # SMALL is 0 in it
        array = array.astype(jnp.float32)
    if array.ndim == 0:
        return jnp.isfinite(array)
    small_D = jnp.full(array.shape[-1], SMALL, array.dtype)
    # Exact on a TPU too, where a float32 may otherwise round to infinity.
    product = jnp.matmul(array, small_D, precision=jax.lax.Precision.HIGHEST)
    return jnp.isfinite(product).all()


def largest(tree: PyTree) -> Float[Array, "N"]:
    """Returns max |x| of every array of real numbers in a tree, in the tree's order.

    NaN where one of an array's numbers is NaN; NaN or infinity where one is infinite.
    """
    found = [_largest(leaf) for leaf in jax.tree.leaves(_real(tree))]
    return jnp.stack(found) if found else jnp.zeros(0, jnp.float32)


def _largest(leaf: Array) -> Float[Array, ""]:
    most = jnp.abs(leaf).max(initial=0).astype(jnp.float32)
    return jnp.where(all_finite(leaf) | jnp.isinf(most), most, jnp.nan)


def _real(tree: PyTree) -> PyTree:
    """Returns the tree with None in place of what is never NaN: counts and keys."""
    return jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, tree
    )


def tensor_names(state: TrainState) -> list[str]:
    """Returns the names of the N tensors that a step from a state like this measures.

    First the gradients of every set that is trained, then the parameters it makes,
    then the optimisers' states: what a tensor is computed from stands before it.
    """
    gradients = {name: state.param_sets[name] for name in sorted(state.opt_states)}
    return [
        *_names("gradient of", gradients),
        *_names("parameter", state.param_sets),
        *_names("optimizer state", state.opt_states),
    ]


def _names(kind: str, sets: Mapping[str, PyTree]) -> list[str]:
    found = []
    for name in sorted(sets):
        leaves, _ = jax.tree_util.tree_flatten_with_path(_real(sets[name]))
        whose = "" if name == POLICY else f" of the set {name}"
        for path, _ in leaves:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            found.append(f"{kind} {where}{whose}")
    return found


def finish(
    before: TrainState,
    after: TrainState,
    metrics: Mapping[str, Array],
    gradients: Mapping[str, Float[Array, "G"]],
    *,
    skip: bool,
) -> tuple[TrainState, dict[str, Array]]:
    """Returns what a step returns, every tensor measured and a bad step taken back.

    Args:
      before: the state that the step was given.
      after: the state that it made.
      metrics: of the step.
      gradients: trained set -> `largest` of its gradient.
      skip: where a loss, the gradient's norm or a tensor is not finite, the state
        stays `before`, save that `step` moves on, and SKIPPED is 1. It needs memory
        for both states at once.

    Returns:
      The state, and the metrics with LARGEST in them.
    """
    sizes_N = jnp.concatenate(
        [gradients[name] for name in sorted(gradients)]
        + [largest(sets) for sets in (after.param_sets, after.opt_states)]
    )
    metrics = dict(metrics) | {LARGEST: sizes_N}
    if not skip:
        return after, metrics
    is_fine = is_finite(metrics)
    kept = jax.tree.map(lambda new, old: jnp.where(is_fine, new, old), after, before)
    metrics[SKIPPED] = 1.0 - is_fine.astype(jnp.float32)
    return kept._replace(step=after.step), metrics


def is_watched(name: str) -> bool:
    """Whether a metric of this name must be finite: losses and the gradient's norm."""
    return name.startswith("loss/") or name == "optimizer/gradient_norm"


def is_finite(metrics: Mapping[str, Array]) -> Bool[Array, ""]:
    """Whether all watched metrics and all tensors of a step are finite."""
    watched = [v for k, v in metrics.items() if is_watched(k)]
    return jnp.isfinite(jnp.stack([*watched, metrics[LARGEST].max()])).all()


def worst(*sizes: Float[Array, "G"]) -> Float[Array, "G"]:
    """Returns the larger of several measures of the same tensors, NaN before all."""
    return jnp.stack(sizes).max(axis=0)
