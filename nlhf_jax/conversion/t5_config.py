# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's `config.json` of T5 1.0, 1.1, FLAN-T5, mT5 and ByT5 as our settings.

Theirs scales the decoder's output by D^-1/2 where input and output share a table (T5
1.0), as ours does, and has no such scale where they do not (1.1 and what came after).
"""

from collections.abc import Mapping
from typing import Any

from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.models.layers import MAX_DISTANCE, NORM_EPSILON, NUM_BUCKETS
from nlhf_jax.models.t5 import EOS_ID, PAD_ID, START_ID
from nlhf_jax.t5_settings import T5Settings

T5, MT5 = "t5", "mt5"
FAMILIES = (T5, MT5)
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_layers": "num_encoder_layers",
}
ACTIVATIONS = {
    "relu": ("relu",),
    "gated-relu": ("relu", "linear"),
    # Their "gelu" of gates is the one by tanh, as ours.
    "gated-gelu": ("gelu", "linear"),
}
# What the network has no switch for: key -> the value it must have.
FIXED = {
    "relative_attention_num_buckets": NUM_BUCKETS,
    "relative_attention_max_distance": MAX_DISTANCE,
    "layer_norm_epsilon": NORM_EPSILON,
    "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "decoder_start_token_id": START_ID,
}


def t5_settings(config: Mapping[str, Any]) -> T5Settings:
    """Returns the settings of the network that a `config.json` describes.

    Raises:
      UserError: a size that is missing, or a switch our network does not have.
    """
    config = {key: value for key, value in config.items() if value is not None}
    family = check_choice("model_type", config.get("model_type", ""), FAMILIES)
    for key in SIZES:
        if key not in config:
            raise UserError(f"config.json must have the key {key!r}, got none")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} must be {value}, got {config[key]!r}")
    default = "gated-gelu" if family == MT5 else "relu"
    named = config.get("feed_forward_proj", default)
    activations = ACTIVATIONS[check_choice("feed_forward_proj", named, ACTIVATIONS)]
    return T5Settings(
        **{ours: config[theirs] for theirs, ours in SIZES.items()},
        num_decoder_layers=config.get("num_decoder_layers", config["num_layers"]),
        mlp_activations=activations,
        logits_via_embedding=is_scaled(config),
        dropout_rate=float(config.get("dropout_rate", 0.1)),
    )


def is_scaled(config: Mapping[str, Any]) -> bool:
    """Whether the decoder's output is scaled before the output layer.

    transformers 5 always ties, and writes the scale as a key of its own; before, the
    one followed from the other. mT5 is never scaled.
    """
    if config["model_type"] == MT5:
        return False
    tied = config.get("tie_word_embeddings") is not False
    return bool(config.get("scale_decoder_outputs", tied))


def may_share_table(config: Mapping[str, Any]) -> bool:
    """Whether a file without an output layer means that the embedding is it, unscaled.

    transformers 5 writes such files: it ties what is equal.
    """
    if is_scaled(config):
        return False
    return config["model_type"] == MT5 or config.get("tie_word_embeddings") is not False


def config_of_t5(settings: T5Settings) -> dict[str, Any]:
    """Returns the content of a `config.json` that describes a T5.

    Raises:
      UserError: its activations are none of theirs, or its layers have biases.
    """
    if settings.bias_in_each_layer:
        raise UserError(
            "bias_in_each_layer must be False for Hugging Face's T5, whose stacks have "
            "one relative bias each, got True; --format=t5x holds such a network"
        )
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if settings.mlp_activations not in names:
        raise UserError(
            f"mlp_activations must be one of {', '.join(map(str, names))} for Hugging "
            f"Face's T5, got {settings.mlp_activations}"
        )
    config = {theirs: getattr(settings, ours) for theirs, ours in SIZES.items()}
    return (
        config
        | FIXED
        | {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": T5,
            "is_encoder_decoder": True,
            "num_decoder_layers": settings.num_decoder_layers,
            "feed_forward_proj": names[settings.mlp_activations],
            "tie_word_embeddings": settings.logits_via_embedding,
            "dropout_rate": settings.dropout_rate,
        }
    )
