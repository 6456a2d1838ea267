# SPDX-License-Identifier: Apache-2.0
"""The gradient of an algorithm's mean loss on responses that were drawn and judged.

It is a sample of docs/math.md (26) to (29).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nlhf_jax.optimizers import split_microbatches
from nlhf_jax.sequences import masked_sum
from nlhf_jax.types import (
    Algorithm,
    Feedback,
    LanguageModel,
    Params,
    ParamSets,
    PromptBatch,
    Samples,
    ScoredSample,
)

# Scalars, and under `guards.LARGEST` a vector.
Metrics = dict[str, Float[Array, "..."]]
Examples = tuple[PromptBatch, tuple[Samples, ...], Feedback]

LARGEST_WEIGHT = 20.0  # nats, of an importance weight that is measured
_FIRST, _SECOND = "weight/first", "weight/second"


def scored_samples(
    model: LanguageModel,
    algorithm: Algorithm,
    params: Params,
    constants: ParamSets,
    prompts: PromptBatch,
    samples: tuple[Samples, ...],
) -> tuple[ScoredSample, ...]:
    """Returns what the loss reads, teacher-forced; only `params` carries gradient."""
    responses = [samples[index].responses for index in algorithm.trained_on]

    def log_probs(weights: Params) -> list[Float[Array, "B T"]]:
        found = _log_probs(
            model, weights, prompts, [one.tokens_BT for one in responses]
        )
        return [
            jnp.where(one.mask_BT, each, 0.0)
            for one, each in zip(responses, found, strict=True)
        ]

    under = {
        name: jax.lax.stop_gradient(log_probs(constants[name]))
        for name in algorithm.scored_under
    }
    under = {algorithm.trains: log_probs(params)} | under
    return tuple(
        ScoredSample(
            responses[place].mask_BT,
            {name: found[place] for name, found in under.items()},
            samples[index].sampling_log_probs_BT,
        )
        for place, index in enumerate(algorithm.trained_on)
    )


def _log_probs(
    model: LanguageModel,
    params: Params,
    prompts: PromptBatch,
    responses: list[Int[Array, "B T"]],
) -> list[Float[Array, "B T"]]:
    """Returns the log-probabilities of several responses to each prompt."""
    if len(responses) == 1 or not model.reads_prompts_once:
        return [
            model.token_scores(params, prompts, tokens_BT, None).log_probs_BT
            for tokens_BT in responses
        ]
    tokens_BNT = jnp.stack(responses, axis=1)
    tokens_RT = tokens_BNT.reshape(-1, tokens_BNT.shape[-1])
    scores = model.token_scores(params, prompts, tokens_RT, None)
    log_probs_BNT = scores.log_probs_BT.reshape(tokens_BNT.shape)
    return [log_probs_BNT[:, place] for place in range(len(responses))]


def gradient(
    model: LanguageModel,
    algorithm: Algorithm,
    params: Params,
    constants: ParamSets,
    examples: Examples,
    *,
    num_microbatches: int = 1,
) -> tuple[Params, Metrics]:
    """Returns the gradient of the mean loss, and the means of its metrics.

    The batch is cut into `num_microbatches` equal parts that are added up one after
    the other, so that only one part's activations are alive.
    """

    def mean_loss(params: Params, part: Examples):
        prompts, drawn, feedback = part
        samples = scored_samples(model, algorithm, params, constants, prompts, drawn)
        output = algorithm.loss(samples, feedback)
        metrics = {"loss/policy": output.loss_B} | output.metrics
        metrics |= _weight_moments(samples, algorithm.trains)
        return output.loss_B.mean(), {k: v.mean() for k, v in metrics.items()}

    compute = jax.grad(mean_loss, has_aux=True)
    if num_microbatches == 1:
        found, metrics = compute(params, examples)
        return found, _with_effective_share(metrics)
    parts = split_microbatches(examples, num_microbatches)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(compute, params, jax.tree.map(lambda leaf: leaf[0], parts)),
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, compute(params, part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    found, metrics = jax.tree.map(lambda leaf: leaf / num_microbatches, total)
    return found, _with_effective_share(metrics)


def _weight_moments(
    samples: tuple[ScoredSample, ...], trained: str
) -> dict[str, Float[Array, "B"]]:
    """Returns first and second powers of w = p(y) under the trained set / as drawn."""
    log_weight_B = jnp.concatenate(
        [
            masked_sum(
                sample.log_probs[trained] - sample.sampling_log_probs_BT,
                sample.mask_BT,
            )
            for sample in samples
        ]
    )
    weight_B = jnp.exp(jnp.minimum(jax.lax.stop_gradient(log_weight_B), LARGEST_WEIGHT))
    return {_FIRST: weight_B, _SECOND: weight_B**2}


def _with_effective_share(metrics: Metrics) -> Metrics:
    """Returns the metrics with E[w]^2 / E[w^2] in place of the two moments."""
    kept = {k: v for k, v in metrics.items() if k not in (_FIRST, _SECOND)}
    return kept | {"policy/effective_share": metrics[_FIRST] ** 2 / metrics[_SECOND]}
