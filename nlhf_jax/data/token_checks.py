# SPDX-License-Identifier: Apache-2.0
"""What texts may have become as tokens, checked before anything is trained on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nlhf_jax.checks import UserError
from nlhf_jax.data.prompts import PromptFormat
from nlhf_jax.data.vocabularies import Vocabulary, decode


def check_ids(
    examples: Sequence[Mapping[str, Any]],
    features: Sequence[str],
    vocabulary: Vocabulary,
    where: str,
    form: PromptFormat,
) -> None:
    """Checks that each text has a token, and its end at its end and nowhere else.

    A text of padding alone would be trained on as an empty one, and what stands after
    an end is never decoded. A prompt in a chat template ends turns inside it.

    Raises:
      UserError: names the example, counted from 1, and the feature.
    """
    for number, example in enumerate(examples, 1):
        for feature in features:
            if feature == "inputs" and not form.is_plain:
                _check_prompt(example[feature], form, f"{where}, example {number}")
                continue
            ids = np.asarray(example[feature])
            inner = ids[:-1] if len(ids) and ids[-1] == vocabulary.eos_id else ids
            fault = ""
            if not (inner != vocabulary.pad_id).any():
                fault = "has no token besides padding and the end of a sequence"
            elif (inner == vocabulary.eos_id).any():
                fault = "has the end of a sequence before its end"
            if fault:
                text = decode(inner, vocabulary)[:60]
                raise UserError(
                    f"{where}: {feature!r} of example {number} {fault}: {text!r}"
                )


def _check_prompt(ids: np.ndarray, form: PromptFormat, where: str) -> None:
    if len(ids) <= form.num_before + form.num_after:
        raise UserError(f"{where}: its prompt has no token besides those around it")
