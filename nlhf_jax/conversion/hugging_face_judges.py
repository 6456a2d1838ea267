# SPDX-License-Identifier: Apache-2.0
"""Judges as Hugging Face's sequence classification, where a family has it exactly.

Theirs applies a linear layer `score` to the hidden state of the last token that is not
`pad_token_id`, which several rows at once need. Our score is one
row of the output layer there, which so becomes that layer. T5's class has more layers
than one, and none caps its logits (Gemma 2): such a judge stays text to text.
"""

from collections.abc import Mapping
from typing import Any

from nlhf_jax.conversion.hugging_face import their_name
from nlhf_jax.conversion.hugging_face_writing import ARCHITECTURES
from nlhf_jax.conversion.tensors import Tensor, Weights
from nlhf_jax.decoder_settings import DecoderOnlySettings

TEXT, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
# Where the class of a model_type has another name than its language model's.
NAMES = {"gemma3_text": "Gemma3Text"}
OUTPUT, SCORE = "lm_head.weight", "score.weight"


def is_classifier(weights: Weights) -> bool:
    """Returns whether weights are a judge that such a class holds exactly."""
    settings = weights.settings
    is_decoder_only = isinstance(settings, DecoderOnlySettings)
    return (
        weights.scoring is not None and is_decoder_only and not settings.logit_soft_cap
    )


def as_classifier(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Weights
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the configuration and tensors of a judge as sequence classification.

    Args:
      config: of the language model with the same network.
      tensors: of that, by their names.
      weights: of which `is_classifier`.
    """
    table = their_name("token_embedder/embedding", weights.settings)
    output, row = tensors.get(OUTPUT, tensors[table]), weights.scoring.answer_id
    kept = {name: tensor for name, tensor in tensors.items() if name != OUTPUT}
    shape = (1, output.shape[1])
    kept[SCORE] = Tensor(shape, output.dtype, lambda: output.read()[row : row + 1])
    # A kept configuration may name no class, or several, or other labels.
    family = config["model_type"]
    name = NAMES.get(family, ARCHITECTURES[family].removesuffix(TEXT))
    label = "SCORE"
    changed = {
        "architectures": [f"{name}{CLASSIFIER}"],
        "id2label": {"0": label},
        "label2id": {label: 0},
        "pad_token_id": weights.settings.pad_id,
    }
    said = {key: value for key, value in config.items() if key != "num_labels"}
    return said | changed, kept
