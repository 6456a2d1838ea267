# SPDX-License-Identifier: Apache-2.0
"""Supervised steps: fine-tuning, the preference model and the reward model.

A step is a pure function (state, batch, key) -> (state, metrics); an evaluation is
(params, batch) -> `Totals`. Both come from one function per task that sums over the
rows (or tokens) of a batch, so a mean is the same however the rows are grouped.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from nlhf_jax import guards
from nlhf_jax.optimizers import accumulate_gradients
from nlhf_jax.types import (
    POLICY,
    ComparisonBatch,
    LanguageModel,
    Params,
    PreferenceModel,
    RewardModel,
    Schedule,
    SupervisedBatch,
    TrainState,
)


class Totals(NamedTuple):
    """Sums over the rows or tokens of a batch.

    Attributes:
      sums: metric name -> sum.
      weight: the tokens (or comparisons) summed over.
    """

    sums: dict[str, Float[Array, ""]]
    weight: Float[Array, ""]


Metrics = dict[str, Array]
SummedLoss = Callable[..., tuple[Float[Array, ""], Totals]]
StepFn = Callable[[TrainState, PyTree, jax.Array], tuple[TrainState, Metrics]]
EvaluationFn = Callable[[Params, PyTree], Totals]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(
        jnp.zeros((), jnp.int32), {POLICY: params}, {POLICY: optimizer.init(params)}
    )


def mean_metrics(totals: Iterable[Totals]) -> dict[str, float]:
    """Returns the weighted mean of every metric over several batches (on the host)."""
    totals = [jax.device_get(part) for part in totals]
    weight = float(np.sum([part.weight for part in totals]))
    names = totals[0].sums if totals else ()
    return {
        name: float(np.sum([part.sums[name] for part in totals])) / max(weight, 1.0)
        for name in names
    }


def _masked_sum(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Array:
    """Sums where the mask is True; what stands elsewhere, NaN included, is inert."""
    return jnp.sum(jnp.where(mask, values, 0.0))


def _is_comparison(batch: ComparisonBatch) -> Bool[Array, "B"]:
    """True on rows with a response; a row without any is padding of the batch."""
    return batch.first.mask_BT.any(axis=1) | batch.second.mask_BT.any(axis=1)


def _agreement(
    logit_B: Float[Array, "B"], preference_B: Float[Array, "B"]
) -> Float[Array, "B"]:
    """One where both favour the same response, zero where not, half at a tie."""
    return 0.5 * (1.0 + jnp.sign(logit_B) * jnp.sign(preference_B - 0.5))


def _soft_label_loss(
    logit_B: Float[Array, "B"], preference_B: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Binary cross-entropy -p log sigmoid(l) - (1 - p) log sigmoid(-l), in nats."""
    return jax.nn.softplus(logit_B) - preference_B * logit_B


def _sft_sums(model: LanguageModel, z_loss: float) -> SummedLoss:
    def summed(params: Params, batch: SupervisedBatch, dropout_key: jax.Array | None):
        tokens_BT, mask_BT = batch.targets
        scores = model.token_scores(params, batch.prompts, tokens_BT, dropout_key)
        nll = -_masked_sum(scores.log_probs_BT, mask_BT)
        is_right_BT = scores.is_most_likely_BT.astype(nll.dtype)
        sums = {
            "loss/token_nll": nll,
            "token/accuracy": _masked_sum(is_right_BT, mask_BT),
        }
        loss = nll
        if z_loss:
            log_z_BT = scores.log_normalizers_BT
            sums["loss/z_loss"] = z_loss * _masked_sum(log_z_BT**2, mask_BT)
            loss = loss + sums["loss/z_loss"]
        return loss, Totals(sums, jnp.sum(mask_BT).astype(nll.dtype))

    return summed


def _preference_sums(model: PreferenceModel) -> SummedLoss:
    def summed(params: Params, batch: ComparisonBatch, key: jax.Array | None):
        del key
        logit_B = model.logits(params, batch.prompts, batch.first, batch.second)
        label_B, is_row_B = batch.preference_B, _is_comparison(batch)
        probability_B = jax.nn.sigmoid(logit_B)
        loss = _masked_sum(_soft_label_loss(logit_B, label_B), is_row_B)
        sums = {
            "loss/preference": loss,
            "preference/accuracy": _masked_sum(_agreement(logit_B, label_B), is_row_B),
            "preference/brier": _masked_sum((probability_B - label_B) ** 2, is_row_B),
            "preference/confidence": _masked_sum(
                0.5 + jnp.abs(probability_B - 0.5), is_row_B
            ),
        }
        return loss, Totals(sums, jnp.sum(is_row_B).astype(loss.dtype))

    return summed


def _reward_sums(model: RewardModel) -> SummedLoss:
    def summed(params: Params, batch: ComparisonBatch, key: jax.Array | None):
        del key
        first_B = model.rewards(params, batch.prompts, batch.first)
        second_B = model.rewards(params, batch.prompts, batch.second)
        label_B, is_row_B = batch.preference_B, _is_comparison(batch)
        margin_B = first_B - second_B
        loss = _masked_sum(_soft_label_loss(margin_B, label_B), is_row_B)
        sums = {
            "loss/reward": loss,
            "reward/accuracy": _masked_sum(_agreement(margin_B, label_B), is_row_B),
            "reward/margin": _masked_sum(margin_B * jnp.sign(label_B - 0.5), is_row_B),
            "reward/mean": _masked_sum(0.5 * (first_B + second_B), is_row_B),
        }
        return loss, Totals(sums, jnp.sum(is_row_B).astype(loss.dtype))

    return summed


def _make_step(
    summed_loss: SummedLoss,
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
    learning_rate: Schedule | None,
    weight_name: str,
    skip_not_finite: bool,
) -> StepFn:
    def step_fn(
        state: TrainState, batch: PyTree, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        params = state.param_sets[POLICY]
        gradient, totals = accumulate_gradients(
            summed_loss,
            params,
            batch,
            jax.random.fold_in(key, state.step),
            num_microbatches=num_microbatches,
        )
        scale = 1.0 / jnp.maximum(totals.weight, 1.0)
        gradient = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradient)
        updates, opt_state = optimizer.update(
            gradient, state.opt_states[POLICY], params
        )
        param_sets = {**state.param_sets, POLICY: optax.apply_updates(params, updates)}
        metrics = {name: value * scale for name, value in totals.sums.items()}
        metrics[weight_name] = totals.weight
        metrics["optimizer/gradient_norm"] = optax.tree.norm(gradient)
        if learning_rate is not None:
            metrics["optimizer/learning_rate"] = jnp.asarray(learning_rate(state.step))
        return guards.finish(
            state,
            TrainState(state.step + 1, param_sets, {POLICY: opt_state}),
            metrics,
            {POLICY: guards.largest(gradient)},
            skip=skip_not_finite,
        )

    return step_fn


def _make_evaluation(summed_loss: SummedLoss) -> EvaluationFn:
    def evaluate(params: Params, batch: PyTree) -> Totals:
        return summed_loss(params, batch, None)[1]

    return evaluate


def make_sft_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    z_loss: float = 0.0,
    learning_rate: Schedule | None = None,
    skip_not_finite: bool = False,
) -> StepFn:
    """Returns one update of supervised fine-tuning on a `SupervisedBatch`.

    The loss is the mean over the batch's target tokens of
    -log p(token | prompt, tokens before) + z_loss * (log normaliser)^2. The mean is
    over tokens, not over sequences, whatever the number of microbatches.

    Args:
      model: its parameters are `state.param_sets["params"]`.
      optimizer: see `optimizers.make_optimizer`.
      num_microbatches: parts of the batch done one after the other; divides its rows.
      z_loss: weight that keeps the log normaliser near zero; T5X trains with 1e-4.
      learning_rate: the optimiser's schedule, for the metrics only.
      skip_not_finite: a step with a number that is not finite leaves the state as it
        was, except for its count of steps: see `guards.finish`.

    Returns:
      (state, batch, key) -> (state, metrics); dropout draws from
      `fold_in(key, state.step)`, so the same key serves every step. Metrics:
      loss/token_nll (nats), token/accuracy, token/count, optimizer/gradient_norm
      (before clipping), optimizer/learning_rate and, with a z_loss, loss/z_loss; and
      the measure of every tensor, `guards.LARGEST`.
    """
    return _make_step(
        _sft_sums(model, z_loss),
        optimizer,
        num_microbatches,
        learning_rate,
        "token/count",
        skip_not_finite,
    )


def make_sft_evaluation(model: LanguageModel) -> EvaluationFn:
    """Returns (params, SupervisedBatch) -> totals, without dropout or z-loss."""
    return _make_evaluation(_sft_sums(model, 0.0))


def make_preference_step(
    model: PreferenceModel,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    learning_rate: Schedule | None = None,
    skip_not_finite: bool = False,
) -> StepFn:
    """Returns one update of a preference model on a `ComparisonBatch`.

    With P = sigmoid(logit) and a label p in [0, 1], the loss is the mean over
    comparisons of -p log P - (1 - p) log(1 - P), whose minimum is P = p, also for
    labels that are shares of votes. Rows without any response token are padding.

    Returns:
      (state, batch, key) -> (state, metrics): loss/preference (nats),
      preference/accuracy (a tie of label or model counts half), preference/brier (mean
      squared error of P), preference/confidence (mean of max(P, 1 - P); equal to the
      accuracy when calibrated on hard labels), preference/count and the optimiser's.
    """
    return _make_step(
        _preference_sums(model),
        optimizer,
        num_microbatches,
        learning_rate,
        "preference/count",
        skip_not_finite,
    )


def make_preference_evaluation(model: PreferenceModel) -> EvaluationFn:
    """Returns (params, ComparisonBatch) -> totals of the preference metrics."""
    return _make_evaluation(_preference_sums(model))


def make_reward_step(
    model: RewardModel,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    learning_rate: Schedule | None = None,
    skip_not_finite: bool = False,
) -> StepFn:
    """Returns one update of a Bradley-Terry reward model on a `ComparisonBatch`.

    The loss is that of `make_preference_step` with logit r(first) - r(second). It
    fixes rewards up to a constant per prompt only.

    Returns:
      (state, batch, key) -> (state, metrics): loss/reward (nats), reward/accuracy,
      reward/margin (mean lead of the preferred response), reward/mean, reward/count
      and the optimiser's.

    Source: Bradley and Terry (1952); Stiennon et al. (2020, arXiv 2009.01325).
    """
    return _make_step(
        _reward_sums(model),
        optimizer,
        num_microbatches,
        learning_rate,
        "reward/count",
        skip_not_finite,
    )


def make_reward_evaluation(model: RewardModel) -> EvaluationFn:
    """Returns (params, ComparisonBatch) -> totals of the reward metrics."""
    return _make_evaluation(_reward_sums(model))
