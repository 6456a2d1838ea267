# SPDX-License-Identifier: Apache-2.0
"""What those who serve a judge elsewhere must know of it, as ids and in words."""

from collections.abc import Callable, Sequence
from typing import Any

from nlhf_jax.conversion import hugging_face_judges
from nlhf_jax.conversion.tensors import Scoring, Weights
from nlhf_jax.data import prompts, vocabularies
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.jobs import folders
from nlhf_jax.models.families import end_of
from nlhf_jax.preferences import inputs

FORMULAS = {
    "preference": "P(y is preferred to y' | x) = sigmoid((f(x, y, y') - f(x, y', y)) "
    "/ 2), where f is the score of y beside y'.",
    "reward": "The score is the reward r(x, y), and P(y is preferred to y' | x) = "
    "sigmoid(r(x, y) - r(x, y')).",
}


def scoring_of(description: folders.ModelDescription, vocabulary: Any) -> Scoring:
    """Returns how the judge in a folder scores, in the ids of its vocabulary."""
    start = tuple(prompts.frame_of(vocabulary)[0])
    end = (end_of(description.settings),)

    lengths = (
        description.feature_lengths["inputs"],
        description.feature_lengths["targets"],
    )

    def encode(text: str) -> Sequence[int]:
        return vocabularies.encode(text, vocabulary)

    if description.kind == "reward":
        return _of_reward(encode, start, end, lengths)
    words = inputs.pairwise_template(encode)
    reads = (
        (*start, *words.instruction),
        "x",
        words.before_first,
        "y",
        words.before_second,
        "y'",
        (*words.end, *end),
        "y",
    )
    return Scoring(description.kind, words.answer_id, reads, *lengths)


def _of_reward(
    encode: Callable[[str], Sequence[int]],
    start: tuple[int, ...],
    end: tuple[int, ...],
    lengths: tuple[int, int],
) -> Scoring:
    words = inputs.reward_template(encode)
    reads = ((*start, *words.context), "x", words.before_response, "y", end, "y")
    return Scoring("reward", words.answer_id, reads, *lengths)


def in_words(weights: Weights) -> str:
    """Returns paragraphs that say how a judge's numbers come about."""
    found = weights.scoring
    parts = [part if isinstance(part, str) else str(list(part)) for part in found.reads]
    padding = ""
    if hugging_face_judges.is_classifier(weights):
        score = "The score is the one number of sequence classification"
        padding = _on_padding(weights.settings.pad_id)
    else:
        score = f"The score is the logit of id {found.answer_id} after the last token"
    where = "It reads the ids"
    if not isinstance(weights.settings, DecoderOnlySettings):
        *parts, last = parts
        where = f"Its decoder reads {last} after the start id, its encoder the ids"
    return (
        f"It is a {found.kind} model. {where} {' + '.join(parts)}, where x is the "
        "prompt and y the response, without their end and beginning ids. "
        f"{score}. {FORMULAS[found.kind]}\n"
        f"{_on_lengths(found)}{_on_prompts(weights)}{padding}"
    )


def _on_lengths(found: Scoring) -> str:
    return (
        f"Of a prompt only the first {found.prompt_length} tokens are read, all that "
        "stands around its text counted; in training a longer one lost the end of its "
        "text and kept what stands after it. A response has at most "
        f"{found.response_length} tokens, its end counted: a longer one is not "
        "scored.\n"
    )


def _on_prompts(weights: Weights) -> str:
    """Returns how the prompt's text becomes x."""
    put = weights.chat_template
    if put is None:
        return "Whether x was put in a chat template in training is not recorded.\n"
    if put == folders.NO_TEMPLATE:
        return "x is the prompt as it is, in no chat template.\n"
    said = f"the system prompt {weights.system_prompt!r}"
    return (
        "x is the prompt in the tokenizer's chat template, as the user's turn, with "
        f"{said if weights.system_prompt else 'no system prompt'} before it and the "
        "beginning of the answer's turn after it.\n"
    )


def _on_padding(pad_id: int) -> str:
    """Returns what rows of different lengths need where the last token is pooled."""
    return (
        f"Rows of different lengths are padded with id {pad_id} (pad_token_id), at the "
        "right, or at the left with an attention mask. The score is taken at a row's "
        f"last id that is not {pad_id}, so what is read must not end in it: a row that "
        "does is read by itself, with pad_token_id None.\n"
    )
