# SPDX-License-Identifier: Apache-2.0
"""T5: T5X's parameter layout, a plain-numpy forward, cached decode, causality."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.models import layers
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import PromptBatch
from tests.t5_toys import (
    BATCH,
    DROPPING,
    LENGTH,
    PROMPT,
    T5_1_0,
    T5_1_1,
    initialised,
    integer_bucket,
    numpy_logits,
    numpy_norm,
    random_prompts,
    random_responses,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")

VERSIONS = pytest.mark.parametrize("settings", [T5_1_1, T5_1_0], ids=["1.1", "1.0"])


@VERSIONS
def test_logits_equal_a_plain_numpy_forward(settings):
    """With distances beyond the buckets that hold one distance each."""
    model, params = initialised(settings)
    prompts, tokens_BT = random_prompts(width=20), random_responses(length=24)
    logits_BTV = jax.jit(model.logits)(params, prompts, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    for row in range(BATCH):
        length = int(prompts.mask_BS[row].sum())
        expected_TV = numpy_logits(
            params,
            settings,
            np.asarray(prompts.tokens_BS[row, :length]),
            np.asarray(tokens_BT[row]),
        )
        np.testing.assert_allclose(logits_BTV[row], expected_TV, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_equal_the_integer_formula(bidirectional):
    offsets = np.arange(-400, 401)
    buckets = layers.relative_position_bucket(
        jnp.asarray(offsets), bidirectional=bidirectional
    )
    expected = [integer_bucket(int(offset), bidirectional) for offset in offsets]
    assert buckets.tolist() == expected
    assert min(expected) == 0 and max(expected) == 31
    if not bidirectional:
        assert set(np.asarray(buckets)[offsets > 0]) == {0}


def test_rms_norm_is_computed_in_float32():
    """So that its result is off by its last rounding alone: 2^-8, half a unit."""
    norm = layers.RMSNorm("bfloat16")
    x_BD = jax.random.normal(jax.random.key(0), (20, 50), jnp.bfloat16) * 30
    scale_D = jnp.linspace(0.3, 3.0, 50)
    y_BD = norm.apply({"params": {"scale": scale_D}}, x_BD)
    assert y_BD.dtype == jnp.bfloat16
    expected_BD = numpy_norm(np.asarray(x_BD, np.float64), np.asarray(scale_D))
    np.testing.assert_allclose(
        np.asarray(y_BD, np.float64), expected_BD, rtol=2**-8 * 1.001
    )


def _expected_parameters(s: T5Settings) -> dict:
    """T5X's table: path -> (shape, logical axes)."""
    joined = s.num_heads * s.head_dim
    norm = ((s.emb_dim,), ("embed",))
    into = ((s.emb_dim, joined), ("embed", "joined_kv"))
    attention = {f"{name}/kernel": into for name in ("query", "key", "value")}
    attention["out/kernel"] = ((joined, s.emb_dim), ("joined_kv", "embed"))
    names = ("wi",) if len(s.mlp_activations) == 1 else ("wi_0", "wi_1")
    mlp = {f"{n}/kernel": ((s.emb_dim, s.mlp_dim), ("embed", "mlp")) for n in names}
    mlp["wo/kernel"] = ((s.mlp_dim, s.emb_dim), ("mlp", "embed"))
    table = ((s.vocab_size, s.emb_dim), ("vocab", "embed"))
    bias = ((s.num_heads, 32), ("heads", "relpos_buckets"))
    expected = {"token_embedder/embedding": table}
    parts = (
        ("encoder", s.num_encoder_layers, {"attention": "attention"}),
        (
            "decoder",
            s.num_decoder_layers,
            {
                "self_attention": "self_attention",
                "encoder_decoder_attention": "cross_attention",
            },
        ),
    )
    for part, num_layers, attentions in parts:
        expected[f"{part}/relpos_bias/rel_embedding"] = bias
        expected[f"{part}/{part}_norm/scale"] = norm
        for layer in (f"{part}/layers_{index}" for index in range(num_layers)):
            expected[f"{layer}/pre_mlp_layer_norm/scale"] = norm
            expected |= {f"{layer}/mlp/{name}": leaf for name, leaf in mlp.items()}
            for block, label in attentions.items():
                expected[f"{layer}/pre_{label}_layer_norm/scale"] = norm
                expected |= {
                    f"{layer}/{block}/{name}": leaf for name, leaf in attention.items()
                }
    if not s.logits_via_embedding:
        head = ((s.emb_dim, s.vocab_size), ("embed", "vocab"))
        expected["decoder/logits_dense/kernel"] = head
    return expected


def _flat(tree, is_leaf=None) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@VERSIONS
def test_parameters_and_logical_axes_are_those_of_t5x(settings):
    model = t5_language_model(settings)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in _flat(params).items()}
    axes = _flat(model.logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    expected = _expected_parameters(settings)
    assert shapes == {path: shape for path, (shape, _) in expected.items()}
    assert axes == {path: names for path, (_, names) in expected.items()}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert type(params["encoder"]) is dict


@pytest.mark.battery
def test_initialisers_have_the_scales_of_t5x():
    """Standard deviations; that of n draws has the relative error 1 / sqrt(2 n)."""
    s = T5Settings(500, 128, 4, 16, 256, 1, 1)
    params = jax.jit(t5_language_model(s).init)(jax.random.key(3))
    layer, joined = params["decoder"]["layers_0"], s.num_heads * s.head_dim
    attention, mlp = layer["self_attention"], layer["mlp"]
    expected = {
        "embedding": (params["token_embedder"]["embedding"], 1.0),
        "query": (attention["query"]["kernel"], (s.emb_dim * s.head_dim) ** -0.5),
        "key": (attention["key"]["kernel"], s.emb_dim**-0.5),
        "value": (attention["value"]["kernel"], s.emb_dim**-0.5),
        "out": (attention["out"]["kernel"], joined**-0.5),
        "wi_1": (mlp["wi_1"]["kernel"], s.emb_dim**-0.5),
        "wo": (mlp["wo"]["kernel"], s.mlp_dim**-0.5),
        "logits": (params["decoder"]["logits_dense"]["kernel"], s.emb_dim**-0.5),
        # Uniform with variance 1 / mean of the two sizes.
        "bias": (params["decoder"]["relpos_bias"]["rel_embedding"], 18**-0.5),
    }
    for name, (leaf, stddev) in expected.items():
        error = stddev / math.sqrt(2 * leaf.size)
        assert abs(float(leaf.std()) - stddev) < 5 * error, name
    for name in ("wi_1", "wo", "logits"):
        leaf, stddev = expected[name]
        # Cut at two standard deviations of the normal before cutting, whose own
        # standard deviation after the cut is 0.8796 of it.
        assert float(jnp.abs(leaf).max()) <= 2 * stddev / 0.8796, name
    assert float(jnp.abs(attention["key"]["kernel"]).max()) > 3 * s.emb_dim**-0.5
    norm = params["decoder"]["decoder_norm"]["scale"]
    assert jnp.array_equal(norm, jnp.ones(s.emb_dim))


def _decode(model, params, prompts, tokens_BT, cache_map=lambda cache: cache):
    """Logits of a cached decode that is fed `tokens_BT`, [B, T, V]."""
    start_B, cache = jax.jit(model.prefill, static_argnums=2)(
        params, prompts, tokens_BT.shape[1]
    )
    cache, step_fn = cache_map(cache), jax.jit(model.decode_step)
    assert start_B.tolist() == [0] * len(prompts.tokens_BS)
    last_R, logits = jnp.zeros(len(tokens_BT), jnp.int32), []
    for step in range(tokens_BT.shape[1]):
        logits_RV, cache = step_fn(params, cache, last_R, step)
        logits.append(logits_RV)
        last_R = tokens_BT[:, step]
    return jnp.stack(logits, axis=1)


@VERSIONS
def test_cached_decode_equals_the_uncached_forward(settings):
    model, params = initialised(settings)
    prompts, tokens_BT = random_prompts(), random_responses()
    logits_BTV = jax.jit(model.logits)(params, prompts, tokens_BT)
    decoded_BTV = _decode(model, params, prompts, tokens_BT)
    assert decoded_BTV.dtype == jnp.float32
    np.testing.assert_allclose(decoded_BTV, logits_BTV, atol=1e-5)


def test_rows_of_the_cache_can_be_repeated_and_gathered():
    """Two responses to one prompt are two rows, whatever the order of the rows."""
    model, params = initialised(T5_1_1)
    prompts, tokens_RT = (
        random_prompts(),
        jnp.concatenate([random_responses(4), random_responses(5)]),
    )
    rows = jnp.array([0, 0, 1, 1, 2, 2])
    order = jnp.array([5, 0, 3, 2, 4, 1])

    def repeat_and_shuffle(cache):
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), cache)
        return jax.tree.map(lambda leaf: leaf[order], repeated)

    decoded = _decode(model, params, prompts, tokens_RT, repeat_and_shuffle)
    wide = PromptBatch(*(leaf[rows[order]] for leaf in prompts))
    expected = jax.jit(model.logits)(params, wide, tokens_RT)
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


def test_every_leaf_of_the_cache_has_the_row_first_and_keeps_its_shape():
    model, params = initialised(T5_1_1)
    _, cache = jax.eval_shape(
        lambda p: model.prefill(p, random_prompts(), LENGTH), params
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(cache)}
    assert shapes == {(BATCH, 2, LENGTH, 3), (BATCH, 2, PROMPT, 3), (BATCH, PROMPT)}
    last_R = jnp.zeros(BATCH, jnp.int32)
    _, after = jax.eval_shape(model.decode_step, params, cache, last_R, 0)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    assert jax.tree.leaves(after) == jax.tree.leaves(cache)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


def test_a_decode_step_reads_the_cache_as_it_lies():
    """Rows and heads lead in each product with the cache, and it is never moved.

    Any other order makes the compiler copy the whole cache at each token.
    """
    model, params = initialised(T5_1_1)
    _, cache = model.prefill(params, random_prompts(), LENGTH)
    last_R = jnp.zeros(BATCH, jnp.int32)
    jaxpr = jax.make_jaxpr(model.decode_step)(params, cache, last_R, 0).jaxpr
    cache_shapes = {leaf.shape for leaf in jax.tree.leaves(cache) if leaf.ndim == 4}
    num_products = 0
    for equation in _equations(jaxpr):
        shapes = {var.aval.shape for var in equation.invars if hasattr(var, "aval")}
        if shapes & cache_shapes:
            assert equation.primitive.name != "transpose"
            if equation.primitive.name == "dot_general":
                _, batch = equation.params["dimension_numbers"]
                assert batch == ((0, 1), (0, 1))
                num_products += 1
    # Keys and values, of the response and of the prompt, in each layer.
    assert num_products == 4 * T5_1_1.num_decoder_layers


@VERSIONS
def test_padding_is_inert(settings):
    """Poisoned padding, and more of it, change nothing."""
    model, params = initialised(settings)
    prompts, tokens_BT = random_prompts(), random_responses()
    poison_BS = jnp.where(prompts.mask_BS, prompts.tokens_BS, 59)
    poisoned = prompts._replace(tokens_BS=poison_BS)
    logits = jax.jit(model.logits)
    expected_BTV = logits(params, prompts, tokens_BT)
    assert jnp.array_equal(logits(params, poisoned, tokens_BT), expected_BTV)
    wider = PromptBatch(*(jnp.pad(leaf, ((0, 0), (0, 4))) for leaf in poisoned))
    wider_BTV = logits(params, wider, tokens_BT)
    np.testing.assert_allclose(wider_BTV, expected_BTV, atol=1e-5)
    clean = _decode(model, params, prompts, tokens_BT)
    assert jnp.array_equal(_decode(model, params, poisoned, tokens_BT), clean)


def test_causality_as_a_zero_gradient():
    """Position t reads the prompt and the response before t, and nothing else.

    All ids differ, so the embedding's gradient tells which positions were read.
    """
    model, params = initialised(T5_1_1)
    prompt = PromptBatch(jnp.arange(10, 17)[None], jnp.ones((1, 7), bool))
    tokens_1T = jnp.arange(30, 35)[None]

    def position_logits(embedding_VD):
        changed = {**params, "token_embedder": {"embedding": embedding_VD}}
        # The squares keep the gradient from cancelling over the vocabulary.
        return (model.logits(changed, prompt, tokens_1T)[0] ** 2).sum(axis=-1)

    gradient_TVD = jax.jit(jax.jacrev(position_logits))(
        params["token_embedder"]["embedding"]
    )
    is_read_TV = np.asarray(jnp.abs(gradient_TVD).sum(axis=-1) > 0)
    for position in range(5):
        read = set(np.flatnonzero(is_read_TV[position]).tolist())
        # Id 0 starts every response.
        assert read == {0, *range(10, 17), *range(30, 30 + position)}


def test_no_key_means_no_dropout_and_a_key_draws():
    """Without a key, or at rate 0, the network has no random number in it."""
    model, params = initialised(DROPPING)
    rate_0 = t5_language_model(T5Settings(**{**vars(DROPPING), "dropout_rate": 0.0}))
    prompts, tokens_BT = random_prompts(), random_responses()
    key, other = jax.random.split(jax.random.key(1))

    def draws(logits, key):
        trace = jax.make_jaxpr(functools.partial(logits, dropout_key=key))
        return "random_bits" in str(trace(params, prompts, tokens_BT))

    assert draws(model.logits, key)
    assert not draws(model.logits, None)
    assert not draws(rate_0.logits, key)
    logits = jax.jit(model.logits)
    dropped = logits(params, prompts, tokens_BT, key)
    assert jnp.array_equal(logits(params, prompts, tokens_BT, key), dropped)
    assert not jnp.allclose(logits(params, prompts, tokens_BT, other), dropped)
    _, cache = jax.jit(model.prefill, static_argnums=2)(params, prompts, LENGTH)
    start_B = jnp.zeros(BATCH, jnp.int32)
    first_BV, _ = jax.jit(model.decode_step)(params, cache, start_B, 0)
    exact_BTV = logits(params, prompts, tokens_BT)
    np.testing.assert_allclose(first_BV, exact_BTV[:, 0], atol=1e-5)
    assert not jnp.allclose(dropped[:, 0], exact_BTV[:, 0], atol=1e-2)


def test_dropout_of_the_output_zeroes_and_rescales():
    """With blocks that add nothing, the logits are a dropped, normalised embedding.

    Of its D entries each is 0 or 2, as often as the others: the rate is 1/2.
    """
    model, params = initialised(DROPPING)
    params = jax.tree.map(jnp.zeros_like, params)
    params["token_embedder"]["embedding"] = jnp.ones((64, 64))
    params["decoder"]["decoder_norm"]["scale"] = jnp.ones(64)
    # Logit v is entry v of the decoder's output.
    params["decoder"]["logits_dense"]["kernel"] = jnp.eye(64)
    logits_BTV = jax.jit(model.logits)(
        params, random_prompts(), random_responses(), jax.random.key(5)
    )
    values_BTV = np.asarray(logits_BTV)
    # One mask for all positions of a row, another for each row.
    assert np.array_equal(values_BTV == 0, np.repeat(values_BTV[:, :1] == 0, 5, axis=1))
    assert not np.array_equal(values_BTV[0], values_BTV[1])
    # Dropped as embedding and again as output: a quarter is left.
    share = (values_BTV[:, 0] != 0).mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (3 * 64))
    for row_V in values_BTV[:, 0]:
        kept = row_V[row_V != 0]
        np.testing.assert_allclose(kept, kept[0], rtol=1e-5)
        # Mean square 1 after the norm; the output's dropout follows it and doubles
        # half of the entries, which makes it 2 on average.
        assert abs((row_V**2).mean() - 2) < 0.7


@pytest.mark.battery
@VERSIONS
def test_bfloat16_activations_keep_float32_logits(settings):
    model, params = initialised(settings)
    half = t5_language_model(T5Settings(**{**vars(settings), "dtype": "bfloat16"}))
    prompts, tokens_BT = random_prompts(), random_responses()
    exact_BTV = jax.jit(model.logits)(params, prompts, tokens_BT)
    logits_BTV = jax.jit(half.logits)(params, prompts, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    # Not values of 8 bits in float32 clothes.
    rounded = logits_BTV.astype(jnp.bfloat16).astype(jnp.float32)
    assert not jnp.array_equal(rounded, logits_BTV)
    # About 20 roundings of relative size 2^-9 in a row, on logits of size 1.
    np.testing.assert_allclose(logits_BTV, exact_BTV, atol=0.1)
    assert float(jnp.abs(logits_BTV - exact_BTV).max()) > 1e-4
    decoded = _decode(half, params, prompts, tokens_BT)
    np.testing.assert_allclose(decoded, logits_BTV, atol=0.1)
    _, cache = jax.eval_shape(lambda p: half.prefill(p, prompts, 4), params)
    assert cache.layers[0].self_keys_RHTK.dtype == jnp.bfloat16


def test_equal_settings_give_equal_functions_and_one_compilation():
    assert t5_language_model(T5_1_1) is t5_language_model(T5Settings(**vars(T5_1_1)))
    model, params = initialised(T5_1_1)
    assert (model.vocab_size, model.pad_id, model.eos_id) == (61, 0, 1)
    _, cache = model.prefill(params, random_prompts(), LENGTH)
    num_traces = 0

    def counted(cache, last_R, step):
        nonlocal num_traces
        num_traces += 1
        return model.decode_step(params, cache, last_R, step)

    step_fn = jax.jit(counted)
    for step in range(3):
        _, cache = step_fn(cache, jnp.full(BATCH, 5, jnp.int32), step)
    assert num_traces == 1
