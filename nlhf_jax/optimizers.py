# SPDX-License-Identifier: Apache-2.0
"""Optimisers, learning-rate schedules, and gradients summed over microbatches.

M is the number of microbatches; `sums` are totals over examples or tokens, which the
caller divides by a total weight, so that a mean does not depend on M.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from nlhf_jax.checks import UserError
from nlhf_jax.settings import OptimizerSettings
from nlhf_jax.types import Params, Schedule

ADAM_DECAYS = (0.9, 0.999)
# Optimiser -> what its state averages of the gradients: trees like the parameters'.
SLOTS = {"adafactor": ("v_row", "v_col", "v"), "adamw": ("mu", "nu")}
SMALLEST_FACTORED = 128  # sides of the matrices that Adafactor factors


def learning_rate_schedule(settings: OptimizerSettings, train_steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates done.

    With s updates done, w warm-up steps and N = `train_steps`, the rate is
    peak * min(1, s / w) * decay(s), where u = clip((s - w) / (N - w), 0, 1) and decay
    is 1 (constant), 1 - u (linear), (1 + cos(pi u)) / 2 (cosine) or
    sqrt(w' / max(s, w')) with w' = max(w, 1) (rsqrt). Without warm-up the first factor
    is one. The last update is made at s = N - 1, one step before zero is reached.
    """
    warmup = settings.warmup_steps
    decay_steps = max(train_steps - warmup, 1)

    def decay(step: Array) -> Array:
        if settings.schedule == "constant":
            return jnp.ones_like(step)
        if settings.schedule == "rsqrt":
            floor = float(max(warmup, 1))
            return jnp.sqrt(floor / jnp.maximum(step, floor))
        done = jnp.clip((step - warmup) / decay_steps, 0.0, 1.0)
        if settings.schedule == "linear":
            return 1.0 - done
        return 0.5 * (1.0 + jnp.cos(math.pi * done))

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step).astype(jnp.result_type(float))
        rise = jnp.minimum(1.0, step / warmup) if warmup else jnp.ones_like(step)
        return settings.learning_rate * rise * decay(step)

    return schedule


def make_optimizer(
    settings: OptimizerSettings, train_steps: int
) -> optax.GradientTransformation:
    """Returns the optimiser: clip, precondition, decay weights, scale by the rate.

    One update is p <- p - rate(s) * (direction(clipped gradient) + weight_decay * p).
    The direction of AdamW has decays 0.9 and 0.999. That of Adafactor is the gradient
    over its factored root mean square (second-moment decay 1 - t^-0.8, arrays with two
    sides of at least 128 factored), clipped to root mean square one, and by default
    times max(rms(p), 1e-3), which is T5X's default: a rate of 1e-3 moves every
    array by about a thousandth of its size, whatever the model's width. It is what T5
    checkpoints of every size were trained with. Set
    `multiply_by_parameter_scale=False` for absolute steps.

    Unlike optax's own Adafactor, weight decay is multiplied by the rate, as in AdamW.

    Source: Shazeer and Stern (2018, arXiv 1804.04235); Loshchilov and Hutter (2019,
    arXiv 1711.05101).
    """
    parts = []
    if settings.clip_norm:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    if settings.name == "adamw":
        parts.append(optax.scale_by_adam(*ADAM_DECAYS))
    else:
        parts.append(
            optax.scale_by_factored_rms(min_dim_size_to_factor=SMALLEST_FACTORED)
        )
        parts.append(optax.clip_by_block_rms(1.0))
        if settings.multiply_by_parameter_scale:
            parts.append(optax.scale_by_param_block_rms())
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay))
    schedule = learning_rate_schedule(settings, train_steps)
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def is_factored(shape: tuple[int, ...]) -> bool:
    """Returns whether Adafactor keeps two means of a matrix, and not all of it."""
    return len(shape) == 2 and min(shape) >= SMALLEST_FACTORED


def row_axis(shape: tuple[int, ...]) -> int:
    """Returns which axis of a factored matrix `v_row` has: the shorter, or the first.

    `v_row` is the mean over the other axis, and `v_col` the mean over this one.
    """
    return 0 if shape[0] <= shape[1] else 1


def slots_of(opt_state: PyTree) -> tuple[str, PyTree]:
    """Returns an optimiser's name, and the part of its state that has slots.

    Args:
      opt_state: of a chain as `make_optimizer` makes it, or its shapes.
    """
    for part in opt_state:
        for name, slots in SLOTS.items():
            if set(slots) <= set(getattr(part, "_fields", ())):
                return name, part
    raise ValueError(f"no part of {type(opt_state).__name__} has slots")


def with_slots(
    opt_state: PyTree, count: jax.Array, slots: Mapping[str, PyTree]
) -> PyTree:
    """Returns a state that goes on from other averages; the rate's schedule begins.

    Args:
      opt_state: as it is before the first update.
      count: updates that made the averages: an optimiser's decay and its correction of
        the first averages follow it.
      slots: a tree for each slot of `slots_of`.
    """
    _, mine = slots_of(opt_state)
    new = mine._replace(count=count, **slots)
    return tuple(new if part is mine else part for part in opt_state)


def split_microbatches(batch: PyTree, num_microbatches: int) -> PyTree:
    """Returns the batch with a new leading axis M; part m has the rows m, m + M, ...

    Rows are dealt out in turn and not in blocks, so that a batch sharded over devices
    by rows stays where it is: every device holds rows of every part.

    Raises:
      UserError: M does not divide the number of rows.
    """

    def split(array: Array) -> Array:
        rows = array.shape[0]
        if rows % num_microbatches:
            raise UserError(
                f"num_microbatches must divide the batch size {rows}, "
                f"got {num_microbatches}"
            )
        dealt = array.reshape(
            (rows // num_microbatches, num_microbatches, *array.shape[1:])
        )
        return jnp.swapaxes(dealt, 0, 1)

    return jax.tree.map(split, batch)


def accumulate_gradients(
    summed_loss: Callable[..., tuple[Float[Array, ""], Any]],
    params: Params,
    batch: PyTree,
    key: jax.Array,
    *,
    num_microbatches: int = 1,
) -> tuple[Params, Any]:
    """Returns the gradient of a summed loss and its sums, one part at a time.

    Args:
      summed_loss: (params, part of the batch, key) -> (loss summed over the part's
        examples or tokens, tree of further sums).
      params: differentiated with respect to.
      batch: a tree of arrays whose first axis is the row.
      key: part m gets `fold_in(key, m)`.
      num_microbatches: M >= 1; memory for activations shrinks by it.

    Returns:
      The gradient of the loss over the whole batch, and the sums over the whole batch.
    """
    gradient_fn = jax.grad(summed_loss, has_aux=True)
    if num_microbatches == 1:
        return gradient_fn(params, batch, jax.random.fold_in(key, 0))
    parts = split_microbatches(batch, num_microbatches)

    def one_part(totals: Any, item: tuple[Array, PyTree]) -> tuple[Any, None]:
        index, part = item
        new = gradient_fn(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, totals, new), None

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(gradient_fn, params, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    totals, _ = jax.lax.scan(one_part, zeros, (jnp.arange(num_microbatches), parts))
    return totals
