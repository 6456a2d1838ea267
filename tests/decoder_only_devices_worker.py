# SPDX-License-Identifier: Apache-2.0
"""A decoder-only model on eight fake devices, in a process of its own; writes JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import decoding, partitioning
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.settings import MemorySettings, MeshSettings
from nlhf_jax.types import PromptBatch, Speaker
from tests.decoder_only_toys import GEMMA, parameters, shape

# Two key-value heads on four devices: each of them lies on two.
SETTINGS = shape(
    2, head_dim=8, attention_pattern=("local", "global"), sliding_window=3, **GEMMA
)
MESHES = {"8 x 1 x 1": MeshSettings(), "1 x 2 x 4": MeshSettings(1, 2, 4)}
MODEL = decoder_only_language_model(SETTINGS, MemorySettings("full", True))


def batch():
    """Returns prompts of unequal lengths, and tokens."""
    rng = np.random.default_rng(0)
    mask = np.arange(5)[None, :] < rng.integers(1, 6, size=(8, 1))
    tokens = np.where(mask, rng.integers(2, 60, mask.shape), 0).astype(np.int32)
    return PromptBatch(tokens, mask), rng.integers(2, 60, (8, 4)).astype(np.int32)


def work(params, prompts, tokens_BT):
    """Returns (loss, gradient, greedy responses)."""

    def loss(params):
        scores = MODEL.token_scores(params, prompts, tokens_BT, None)
        return -scores.log_probs_BT.mean()

    rollout = decoding.sample(
        MODEL,
        {"params": params},
        (Speaker({"params": 1.0}, temperature=0.0),),
        prompts,
        jax.random.key(0),
        max_length=4,
    )
    value, gradient = jax.value_and_grad(loss)(params)
    return value, gradient, rollout.samples[0].responses.tokens_BT


def on_mesh(settings):
    """Returns what one mesh makes of it, and how parameters lay."""
    mesh = partitioning.make_mesh(settings)
    params = parameters(SETTINGS)
    places = partitioning.shardings_for(MODEL.logical_axes, params, mesh)
    given = jax.device_put(params, places)
    with jax.set_mesh(mesh):
        rows = partitioning.batch_sharding(mesh)
        done = jax.jit(work)(given, *jax.device_put(batch(), rows))
    kernel = given["layers_0"]["attention"]["key"]["kernel"]
    return jax.block_until_ready(done), kernel.sharding.shard_shape(kernel.shape)


def main():
    """Writes the largest differences from one device, by mesh."""
    jax.config.update("jax_disable_most_optimizations", True)
    known = jax.jit(work)(parameters(SETTINGS), *batch())
    found = {}
    for name, settings in MESHES.items():
        (value, gradient, tokens_BT), shard = on_mesh(settings)
        differences = jax.tree.map(
            lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
            gradient,
            known[1],
        )
        found[name] = {
            "loss": abs(float(value) - float(known[0])),
            "gradient": max(jax.tree.leaves(differences)),
            "same_tokens": bool((np.asarray(tokens_BT) == np.asarray(known[2])).all()),
            "shard": shard,
        }
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(known[1]))
    json.dump({"meshes": found, "gradient_size": size}, sys.stdout)


if __name__ == "__main__":
    main()
