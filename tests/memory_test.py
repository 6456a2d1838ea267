# SPDX-License-Identifier: Apache-2.0
"""What saves memory changes no number: recomputing, looping over layers, chunks."""

import dataclasses
import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import sequences
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import policies
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.models.unembedding import chunked_token_scores
from nlhf_jax.settings import MemorySettings
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import PromptBatch
from tests.battery import all_but

pytestmark = pytest.mark.usefixtures("compiled_quickly")
VOCAB, LENGTH = 60, 7
SHAPES = {
    "1.1": T5Settings(VOCAB, 16, 2, 8, 24, 3, 2),
    "1.0": T5Settings(VOCAB, 16, 2, 8, 24, 3, 2, ("relu",), logits_via_embedding=True),
}
PLAIN = MemorySettings()
WAYS = [
    MemorySettings(remat, scan, chunks)
    for remat, scan, chunks in itertools.product(
        ("none", "dots", "full"), (False, True), (1, 4)
    )
][1:]
# Each of the three alone, and all together.
FEW = (WAYS[0], WAYS[1], WAYS[3], WAYS[-1])
# CI runs all others too.
SHORT = (WAYS[-1],)


def batch():
    """Returns prompts of unequal lengths, tokens and a mask."""
    rng = np.random.default_rng(0)
    mask_BS = np.arange(5)[None, :] < np.array([[5], [2], [4]])
    prompts = PromptBatch(
        jnp.asarray(np.where(mask_BS, rng.integers(2, VOCAB, (3, 5)), 0)),
        jnp.asarray(mask_BS),
    )
    mask_BT = np.arange(LENGTH)[None, :] < np.array([[7], [1], [4]])
    tokens_BT = np.where(mask_BT, rng.integers(2, VOCAB, (3, LENGTH)), 0)
    return prompts, jnp.asarray(tokens_BT), jnp.asarray(mask_BT)


def loss_of(settings, memory, key=None):
    """Returns params -> mean negative log-probability of the batch."""
    network = t5_language_model(settings, memory)
    prompts, tokens_BT, mask_BT = batch()

    def loss(params):
        scores = network.token_scores(params, prompts, tokens_BT, key)
        extra = 1e-2 * jnp.square(scores.log_normalizers_BT)
        return jnp.where(mask_BT, extra - scores.log_probs_BT, 0.0).sum()

    return loss


@functools.cache
def parameters(settings):
    return jax.jit(t5_language_model(settings).init)(jax.random.key(0))


@functools.cache
def plain_loss(shape):
    settings = SHAPES[shape]
    loss = jax.value_and_grad(loss_of(settings, PLAIN))
    return jax.jit(loss)(parameters(settings))


@pytest.mark.parametrize(
    "case",
    all_but(
        [("1.1", way) for way in SHORT],
        [*(("1.1", way) for way in WAYS), *(("1.0", way) for way in FEW)],
    ),
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_plain_pass(case):
    shape, memory = case
    settings = SHAPES[shape]
    params = parameters(settings)
    known = plain_loss(shape)
    found = jax.jit(jax.value_and_grad(loss_of(settings, memory)))(params)
    assert float(found[0]) == pytest.approx(float(known[0]), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found[1],
        known[1],
    )


def test_parameters_do_not_depend_on_it():
    settings = SHAPES["1.1"]
    for memory in (MemorySettings("full", True, 4), PLAIN):
        network = t5_language_model(settings, memory)
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.jit(network.init)(jax.random.key(0)),
            parameters(settings),
        )
        assert network.logical_axes == t5_language_model(settings).logical_axes


@pytest.mark.battery
@pytest.mark.parametrize(
    "memory", [MemorySettings("full"), MemorySettings("dots", True)]
)
def test_what_is_computed_again_drops_the_same(memory):
    settings = dataclasses.replace(SHAPES["1.1"], dropout_rate=0.5)
    params, key = parameters(settings), jax.random.key(3)
    known, other, found = (
        jax.jit(jax.value_and_grad(loss_of(settings, way, at)))(params)
        for way, at in ((PLAIN, key), (PLAIN, jax.random.key(4)), (memory, key))
    )
    assert float(found[0]) == pytest.approx(float(known[0]), rel=1e-6)
    assert float(other[0]) != pytest.approx(float(known[0]), rel=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found[1],
        known[1],
    )


@pytest.mark.parametrize(
    "memory",
    all_but(
        [MemorySettings(scan_layers=True)], [PLAIN, MemorySettings(scan_layers=True)]
    ),
    ids=str,
)
def test_every_layer_draws_what_it_drops_with_a_key_of_its_own(memory, monkeypatch):
    settings = dataclasses.replace(SHAPES["1.1"], dropout_rate=0.5)
    params = parameters(settings)

    def loss(params):
        return jax.jit(loss_of(settings, memory, jax.random.key(3)))(params)

    own, again = float(loss(params)), float(loss(params))
    split = jax.random.split
    monkeypatch.setattr(
        jax.random, "split", lambda key, num=2: jnp.stack([split(key, num)[0]] * num)
    )
    shared = float(loss(params))
    assert own == again
    assert shared != pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize("shape", all_but(["1.0"], SHAPES))
@pytest.mark.parametrize("memory", all_but([PLAIN], [PLAIN, WAYS[-1]]), ids=str)
def test_the_logits_of_one_token_are_a_column_of_all(shape, memory):
    network, params = (
        t5_language_model(SHAPES[shape], memory),
        parameters(SHAPES[shape]),
    )
    prompts, tokens_BT, _ = batch()
    every_BTV = network.logits(params, prompts, tokens_BT)
    found_BT = network.logits_of(params, prompts, tokens_BT, 17)
    np.testing.assert_allclose(found_BT, every_BTV[..., 17], rtol=1e-5, atol=1e-6)
    closed = jax.make_jaxpr(lambda p: network.logits_of(p, prompts, tokens_BT, 17))
    assert (3, LENGTH, VOCAB) not in set(shapes_in(closed(params).jaxpr))


# --- scores in chunks


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 12, 60])
def test_chunks_give_the_scores_of_all_logits(num_chunks, float64):
    rng = np.random.default_rng(num_chunks)
    features_BTD, kernel_DV = rng.normal(size=(3, 5, 4)), rng.normal(size=(4, VOCAB))
    # Far apart, so that a sum that does not follow the maximum overflows.
    features_BTD[0] *= 500
    tokens_BT = jnp.asarray(rng.integers(0, VOCAB, size=(3, 5)))

    def whole(features, kernel):
        return sequences.token_scores(features @ kernel, tokens_BT)

    def in_chunks(features, kernel):
        return chunked_token_scores(features, kernel, tokens_BT, num_chunks)

    given = jnp.asarray(features_BTD), jnp.asarray(kernel_DV)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        in_chunks(*given),
        whole(*given),
    )
    weights = jnp.asarray(rng.normal(size=(2, 3, 5)))

    def value(scores):
        def total(*given):
            found = scores(*given)
            by = (found.log_probs_BT, found.log_normalizers_BT)
            return sum((w * x).sum() for w, x in zip(weights, by, strict=True))

        return total

    for found, known in zip(
        jax.grad(value(in_chunks), (0, 1))(*given),
        jax.grad(value(whole), (0, 1))(*given),
        strict=True,
    ):
        np.testing.assert_allclose(found, known, rtol=1e-10, atol=1e-12)


def test_the_likeliest_token_is_said_to_be():
    features_BTD, kernel_DV = jnp.ones((1, 6, 1)), jnp.arange(6.0)[None, :] % 4
    tokens_BT = jnp.arange(6)[None, :]
    found = chunked_token_scores(features_BTD, kernel_DV, tokens_BT, 3)
    # Logits 0 1 2 3 0 1: the fourth is largest.
    np.testing.assert_array_equal(
        found.is_most_likely_BT, [[False, False, False, True, False, False]]
    )


def shapes_in(jaxpr):
    """Yields the shape of every value of a program and of those inside it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(variable.aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_no_array_has_every_logit_when_the_vocabulary_is_cut(num_chunks):
    settings = SHAPES["1.1"]
    memory = MemorySettings(num_vocab_chunks=num_chunks)
    closed = jax.make_jaxpr(jax.grad(loss_of(settings, memory)))(parameters(settings))
    shapes = set(shapes_in(closed.jaxpr))
    assert ((3, LENGTH, VOCAB // num_chunks)) in shapes
    assert ((3, LENGTH, VOCAB) in shapes) == (num_chunks == 1)


@pytest.mark.parametrize("num_chunks, near", [(7, 6), (59, 60), (8, 6)])
def test_chunks_that_do_not_divide_the_vocabulary_are_refused(num_chunks, near):
    with pytest.raises(UserError, match=rf"got {num_chunks}; (\d+) would do") as caught:
        t5_language_model(SHAPES["1.1"], MemorySettings(num_vocab_chunks=num_chunks))
    named = int(str(caught.value).split("; ")[1].split()[0])
    assert VOCAB % named == 0 and abs(named - num_chunks) <= abs(near - num_chunks)


# --- that memory is saved


def temporary_bytes(settings, memory, rows=3):
    """Returns what the compiler sets aside for a gradient, besides what goes in."""
    params = jax.eval_shape(t5_language_model(settings).init, jax.random.key(0))
    prompts, tokens_BT, mask_BT = jax.tree.map(
        lambda leaf: jnp.resize(leaf, (rows, *leaf.shape[1:])), batch()
    )
    network = t5_language_model(settings, memory)

    def loss(params):
        scores = network.token_scores(params, prompts, tokens_BT, None)
        return jnp.where(mask_BT, scores.log_probs_BT, 0.0).sum()

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.battery
def test_recomputing_saves_memory():
    # In a loop: elsewhere the compiler for CPUs merges what is computed again.
    deep = T5Settings(VOCAB, 16, 2, 8, 64, 6, 6)
    plain, dots, full = (
        temporary_bytes(deep, MemorySettings(remat, True), rows=300)
        for remat in ("none", "dots", "full")
    )
    assert full < dots < plain


def test_a_vocabulary_in_chunks_saves_memory():
    wide = T5Settings(60_000, 8, 1, 8, 8, 1, 1)
    chunks = temporary_bytes(wide, MemorySettings(num_vocab_chunks=60))
    # One [B, T, V] array of float32 is what is no longer there.
    assert temporary_bytes(wide, PLAIN) - chunks > 3 * LENGTH * 60_000 * 4


def test_a_loop_over_layers_compiles_one_layer():
    def lines(num_layers, memory):
        settings = T5Settings(VOCAB, 16, 2, 8, 24, num_layers, num_layers)
        params = jax.eval_shape(t5_language_model(settings).init, jax.random.key(0))
        text = jax.jit(loss_of(settings, memory)).lower(params).as_text()
        return text.count("dot_general")

    looped = MemorySettings(scan_layers=True)
    assert lines(2, looped) == lines(6, looped) < lines(2, PLAIN) < lines(6, PLAIN)


# --- settings


@pytest.mark.battery
def test_activations_in_bfloat16_keep_float32_parameters_and_scores():
    settings = SHAPES["1.1"]
    half = t5_language_model(settings, MemorySettings(compute_dtype="bfloat16"))
    prompts, tokens_BT, mask_BT = batch()
    params = half.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    scores = half.token_scores(params, prompts, tokens_BT, None)
    assert scores.log_probs_BT.dtype == jnp.float32
    exact = t5_language_model(settings).token_scores(params, prompts, tokens_BT, None)
    errors = np.abs(np.asarray(scores.log_probs_BT - exact.log_probs_BT))[mask_BT]
    # bfloat16 has eight significant bits; equal numbers would mean nothing was halved.
    assert 0 < errors.max() < 0.2


def test_frozen_parameters_are_kept_in_their_dtype():
    params = {"a": jnp.ones((2, 3)), "b": {"c": jnp.zeros(4)}}
    half = policies.as_frozen(params, MemorySettings(frozen_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    kept = policies.as_frozen(params, PLAIN)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "given, said",
    [
        ({"remat": "al"}, "remat must be one of dots, full, none; got 'al'"),
        ({"num_vocab_chunks": 0}, "num_vocab_chunks must be an integer of at least 1"),
        ({"compute_dtype": "float16"}, "compute_dtype must be one of"),
        ({"frozen_dtype": ""}, "frozen_dtype must be one of"),
    ],
)
def test_bad_settings_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        MemorySettings(**given)
