# SPDX-License-Identifier: Apache-2.0
"""Small decoder-only networks of every family, and one in plain numpy beside them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.types import PromptBatch

VOCAB, BATCH, PROMPT, LENGTH = 60, 3, 7, 6


def shape(num_layers: int = 2, **switches) -> DecoderOnlySettings:
    """Returns a network of width 16 with four heads of six numbers."""
    widths = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6} | switches
    return DecoderOnlySettings(
        vocab_size=VOCAB, emb_dim=16, mlp_dim=20, num_layers=num_layers, **widths
    )


GEMMA = {
    "activation": "gelu",
    "tied_output": True,
    "norm_plus_one": True,
    "scale_embedding": True,
}
FAMILIES = {
    "llama_2": shape(num_kv_heads=4, norm_epsilon=1e-5),
    "llama_3": shape(
        rope_base=500.0,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_low_frequency_factor=1.0,
        rope_high_frequency_factor=3.0,
        rope_original_length=30,
    ),
    "gemma_1": shape(num_kv_heads=1, **GEMMA),
    "gemma_2": shape(
        num_layers=3,
        post_norms=True,
        query_scalar=10.0,
        attention_soft_cap=0.8,
        logit_soft_cap=1.5,
        attention_pattern=("local", "global"),
        sliding_window=3,
        **GEMMA,
    ),
    "gemma_3": shape(
        num_layers=4,
        post_norms=True,
        query_key_norm=True,
        query_scalar=10.0,
        attention_pattern=("local", "local", "global"),
        sliding_window=4,
        rope_base=1000.0,
        local_rope_base=50.0,
        rope_scaling="linear",
        rope_factor=8.0,
        **GEMMA,
    ),
    "qwen_2": shape(query_key_value_bias=True, tied_output=True),
    "qwen_3": shape(query_key_norm=True, head_dim=10),
    "biases": shape(
        activation="gelu_exact",
        query_key_value_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
}


@functools.cache
def parameters(settings: DecoderOnlySettings):
    """Returns random parameters; norms and biases are neither all 0 nor all 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":
            factor = rng.uniform(0.5, 1.5, leaf.shape) - settings.norm_plus_one
            return jnp.asarray(factor, jnp.float32)
        # So that logits are of the size of 1, tied or not.
        stddev = leaf.shape[path[-1].key == "embedding"] ** -0.5
        return jnp.asarray(rng.normal(0.0, stddev, leaf.shape), jnp.float32)

    init = decoder_only_language_model(settings).init
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_prompts(width: int = PROMPT) -> PromptBatch:
    """Returns prompts of `width`, 4 and 1 tokens, padded to `width`."""
    tokens_BS = np.random.default_rng(1).integers(2, VOCAB, (BATCH, width))
    mask_BS = np.arange(width)[None, :] < np.array([[width], [4], [1]])
    tokens_BS = np.where(mask_BS, tokens_BS, 0).astype(np.int32)
    return PromptBatch(jnp.asarray(tokens_BS), jnp.asarray(mask_BS))


def random_responses(seed: int = 2, length: int = LENGTH):
    """Returns token ids from 2 on, [B, length]."""
    tokens_BT = np.random.default_rng(seed).integers(2, VOCAB, (BATCH, length))
    return jnp.asarray(tokens_BT, jnp.int32)


# A forward pass in plain numpy, one sequence, one head and one position at a time.


def turned(vector_K, position: int, base: float, factor_E):
    """Turns pair i by position * base^(-2 i / K) * factor_i, as complex numbers."""
    half = len(vector_K) // 2
    pairs_E = vector_K[:half] + 1j * vector_K[half:]
    angles_E = position * base ** (-2 * np.arange(half) / len(vector_K)) * factor_E
    pairs_E = pairs_E * np.exp(1j * angles_E)
    return np.concatenate([pairs_E.real, pairs_E.imag])


def rope_of(s: DecoderOnlySettings, is_local: bool):
    """Returns (base, what each frequency is multiplied by)."""
    half = s.head_dim // 2
    if is_local and s.local_rope_base:
        return s.local_rope_base, np.ones(half)
    if s.rope_scaling != "llama3":
        return s.rope_base, np.full(half, 1 / s.rope_factor)
    factors = []
    for i in range(half):
        wave = 2 * math.pi * s.rope_base ** (2 * i / s.head_dim)
        if wave < s.rope_original_length / s.rope_high_frequency_factor:
            factors.append(1.0)
        elif wave > s.rope_original_length / s.rope_low_frequency_factor:
            factors.append(1 / s.rope_factor)
        else:
            width = s.rope_high_frequency_factor - s.rope_low_frequency_factor
            share = (
                s.rope_original_length / wave - s.rope_low_frequency_factor
            ) / width
            factors.append((1 - share) / s.rope_factor + share)
    return s.rope_base, np.array(factors)


def _norm(s, x, scale):
    scale = 1 + scale if s.norm_plus_one else scale
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + s.norm_epsilon) * scale


def _dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def _capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def _activation(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _attention(s, p, x, is_local):
    size, base_and_factor = len(x), rope_of(s, is_local)

    def heads(name):
        out = _dense(p[name], x).reshape(size, -1, s.head_dim)
        if s.query_key_norm and name != "value":
            out = _norm(s, out, p[f"{name}_norm"]["scale"])
        return out

    q, k, v = (heads(name) for name in ("query", "key", "value"))
    read = np.zeros((size, s.num_heads, s.head_dim))
    for head in range(s.num_heads):
        shared = head // (s.num_heads // s.num_kv_heads)
        for i in range(size):
            first = max(0, i - s.sliding_window + 1) if is_local else 0
            query = turned(q[i, head], i, *base_and_factor)
            logits = np.array(
                [
                    query @ turned(k[j, shared], j, *base_and_factor)
                    for j in range(first, i + 1)
                ]
            )
            logits = logits / math.sqrt(s.query_scalar or s.head_dim)
            weights = np.exp(_capped(logits, s.attention_soft_cap))
            weights = weights / weights.sum()
            read[i, head] = weights @ v[first : i + 1, shared]
    return _dense(p["out"], read.reshape(size, -1))


def numpy_logits(params, s: DecoderOnlySettings, prompt, response):
    """Logits of one unpadded prompt and response, float64, [T, V]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    table = p["token_embedder"]["embedding"]
    x = table[[*prompt, *response[:-1]]]
    x = x * math.sqrt(s.emb_dim) if s.scale_embedding else x
    for index in range(s.num_layers):
        q = p[f"layers_{index}"]
        is_local = s.attention_pattern[index % len(s.attention_pattern)] == "local"
        h = _norm(s, x, q["pre_attention_norm"]["scale"])
        h = _attention(s, q["attention"], h, is_local)
        x = x + (_norm(s, h, q["post_attention_norm"]["scale"]) if s.post_norms else h)
        h, mlp = _norm(s, x, q["pre_mlp_norm"]["scale"]), q["mlp"]
        gate = _activation(s.activation, _dense(mlp["wi_0"], h))
        h = _dense(mlp["wo"], gate * _dense(mlp["wi_1"], h))
        x = x + (_norm(s, h, q["post_mlp_norm"]["scale"]) if s.post_norms else h)
    x = _norm(s, x, p["final_norm"]["scale"])[len(prompt) - 1 :]
    logits = x @ table.T if s.tied_output else x @ p["logits_dense"]["kernel"]
    return _capped(logits, s.logit_soft_cap)
