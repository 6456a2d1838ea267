# SPDX-License-Identifier: Apache-2.0
"""Small T5 networks with random weights, and a T5 in plain numpy to hold them to."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import PromptBatch

T5_1_1 = T5Settings(
    vocab_size=61,
    emb_dim=8,
    num_heads=2,
    head_dim=3,
    mlp_dim=10,
    num_encoder_layers=1,
    num_decoder_layers=2,
)
T5_1_0 = T5Settings(61, 8, 2, 3, 10, 2, 1, ("relu",), logits_via_embedding=True)
DROPPING = T5Settings(64, 64, 2, 3, 10, 1, 1, ("relu",), False, dropout_rate=0.5)
BATCH, PROMPT, LENGTH = 3, 7, 5


@functools.cache
def initialised(settings: T5Settings):
    """Returns the model and random parameters, whose norms are not all ones."""
    model, rng = t5_language_model(settings), np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.linspace(0.5, 1.5, leaf.size)
        stddev = leaf.shape[0] ** -0.5 if path[-1].key == "kernel" else 1.0
        return jnp.asarray(rng.normal(0.0, stddev, leaf.shape), jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def random_prompts(width: int = PROMPT) -> PromptBatch:
    """Returns prompts of `width`, 4 and 1 tokens, padded to `width`."""
    tokens_BS = jax.random.randint(jax.random.key(1), (BATCH, width), 2, 61)
    lengths_B1 = jnp.array([[width], [4], [1]])
    mask_BS = jnp.arange(width)[None, :] < lengths_B1
    return PromptBatch(jnp.where(mask_BS, tokens_BS, 0), mask_BS)


def random_responses(seed: int = 2, length: int = LENGTH):
    """Returns token ids from 2 on, [B, length]."""
    return jax.random.randint(jax.random.key(seed), (BATCH, length), 2, 61)


# A forward pass in plain numpy, one example at a time, float64.


def integer_bucket(offset: int, bidirectional: bool) -> int:
    """The bucket by integer comparisons: no logarithm, so no rounding.

    Beyond `exact` distances, distance d has bucket exact + n for the largest n with
    d / exact >= (128 / exact)^(n / exact), here raised to the power `exact`.
    """
    first, exact, distance = 0, 16, max(-offset, 0)
    if bidirectional:
        first, exact, distance = (16 if offset > 0 else 0), 8, abs(offset)
    if distance < exact:
        return first + distance
    steps = [
        n for n in range(exact) if distance**exact >= exact**exact * (128 // exact) ** n
    ]
    return first + exact + steps[-1]


def numpy_norm(x, scale):
    """Root-mean-square norm, epsilon 1e-6."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def _numpy_attention(p, x, memory, bias, heads):
    def split(y):
        return y.reshape(len(y), heads, -1).transpose(1, 0, 2)

    q, k, v = (
        split(source @ p[name]["kernel"])
        for source, name in ((x, "query"), (memory, "key"), (memory, "value"))
    )
    weights = np.exp(q @ k.transpose(0, 2, 1) + bias)
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).transpose(1, 0, 2).reshape(len(x), -1) @ p["out"]["kernel"]


def _numpy_mlp(p, x):
    def gelu(y):
        return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

    if "wi" in p:
        hidden = np.maximum(x @ p["wi"]["kernel"], 0)
    else:
        hidden = gelu(x @ p["wi_0"]["kernel"]) * (x @ p["wi_1"]["kernel"])
    return hidden @ p["wo"]["kernel"]


def _numpy_bias(table, num_queries, num_keys, bidirectional):
    buckets = [
        [integer_bucket(key - query, bidirectional) for key in range(num_keys)]
        for query in range(num_queries)
    ]
    return table[:, np.array(buckets)]


def numpy_logits(params, settings, prompt, response):
    """Logits of one unpadded prompt and response, [T, V]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    embedding, heads = p["token_embedder"]["embedding"], settings.num_heads
    encoder, decoder = p["encoder"], p["decoder"]
    x = embedding[prompt]
    table = encoder["relpos_bias"]["rel_embedding"]
    bias = _numpy_bias(table, len(prompt), len(prompt), True)
    for index in range(settings.num_encoder_layers):
        q = encoder[f"layers_{index}"]
        h = numpy_norm(x, q["pre_attention_layer_norm"]["scale"])
        x = x + _numpy_attention(q["attention"], h, h, bias, heads)
        x = x + _numpy_mlp(q["mlp"], numpy_norm(x, q["pre_mlp_layer_norm"]["scale"]))
    memory = numpy_norm(x, encoder["encoder_norm"]["scale"])

    y = embedding[[0, *response[:-1]]]
    size = len(response)
    bias = _numpy_bias(decoder["relpos_bias"]["rel_embedding"], size, size, False)
    bias = np.where(np.triu(np.ones((size, size)), 1) > 0, -np.inf, bias)
    for index in range(settings.num_decoder_layers):
        q = decoder[f"layers_{index}"]
        h = numpy_norm(y, q["pre_self_attention_layer_norm"]["scale"])
        y = y + _numpy_attention(q["self_attention"], h, h, bias, heads)
        h = numpy_norm(y, q["pre_cross_attention_layer_norm"]["scale"])
        cross = q["encoder_decoder_attention"]
        y = y + _numpy_attention(cross, h, memory, 0.0, heads)
        y = y + _numpy_mlp(q["mlp"], numpy_norm(y, q["pre_mlp_layer_norm"]["scale"]))
    y = numpy_norm(y, decoder["decoder_norm"]["scale"])
    if settings.logits_via_embedding:
        return y @ embedding.T / math.sqrt(settings.emb_dim)
    return y @ decoder["logits_dense"]["kernel"]
