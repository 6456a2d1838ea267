# SPDX-License-Identifier: Apache-2.0
"""What texts may have become as tokens, checked before anything is trained on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nlhf_jax.checks import UserError
from nlhf_jax.data.vocabularies import Vocabulary, decode


def check_ids(
    examples: Sequence[Mapping[str, Any]],
    features: Sequence[str],
    vocabulary: Vocabulary,
    where: str,
) -> None:
    """Checks that each text has a token, and its end at its end and nowhere else.

    A text of padding alone would be trained on as an empty one, and what stands after
    an end is never decoded.

    Raises:
      UserError: names the example, counted from 1, and the feature.
    """
    for number, example in enumerate(examples, 1):
        for feature in features:
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
