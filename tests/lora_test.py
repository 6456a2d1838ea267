# SPDX-License-Identifier: Apache-2.0
"""Adapters on every model: off, on, merged, differentiated, decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.decoding import sample
from nlhf_jax.models import adapters as lora_of
from nlhf_jax.models.adapters import with_base
from nlhf_jax.partitioning import make_mesh, shardings_for
from nlhf_jax.settings import LoraSettings, MemorySettings, MeshSettings
from nlhf_jax.types import Adapted, Speaker
from tests.decoder_only_toys import random_prompts, random_responses
from tests.lora_toys import LORA, network_of, on_base

pytestmark = pytest.mark.usefixtures("compiled_quickly")

NAMES = ("t5_1_1", "gemma_2", "tabular")
LENGTH = 4


def responses(name: str):
    """Token ids that every model has."""
    return random_responses(length=LENGTH) % (5 if name == "tabular" else 60)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(first, second):
    pairs = list(zip(leaves(first), leaves(second), strict=True))
    assert pairs
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


# --- off, and at the start


@pytest.mark.parametrize("name", NAMES)
def test_without_adapters_all_is_the_base_bit_for_bit(name):
    """The base is an argument of both programs, as in a training step."""
    network, base, _, _, lora = on_base(name)
    prompts, tokens_BT = random_prompts(), responses(name)

    def everything(one, params):
        start_B, cache = one.prefill(params, prompts, LENGTH)
        decoded, ready = [], one.for_decoding(params)
        for step in range(2):
            logits_RV, cache = one.decode_step(ready, cache, start_B, step)
            decoded.append(logits_RV)
        return (
            one.logits(params, prompts, tokens_BT),
            one.token_scores(params, prompts, tokens_BT, None),
            one.logits_of(params, prompts, tokens_BT, 3),
            (decoded, cache),
        )

    found = jax.jit(lambda base: everything(with_base(network, base, lora), {}))(base)
    assert_same(found, jax.jit(lambda base: everything(network, base))(base))


@pytest.mark.parametrize("name", ["qwen_2", "tabular"])
def test_fresh_adapters_change_nothing(name):
    """B = 0: the policy starts at its reference."""
    network, base, model, _, _ = on_base(name)
    fresh = model.init(jax.random.key(3))
    assert any(leaf.any() for leaf in leaves(fresh))
    given = random_prompts(), responses(name)
    found = jax.jit(model.logits)(fresh, *given)
    np.testing.assert_allclose(
        found, jax.jit(network.logits)(base, *given), rtol=0, atol=1e-6
    )


def test_a_starts_within_its_bounds_and_each_a_otherwise():
    _, _, model, _, _ = on_base("qwen_2")
    fresh = model.init(jax.random.key(0))
    layers = fresh["layers_0"], fresh["layers_1"]
    first, second = (one["attention"]["query"]["lora_a"] for one in layers)
    assert first.shape == (16, 3) and first.dtype == jnp.float32
    assert float(abs(first).max()) <= 1 / 4 < 1.1 * float(abs(first).max())
    assert not np.array_equal(first, second)


# --- on: the same as other weights


@pytest.mark.parametrize("name", NAMES)
def test_adapters_say_what_the_merged_weights_say(name, float64):
    network, base, model, on, lora = on_base(name)
    merged = lora_of.merged(base, on, lora)
    given = random_prompts(), responses(name)
    plain = jax.jit(network.logits)
    found, wanted = jax.jit(model.logits)(on, *given), plain(merged, *given)
    assert float(abs(found - plain(base, *given)).max()) > 0.01
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_is_the_formula_and_comes_off_again(name, float64):
    _, base, _, on, lora = on_base(name)
    merged = lora_of.merged(base, on, lora)
    paths = lora_of.adapted_paths(base, lora.targets)
    for names, kernel in paths.items():
        pair, place = on, merged
        for part in names:
            pair, place = pair[part], place[part]
        place = place if name == "tabular" else place["kernel"]
        scale_ab = 5.0 / 3 * np.asarray(pair["lora_a"]) @ np.asarray(pair["lora_b"])
        np.testing.assert_allclose(place, kernel + scale_ab, rtol=0, atol=1e-12)
    is_moved = [
        not np.array_equal(one, other)
        for one, other in zip(leaves(base), leaves(merged), strict=True)
    ]
    assert sum(is_moved) == len(paths)
    again = lora_of.merged(merged, on, lora, sign=-1)
    for one, other in zip(leaves(base), leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    assert_same(lora_of.merged(base, {}, lora), base)


@pytest.mark.parametrize("name", ["t5_1_1", "tabular"])
def test_the_gradient_is_the_full_ones_projection(name, float64):
    """dA = scale dW B^T and dB = scale A^T dW, with dW at W + scale A B."""
    network, base, model, on, lora = on_base(name)
    prompts, tokens_BT = random_prompts(), responses(name)

    def loss(functions, params):
        logits_BTV = functions.logits(params, prompts, tokens_BT)
        return jnp.sum(jnp.sin(logits_BTV))

    found = jax.jit(jax.grad(lambda params: loss(model, params)))(on)
    whole = jax.jit(jax.grad(lambda params: loss(network, params)))(
        lora_of.merged(base, on, lora)
    )
    for names, dw in lora_of.adapted_paths(whole, lora.targets).items():
        mine, pair = found, on
        for part in names:
            mine, pair = mine[part], pair[part]
        da = lora.scale * dw @ jnp.swapaxes(pair["lora_b"], -1, -2)
        db = lora.scale * jnp.swapaxes(pair["lora_a"], -1, -2) @ dw
        # Norms and the softmax of these networks compute in float32.
        atol = 1e-12 if name == "tabular" else 2e-5 * float(abs(dw).max())
        np.testing.assert_allclose(mine["lora_a"], da, rtol=0, atol=atol)
        np.testing.assert_allclose(mine["lora_b"], db, rtol=0, atol=atol)
        assert float(abs(da).max()) > 0


@pytest.mark.parametrize("name", ["t5_1_1", "gemma_2"])
@pytest.mark.battery
def test_what_saves_memory_changes_no_gradient(name):
    memory = MemorySettings(scan_layers=True, remat="dots")
    given = random_prompts(), responses(name)

    def gradient(memory):
        _, _, model, on, _ = on_base(name, memory)

        def loss(params):
            return model.token_scores(params, *given, None).log_probs_BT.sum()

        return jax.jit(jax.grad(loss))(on)

    found, wanted = gradient(memory), gradient(MemorySettings())
    for one, other in zip(leaves(found), leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert abs(other).max() > 0


@pytest.mark.battery
def test_bfloat16_activations_take_adapters():
    name = "gemma_2"
    memory = MemorySettings(compute_dtype="bfloat16", num_vocab_chunks=1)
    _, base, model, on, lora = on_base(name, memory)
    given = random_prompts(), responses(name)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    scores = lora_of.with_base(network_of(name, memory)[0], half, lora).token_scores
    found = scores(on, *given, None).log_probs_BT
    wanted = model.token_scores(on, *given, None).log_probs_BT
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.3)


# --- decoding: one pass over the base for all sets


@pytest.mark.parametrize("name", ["t5_1_1", "tabular"])
def test_sets_that_are_joined_say_what_each_says_alone(name):
    _, _, model, on, _ = on_base(name)
    other = jax.tree.map(lambda leaf: -leaf, on)
    sets = (on, {}, other)
    prompts = random_prompts()
    both = model.join(sets)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), prompts)
    prefill = jax.jit(model.prefill, static_argnums=2)
    decode_step = jax.jit(model.decode_step)
    start_R, cache = prefill(both, repeated, LENGTH)
    ready = model.for_decoding(both)
    alone = [prefill(one, prompts, LENGTH) for one in sets]
    caches = [cache for _, cache in alone]
    tokens_R = start_R
    for step in range(LENGTH):
        logits_RV, cache = decode_step(ready, cache, tokens_R, step)
        for index, one in enumerate(sets):
            wanted_BV, caches[index] = decode_step(
                model.for_decoding(one), caches[index], tokens_R[index::3], step
            )
            np.testing.assert_allclose(
                logits_RV[index::3], wanted_BV, rtol=0, atol=2e-5
            )
        tokens_R = jnp.argmax(logits_RV, axis=-1)
    assert not np.allclose(logits_RV[0::3], logits_RV[1::3], atol=1e-2)


@pytest.mark.parametrize("name", ["gemma_2", "tabular"])
def test_the_fused_decode_draws_what_each_set_draws_apart(name):
    _, _, model, on, _ = on_base(name)
    sets = {"params": on, "reference": {}}
    speakers = (
        Speaker({"params": 1.0}),
        Speaker({"params": 0.7, "reference": 0.3}),
        Speaker({"reference": 1.0}),
        Speaker({"params": 1.0}, temperature=0.0),
    )

    def tokens(one):
        drawn = jax.jit(
            lambda: sample(
                one, sets, speakers, random_prompts(), jax.random.key(5), max_length=4
            )
        )()
        return [part.responses.tokens_BT for part in drawn.samples]

    assert_same(tokens(model), tokens(model._replace(join=None)))


def test_one_product_with_the_base_serves_all_sets():
    """The compiled decode has as many products with base kernels as of one set."""
    _, _, model, on, _ = on_base("qwen_2")
    sets = {"params": on, "reference": {}}

    def products(model):
        speakers = (Speaker({"params": 1.0}), Speaker({"reference": 1.0}))
        jaxpr = jax.make_jaxpr(
            lambda sets: sample(
                model, sets, speakers, random_prompts(), jax.random.key(0), max_length=2
            )
        )(sets)
        # The kernel of the first layer's `wi_0`, [16, 20], is not adapted.
        return str(jaxpr).count("f32[16,20]\n") + str(jaxpr).count("dot_general")

    joined, apart = products(model), products(model._replace(join=None))
    assert joined < apart


# --- where they lie, and mistakes


def test_adapters_lie_as_their_kernels_do():
    network, lora = network_of("gemma_2")
    model = lora_of.with_base(network, None, lora)
    axes = model.logical_axes["layers_0"]
    assert axes["attention"]["query"] == {
        "lora_a": ("embed", "lora_rank"),
        "lora_b": ("lora_rank", "joined_kv"),
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(
        model.logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    placed = shardings_for(model.logical_axes, shapes, mesh)
    out = placed["layers_0"]["attention"]["out"]
    assert tuple(out["lora_a"].spec) == ("tensor", None)
    assert tuple(out["lora_b"].spec) == (None, "fsdp")


def test_the_output_layer_is_no_target():
    shapes = jax.eval_shape(network_of("t5_1_1")[0].init, jax.random.key(0))
    with pytest.raises(UserError, match=r"targets must be one of .* got 'logits_d"):
        lora_of.adapted_paths(shapes, ("logits_dense",))


def test_an_unknown_target_is_named_with_its_neighbour():
    network, _ = network_of("t5_1_0")
    with pytest.raises(UserError, match=r"targets must be one of .*'wi_0'.*'wi'"):
        lora_of.with_base(network, None, LORA)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"rank": 0}, "rank must be .*got 0"),
        ({"alpha": 0.0}, "alpha must be in .*got 0.0"),
        ({"targets": ()}, r"targets must name at least one module, got \(\)"),
        ({"targets": ("wo", "wo")}, "targets names 'wo' twice"),
    ],
)
def test_settings_check_themselves(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        LoraSettings(**wrong)


def test_the_scale():
    assert LoraSettings(rank=4, alpha=8.0).scale == 2.0
    named = ("value", "query")
    assert LoraSettings(targets=named) == LoraSettings(targets=named[::-1])
    assert LoraSettings(rank=4, alpha=8.0, rank_stabilized=True).scale == 4.0


def test_an_adapted_value_is_a_tree_of_arrays():
    _, base, _, on, lora = on_base("tabular")
    value = lora_of.adapted(base, on, lora)
    assert isinstance(value, Adapted)
    again = jax.jit(lambda value: value)(value)
    assert_same(again.adapters, value.adapters)
    np.testing.assert_allclose(
        value.adapters["table"]["lora_b"], on["table"]["lora_b"] * lora.scale
    )
    assert lora_of.num_parameters(on) == sum(leaf.size for leaf in leaves(on))
