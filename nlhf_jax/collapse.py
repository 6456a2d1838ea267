# SPDX-License-Identifier: Apache-2.0
"""What shows in a rollout that a policy or its judge has collapsed.

A policy that gives one answer to everything, or a judge to whom all answers are alike,
leaves losses finite and gradients small: nothing but these figures tells. `alarms` says
when they are far enough.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from nlhf_jax.types import Feedback, Responses, Samples

UNDECIDED = 0.005  # |P - 1/2| up to which a judge has not decided


def shares(samples: Sequence[Samples], feedback: Feedback) -> dict[str, Array]:
    """Returns the metrics of one rollout; each is left out where it has no meaning.

        response/distinct_share     of the first speaker's B responses, D distinct
                                    ones: (D - 1) / (B - 1), 0 where all are the same
        response/identical_share    prompts whose speakers all gave the same response
        preference/undecided_share  comparisons with |P - 1/2| <= 0.005

    Args:
      samples: one per speaker.
      feedback: what the judge said of them.
    """
    prints = [_fingerprint(one.responses) for one in samples]
    found = {}
    if prints[0].shape[1] > 1:
        found["response/distinct_share"] = _distinct_share(prints[0])
    if len(prints) > 1:
        others = jnp.stack(prints[1:])
        same_B = (others == prints[0][None]).all(axis=(0, 1))
        found["response/identical_share"] = same_B.astype(jnp.float32).mean()
    if feedback.preferences:
        preferences = jnp.stack(feedback.preferences)
        undecided = jnp.abs(preferences - 0.5) <= UNDECIDED
        found["preference/undecided_share"] = undecided.astype(jnp.float32).mean()
    return found


def _fingerprint(responses: Responses) -> UInt32[Array, "2 B"]:
    """Two sums mod 2^32 of a response's tokens, each times a number of its position.

    Different responses share both with a chance of some 2^-64, and B numbers go between
    devices where B responses would.
    """
    tokens_BT = jnp.where(responses.mask_BT, responses.tokens_BT + 1, 0)
    words_BT = _mixed(tokens_BT.astype(jnp.uint32))
    position_T = jnp.arange(words_BT.shape[1], dtype=jnp.uint32)
    return jnp.stack(
        [
            jnp.sum(words_BT * odd_T[None], axis=1, dtype=jnp.uint32)
            for odd_T in (2 * position_T + 1, _mixed(position_T + 1) | 1)
        ]
    )


def _mixed(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Spreads every bit of a word over all of them (the finaliser of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def _distinct_share(print_2B: UInt32[Array, "2 B"]) -> Float[Array, ""]:
    same_BB = (print_2B[:, :, None] == print_2B[:, None, :]).all(axis=0)
    # A response counts where no earlier row has it.
    is_repeated_B = jnp.tril(same_BB, -1).any(axis=1)
    distinct = jnp.sum(~is_repeated_B).astype(jnp.float32)
    return (distinct - 1.0) / (print_2B.shape[1] - 1)
