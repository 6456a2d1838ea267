# SPDX-License-Identifier: Apache-2.0
"""Which of several candidates a pairwise loss gets to see: the best and the worst."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nlhf_jax.types import Feedback, Samples, Select

Picks = tuple[Int[Array, "B"], Int[Array, "B"]]


def best_and_worst(
    num_candidates: int,
    scores: Callable[[Feedback], Sequence[Float[Array, "B"]]],
    answers: Callable[[Feedback, Picks], Feedback],
) -> Select:
    """Returns a selection of two of the first `num_candidates` samples, by prompt.

    The best comes first. Of equal scores the first is the best and the last the worst,
    so that two different candidates are always picked. Later samples (comparators) are
    left out: all that is still needed of them is what the judge said.

    Args:
      num_candidates: K >= 2.
      scores: feedback -> the score of each candidate, [B] each.
      answers: (feedback, picks) -> what the loss is told of the two.
    """

    def select(
        samples: tuple[Samples, ...], feedback: Feedback
    ) -> tuple[tuple[Samples, ...], Feedback]:
        scores_KB = jnp.stack(scores(feedback))
        last = num_candidates - 1
        picks = scores_KB.argmax(axis=0), last - scores_KB[::-1].argmin(axis=0)
        chosen = tuple(_gather(samples[:num_candidates], pick) for pick in picks)
        return chosen, answers(feedback, picks)

    return select


def pick(values: Sequence[Array], index_B: Int[Array, "B"]) -> Array:
    """Returns, row by row, the value of the candidate with that index."""
    stacked = jnp.stack(values)
    return stacked[index_B, jnp.arange(stacked.shape[1])]


def _gather(candidates: tuple[Samples, ...], index_B: Int[Array, "B"]) -> Samples:
    return jax.tree.map(lambda *leaves: pick(leaves, index_B), *candidates)
