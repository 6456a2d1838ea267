# SPDX-License-Identifier: Apache-2.0
"""Losses per example, minimised; targets and advantages are constants.

Notation: lr(y) = log pi(y|x) - log mu(y|x), a sum over tokens, nats; tau >= 0 is the
strength of the KL to the reference mu. An anchor is a log-linear mixture of parameter
sets: log a(y) = sum_k w_k log p_k(y) with weights that sum to one.

The factors before the regressions make their gradient at pi = a that of self-play, so
that one learning rate serves the whole family.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nlhf_jax.sequences import lengths, masked_sum, reward_to_go
from nlhf_jax.types import POLICY, REFERENCE, LossOutput, ScoredSample

CLIP_RANGE = 0.2  # of the ratio; Schulman et al., 2017, arXiv 1707.06347, section 6.1


def policy_gradient(
    sample: ScoredSample,
    payoff_B: Float[Array, "B"],
    *,
    tau: float,
    anchor: str = REFERENCE,
    clip_range: float = CLIP_RANGE,
) -> LossOutput:
    """Returns the policy-gradient loss with reward-to-go KL for y ~ pi.

        A_t    = payoff - tau * sum_{m >= t} lr_m          (no gradient)
        w_t    = pi(y_t | x, y_<t) / p(y_t | x, y_<t), with p what y was drawn from
        loss_B = -sum_t min(w_t A_t, clip(w_t, 1 - c, 1 + c) A_t)

    At the first update after a rollout w = 1, and the expected gradient over y ~ pi is
    minus that of E[payoff] - tau KL(pi, mu) with sequence-level KL, for a payoff that
    is constant for the gradient; only samples at temperature 1 without truncation have
    this property. Later updates follow the clipped surrogate, preference and KL alike,
    with lr at the policy they have reached. Terms of the KL before t have zero
    expectation and are left out; a diagonal that multiplies only lr_t would be biased.

    Args:
      sample: mask and log-probabilities under `params` and the anchor, [B, T].
      payoff_B: preference - 1/2, or reward - baseline; no gradient flows through it.
      tau: strength of the KL, per nat, >= 0.
      anchor: the parameter set that stands for mu.
      clip_range: c > 0.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 13 and Appendix F.2; Schulman et
    al., 2017, arXiv 1707.06347, eq. 7; docs/math.md (26), (27), (44).
    """
    log_probs_BT = sample.log_probs[POLICY]
    ratio_BT = jax.lax.stop_gradient(log_probs_BT - sample.log_probs[anchor])
    ratio_BT = jnp.where(sample.mask_BT, ratio_BT, 0.0)
    payoff_B = jax.lax.stop_gradient(payoff_B)
    advantage_BT = payoff_B[:, None] - tau * reward_to_go(ratio_BT)
    loss_B = clipped_surrogate(sample, advantage_BT, clip_range=clip_range)
    return LossOutput(loss_B, sample_metrics(sample))


def clipped_surrogate(
    sample: ScoredSample, advantage_BT: Float[Array, "B T"], *, clip_range: float
) -> Float[Array, "B"]:
    """Returns -sum_t min(w_t A_t, clip(w_t, 1 - c, 1 + c) A_t), see `policy_gradient`.

    Source: Schulman et al., 2017, arXiv 1707.06347, eq. 7; docs/math.md (44).
    """
    difference_BT = sample.log_probs[POLICY] - sample.sampling_log_probs_BT
    weight_BT = jnp.exp(jnp.where(sample.mask_BT, difference_BT, 0.0))
    clipped_BT = jnp.clip(weight_BT, 1.0 - clip_range, 1.0 + clip_range)
    worse_BT = jnp.minimum(weight_BT * advantage_BT, clipped_BT * advantage_BT)
    return -masked_sum(worse_BT, sample.mask_BT)


def sample_metrics(sample: ScoredSample) -> dict[str, Float[Array, "B"]]:
    """Returns log-ratio to the reference, surprise and length of each sample."""
    return {
        "policy/kl": jax.lax.stop_gradient(log_ratio(sample, {REFERENCE: 1.0})),
        "policy/entropy": -jax.lax.stop_gradient(
            masked_sum(sample.log_probs[POLICY], sample.mask_BT)
        ),
        "response/length": lengths(sample.mask_BT),
    }


def log_ratio(
    sample: ScoredSample, anchors: Mapping[str, float], *, trained: str = POLICY
) -> Float[Array, "B"]:
    """Returns log pi(y) - sum_k w_k log p_k(y) in nats; it carries pi's gradient."""
    anchor_BT = sum(weight * sample.log_probs[k] for k, weight in anchors.items())
    return masked_sum(sample.log_probs[trained] - anchor_BT, sample.mask_BT)


def square(
    first: ScoredSample,
    second: ScoredSample,
    target_B: Float[Array, "B"],
    *,
    anchors: Mapping[str, float],
    scale: float,
) -> LossOutput:
    """Returns the regression of a pair's log-ratio difference to a target.

        h      = log pi(y)/a(y) - log pi(y')/a(y')
        loss_B = (h - scale * target)^2 / (4 scale)

    Where E[target | y, y'] = g(y) - g(y'), the minimiser over all policies is a(y)
    exp(scale g(y)) / const, for every distribution of pairs with full support.

    Args:
      first: the response y, with log-probabilities under `params` and all anchors.
      second: the response y'.
      target_B: what h / scale should be; no gradient flows through it.
      anchors: parameter set -> weight; they sum to one.
      scale: > 0; 1 / tau where the anchor is the reference, else a step size s.

    Source: Calandriello et al., 2024, arXiv 2403.08635, eq. 11; docs/math.md (45).
    """
    target_B = jax.lax.stop_gradient(target_B)
    h_B = log_ratio(first, anchors) - log_ratio(second, anchors)
    loss_B = (h_B - scale * target_B) ** 2 / (4 * scale)
    return LossOutput(loss_B, pair_metrics(first, second))


def logistic(
    first: ScoredSample,
    second: ScoredSample,
    preference_B: Float[Array, "B"],
    *,
    anchors: Mapping[str, float],
    tau: float,
    trained: str = POLICY,
) -> Float[Array, "B"]:
    """Returns the pairwise logistic loss with soft labels.

        loss_B = -(P log sigma(tau h) + (1 - P) log sigma(-tau h)) / (2 tau)

    with h as in `square`.

    Args:
      first: the response y.
      second: the response y'.
      preference_B: P(y > y') in [0, 1]; no gradient flows through it.
      anchors: parameter set -> weight; they sum to one.
      tau: > 0, per nat.
      trained: the parameter set that carries the gradient.

    Source: Rafailov et al., 2023, arXiv 2305.18290, eq. 7; docs/math.md (46).
    """
    preference_B = jax.lax.stop_gradient(preference_B)
    h_B = log_ratio(first, anchors, trained=trained)
    h_B = tau * (h_B - log_ratio(second, anchors, trained=trained))
    return (jax.nn.softplus(h_B) - preference_B * h_B) / (2 * tau)


def pair_metrics(
    first: ScoredSample, second: ScoredSample
) -> dict[str, Float[Array, "B"]]:
    """Returns the mean of both responses' `sample_metrics`."""
    both = sample_metrics(first), sample_metrics(second)
    return jax.tree.map(lambda *parts: sum(parts) / 2, *both)


def group_win_rates(
    preferences: tuple[Float[Array, "B"], ...],
    comparisons: tuple[tuple[int, int], ...],
    num_responses: int,
    *,
    with_itself: bool = False,
) -> tuple[Float[Array, "B"], ...]:
    """Returns each response's mean preference over the others of its group.

    Args:
      preferences: P(y_i > y_j) for each comparison (i, j).
      comparisons: every pair of the group once.
      num_responses: size of the group, K >= 2.
      with_itself: count P(y > y) = 1/2 as well.

    The mean over the group is 1/2 exactly, by antisymmetry.
    """
    wins = [0.5 * with_itself] * num_responses
    for preference_B, (i, j) in zip(preferences, comparisons, strict=True):
        wins[i] = wins[i] + preference_B
        wins[j] = wins[j] + 1.0 - preference_B
    return tuple(win / (num_responses - 1 + with_itself) for win in wins)


def mean_of(outputs: tuple[LossOutput, ...]) -> LossOutput:
    """Returns the mean of several losses of the same examples and of their metrics."""
    return jax.tree.map(lambda *parts: sum(parts) / len(parts), *outputs)
