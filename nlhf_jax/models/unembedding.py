# SPDX-License-Identifier: Apache-2.0
"""Scores of given tokens without the logits of all of them at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nlhf_jax.checks import UserError
from nlhf_jax.constraints import constrain, gather
from nlhf_jax.types import TokenScores


def check_chunks(vocab_size: int, num_chunks: int) -> None:
    """Raises a UserError unless the chunks divide the vocabulary."""
    if vocab_size % num_chunks:
        near = [n for n in range(1, 2 * num_chunks + 1) if vocab_size % n == 0]
        best = min(near, key=lambda n: abs(n - num_chunks))
        raise UserError(
            f"num_vocab_chunks must divide the vocabulary's {vocab_size} rows, got "
            f"{num_chunks}; {best} would do"
        )


def soft_capped(
    logits: Float[Array, "*shape"], soft_cap: float
) -> Float[Array, "*shape"]:
    """Returns cap * tanh(logits / cap), which lies in (-cap, cap); 0 caps nothing.

    Source: Gemma Team, 2024, arXiv 2408.00118, section 2.
    """
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


def chunked_token_scores(
    features_BTD: Float[Array, "B T D"],
    kernel_DV: Float[Array, "D V"],
    tokens_BT: Int[Array, "B T"],
    num_chunks: int,
    soft_cap: float = 0.0,
) -> TokenScores:
    """Returns the scores of tokens under logits = features @ kernel, V / n at a time.

        m' = max(m, max_v logit_v),  z' = z exp(m - m') + sum_v exp(logit_v - m')

    over the chunks v = j, j + n, j + 2 n, ..., so that a vocabulary split over devices
    stays where it is. The backward pass computes each chunk's logits again: no
    [B, T, V] array exists, then or now.

    Args:
      features_BTD: what the output layer reads, float32.
      kernel_DV: the output layer, float32.
      tokens_BT: token ids in [0, V).
      num_chunks: n, divides V.
      soft_cap: of the logits; see `soft_capped`.

    Source: the online normaliser of Milakov and Gimelshein, 2018, arXiv 1805.02867.
    """
    width, vocab_size = kernel_DV.shape
    check_chunks(vocab_size, num_chunks)
    kernel_DWn = kernel_DV.reshape(width, vocab_size // num_chunks, num_chunks)
    place_BT, chunk_BT = jnp.divmod(tokens_BT, num_chunks)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(totals, given):
        largest_BT, sum_BT, chosen_BT = totals
        index, kernel_DW = given
        kernel_DW = gather(kernel_DW, ("embed", "vocab"))
        logits_BTW = soft_capped(features_BTD @ kernel_DW, soft_cap)
        logits_BTW = constrain(logits_BTW, ("batch", "length", "vocab"))
        found_BT = jax.lax.stop_gradient(logits_BTW.max(axis=-1))
        new_BT = jnp.maximum(largest_BT, found_BT)
        added_BT = jnp.exp(logits_BTW - new_BT[..., None]).sum(axis=-1)
        sum_BT = sum_BT * jnp.exp(largest_BT - new_BT) + added_BT
        mine_BT = jnp.take_along_axis(logits_BTW, place_BT[..., None], axis=-1)[..., 0]
        return (new_BT, sum_BT, jnp.where(chunk_BT == index, mine_BT, chosen_BT)), None

    lowest_BT = jnp.full(tokens_BT.shape, -jnp.inf, features_BTD.dtype)
    zeros_BT = jnp.zeros_like(lowest_BT)
    (largest_BT, sum_BT, chosen_BT), _ = jax.lax.scan(
        add,
        (lowest_BT, zeros_BT, zeros_BT),
        (jnp.arange(num_chunks), jnp.moveaxis(kernel_DWn, 2, 0)),
    )
    normalizer_BT = largest_BT + jnp.log(sum_BT)
    return TokenScores(
        chosen_BT - normalizer_BT, normalizer_BT, chosen_BT >= largest_BT
    )
