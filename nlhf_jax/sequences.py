# SPDX-License-Identifier: Apache-2.0
"""Masks, end-of-sequence, and log-probabilities of tokens and whole sequences."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nlhf_jax.types import TokenScores


def response_mask(tokens_BT: Int[Array, "B T"], eos_id: int) -> Bool[Array, "B T"]:
    """Returns True up to and including the first `eos_id` of each row.

    Where the padding id equals `eos_id`, only the first one counts: the mask comes
    from the position, never from the token's identity.
    """
    is_eos_BT = tokens_BT == eos_id
    num_before_BT = jnp.cumsum(is_eos_BT, axis=1) - is_eos_BT
    return num_before_BT == 0


def token_scores(
    logits_BTV: Float[Array, "B T V"], tokens_BT: Int[Array, "B T"]
) -> TokenScores:
    """Returns log p(token) = logit - logsumexp, the logsumexp, and who is largest."""
    dtype = jnp.promote_types(logits_BTV.dtype, jnp.float32)
    logits_BTV = logits_BTV.astype(dtype)
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    is_largest_BT = chosen_BT >= logits_BTV.max(axis=-1)
    return TokenScores(chosen_BT - normalizer_BT, normalizer_BT, is_largest_BT)


def from_all_logits(
    logits: Callable[..., Float[Array, "B T V"]],
) -> dict[str, Callable]:
    """Returns a `LanguageModel`'s words on some tokens, made from all logits."""

    def scores(params, prompts, tokens_BT, dropout_key=None) -> TokenScores:
        return token_scores(logits(params, prompts, tokens_BT, dropout_key), tokens_BT)

    def logits_of(params, prompts, tokens_BT, token_id) -> Float[Array, "B T"]:
        return logits(params, prompts, tokens_BT, None)[..., token_id]

    return {"token_scores": scores, "logits_of": logits_of}


def token_log_probs(
    logits_BTV: Float[Array, "B T V"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Returns log p(token), float32, 0 where the mask is False."""
    log_probs_BT = token_scores(logits_BTV, tokens_BT).log_probs_BT
    return jnp.where(mask_BT, log_probs_BT, 0.0)


def masked_sum(
    values_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Returns the sum over the tokens that count."""
    return jnp.sum(jnp.where(mask_BT, values_BT, 0.0), axis=1)


def sequence_log_probs(
    log_probs_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Returns log p(response) in nats: a sum over tokens, the end token included."""
    return masked_sum(log_probs_BT, mask_BT)


def reward_to_go(values_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns sum over m >= t of values[:, m] for each t."""
    return jnp.flip(jnp.cumsum(jnp.flip(values_BT, axis=1), axis=1), axis=1)


def lengths(mask_BT: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Returns the number of tokens that count, as float32."""
    return mask_BT.sum(axis=1).astype(jnp.float32)


def has_eos(
    tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"], eos_id: int
) -> Bool[Array, "B"]:
    """Returns True for responses that ended by themselves."""
    return jnp.any(mask_BT & (tokens_BT == eos_id), axis=1)
