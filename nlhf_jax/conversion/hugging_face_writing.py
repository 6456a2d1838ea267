# SPDX-License-Identifier: Apache-2.0
"""Our settings as a Hugging Face `config.json`, of the family that has their switches.

A family is taken if what is written for it is read again as the same network, so a
switch that a family lacks is never lost on the way.
"""

import dataclasses
from typing import Any

from nlhf_jax.checks import UserError
from nlhf_jax.conversion.hugging_face_config import (
    ACTIVATIONS,
    SIZES,
    settings_from_config,
    shortest_pattern,
)
from nlhf_jax.conversion.t5_config import config_of_t5
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
THEIR_KINDS = {"local": "sliding_attention", "global": "full_attention"}
ROPE_DEFAULTS = {
    "rope_low_frequency_factor": 1.0,
    "rope_high_frequency_factor": 4.0,
    "rope_original_length": 8192,
}


def config_of(settings: ModelSettings, max_positions: int) -> dict[str, Any]:
    """Returns the content of a `config.json` that describes a network.

    Rotary positions are written as files before transformers 5 have them, which both
    old and new versions read.

    Args:
      settings: the network.
      max_positions: tokens of prompt and response that it is meant for.

    Raises:
      UserError: no family has all switches as they are; names the nearest family and
        the first switch that it lacks.
    """
    if not isinstance(settings, DecoderOnlySettings):
        return config_of_t5(settings)
    wanted = plain(settings)
    wrong: dict[str, list[str]] = {}
    for family in ARCHITECTURES:
        config = _written(family, wanted, max_positions)
        try:
            found = plain(settings_from_config(config))
        except UserError as error:
            wrong[family] = [str(error)] * len(dataclasses.fields(wanted))
            continue
        if found == wanted:
            return config
        wrong[family] = [
            f"{field.name} {getattr(found, field.name)!r}, and this network has "
            f"{getattr(wanted, field.name)!r}"
            for field in dataclasses.fields(wanted)
            if getattr(found, field.name) != getattr(wanted, field.name)
        ]
    family = min(wrong, key=lambda name: len(wrong[name]))
    raise UserError(
        f"no Hugging Face family has this network's switches: {family}, the nearest, "
        f"has {wrong[family][0]}"
    )


def plain(settings: DecoderOnlySettings) -> DecoderOnlySettings:
    """Returns the settings of the same network whose unread switches are the defaults.

    The dtype of activations, which is no matter of a file, is float32.
    """
    kinds = ["local" if local else "global" for local in settings.is_local]
    same: dict[str, Any] = {
        "dtype": "float32",
        "attention_pattern": shortest_pattern(kinds),
    }
    if settings.query_scalar == settings.head_dim:
        same["query_scalar"] = 0.0
    if settings.rope_factor == 1.0 and settings.rope_scaling != "llama3":
        same["rope_scaling"] = "none"
    scaling = same.get("rope_scaling", settings.rope_scaling)
    if scaling != "llama3":
        same |= ROPE_DEFAULTS
    if scaling == "none":
        same["rope_factor"] = 1.0
    is_same_base = scaling == "none" and settings.local_rope_base == settings.rope_base
    if is_same_base or not any(settings.is_local):
        same["local_rope_base"] = 0.0
    return dataclasses.replace(settings, **same)


def _written(
    family: str, settings: DecoderOnlySettings, max_positions: int
) -> dict[str, Any]:
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.head_dim,
        "rms_norm_eps": settings.norm_epsilon,
        "tie_word_embeddings": settings.tied_output,
        "max_position_embeddings": max_positions,
        "pad_token_id": settings.pad_id,
        "eos_token_id": settings.eos_id,
    }
    config |= {theirs: getattr(settings, ours) for theirs, ours in SIZES.items()}
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    key = "hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act"
    config[key] = activation[settings.activation]
    if family not in ("qwen2", "mistral"):
        config["attention_bias"] = settings.output_bias
    if family == "llama":
        config["mlp_bias"] = settings.mlp_bias
    if family in ("gemma2", "gemma3_text"):
        scalar = settings.query_scalar or settings.head_dim
        config["query_pre_attn_scalar"] = int(scalar) if scalar % 1 == 0 else scalar
    if family == "gemma2":
        config["attn_logit_softcapping"] = settings.attention_soft_cap or None
        config["final_logit_softcapping"] = settings.logit_soft_cap or None
    return config | _window(family, settings) | _rope(family, settings)


def _window(family: str, settings: DecoderOnlySettings) -> dict[str, Any]:
    window = settings.sliding_window or None
    if family == "mistral":
        return {"sliding_window": window}
    kinds = [THEIR_KINDS["local" if local else "global"] for local in settings.is_local]
    if family in ("gemma2", "gemma3_text"):
        return {"sliding_window": window or 4096, "layer_types": kinds}
    if not family.startswith("qwen") or window is None:
        return {}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": (*settings.is_local, True).index(True),
        "layer_types": kinds,
    }


def _rope(family: str, settings: DecoderOnlySettings) -> dict[str, Any]:
    config: dict[str, Any] = {"rope_theta": settings.rope_base}
    if family == "gemma3_text":
        config["rope_local_base_freq"] = settings.local_rope_base or settings.rope_base
    if settings.rope_scaling == "none":
        return config
    scaling = {"rope_type": settings.rope_scaling, "factor": settings.rope_factor}
    if settings.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": settings.rope_low_frequency_factor,
            "high_freq_factor": settings.rope_high_frequency_factor,
            "original_max_position_embeddings": settings.rope_original_length,
        }
    return config | {"rope_scaling": scaling}
