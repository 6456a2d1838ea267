# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's `config.json` of decoder-only models as our settings.

A key that is absent has its family's default; one that is null says "none". What our
network has no switch for (other rotary scalings, activations, families) is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nlhf_jax.checks import UserError, check_choice, check_integer, check_range
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.t5_settings import LARGEST_LAYERS

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
GEMMA = {"norm_plus_one": True, "scale_embedding": True}
# model_type -> what no key of its config says.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "gemma": GEMMA,
    "gemma2": {"post_norms": True} | GEMMA,
    "gemma3_text": {"post_norms": True, "query_key_norm": True} | GEMMA,
    "qwen2": {"query_key_value_bias": True},
    "qwen3": {"query_key_norm": True},
}
SILU = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
GELU = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
# Keys that are left out of a config where they have their default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": SILU,
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8} | SILU,
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28} | SILU,
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128} | SILU,
    "gemma": {"hidden_act": "gelu_pytorch_tanh"} | GELU,
    "gemma2": dict(GELU),
    "gemma3_text": dict(GELU),
}
DEFAULTS["gemma2"] |= {
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
}
DEFAULTS["gemma3_text"] |= {
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
# Families with a window unless their config has null for it.
WINDOWED = ("mistral", "gemma2", "gemma3_text")
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "emb_dim",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
}


def settings_from_config(
    config: Mapping[str, Any], *, pad_id: int | None = None, eos_id: int | None = None
) -> DecoderOnlySettings:
    """Returns the settings of the network that a `config.json` describes.

    Args:
      config: the file's content; of old files and of those that transformers 5 writes.
      pad_id: fills the padding; None takes the file's, else 0.
      eos_id: ends a response; None takes the file's, the first if there are several.

    Raises:
      UserError: another family, a size that is missing, or a switch our network does
        not have.
    """
    family = check_choice("model_type", config.get("model_type", ""), FAMILIES)
    config = DEFAULTS[family] | dict(config)
    config = {key: value for key, value in config.items() if value is not None}
    for key in SIZES:
        if key not in config:
            raise UserError(f"config.json must have the key {key!r}, got none")
    if config.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention must be false, got true")
    layers = check_integer("num_hidden_layers", config["num_hidden_layers"], 1)
    check_range("num_hidden_layers", layers, 1, LARGEST_LAYERS)
    heads = check_integer("num_attention_heads", config["num_attention_heads"], 1)
    epsilon = check_range("rms_norm_eps", config["rms_norm_eps"], 0, high_open=True)
    bias = bool(config.get("attention_bias", False))
    said = {
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim", config["hidden_size"] // heads),
        "activation": _activation(family, config),
        "tied_output": bool(config.get("tie_word_embeddings", False)),
        "query_key_value_bias": bias and family != "qwen2",
        "output_bias": bias and family != "qwen2",
        "mlp_bias": family == "llama" and bool(config.get("mlp_bias", False)),
        "norm_epsilon": float(epsilon),
        "query_scalar": float(config.get("query_pre_attn_scalar", 0.0)),
        "attention_soft_cap": float(config.get("attn_logit_softcapping", 0.0)),
        "logit_soft_cap": float(config.get("final_logit_softcapping", 0.0)),
        "pad_id": _id(pad_id, config.get("pad_token_id"), 0),
        "eos_id": _id(eos_id, config.get("eos_token_id"), 1),
    }
    sizes = {ours: config[theirs] for theirs, ours in SIZES.items()}
    said |= _pattern(family, config) | _rope(config) | FAMILIES[family]
    return DecoderOnlySettings(**sizes, **said)


def _activation(family: str, config: Mapping[str, Any]) -> str:
    key = "hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act"
    named = config.get(key, "")
    if family == "gemma" and named in ("", "gelu"):
        # Its first files say "gelu", or nothing, and mean the other.
        named = "gelu_pytorch_tanh"
    return ACTIVATIONS[check_choice(key, named, ACTIVATIONS)]


def _id(given: int | None, found: Any, otherwise: int) -> int:
    if given is not None:
        return given
    if isinstance(found, list | tuple):
        found = found[0] if found else None
    if found is None:
        return otherwise
    if isinstance(found, bool) or not isinstance(found, int):
        raise UserError(f"special tokens must be named by their ids, got {found!r}")
    return found


def _kinds(family: str, config: Mapping[str, Any]) -> list[str]:
    """Returns "local" or "global" for each layer."""
    num_layers = config["num_hidden_layers"]
    named = {"sliding_attention": "local", "full_attention": "global"}
    if "layer_types" in config:
        kinds = [check_choice("layer_types", k, named) for k in config["layer_types"]]
        if len(kinds) != num_layers:
            raise UserError(
                f"layer_types must name {num_layers} layers, got {len(kinds)}"
            )
        return [named[kind] for kind in kinds]
    if family == "mistral":
        return ["local"] * num_layers
    if family.startswith("qwen"):
        first = config["max_window_layers"]
        return ["local" if i >= first else "global" for i in range(num_layers)]
    every = check_integer("sliding_window_pattern", config["sliding_window_pattern"], 1)
    return ["local" if (i + 1) % every else "global" for i in range(num_layers)]


def _pattern(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    has_window = family in WINDOWED or config.get("use_sliding_window")
    has_window = has_window and "sliding_window" in config
    kinds = _kinds(family, config) if has_window else ["global"]
    if "local" not in kinds:
        return {}
    return {
        "attention_pattern": shortest_pattern(kinds),
        "sliding_window": config["sliding_window"],
    }


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns the shortest beginning whose repetition names all layers."""
    length = next(
        n
        for n in range(1, len(kinds) + 1)
        if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
    )
    return tuple(kinds[:length])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings, of whichever of the three ways they are written."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key, {}), Mapping):
            raise UserError(f"{key} must be an object, got {config[key]!r:.80}")
    found = config.get("rope_parameters") or {}
    local: dict[str, Any] = {}
    if "full_attention" in found:
        found, local = found["full_attention"], found.get("sliding_attention") or {}
    for part in (found, local):
        if not isinstance(part, Mapping):
            raise UserError(f"rope_parameters must hold objects, got {part!r:.80}")
    found = config.get("rope_scaling") or found
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta", config.get("rope_theta", 10_000.0))
    check_choice("rope_type", kind, ("default", "linear", "llama3"))
    local_kind = local.get("rope_type", "default")
    check_choice("rope_type of local layers", local_kind, ("default",))
    share = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))
    if share != 1:
        raise UserError(f"partial_rotary_factor must be 1, got {share!r}")
    local_theta = local.get("rope_theta", config.get("rope_local_base_freq", 0.0))
    settings = {"rope_base": float(theta), "local_rope_base": float(local_theta)}
    if kind == "default":
        return settings
    settings |= {"rope_scaling": kind, "rope_factor": float(found["factor"])}
    if kind == "llama3":
        settings |= {
            "rope_low_frequency_factor": float(found["low_freq_factor"]),
            "rope_high_frequency_factor": float(found["high_freq_factor"]),
            "rope_original_length": int(found["original_max_position_embeddings"]),
        }
    return settings
