# SPDX-License-Identifier: Apache-2.0
"""Models of every kind with random adapters, in float64 where jax is."""

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax.models.adapters import with_base
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.models.tabular import tabular_model
from nlhf_jax.settings import LoraSettings, MemorySettings
from tests.decoder_only_toys import FAMILIES
from tests.t5_toys import T5_1_0, T5_1_1

EVERY = ("query", "key", "value", "out", "wi_0", "wi_1", "wo")
LORA = LoraSettings(rank=3, alpha=5.0, targets=EVERY)
SHAPES = {
    "t5_1_1": (T5_1_1, EVERY),
    "t5_1_0": (T5_1_0, ("query", "wi")),
    "gemma_2": (FAMILIES["gemma_2"], EVERY),
    "qwen_2": (FAMILIES["qwen_2"], ("query", "value", "wo")),
    "tabular": (None, ("table",)),
}


def network_of(name: str, memory: MemorySettings = MemorySettings()):  # noqa: B008
    """Returns (language model, LoRA settings) of a row of SHAPES."""
    settings, targets = SHAPES[name]
    lora = LoraSettings(rank=3, alpha=5.0, targets=targets)
    if settings is None:
        return tabular_model(5, 4), lora
    build = t5_language_model if name[:2] == "t5" else decoder_only_language_model
    return build(settings, memory), lora


def drawn(shapes, seed: int, size: float = 1.0):
    """Returns random numbers, also where the model would start at 0 or 1."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        scale = size * max(leaf.shape[0], 2) ** -0.5
        return jnp.asarray(rng.normal(0.0, scale, leaf.shape), jnp.result_type(float))

    return jax.tree.map(one, shapes)


def on_base(name: str, memory: MemorySettings = MemorySettings()):  # noqa: B008
    """Returns (model, base, model of adapters, random adapters, LoRA settings)."""
    network, lora = network_of(name, memory)
    base = drawn(jax.eval_shape(network.init, jax.random.key(0)), 0)
    model = with_base(network, base, lora)
    adapters = drawn(jax.eval_shape(model.init, jax.random.key(0)), 1, 0.5)
    return network, base, model, adapters, lora
