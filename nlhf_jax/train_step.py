# SPDX-License-Identifier: Apache-2.0
"""One step of any algorithm: rollout, score, update. No algorithm is named here.

Its gradients are samples of docs/math.md (26) to (29).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from nlhf_jax import collapse, guards
from nlhf_jax.decoding import sample
from nlhf_jax.loss_gradient import Examples, Metrics, gradient
from nlhf_jax.sequences import has_eos
from nlhf_jax.types import (
    POLICY,
    Algorithm,
    Feedback,
    Judge,
    LanguageModel,
    Params,
    ParamSets,
    PromptBatch,
    Responses,
    Rollout,
    Samples,
    Schedule,
    TrainState,
)

TrainStepFn = Callable[
    [TrainState, ParamSets, PromptBatch, jax.Array], tuple[TrainState, Metrics]
]


def init_state(
    params: Params, algorithm: Algorithm, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step; derived sets start at the policy."""
    copies = {name: jax.tree.map(jnp.copy, params) for name in algorithm.derived_sets}
    trained = dict.fromkeys([POLICY, *(one.trains for one in algorithm.followers)])
    return TrainState(
        jnp.zeros((), jnp.int32),
        {POLICY: params} | copies,
        {name: optimizer.init(params) for name in trained},
    )


def rollout(
    model: LanguageModel,
    algorithm: Algorithm,
    param_sets: ParamSets,
    prompts: PromptBatch,
    key: jax.Array,
    step: jax.Array,
    *,
    max_length: int,
) -> Rollout:
    """Draws one response per speaker of the algorithm, without gradient."""
    drawn = sample(
        model,
        param_sets,
        algorithm.speakers,
        prompts,
        key,
        step,
        max_length=max_length,
    )
    return jax.lax.stop_gradient(drawn)


def score(
    algorithm: Algorithm,
    judge: Judge,
    frozen: ParamSets,
    prompts: PromptBatch,
    responses: tuple[Responses, ...],
) -> Feedback:
    """Asks the judge all of the algorithm's comparisons and ratings, in float32."""
    preferences = tuple(
        judge.preference(frozen, prompts, responses[i], responses[j])
        for i, j in algorithm.comparisons
    )
    rewards = tuple(
        judge.reward(frozen, prompts, responses[i]) for i in algorithm.ratings
    )
    return jax.lax.stop_gradient(Feedback(preferences, rewards))


def judged(
    algorithm: Algorithm,
    judge: Judge,
    frozen: ParamSets,
    prompts: PromptBatch,
    samples: tuple[Samples, ...],
) -> Examples:
    """Returns what an update learns from: samples and answers, as far as selected."""
    responses = tuple(one.responses for one in samples)
    feedback = score(algorithm, judge, frozen, prompts, responses)
    return (prompts, *algorithm.select(samples, feedback))


def update(
    model: LanguageModel,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    constants: ParamSets,
    examples: Examples,
    *,
    num_microbatches: int = 1,
    num_updates: int = 1,
) -> tuple[TrainState, Metrics]:
    """Takes optimiser steps on judged responses; `step` and derived sets stay.

    Every one of the `num_updates` sees the whole batch; the metrics are their means,
    except that `guards.LARGEST` measures the largest of their gradients.
    """

    def one(learned, _):
        params, opt_state = learned
        grads, metrics = gradient(
            model,
            algorithm,
            params,
            constants,
            examples,
            num_microbatches=num_microbatches,
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics["optimizer/gradient_norm"] = optax.tree.norm(grads)
        learned = optax.apply_updates(params, updates), opt_state
        return learned, (metrics, guards.largest(grads))

    name = algorithm.trains
    (params, opt_state), (metrics, sizes) = jax.lax.scan(
        one, (state.param_sets[name], state.opt_states[name]), length=num_updates
    )
    learned = TrainState(
        state.step,
        state.param_sets | {name: params},
        state.opt_states | {name: opt_state},
    )
    metrics = jax.tree.map(lambda values: values.mean(axis=0), metrics)
    return learned, metrics | {guards.LARGEST: sizes.max(axis=0)}


def measured(model: LanguageModel, drawn: Rollout, feedback: Feedback) -> Metrics:
    """Returns the metrics of the responses themselves, and of what was said of them."""
    ended_B = has_eos(*drawn.samples[0].responses, model.eos_id)
    drawn_tokens = sum(one.responses.mask_BT.sum() for one in drawn.samples)
    return collapse.shares(drawn.samples, feedback) | {
        "response/eos_rate": ended_B.astype(jnp.float32).mean(),
        "decode/steps": drawn.num_steps.astype(jnp.float32),
        "token/count": drawn_tokens.astype(jnp.float32),
    }


def train_step(
    model: LanguageModel,
    algorithm: Algorithm,
    judge: Judge,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: ParamSets,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    max_length: int,
    num_microbatches: int = 1,
    num_updates_per_rollout: int = 1,
    skip_not_finite: bool = False,
) -> tuple[TrainState, Metrics]:
    """Rollout, score and update as one pure function.

    Args:
      model: the language model shared by all parameter sets.
      algorithm: what is drawn, asked and minimised.
      judge: answers the algorithm's questions from the frozen sets.
      optimizer: optax transformation.
      state: parameters, optimisers' states and step.
      frozen: reference and judges' weights, an argument and never a constant.
      prompts: prompts of the batch, [B, S].
      key: the run's key; the step is folded in, so a resumed run draws the same.
      max_length: longest response in tokens.
      num_microbatches: parts of the batch for the gradient.
      num_updates_per_rollout: optimiser steps on the same responses.
      skip_not_finite: a step with a number that is not finite leaves the state as it
        was, except for its count of steps: see `guards.finish`.

    Returns:
      The state after the step, and scalar float32 metrics of this step; among them
      stands the measure of every tensor, `guards.LARGEST`.
    """
    key = jax.random.fold_in(key, state.step)
    keys = iter(jax.random.split(key, len(algorithm.parts)))
    gradients, before = {}, state

    def learn(part: Algorithm, state: TrainState, constants: ParamSets):
        constants = dict(constants) | state.param_sets
        drawn = rollout(
            model,
            part,
            constants,
            prompts,
            next(keys),
            state.step,
            max_length=max_length,
        )
        examples = judged(part, judge, frozen, prompts, drawn.samples)
        state, metrics = update(
            model,
            part,
            optimizer,
            state,
            constants,
            examples,
            num_microbatches=num_microbatches,
            num_updates=num_updates_per_rollout,
        )
        sizes = metrics.pop(guards.LARGEST)
        gradients[part.trains] = guards.worst(gradients.get(part.trains, sizes), sizes)
        return state, metrics | measured(model, drawn, examples[-1])

    constants = dict(frozen)
    for name, part in algorithm.lookaheads.items():
        ahead, _ = learn(part, state, constants)
        constants[name] = ahead.param_sets[part.trains]
    state, metrics = learn(algorithm, state, constants)
    for part in algorithm.followers:
        state, its_metrics = learn(part, state, constants)
        metrics = its_metrics | metrics  # what both measure is the policy's
    sets = algorithm.update_sets(state.param_sets, state.step + 1, metrics)
    after = TrainState(state.step + 1, dict(sets), state.opt_states)
    return guards.finish(before, after, metrics, gradients, skip=skip_not_finite)


def make_train_step(
    model: LanguageModel,
    algorithm: Algorithm,
    judge: Judge,
    optimizer: optax.GradientTransformation,
    *,
    max_length: int,
    num_microbatches: int = 1,
    num_updates_per_rollout: int = 1,
    learning_rate: Schedule | None = None,
    skip_not_finite: bool = False,
) -> TrainStepFn:
    """Returns `train_step` with everything bound but state, weights, prompts and key.

    With `learning_rate`, a schedule of the updates done, the metrics hold its value at
    the first update of this step.
    """
    step = functools.partial(
        train_step,
        model,
        algorithm,
        judge,
        optimizer,
        max_length=max_length,
        num_microbatches=num_microbatches,
        num_updates_per_rollout=num_updates_per_rollout,
        skip_not_finite=skip_not_finite,
    )
    if learning_rate is None:
        return step

    def with_rate(state, frozen, prompts, key):
        num_updates = state.step * num_updates_per_rollout
        rate = jnp.asarray(learning_rate(num_updates), jnp.float32)
        state, metrics = step(state, frozen, prompts, key)
        return state, metrics | {"optimizer/learning_rate": rate}

    return with_rate
