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

    def encode(text: str) -> Sequence[int]:
        return vocabularies.encode(text, vocabulary)

    if description.kind == "reward":
        return _of_reward(encode, start, end)
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
    return Scoring(description.kind, words.answer_id, reads)


def _of_reward(
    encode: Callable[[str], Sequence[int]], start: tuple[int, ...], end: tuple[int, ...]
) -> Scoring:
    words = inputs.reward_template(encode)
    reads = ((*start, *words.context), "x", words.before_response, "y", end, "y")
    return Scoring("reward", words.answer_id, reads)


def in_words(weights: Weights) -> str:
    """Returns a paragraph that says how a judge's numbers come about."""
    found = weights.scoring
    parts = [part if isinstance(part, str) else str(list(part)) for part in found.reads]
    if hugging_face_judges.is_classifier(weights):
        score = "The score is the one number of sequence classification"
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
    )
