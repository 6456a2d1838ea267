# SPDX-License-Identifier: Apache-2.0
"""Judges' inputs, put together on the device from token ids.

The judge reads one sequence: fixed words, the document and the responses between
them. The templates hold ids, not text, so no tokenizer runs inside the compiled step.
The fields follow the paper's rater input (Munos et al., 2024, arXiv 2312.00886,
Appendix G); the wording is ours and short.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from nlhf_jax.checks import UserError
from nlhf_jax.types import PromptBatch, Responses

Encode = Callable[[str], Sequence[int]]
# Segments of one sequence differ in width, so the second axis has no name.
Segment = tuple[Int[Array, "B _"], Bool[Array, "B _"]]


@dataclasses.dataclass(frozen=True)
class PairwiseTemplate:
    """Ids of the words around a document and two responses.

    Attributes:
      instruction: what the judge is asked, and the document's label.
      before_first: label of the first response.
      before_second: label of the second response.
      end: label of the answer.
      answer_id: the id whose last logit is the score; any fixed id will do.
      eos_id: ends the sequence, and is left out at the end of its parts.
      start: ids that begin any text of the model's, and are left out at the beginning
        of the document.
    """

    instruction: tuple[int, ...]
    before_first: tuple[int, ...]
    before_second: tuple[int, ...]
    end: tuple[int, ...]
    answer_id: int
    eos_id: int = 1
    start: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class RewardTemplate:
    """Ids of the words around a document and one response; see `PairwiseTemplate`."""

    context: tuple[int, ...]
    before_response: tuple[int, ...]
    answer_id: int
    eos_id: int = 1
    start: tuple[int, ...] = ()


def pairwise_template(encode: Encode) -> PairwiseTemplate:
    """Returns the template in the ids of `encode` (text -> ids, no end token)."""
    return PairwiseTemplate(
        instruction=tuple(encode("Which summary is better, 1 or 2? Text:")),
        before_first=tuple(encode("Summary 1:")),
        before_second=tuple(encode("Summary 2:")),
        end=tuple(encode("Preferred Summary:")),
        answer_id=int(encode("1")[-1]),
    )


def reward_template(encode: Encode) -> RewardTemplate:
    """Returns the template in the ids of `encode` (text -> ids, no end token)."""
    return RewardTemplate(
        context=tuple(encode("Context:")),
        before_response=tuple(encode("Summary:")),
        answer_id=int(encode("1")[-1]),
    )


def concatenate(
    segments: Sequence[Segment], length: int
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Joins ragged segments and packs them to the left.

    With `.` for masked entries, [5 6 .] + [. 7] becomes [5 6 7 . .]: the entries whose
    mask is True keep their order, whatever lies between them.

    Args:
      segments: (tokens, mask) pairs of shape [B, n_i].
      length: S, at least the longest sum of entries kept; later entries would be lost.

    Returns:
      Tokens (0 where the mask is False) and mask, [B, length].
    """
    tokens_BN = jnp.concatenate([tokens for tokens, _ in segments], axis=1)
    mask_BN = jnp.concatenate([mask for _, mask in segments], axis=1)
    # Entries to drop are sent to a column of their own, which is cut off.
    place_BN = jnp.where(mask_BN, jnp.cumsum(mask_BN, axis=1) - 1, length)
    place_BN = jnp.minimum(place_BN, length)
    rows_B1 = jnp.arange(tokens_BN.shape[0])[:, None]
    packed_BS = jnp.zeros((tokens_BN.shape[0], length + 1), tokens_BN.dtype)
    packed_BS = packed_BS.at[rows_B1, place_BN].set(tokens_BN)[:, :length]
    num_kept_B1 = mask_BN.sum(axis=1, keepdims=True)
    kept_BS = jnp.arange(length)[None, :] < num_kept_B1
    return jnp.where(kept_BS, packed_BS, 0), kept_BS


def words(ids: Sequence[int], batch_size: int) -> Segment:
    """Returns fixed ids as a segment of every row."""
    row_1N = jnp.asarray(ids, jnp.int32).reshape(1, -1)
    tokens_BN = jnp.broadcast_to(row_1N, (batch_size, len(ids)))
    return tokens_BN, jnp.ones(tokens_BN.shape, bool)


def cut(
    prompts: PromptBatch, length: int, eos_id: int, start: Sequence[int] = ()
) -> Segment:
    """Returns the first `length` columns of the document, without its own frame.

    The end token is left out where it is the last, and `start` where it is the first:
    inside, a chat template ends turns with it.
    """
    tokens_BS, mask_BS = prompts
    columns_1S = jnp.arange(tokens_BS.shape[1])[None, :]
    last_B1 = mask_BS.sum(axis=1, keepdims=True) - 1
    mask_BS = mask_BS & ~((columns_1S == last_B1) & (tokens_BS == eos_id))
    for column, token_id in enumerate(start):
        is_start_BS = (columns_1S == column) & (tokens_BS == token_id)
        mask_BS = mask_BS & ~is_start_BS
    return tokens_BS[:, :length], mask_BS[:, :length]


def whole(responses: Responses, length: int, eos_id: int) -> Segment:
    """Returns the responses without the end token.

    A judge that reads a part of a response would judge another response, so nothing is
    cut off.

    Raises:
      UserError: they are wider than the `length` the judge was made for.
    """
    tokens_BT, mask_BT = responses
    if tokens_BT.shape[1] > length:
        raise UserError(
            f"responses must have at most {length} tokens, the length this judge was "
            f"trained with, got {tokens_BT.shape[1]}"
        )
    return tokens_BT, mask_BT & (tokens_BT != eos_id)


def pairwise_input(
    template: PairwiseTemplate,
    prompts: PromptBatch,
    first: Responses,
    second: Responses,
    *,
    prompt_length: int,
    response_length: int,
) -> PromptBatch:
    """Returns the judge's input: instruction, document, both responses, answer slot.

    The document keeps at most `prompt_length` tokens, the responses keep all; the sum
    of all parts is the static length, so a long document never pushes a response out.

    Raises:
      UserError: responses wider than `response_length`.
    """
    batch, eos = prompts.tokens_BS.shape[0], template.eos_id
    segments = (
        words((*template.start, *template.instruction), batch),
        cut(prompts, prompt_length, eos, template.start),
        words(template.before_first, batch),
        whole(first, response_length, eos),
        words(template.before_second, batch),
        whole(second, response_length, eos),
        words((*template.end, eos), batch),
    )
    return PromptBatch(*concatenate(segments, _width(segments)))


def reward_input(
    template: RewardTemplate,
    prompts: PromptBatch,
    responses: Responses,
    *,
    prompt_length: int,
    response_length: int,
) -> PromptBatch:
    """Returns the reward model's input: document and response, each with its label.

    The lengths are those of `pairwise_input`.

    Raises:
      UserError: responses wider than `response_length`.
    """
    batch, eos = prompts.tokens_BS.shape[0], template.eos_id
    segments = (
        words((*template.start, *template.context), batch),
        cut(prompts, prompt_length, eos, template.start),
        words(template.before_response, batch),
        whole(responses, response_length, eos),
        words((eos,), batch),
    )
    return PromptBatch(*concatenate(segments, _width(segments)))


def _width(segments: Sequence[Segment]) -> int:
    return sum(tokens_BN.shape[1] for tokens_BN, _ in segments)
