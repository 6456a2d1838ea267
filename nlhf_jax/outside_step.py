# SPDX-License-Identifier: Apache-2.0
"""One step in two halves, with a judge on the host in between: draw, then learn.

With one part they are `train_step` cut at its judge: the same random numbers, the same
responses, the same update. With more, each part of the batch has random numbers of its
own. All parts are drawn from the state before the update: every response is on-policy.
The letter M counts parts, P the rows of one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nlhf_jax import guards
from nlhf_jax.loss_gradient import Metrics
from nlhf_jax.optimizers import split_microbatches
from nlhf_jax.train_step import measured, rollout, update
from nlhf_jax.types import (
    Algorithm,
    Feedback,
    LanguageModel,
    ParamSets,
    PromptBatch,
    Rollout,
    Samples,
    Schedule,
    TrainState,
)


class JudgedPrompts(NamedTuple):
    """A batch for a judge of texts.

    Attributes:
      prompts: tokenised.
      rows_B: which of the data's examples they are.
    """

    prompts: PromptBatch
    rows_B: Int[Array, "B"]


Drawn = tuple[tuple[Samples, ...], Int[Array, ""]]


def draw(
    model: LanguageModel,
    algorithm: Algorithm,
    state: TrainState,
    frozen: ParamSets,
    prompts: PromptBatch,
    key: jax.Array,
    part: Int[Array, ""],
    *,
    num_parts: int,
    max_length: int,
) -> Drawn:
    """Draws the responses to one part of a batch; one program serves all parts.

    Args:
      model: the language model shared by all parameter sets.
      algorithm: whose speakers answer.
      state: before the step.
      frozen: parameter sets that are not trained.
      prompts: of the whole batch, [B, S].
      key: the run's; the step is folded in, and with several parts the part.
      part: m, from 0; it has the rows m, m + M, ...
      num_parts: M, which divides B.
      max_length: longest response in tokens.

    Returns:
      One `Samples` per speaker, and the decode steps taken.
    """
    parts = split_microbatches(prompts, num_parts)
    mine = jax.tree.map(lambda leaf: leaf[part], parts)
    # As `train_step` derives it for an algorithm of one part.
    (key,) = jax.random.split(jax.random.fold_in(key, state.step), 1)
    key = key if num_parts == 1 else jax.random.fold_in(key, part)
    drawn = rollout(
        model,
        algorithm,
        dict(frozen) | state.param_sets,
        mine,
        key,
        state.step,
        max_length=max_length,
    )
    return drawn.samples, drawn.num_steps


def joined(parts: Sequence[Array]) -> Array:
    """Returns the rows of M parts in the batch's order: undoes `split_microbatches`."""
    stacked = jnp.stack(parts, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def learn(
    model: LanguageModel,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: ParamSets,
    prompts: PromptBatch,
    samples: Sequence[tuple[Samples, ...]],
    num_steps: Sequence[Int[Array, ""]],
    preferences: Sequence[tuple[Float[Array, "P"], ...]],
    *,
    num_microbatches: int = 1,
    num_updates_per_rollout: int = 1,
    learning_rate: Schedule | None = None,
    skip_not_finite: bool = False,
) -> tuple[TrainState, Metrics]:
    """Updates on the responses of all parts, once they have been judged.

    Args:
      model, algorithm, optimizer, state, frozen, prompts: as `train_step`'s.
      samples: of each part, one per speaker.
      num_steps: of each part's decode; the metric is their mean.
      preferences: of each part, P(first > second) of each comparison, in [0, 1].
      num_microbatches, num_updates_per_rollout, skip_not_finite: as `train_step`'s.
      learning_rate: schedule of the updates done, for its metric.

    Returns:
      The state after the step, and its metrics.
    """
    rate_at = state.step * num_updates_per_rollout
    drawn = jax.tree.map(lambda *leaves: joined(leaves), *samples)
    answers = jax.tree.map(lambda *leaves: joined(leaves), *preferences)
    examples = (prompts, *algorithm.select(drawn, Feedback(answers, ())))
    after, metrics = update(
        model,
        algorithm,
        optimizer,
        state,
        dict(frozen) | state.param_sets,
        examples,
        num_microbatches=num_microbatches,
        num_updates=num_updates_per_rollout,
    )
    gradients = {algorithm.trains: metrics.pop(guards.LARGEST)}
    mean_steps = jnp.stack(num_steps).astype(jnp.float32).mean()
    metrics |= measured(model, Rollout(drawn, mean_steps), examples[-1])
    sets = algorithm.update_sets(after.param_sets, state.step + 1, metrics)
    after = TrainState(state.step + 1, dict(sets), after.opt_states)
    after, metrics = guards.finish(
        state, after, metrics, gradients, skip=skip_not_finite
    )
    if learning_rate is None:
        return after, metrics
    rate = jnp.asarray(learning_rate(rate_at), jnp.float32)
    return after, metrics | {"optimizer/learning_rate": rate}
