# SPDX-License-Identifier: Apache-2.0
"""Decoder-only models: a plain-numpy forward, cached decode, padding, causality."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import decoding
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.types import PromptBatch, Speaker
from tests.battery import all_but
from tests.decoder_only_toys import (
    BATCH,
    FAMILIES,
    GEMMA,
    LENGTH,
    PROMPT,
    VOCAB,
    numpy_logits,
    parameters,
    random_prompts,
    random_responses,
    shape,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")
# Two that differ in most switches.
FAMILY = pytest.mark.parametrize("family", all_but(("llama_3", "gemma_3"), FAMILIES))


def model_of(family):
    """Returns (settings, model, parameters)."""
    settings = FAMILIES[family]
    return settings, decoder_only_language_model(settings), parameters(settings)


@pytest.mark.parametrize(
    "family", all_but(("llama_3", "gemma_2", "gemma_3", "qwen_2"), FAMILIES)
)
def test_logits_equal_a_plain_numpy_forward(family):
    settings, model, params = model_of(family)
    prompts, tokens_BT = random_prompts(), random_responses()
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
        np.testing.assert_allclose(logits_BTV[row], expected_TV, atol=1e-5, rtol=1e-5)


def prefilled(model, params, prompts, length=LENGTH):
    """Returns (start tokens, cache)."""
    return jax.jit(model.prefill, static_argnums=2)(params, prompts, length)


def _decode(model, params, prompts, tokens_BT, cache_map=lambda cache: cache):
    """Logits of a cached decode that is fed `tokens_BT`, [B, T, V]."""
    start_B, cache = prefilled(model, params, prompts, tokens_BT.shape[1])
    last_R, cache = cache_map((start_B, cache))
    params, step_fn = model.for_decoding(params), jax.jit(model.decode_step)
    logits = []
    for step in range(tokens_BT.shape[1]):
        logits_RV, cache = step_fn(params, cache, last_R, step)
        logits.append(logits_RV)
        last_R = tokens_BT[:, step]
    return jnp.stack(logits, axis=1)


@FAMILY
def test_cached_decode_equals_the_uncached_forward(family):
    _, model, params = model_of(family)
    prompts, tokens_BT = random_prompts(), random_responses()
    logits_BTV = jax.jit(model.logits)(params, prompts, tokens_BT)
    decoded_BTV = _decode(model, params, prompts, tokens_BT)
    assert decoded_BTV.dtype == jnp.float32
    np.testing.assert_allclose(decoded_BTV, logits_BTV, atol=1e-5)


def test_a_decode_starts_with_the_prompts_last_token():
    _, model, params = model_of("llama_3")
    prompts = random_prompts()
    start_B, cache = prefilled(model, params, prompts)
    rows = np.asarray(prompts.tokens_BS)
    assert start_B.tolist() == [rows[0, 6], rows[1, 3], rows[2, 0]]
    assert cache.start_R.tolist() == [6, 3, 0]
    assert cache.mask_RS.sum(axis=1).tolist() == [6, 3, 0]


def test_rows_of_the_cache_can_be_repeated_and_gathered():
    """Two responses to one prompt are two rows, whatever the order of the rows."""
    _, model, params = model_of("gemma_3")
    prompts = random_prompts()
    tokens_RT = jnp.concatenate([random_responses(4), random_responses(5)])
    rows, order = jnp.array([0, 0, 1, 1, 2, 2]), jnp.array([5, 0, 3, 2, 4, 1])

    def repeat_and_shuffle(tree):
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), tree)
        return jax.tree.map(lambda leaf: leaf[order], repeated)

    decoded = _decode(model, params, prompts, tokens_RT, repeat_and_shuffle)
    wide = PromptBatch(*(leaf[rows[order]] for leaf in prompts))
    expected = jax.jit(model.logits)(params, wide, tokens_RT)
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


def test_every_leaf_of_the_cache_has_the_row_first_and_keeps_its_shape():
    _, model, params = model_of("gemma_3")
    start_B, cache = jax.eval_shape(
        lambda p: model.prefill(p, random_prompts(), LENGTH), params
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(cache)}
    assert shapes == {(BATCH, 2, PROMPT + LENGTH, 6), (BATCH, PROMPT), (BATCH,)}
    _, after = jax.eval_shape(model.decode_step, params, cache, start_B, 0)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    assert jax.tree.leaves(after) == jax.tree.leaves(cache)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


def test_a_decode_step_reads_the_cache_as_it_lies():
    """Rows and heads lead in each product with the cache, and it is never moved."""
    settings, model, params = model_of("llama_3")
    start_B, cache = prefilled(model, params, random_prompts())
    jaxpr = jax.make_jaxpr(model.decode_step)(params, cache, start_B, 0).jaxpr
    cache_shape, num_products = cache.layers[0].keys_BGNK.shape, 0
    for equation in _equations(jaxpr):
        shapes = [var.aval.shape for var in equation.invars if hasattr(var, "aval")]
        if cache_shape in shapes:
            assert equation.primitive.name not in ("transpose", "broadcast_in_dim")
            if equation.primitive.name == "dot_general":
                _, batch = equation.params["dimension_numbers"]
                assert batch == ((0, 1), (0, 1))
                num_products += 1
    assert num_products == 2 * settings.num_layers


@FAMILY
def test_padding_is_inert(family):
    """Poisoned padding, and more of it, change nothing; nor does the neighbour."""
    _, model, params = model_of(family)
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


def test_a_prompt_without_tokens_is_one_of_its_first_column():
    _, model, params = model_of("llama_3")
    tokens_BS, tokens_BT = jnp.full((BATCH, PROMPT), 7), random_responses()
    mask_BS = jnp.zeros((BATCH, PROMPT), bool)
    empty, one = (
        PromptBatch(tokens_BS, m) for m in (mask_BS, mask_BS.at[:, 0].set(True))
    )
    logits = jax.jit(model.logits)
    logits_BTV = logits(params, empty, tokens_BT)
    assert jnp.array_equal(logits_BTV, logits(params, one, tokens_BT))
    np.testing.assert_allclose(
        _decode(model, params, empty, tokens_BT), logits_BTV, atol=1e-5
    )


def _positions_read(settings, prompt_length=5, length=6):
    """Returns [T, V]: which ids the logits at each position depend on.

    All ids differ, so the embedding's gradient tells which positions were read.
    """
    model, params = decoder_only_language_model(settings), parameters(settings)
    prompt = PromptBatch(
        jnp.arange(10, 12 + prompt_length)[None],
        (jnp.arange(prompt_length + 2) < prompt_length)[None],
    )
    tokens_1T = jnp.arange(30, 30 + length)[None]

    def position_logits(embedding_VD):
        changed = {**params, "token_embedder": {"embedding": embedding_VD}}
        # The squares keep the gradient from cancelling over the vocabulary.
        return (model.logits(changed, prompt, tokens_1T)[0] ** 2).sum(axis=-1)

    gradient_TVD = jax.jit(jax.jacrev(position_logits))(
        params["token_embedder"]["embedding"]
    )
    return np.asarray(jnp.abs(gradient_TVD).sum(axis=-1) > 0)


def test_causality_as_a_zero_gradient():
    """Position t reads the prompt and the response before t, and nothing else."""
    is_read_TV = _positions_read(FAMILIES["llama_3"])
    for position in range(6):
        read = set(np.flatnonzero(is_read_TV[position]).tolist())
        assert read == {*range(10, 15), *range(30, 30 + position)}


@pytest.mark.parametrize("window, num_layers", [(1, 1), (3, 1), (3, 2), (99, 1)])
def test_a_sliding_window_as_a_zero_gradient(window, num_layers):
    """Each local layer looks `window - 1` positions further back, prompt or not."""
    settings = shape(num_layers, attention_pattern=("local",), sliding_window=window)
    is_read_TV = _positions_read(settings)
    ids = [*range(10, 15), *range(30, 36)]
    for position in range(6):
        last = 5 + position  # inputs before this position
        first = max(0, last - 1 - num_layers * (window - 1))
        read = set(np.flatnonzero(is_read_TV[position]).tolist())
        assert read == set(ids[first:last])


def test_a_layer_of_the_pattern_is_what_it_says():
    """One global layer among local ones reads everything."""
    pattern = {"attention_pattern": ("local", "global"), "sliding_window": 1}
    assert _positions_read(shape(1, **pattern))[-1].sum() == 1
    assert _positions_read(shape(2, **pattern))[-1].sum() == 10


def test_grouped_heads_are_shared_heads():
    """A key-value head read by two query heads, or copied for each: the same."""
    grouped = FAMILIES["llama_3"]
    copied = dataclasses.replace(grouped, num_kv_heads=grouped.num_heads)

    def copy(path, leaf):
        if path[-2].key not in ("key", "value"):
            return leaf
        heads = leaf.reshape(leaf.shape[0], grouped.num_kv_heads, grouped.head_dim)
        return jnp.repeat(heads, 2, axis=1).reshape(leaf.shape[0], -1)

    params = parameters(grouped)
    prompts, tokens_BT = random_prompts(), random_responses()
    expected, found = (
        jax.jit(decoder_only_language_model(settings).logits)(p, prompts, tokens_BT)
        for settings, p in (
            (grouped, params),
            (copied, jax.tree_util.tree_map_with_path(copy, params)),
        )
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_decode_loop_writes_what_is_likeliest():
    """Greedy samples are the argmax of the logits they are scored with."""
    _, model, params = model_of("gemma_3")
    prompts = random_prompts()
    speakers = (Speaker({"params": 1.0}, temperature=0.0), Speaker({"params": 1.0}))
    rollout = jax.jit(
        lambda params: decoding.sample(
            model,
            {"params": params},
            speakers,
            prompts,
            jax.random.key(0),
            max_length=LENGTH,
        )
    )(params)
    for index, sample in enumerate(rollout.samples):
        tokens_BT, mask_BT = sample.responses
        scores = jax.jit(model.token_scores)(params, prompts, tokens_BT)
        np.testing.assert_allclose(
            np.where(mask_BT, scores.log_probs_BT, 0),
            sample.log_probs["params"],
            atol=1e-5,
        )
        likeliest = np.asarray(scores.is_most_likely_BT)[np.asarray(mask_BT)]
        assert likeliest.all() == (index == 0)


def _expected_parameters(s) -> dict:
    """The layout: path -> (shape, logical axes)."""
    width, joined = s.emb_dim, s.num_heads * s.head_dim
    shared = s.num_kv_heads * s.head_dim
    norm = ((width,), ("embed",))
    into, out = ("embed", "joined_kv"), ("joined_kv", "embed")
    layer = {
        "pre_attention_norm/scale": norm,
        "pre_mlp_norm/scale": norm,
        "attention/query/kernel": ((width, joined), into),
        "attention/key/kernel": ((width, shared), into),
        "attention/value/kernel": ((width, shared), into),
        "attention/out/kernel": ((joined, width), out),
        "mlp/wi_0/kernel": ((width, s.mlp_dim), ("embed", "mlp")),
        "mlp/wi_1/kernel": ((width, s.mlp_dim), ("embed", "mlp")),
        "mlp/wo/kernel": ((s.mlp_dim, width), ("mlp", "embed")),
    }
    if s.post_norms:
        layer |= {"post_attention_norm/scale": norm, "post_mlp_norm/scale": norm}
    if s.query_key_norm:
        head = ((s.head_dim,), ("kv",))
        layer["attention/query_norm/scale"] = layer["attention/key_norm/scale"] = head
    biased = ["query", "key", "value"] if s.query_key_value_bias else []
    biased = [f"attention/{n}" for n in biased + ["out"] * s.output_bias]
    biased += [f"mlp/{n}" for n in ("wi_0", "wi_1", "wo")] if s.mlp_bias else []
    for name in biased:
        (_, size), (_, axis) = layer[f"{name}/kernel"]
        layer[f"{name}/bias"] = ((size,), (axis,))
    expected = {
        "token_embedder/embedding": ((s.vocab_size, width), ("vocab", "embed")),
        "final_norm/scale": norm,
    }
    if not s.tied_output:
        head = ((width, s.vocab_size), ("embed", "vocab"))
        expected["logits_dense/kernel"] = head
    for index in range(s.num_layers):
        expected |= {f"layers_{index}/{name}": leaf for name, leaf in layer.items()}
    return expected


def _flat(tree, is_leaf=None) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("family", all_but(("gemma_3", "biases"), FAMILIES))
def test_parameters_and_logical_axes(family):
    settings, model, _ = model_of(family)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in _flat(params).items()}
    axes = _flat(model.logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    expected = _expected_parameters(settings)
    assert shapes == {path: shape for path, (shape, _) in expected.items()}
    assert axes == {path: names for path, (_, names) in expected.items()}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_what_training_starts_from():
    """Norms that do nothing, no bias, and logits of the size of 1."""
    for switches in ({"query_key_value_bias": True}, GEMMA):
        settings = shape(1, num_kv_heads=2, **switches)
        model = decoder_only_language_model(settings)
        params = jax.jit(model.init)(jax.random.key(0))
        for path, leaf in _flat(params).items():
            if path.endswith("scale"):
                assert set(np.ravel(leaf)) == {float(not settings.norm_plus_one)}
            if path.endswith("bias"):
                assert not leaf.any()
        stddev = float(params["token_embedder"]["embedding"].std())
        # That of n draws has the relative error 1 / sqrt(2 n).
        assert abs(stddev * 4 - 1) < 5 / (2 * VOCAB * 16) ** 0.5
        logits = jax.jit(model.logits)(params, random_prompts(), random_responses())
        assert 0.5 < float(logits.std()) < 2.0


@pytest.mark.parametrize("family", all_but(["gemma_3"], ["gemma_3", "biases"]))
def test_bfloat16_activations_keep_float32_logits(family):
    settings, model, params = model_of(family)
    half = decoder_only_language_model(dataclasses.replace(settings, dtype="bfloat16"))
    prompts, tokens_BT = random_prompts(), random_responses()
    exact_BTV = jax.jit(model.logits)(params, prompts, tokens_BT)
    logits_BTV = jax.jit(half.logits)(params, prompts, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    rounded = logits_BTV.astype(jnp.bfloat16).astype(jnp.float32)
    assert not jnp.array_equal(rounded, logits_BTV)
    # Tens of roundings of relative size 2^-9 in a row, on logits of size 2 to 8.
    error = float(jnp.abs(logits_BTV - exact_BTV).max())
    assert 1e-4 < error < 0.05 * float(jnp.abs(exact_BTV).max())
    decoded = _decode(half, params, prompts, tokens_BT)
    assert float(jnp.abs(decoded - logits_BTV).max()) < 2 * error
    _, cache = jax.eval_shape(lambda p: half.prefill(p, prompts, 4), params)
    assert cache.layers[0].keys_BGNK.dtype == jnp.bfloat16


def test_equal_settings_give_equal_functions_and_one_compilation():
    settings, model, params = model_of("llama_3")
    again = decoder_only_language_model(dataclasses.replace(settings))
    assert again is model
    assert (model.vocab_size, model.pad_id, model.eos_id) == (VOCAB, 0, 1)
    other = dataclasses.replace(settings, pad_id=3, eos_id=4)
    other = decoder_only_language_model(other)
    assert (other.pad_id, other.eos_id) == (3, 4)
    start_B, cache = prefilled(model, params, random_prompts())
    num_traces = 0

    def counted(cache, last_R, step):
        nonlocal num_traces
        num_traces += 1
        return model.decode_step(params, cache, last_R, step)

    step_fn = jax.jit(counted)
    for step in range(3):
        _, cache = step_fn(cache, start_B, step)
    assert num_traces == 1
