# SPDX-License-Identifier: Apache-2.0
"""Every way to attend says the same; what is kept, and which platform has a kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nlhf_jax import constraints, partitioning
from nlhf_jax.checks import UserError
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.models import attention as ours
from nlhf_jax.models import families
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.settings import MemorySettings, MeshSettings
from nlhf_jax.t5_settings import T5Settings
from tests import decoder_only_toys

pytestmark = pytest.mark.usefixtures("compiled_quickly")

HOW = {"scale": 0.3, "soft_cap": 0.0}
CHUNKS = [MemorySettings(attention="chunked", attention_chunk=n) for n in (1, 4, 5)]
T5 = T5Settings(16, 8, 1, 2, 4, 1, 1)
WAYS = [
    MemorySettings(),
    MemorySettings(attention="recomputed"),
    MemorySettings(attention="automatic"),
    *CHUNKS,
]


def given(length=12, width=4, batch=2, groups=2, shared=2, dtype=np.float32):
    """Queries, keys, values, who is a key (a gap of padding inside), who sees whom."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    is_key_BN = np.ones((batch, length), bool)
    is_key_BN[0, 3:6] = False
    before_QN = np.tril(np.ones((length, length), bool))
    return (
        normal(batch, groups, shared, length, width),
        normal(batch, groups, length, width),
        normal(batch, groups, length, width),
        jnp.asarray(is_key_BN),
        jnp.asarray(before_QN[None] & is_key_BN[:, None, :]),
    )


def in_loops(query, keys, values, visible, scale, soft_cap):
    """One query, one head, one key at a time, in numpy."""
    query, keys, values, visible = map(np.asarray, (query, keys, values, visible))
    found = np.zeros(query.shape)
    for b, g, u, q in np.ndindex(query.shape[:4]):
        seen = np.flatnonzero(visible[b, q])
        logits = np.array([query[b, g, u, q] @ keys[b, g, k] for k in seen]) * scale
        if soft_cap:
            logits = soft_cap * np.tanh(logits / soft_cap)
        weights = np.exp(logits - logits.max(initial=-np.inf))
        for weight, k in zip(weights / weights.sum(), seen, strict=True):
            found[b, g, u, q] += weight * values[b, g, k]
    return found


@pytest.mark.parametrize("memory", WAYS)
@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
def test_every_way_is_a_loop_over_queries_heads_and_keys(memory, soft_cap, float64):
    query, keys, values, _, visible = given(dtype=np.float64)
    how = {"scale": 0.3, "soft_cap": soft_cap}
    found = ours.attention(
        query, keys, values, visible, is_causal=True, memory=memory, **how
    )
    expected = in_loops(query, keys, values, visible, **how)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", WAYS[1:])
def test_gradients_are_those_of_the_plain_way(memory, float64):
    query, keys, values, _, visible = given(dtype=np.float64)

    def slopes(memory):
        def loss(*qkv):
            read = ours.attention(*qkv, visible, is_causal=True, memory=memory, **HOW)
            return jnp.sin(read).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(query, keys, values)

    for one, two in zip(slopes(memory), slopes(MemorySettings()), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


def largest_kept(memory, length=64):
    """Numbers in the largest array that the backward pass is handed."""
    *qkv, _, visible = given(length)

    def read(*qkv):
        return ours.attention(*qkv, visible, is_causal=True, memory=memory, **HOW)

    return max(leaf.size for leaf in jax.tree.leaves(jax.vjp(read, *qkv)[1]))


def test_only_the_plain_way_keeps_a_weight_of_every_query_and_key():
    weights = 2 * 2 * 2 * 64 * 64
    assert largest_kept(MemorySettings()) == weights
    for memory in (*WAYS[1:3], dataclasses.replace(CHUNKS[0], attention_chunk=8)):
        assert largest_kept(memory) < weights / 3, memory


def largest_made(memory, length=64):
    """Numbers in the largest array of forward and backward pass."""
    *qkv, _, visible = given(length)

    def loss(*qkv):
        read = ours.attention(*qkv, visible, is_causal=True, memory=memory, **HOW)
        return jnp.sin(read).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*qkv).jaxpr
    return max(v.aval.size for e in _equations(jaxpr) for v in e.outvars)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_in_chunks_no_weight_of_every_query_and_key_exists_at_all():
    weights = 2 * 2 * 2 * 64 * 64
    chunked = dataclasses.replace(CHUNKS[0], attention_chunk=8)
    assert largest_made(MemorySettings(attention="recomputed")) == weights
    assert largest_made(chunked) <= weights / 4


@pytest.mark.parametrize("family", ["llama_3", "gemma_3"])
@pytest.mark.parametrize("memory", [WAYS[1], CHUNKS[2]])
def test_a_model_says_the_same_whatever_its_attention_keeps(family, memory):
    settings = decoder_only_toys.FAMILIES[family]
    params = decoder_only_toys.parameters(settings)
    prompts = decoder_only_toys.random_prompts()
    tokens_BT = decoder_only_toys.random_responses()

    def slopes(memory):
        model = decoder_only_language_model(settings, memory)

        def loss(params):
            scores = model.token_scores(params, prompts, tokens_BT, None)
            return scores.log_probs_BT.sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    plain, found = slopes(MemorySettings()), slopes(memory)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
def test_the_kernel_for_tpus_reads_as_the_plain_way_where_anybody_looks(soft_cap):
    """Run step by step on the CPU; padded columns are read by nobody."""
    *qkv, is_key_BN, visible = given(130, 128, groups=1)
    how = {"scale": 0.3, "soft_cap": soft_cap}
    found = ours.splash(*qkv, is_key_BN, interpret=True, **how)
    expected = ours.plain(*qkv, visible, **how)
    looked = np.broadcast_to(
        np.asarray(is_key_BN)[:, None, None, :, None], expected.shape
    )
    np.testing.assert_allclose(
        np.asarray(found)[looked], np.asarray(expected)[looked], atol=2e-5
    )


@pytest.mark.parametrize("length", [11, 12])
def test_the_kernel_for_gpus_reads_as_the_plain_way_where_anybody_looks(length):
    """The same call without cuDNN, which is not at hand."""
    *qkv, is_key_BN, visible = given(length)
    found = ours.cudnn(*qkv, is_key_BN, implementation="xla", **HOW)
    expected = ours.plain(*qkv, visible, **HOW)
    looked = np.broadcast_to(
        np.asarray(is_key_BN)[:, None, None, :, None], expected.shape
    )
    np.testing.assert_allclose(
        np.asarray(found)[looked], np.asarray(expected)[looked], atol=1e-5
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize("length", [11, 12])
def test_the_kernel_for_gpus_gets_an_even_number_of_columns(length, monkeypatch):
    """Its gradient with a mask takes no others; a pass reads S + T - 1 columns."""
    *qkv, is_key_BN, _ = given(length)
    asked, read = [], jax.nn.dot_product_attention

    def recorded(query, key, value, *, mask, **rest):
        asked.extend([query.shape[1], key.shape[1], value.shape[1], *mask.shape[2:]])
        return read(query, key, value, mask=mask, **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    found = ours.cudnn(*qkv, is_key_BN, implementation="xla", **HOW)
    assert set(asked) == {12}
    assert found.shape == qkv[0].shape


def test_gradients_of_an_odd_number_of_columns_are_those_of_the_plain_way():
    *qkv, is_key_BN, visible = given(11)

    def slopes(read):
        def loss(*qkv):  # of the columns that anybody looks at
            return (jnp.sin(read(*qkv)) * is_key_BN[:, None, None, :, None]).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*qkv)

    filled = slopes(
        lambda *qkv: ours.cudnn(*qkv, is_key_BN, implementation="xla", **HOW)
    )
    plain = slopes(lambda *qkv: ours.plain(*qkv, visible, **HOW))
    for one, two in zip(filled, plain, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    "platform, is_causal, dtype, soft_cap, kernel",
    [
        ("tpu", True, "float32", 0.0, ours.splash),
        ("tpu", True, "bfloat16", 0.7, ours.splash),
        ("tpu", False, "bfloat16", 0.0, None),
        ("gpu", True, "bfloat16", 0.0, ours.cudnn),
        ("gpu", True, "bfloat16", 0.7, None),
        ("gpu", True, "float32", 0.0, None),
        ("cpu", True, "bfloat16", 0.0, None),
    ],
)
def test_which_kernel_a_platform_has(
    platform, is_causal, dtype, soft_cap, kernel, monkeypatch
):
    monkeypatch.setattr(ours, "platform", lambda: platform)
    query = jnp.zeros((1, 1, 1, 4, 64), dtype)
    assert ours._kernel(query, is_causal, soft_cap) is kernel


@pytest.mark.parametrize(
    "width, kernel",
    [(8, ours.cudnn), (128, ours.cudnn), (4, None), (100, None), (136, None)],
)
def test_heads_that_the_kernel_for_gpus_lacks_go_without(width, kernel, monkeypatch):
    monkeypatch.setattr(ours, "platform", lambda: "gpu")
    query = jnp.zeros((1, 1, 1, 4, width), jnp.bfloat16)
    assert ours._kernel(query, True, 0.0) is kernel


@pytest.mark.parametrize(
    "platform, kernel", [("tpu", ours.splash), ("gpu", ours.cudnn)]
)
def test_on_several_devices_a_kernel_needs_a_mesh(platform, kernel, monkeypatch):
    """An evaluation is compiled without one, whatever its parameters lie on."""
    query = jnp.zeros((1, 1, 1, 4, 64), jnp.bfloat16)
    mesh = partitioning.make_mesh(MeshSettings(), jax.devices()[:1])
    monkeypatch.setattr(ours, "platform", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert ours._kernel(query, True, 0.0) is None
    with jax.set_mesh(mesh):
        assert ours._kernel(query, True, 0.0) is kernel
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert ours._kernel(query, True, 0.0) is kernel


def test_what_lies_on_several_tpus_is_compiled_for_them_without_a_mesh(monkeypatch):
    """Lowered for TPUs that need not exist, as an evaluation's program is."""
    monkeypatch.setattr(ours, "platform", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    *qkv, _, visible = (
        jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("data"))
        )
        for x in given(128, 128)
    )
    memory = MemorySettings(attention="automatic")

    def read(*given):
        return ours.attention(*given, is_causal=True, memory=memory, **HOW)

    traced = jax.jit(read).trace(*qkv, visible)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_without_a_mesh_the_platform_is_the_backends():
    assert constraints.platform() == "cpu"


def test_only_layers_that_see_everything_before_are_causal(monkeypatch):
    """A sliding window counts positions, which a kernel's columns are not."""
    asked = []
    monkeypatch.setattr(
        ours, "_kernel", lambda query, is_causal, cap: asked.append(is_causal)
    )
    memory = MemorySettings(attention="automatic")
    for family in ("llama_3", "gemma_3"):
        settings = decoder_only_toys.FAMILIES[family]
        model = decoder_only_language_model(settings, memory)
        asked.clear()
        jax.eval_shape(
            lambda model=model, settings=settings: model.token_scores(
                decoder_only_toys.parameters(settings),
                decoder_only_toys.random_prompts(),
                decoder_only_toys.random_responses(),
                None,
            )
        )
        assert asked and set(asked) == {family == "llama_3"}


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"attention": "flash"}, "attention must be one of"),
        ({"attention": "chunk"}, "'chunked'"),
        ({"attention_chunk": 0}, "attention_chunk must be"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        MemorySettings(**settings)


@pytest.mark.parametrize("way", ["recomputed", "chunked", "automatic"])
def test_t5_refuses_a_way_that_it_lacks(way):
    with pytest.raises(UserError) as refused:
        families.language_model(T5, MemorySettings(attention=way))
    assert str(refused.value) == (
        "attention must be 'plain' for T5, which has no other (remat='full' computes "
        f"it again), got {way!r}"
    )


def test_a_judge_of_t5_attends_plainly_beside_any_policy():
    memory = MemorySettings("full", attention="automatic", attention_chunk=4)
    kept = families.judge_memory(T5, memory)
    assert kept == dataclasses.replace(memory, attention="plain")
    families.language_model(T5, kept)
    decoder_only = decoder_only_toys.FAMILIES["llama_3"]
    assert families.judge_memory(decoder_only, memory) == memory


@pytest.mark.battery
def test_the_kernel_for_tpus_compiles_for_each_device_of_a_mesh():
    """Forward and backward, rows split over four chips that need not exist."""
    pytest.importorskip("libtpu", reason="no TPU compiler")
    from nlhf_jax.scale import chips
    from nlhf_jax.types import PromptBatch

    settings = DecoderOnlySettings(64, 128, 1, 1, 128, 128, 1, dtype="bfloat16")
    mesh = partitioning.make_mesh(MeshSettings(), chips.tpu("v5e:2x2").devices)
    split = partitioning.batch_sharding(mesh)

    def rows(dtype):
        return jax.ShapeDtypeStruct((8, 64), dtype, sharding=split)

    def text_of(way):
        model = decoder_only_language_model(settings, MemorySettings(attention=way))
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=partitioning.replicated(mesh)
            ),
            jax.eval_shape(model.init, jax.random.key(0)),
        )

        def loss(params, prompts, tokens_BT):
            scores = model.token_scores(params, prompts, tokens_BT, None)
            return scores.log_probs_BT.sum()

        prompts = PromptBatch(rows(jnp.int32), rows(bool))
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss)).lower(params, prompts, rows(jnp.int32))
            return lowered.compile().as_text()

    assert text_of("automatic").count("tpu_custom_call") == 2
    assert "tpu_custom_call" not in text_of("recomputed")
