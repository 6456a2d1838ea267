# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF file as our settings: Llama, Gemma and Qwen models.

A key stands under its architecture's name, `llama.block_count`. What the file does not
say although the network needs it (Gemma's windows, Llama 3's frequencies) is taken as
llama.cpp takes it, for which the files are made.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.models.rotary import plain_frequencies, stretched

GEMMA = {"norm_plus_one": True, "scale_embedding": True, "activation": "gelu"}
# general.architecture -> what its metadata leaves unsaid.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"post_norms": True},
    "gemma3": GEMMA | {"post_norms": True, "query_key_norm": True},
    "qwen2": {},
    "qwen3": {"query_key_norm": True},
}
# Every how many layers one reads all positions; the largest have another query scale.
PATTERNS = {"gemma2": 2, "gemma3": 6}
LARGEST_LAYERS = {"gemma2": 46, "gemma3": 62}
LOCAL_ROPE_BASE = {"gemma3": 10_000.0}
SOFT_CAPS = {"gemma2": (50.0, 30.0)}
# The released Llama 3.1, 3.2 and 3.3 have these; the file holds their effect alone.
LLAMA_3 = {
    "rope_scaling": "llama3",
    "rope_low_frequency_factor": 1.0,
    "rope_high_frequency_factor": 4.0,
    "rope_original_length": 8192,
}


def settings_of(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    rope_factors_E: Float[np.ndarray, "E"] | None = None,
) -> DecoderOnlySettings:
    """Returns the settings of the network that a GGUF file holds.

    Args:
      metadata: the file's, by key.
      tensors: shapes by the file's names; biases and an output layer of its own are
        there or not.
      rope_factors_E: what wave lengths are stretched by (`rope_freqs.weight`).

    Raises:
      UserError: another architecture, a key that is missing, or something that our
        network has no switch for.
    """
    name = str(metadata.get("general.architecture", ""))
    check_choice("general.architecture", name, ARCHITECTURES)
    keys = _Keys(metadata, name)
    if keys.get("expert_count", 0):
        raise UserError(
            f"{name}.expert_count must be 0, since mixtures of experts cannot be read, "
            f"got {keys.get('expert_count', 0)}"
        )
    num_heads, emb_dim = (
        keys.number("attention.head_count"),
        keys.number("embedding_length"),
    )
    head_dim = keys.number("attention.key_length", emb_dim // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.number(key, head_dim) != head_dim:
            raise UserError(
                f"{name}.{key} must be {head_dim}, the width of a head, got "
                f"{keys.number(key, head_dim)}"
            )
    if "token_embd.weight" not in tensors:
        raise UserError("tensor token_embd.weight is missing")
    said = {
        "vocab_size": tensors["token_embd.weight"][0],
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "num_kv_heads": keys.number("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "mlp_dim": keys.number("feed_forward_length"),
        "num_layers": keys.number("block_count"),
        "norm_epsilon": keys.real("attention.layer_norm_rms_epsilon"),
        "pad_id": _token(metadata, "padding", 0),
        "eos_id": _token(metadata, "eos", 1),
    }
    _check_depth(f"{name}.block_count", said["num_layers"], tensors)
    said |= ARCHITECTURES[name] | _by_tensors(tensors) | _attention(keys, said)
    return DecoderOnlySettings(**said | _rope(keys, head_dim, rope_factors_E))


class _Keys:
    """The keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.architecture = architecture
        self._metadata = metadata

    def get(self, key: str, otherwise: Any = None) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}", otherwise)

    def real(self, key: str, otherwise: float | None = None) -> float:
        found = self.get(key, otherwise)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise UserError(
                f"{self.architecture}.{key} must be one number, got "
                f"{'none' if found is None else repr(found)[:80]}"
            )
        # Files hold float32, people mean the shortest number that rounds to it.
        return float(str(np.float32(found)))

    def number(self, key: str, otherwise: int | None = None) -> int:
        found = self.get(key, otherwise)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise UserError(
                f"{self.architecture}.{key} must be one integer of at least 1, got "
                f"{'none' if found is None else repr(found)[:80]}"
            )
        return found


def _token(metadata: Mapping[str, Any], role: str, otherwise: int) -> int:
    found = metadata.get(f"tokenizer.ggml.{role}_token_id")
    # Where a number may not be negative, -1 for "none" is the largest.
    is_none = not isinstance(found, int) or found == 2**32 - 1
    return otherwise if is_none else found


def _check_depth(key: str, num_layers: int, tensors: Collection[str]) -> None:
    matches = [re.match(r"blk\.(\d+)\.", name) for name in tensors]
    found = len({match[1] for match in matches if match})
    if found < num_layers:
        raise UserError(
            f"{key} must be {found}, since the file has tensors of so many layers, got "
            f"{num_layers}"
        )


def _by_tensors(tensors: Collection[str]) -> dict[str, Any]:
    return {
        "tied_output": "output.weight" not in tensors,
        "query_key_value_bias": "blk.0.attn_q.bias" in tensors,
        "output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _attention(keys: _Keys, said: Mapping[str, Any]) -> dict[str, Any]:
    """Returns caps, scale and windows of the architectures that have them."""
    name, settings = keys.architecture, {}
    if name in SOFT_CAPS:
        of_attention, of_output = SOFT_CAPS[name]
        settings = {
            "attention_soft_cap": keys.real("attn_logit_softcapping", of_attention),
            "logit_soft_cap": keys.real("final_logit_softcapping", of_output),
        }
    if LARGEST_LAYERS.get(name) == said["num_layers"]:
        settings["query_scalar"] = said["emb_dim"] / said["num_heads"]
    if name in PATTERNS:
        every = keys.number("attention.sliding_window_pattern", PATTERNS[name])
        settings["sliding_window"] = keys.number("attention.sliding_window")
        settings["attention_pattern"] = ("local",) * (every - 1) + ("global",)
        if said["num_layers"] < every:
            settings["attention_pattern"] = ("local",) * said["num_layers"]
    return settings


# --- rotary positions


def _rope(
    keys: _Keys, head_dim: int, factors_E: Float[np.ndarray, "E"] | None
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "rope_base": keys.real("rope.freq_base", 10_000.0),
        "local_rope_base": LOCAL_ROPE_BASE.get(keys.architecture, 0.0),
    }
    kind = keys.get("rope.scaling.type", "none")
    # Long ago the factor stood alone, and another key named it.
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
    check_choice(f"{keys.architecture}.rope.scaling.type", kind, ("linear", "none"))
    if factors_E is not None:
        return settings | _llama_3(settings["rope_base"], head_dim, factors_E)
    if factor != 1.0:
        settings |= {"rope_scaling": "linear", "rope_factor": factor}
    return settings


def _llama_3(
    base: float, head_dim: int, factors_E: Float[np.ndarray, "E"]
) -> dict[str, Any]:
    """Returns the scaling whose effect `rope_freqs.weight` is.

    Raises:
      UserError: no scaling that our network has does that.
    """
    settings = LLAMA_3 | {"rope_factor": float(np.max(factors_E, initial=1.0))}
    plain_E = plain_frequencies(head_dim, base)
    probe = DecoderOnlySettings(2, 2, 1, 1, head_dim, 1, 1, rope_base=base, **settings)
    wanted_E = plain_E / stretched(plain_E, probe)
    if factors_E.shape != wanted_E.shape or not np.allclose(
        factors_E, wanted_E, rtol=1e-4
    ):
        raise UserError(
            "tensor rope_freqs.weight must hold the factors of Llama 3.1 to 3.3 (low "
            f"1, high 4, of 8192 positions), got {_few(factors_E)}"
        )
    return settings


def _few(factors_E: Float[np.ndarray, "E"]) -> str:
    return re.sub(r"\s+", " ", np.array2string(factors_E, threshold=6, edgeitems=3))
