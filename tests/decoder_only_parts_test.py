# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, masks, settings, and memory of decoder-only models."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.models import rotary
from nlhf_jax.models.decoder_layers import visible
from nlhf_jax.models.decoder_only import (
    decoder_only_language_model,
    positions_of,
    without_last,
)
from nlhf_jax.models.unembedding import soft_capped
from nlhf_jax.settings import MemorySettings
from nlhf_jax.types import PromptBatch
from tests.battery import all_but
from tests.decoder_only_toys import (
    BATCH,
    FAMILIES,
    LENGTH,
    VOCAB,
    parameters,
    random_prompts,
    random_responses,
    rope_of,
    shape,
    turned,
)
from tests.memory_test import shapes_in

pytestmark = pytest.mark.usefixtures("compiled_quickly")


# --- the sequence


def test_the_picture_of_the_module():
    """The columns of models/decoder_only.py, as drawn there."""
    tokens_BS = jnp.array([[5, 6, 7, 0]])
    prompt = without_last(PromptBatch(tokens_BS, tokens_BS > 0))
    assert prompt.last_B.tolist() == [7] and prompt.start_B.tolist() == [2]
    assert prompt.mask_BS.tolist() == [[True, True, False, False]]
    positions = positions_of(prompt.start_B, 4, 3)
    assert positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]


@pytest.mark.parametrize("window", [0, 1, 3])
def test_visible_is_what_a_double_loop_says(window):
    rng = np.random.default_rng(window)
    queries, keys = rng.integers(0, 9, (2, 5)), rng.integers(0, 9, (2, 7))
    is_key = rng.random((2, 7)) < 0.7
    found = visible(*map(jnp.asarray, (queries, keys, is_key)), window)
    for b in range(2):
        for q in range(5):
            for n in range(7):
                distance = queries[b, q] - keys[b, n]
                near = distance in range(window or 99)
                assert found[b, q, n] == (is_key[b, n] and near)


def test_a_soft_cap_bounds_and_bends():
    x = jnp.array([-1e6, -1.0, 0.0, 1.0, 1e6])
    expected = [-5.0, -5 * math.tanh(0.2), 0.0, 5 * math.tanh(0.2), 5.0]
    np.testing.assert_allclose(soft_capped(x, 5.0), expected, rtol=1e-6)
    assert soft_capped(x, 0.0) is x


# --- rotary positions


@pytest.mark.parametrize("family", ["llama_2", "llama_3", "gemma_3"])
@pytest.mark.parametrize("is_local", [False, True])
def test_vectors_are_turned_as_complex_numbers(family, is_local):
    settings = FAMILIES[family]
    x = np.random.default_rng(0).normal(size=(2, 3, 4, settings.head_dim))
    positions = np.array([[0, 1, 2, 40], [3, 2, 1, 0]])
    frequencies = rotary.layer_frequencies(settings, is_local)
    turn = rotary.rotation(jnp.asarray(positions), frequencies)
    found = rotary.rotate(jnp.asarray(x, jnp.float32), turn)
    for b, h, n in np.ndindex(2, 3, 4):
        expected = turned(x[b, h, n], positions[b, n], *rope_of(settings, is_local))
        np.testing.assert_allclose(found[b, h, n], expected, atol=1e-5)


def test_only_the_distance_counts():
    """A query and a key that both move on by 100 positions meet as before."""
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    frequencies = rotary.plain_frequencies(8, 100.0)

    def product(query_at, key_at):
        query, key = (
            rotary.rotate(
                jnp.asarray(x), rotary.rotation(jnp.array([[at]]), frequencies)
            )
            for x, at in ((q, query_at), (k, key_at))
        )
        return float((query * key).sum())

    assert product(9, 4) == pytest.approx(product(109, 104), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)
    assert product(7, 7) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_scaling_of_the_frequencies():
    """Short waves stay, long ones are stretched, between them by degrees."""
    settings = shape(
        head_dim=2,
        rope_scaling="llama3",
        rope_factor=10.0,
        rope_low_frequency_factor=2.0,
        rope_high_frequency_factor=6.0,
        rope_original_length=1000,
    )
    turns = np.array([1.0, 2.0, 4.0, 6.0, 50.0])  # in 1000 positions
    frequencies = turns * 2 * math.pi / 1000
    # w = (turns - 2) / 4 in [0, 1]; factor w + (1 - w) / 10.
    factors = [0.1, 0.1, 0.55, 1.0, 1.0]
    found = rotary.stretched(frequencies, settings)
    np.testing.assert_allclose(found, frequencies * factors, rtol=1e-12)
    linear = dataclasses.replace(settings, rope_scaling="linear")
    np.testing.assert_allclose(rotary.stretched(frequencies, linear), frequencies / 10)
    plain = dataclasses.replace(settings, rope_scaling="none")
    np.testing.assert_array_equal(rotary.stretched(frequencies, plain), frequencies)


def test_local_layers_have_a_base_of_their_own_if_told():
    settings = FAMILIES["gemma_3"]
    base, local = 1000.0 ** -(np.arange(3) / 3), 50.0 ** -(np.arange(3) / 3)
    np.testing.assert_allclose(rotary.layer_frequencies(settings, False), base / 8)
    np.testing.assert_allclose(rotary.layer_frequencies(settings, True), local)
    same = dataclasses.replace(settings, local_rope_base=0.0)
    np.testing.assert_allclose(rotary.layer_frequencies(same, True), base / 8)


# --- memory

PLAIN = MemorySettings()
WAYS = [
    MemorySettings(remat="dots"),
    MemorySettings(remat="full"),
    MemorySettings(scan_layers=True),
    MemorySettings(num_vocab_chunks=4),
    MemorySettings("full", True, 4),
]


def loss_of(settings, memory):
    """Returns params -> a loss of all that is said about some tokens."""
    network = decoder_only_language_model(settings, memory)
    prompts, tokens_BT = random_prompts(), random_responses()

    def loss(params):
        scores = network.token_scores(params, prompts, tokens_BT, None)
        extra = 1e-2 * jnp.square(scores.log_normalizers_BT)
        return (extra - scores.log_probs_BT).sum()

    return loss


@pytest.mark.parametrize("memory", all_but(WAYS[-1:], WAYS), ids=str)
@pytest.mark.parametrize("family", all_but(["gemma_2"], ["llama_3", "gemma_2"]))
def test_losses_and_gradients_are_those_of_the_plain_pass(family, memory):
    settings = FAMILIES[family]
    params = parameters(settings)
    known, found = (
        jax.jit(jax.value_and_grad(loss_of(settings, way)))(params)
        for way in (PLAIN, memory)
    )
    assert float(found[0]) == pytest.approx(float(known[0]), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        found[1],
        known[1],
    )


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("family", all_but(["qwen_2"], ["llama_3", "qwen_2"]))
def test_no_array_has_every_logit_when_the_vocabulary_is_cut(family, num_chunks):
    settings = FAMILIES[family]
    loss = loss_of(settings, MemorySettings(num_vocab_chunks=num_chunks))
    shapes = set(shapes_in(jax.make_jaxpr(jax.grad(loss))(parameters(settings)).jaxpr))
    assert (BATCH, LENGTH, VOCAB // num_chunks) in shapes
    assert ((BATCH, LENGTH, VOCAB) in shapes) == (num_chunks == 1)


def test_a_loop_over_layers_compiles_one_layer():
    def products(num_layers, memory):
        pattern = {"attention_pattern": ("local", "global"), "sliding_window": 3}
        settings = shape(num_layers, **pattern)
        network = decoder_only_language_model(settings)
        params = jax.eval_shape(network.init, jax.random.key(0))
        text = str(jax.make_jaxpr(loss_of(settings, memory))(params))
        return text.count("dot_general")

    looped = MemorySettings(scan_layers=True)
    assert products(2, looped) == products(4, looped) < products(2, PLAIN)
    assert products(2, PLAIN) < products(4, PLAIN)


@pytest.mark.parametrize("family", ["llama_3", "gemma_2"])
def test_the_logits_of_one_token_are_a_column_of_all(family):
    settings = FAMILIES[family]
    network, params = decoder_only_language_model(settings), parameters(settings)
    prompts, tokens_BT = random_prompts(), random_responses()
    every_BTV = jax.jit(network.logits)(params, prompts, tokens_BT)
    one = jax.jit(network.logits_of, static_argnums=3)
    found_BT = one(params, prompts, tokens_BT, 17)
    np.testing.assert_allclose(found_BT, every_BTV[..., 17], rtol=1e-5, atol=1e-5)
    closed = jax.make_jaxpr(lambda p: network.logits_of(p, prompts, tokens_BT, 17))
    assert (BATCH, LENGTH, VOCAB) not in set(shapes_in(closed(params).jaxpr))


def test_parameters_do_not_depend_on_memory():
    plain = decoder_only_language_model(FAMILIES["gemma_3"])
    other = decoder_only_language_model(FAMILIES["gemma_3"], WAYS[-1])
    assert other.logical_axes == plain.logical_axes
    key = jax.random.key(0)
    shapes = (jax.eval_shape(model.init, key) for model in (plain, other))
    assert next(shapes) == next(shapes)


def test_a_compute_dtype_halves_the_activations():
    half = decoder_only_language_model(
        FAMILIES["llama_3"], MemorySettings(compute_dtype="bfloat16")
    )
    params = parameters(FAMILIES["llama_3"])
    _, cache = jax.eval_shape(lambda p: half.prefill(p, random_prompts(), 4), params)
    assert cache.layers[0].keys_BGNK.dtype == jnp.bfloat16
    ready = jax.eval_shape(half.for_decoding, params)
    assert ready["layers_0"]["mlp"]["wo"]["kernel"].dtype == jnp.bfloat16
    assert ready["logits_dense"]["kernel"].dtype == jnp.float32
    assert ready["final_norm"]["scale"].dtype == jnp.float32


# --- devices


@pytest.mark.battery
def test_one_and_eight_devices_say_the_same():
    here = pathlib.Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(here / "decoder_only_devices_worker.py")],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "NPROC": "16",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(here.parent),
        },
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    # D x (G K) = 16 x 16, rows along `fsdp` and columns along `tensor`.
    shards = {name: one["shard"] for name, one in found["meshes"].items()}
    assert shards == {"8 x 1 x 1": [16, 16], "1 x 2 x 4": [8, 4]}
    for one in found["meshes"].values():
        assert one["loss"] < 1e-5 and one["same_tokens"]
        assert one["gradient"] < 1e-4 * found["gradient_size"]


# --- settings


@pytest.mark.parametrize(
    "given, said",
    [
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads 4, got 3"),
        ({"head_dim": 5}, "head_dim must be even, got 5"),
        (
            {"activation": "gelu_tan"},
            r"activation must be one of gelu, .*did you mean 'gelu_exact'",
        ),
        ({"norm_epsilon": 0.0}, r"norm_epsilon must be in \(0.0, inf"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap must be in"),
        ({"attention_pattern": ()}, "attention_pattern must name at least one layer"),
        ({"attention_pattern": ("globl",)}, "did you mean 'global'"),
        ({"sliding_window": 4}, "sliding_window must be .* got 4 with .*'global'"),
        ({"attention_pattern": ("local",)}, "sliding_window must be .* got 0 with"),
        # The second of the pattern is beyond the one layer there is.
        (
            {
                "num_layers": 1,
                "attention_pattern": ("global", "local"),
                "sliding_window": 4,
            },
            "sliding_window must be .* 0 where none is, got 4",
        ),
        ({"rope_base": 1.0}, r"rope_base must be in \(1.0, inf"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be one of linear, llama3, none"),
        ({"rope_factor": 0.5}, r"rope_factor must be in \[1.0, inf"),
        (
            {"rope_low_frequency_factor": 4.0},
            r"rope_high_frequency_factor must be in \(4.0, inf\), got 4.0",
        ),
        ({"eos_id": VOCAB}, r"eos_id must be in \[0, 59\], got 60"),
        ({"pad_id": -1}, "pad_id must be an integer of at least 0, got -1"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32"),
    ],
)
def test_bad_settings_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(shape(), **given)


def test_the_pattern_is_repeated():
    pattern = ("local", "local", "global")
    settings = shape(5, attention_pattern=pattern, sliding_window=2)
    assert settings.is_local == (True, True, False, True, True)


def test_chunks_that_do_not_divide_the_vocabulary_are_refused():
    with pytest.raises(UserError, match=r"num_vocab_chunks must divide .* got 7"):
        decoder_only_language_model(shape(), MemorySettings(num_vocab_chunks=7))


def test_the_defaults_are_a_plain_llama():
    settings = DecoderOnlySettings(VOCAB, 16, 4, 4, 6, 20, 2)
    assert dataclasses.replace(settings, norm_epsilon=1e-5) == FAMILIES["llama_2"]
