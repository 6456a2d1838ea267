# SPDX-License-Identifier: Apache-2.0
"""One step of any algorithm: rollout, score, update. No algorithm is named here.

Its gradients are samples of docs/math.md (26) to (29).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nlhf_jax.decoding import sample
from nlhf_jax.optimizers import split_microbatches
from nlhf_jax.sequences import has_eos, token_log_probs
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
    Schedule,
    ScoredSample,
    TrainState,
)

Metrics = dict[str, Float[Array, ""]]
TrainStepFn = Callable[
    [TrainState, ParamSets, PromptBatch, jax.Array], tuple[TrainState, Metrics]
]


def init_state(
    params: Params, algorithm: Algorithm, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first update; derived sets start at the policy."""
    copies = {name: jax.tree.map(jnp.copy, params) for name in algorithm.derived_sets}
    return TrainState(
        jnp.zeros((), jnp.int32), {POLICY: params} | copies, optimizer.init(params)
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


def scored_samples(
    model: LanguageModel,
    algorithm: Algorithm,
    params: Params,
    constants: ParamSets,
    prompts: PromptBatch,
    responses: tuple[Responses, ...],
) -> tuple[ScoredSample, ...]:
    """Returns what the loss reads, teacher-forced; only `params` carries gradient."""
    answered = []
    for index in algorithm.trained_on:
        tokens_BT, mask_BT = responses[index]

        def log_probs(weights, tokens_BT=tokens_BT, mask_BT=mask_BT):
            logits_BTV = model.logits(weights, prompts, tokens_BT, None)
            return token_log_probs(logits_BTV, tokens_BT, mask_BT)

        under = {
            name: jax.lax.stop_gradient(log_probs(constants[name]))
            for name in algorithm.scored_under
        }
        answered.append(ScoredSample(mask_BT, {POLICY: log_probs(params)} | under))
    return tuple(answered)


def gradient(
    model: LanguageModel,
    algorithm: Algorithm,
    params: Params,
    constants: ParamSets,
    examples: tuple[PromptBatch, tuple[Responses, ...], Feedback],
    *,
    num_microbatches: int = 1,
) -> tuple[Params, Metrics]:
    """Returns the gradient of the mean loss, and the means of its metrics.

    The batch is cut into `num_microbatches` equal parts that are added up one after
    the other, so that only one part's activations are alive.
    """

    def mean_loss(params: Params, part):
        prompts, responses, feedback = part
        samples = scored_samples(
            model, algorithm, params, constants, prompts, responses
        )
        output = algorithm.loss(samples, feedback)
        metrics = {"loss/policy": output.loss_B} | output.metrics
        return output.loss_B.mean(), {k: v.mean() for k, v in metrics.items()}

    compute = jax.grad(mean_loss, has_aux=True)
    if num_microbatches == 1:
        return compute(params, examples)
    parts = split_microbatches(examples, num_microbatches)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(compute, params, jax.tree.map(lambda leaf: leaf[0], parts)),
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, compute(params, part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda leaf: leaf / num_microbatches, total)


def update(
    model: LanguageModel,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    constants: ParamSets,
    examples: tuple[PromptBatch, tuple[Responses, ...], Feedback],
    *,
    num_microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """Takes one optimiser step on judged responses, then the algorithm's own update."""
    params = state.param_sets[POLICY]
    grads, metrics = gradient(
        model,
        algorithm,
        params,
        constants,
        examples,
        num_microbatches=num_microbatches,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    param_sets = algorithm.update_sets(
        state.param_sets | {POLICY: params}, state.step + 1
    )
    metrics["optimizer/gradient_norm"] = optax.tree.norm(grads)
    return TrainState(state.step + 1, dict(param_sets), opt_state), metrics


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
) -> tuple[TrainState, Metrics]:
    """Rollout, score and update as one pure function.

    Args:
      model: the language model shared by all parameter sets.
      algorithm: what is drawn, asked and minimised.
      judge: answers the algorithm's questions from the frozen sets.
      optimizer: optax transformation.
      state: parameters, optimiser state and step.
      frozen: reference and judges' weights, an argument and never a constant.
      prompts: prompts of the batch, [B, S].
      key: the run's key; the step is folded in, so a resumed run draws the same.
      max_length: longest response in tokens.
      num_microbatches: parts of the batch for the gradient.

    Returns:
      The state after the update, and scalar float32 metrics of this step.
    """
    param_sets = dict(frozen) | state.param_sets
    drawn = rollout(
        model,
        algorithm,
        param_sets,
        prompts,
        jax.random.fold_in(key, state.step),
        state.step,
        max_length=max_length,
    )
    responses = tuple(one.responses for one in drawn.samples)
    feedback = score(algorithm, judge, frozen, prompts, responses)
    state, metrics = update(
        model,
        algorithm,
        optimizer,
        state,
        param_sets,
        (prompts, responses, feedback),
        num_microbatches=num_microbatches,
    )
    ended_B = has_eos(*responses[0], model.eos_id)
    metrics["response/eos_rate"] = ended_B.astype(jnp.float32).mean()
    metrics["decode/steps"] = drawn.num_steps.astype(jnp.float32)
    return state, metrics


def make_train_step(
    model: LanguageModel,
    algorithm: Algorithm,
    judge: Judge,
    optimizer: optax.GradientTransformation,
    *,
    max_length: int,
    num_microbatches: int = 1,
    learning_rate: Schedule | None = None,
) -> TrainStepFn:
    """Returns `train_step` with everything bound but state, weights, prompts and key.

    With `learning_rate`, the metrics hold its value at this step.
    """
    step = functools.partial(
        train_step,
        model,
        algorithm,
        judge,
        optimizer,
        max_length=max_length,
        num_microbatches=num_microbatches,
    )
    if learning_rate is None:
        return step

    def with_rate(state, frozen, prompts, key):
        rate = jnp.asarray(learning_rate(state.step), jnp.float32)
        state, metrics = step(state, frozen, prompts, key)
        return state, metrics | {"optimizer/learning_rate": rate}

    return with_rate
