# SPDX-License-Identifier: Apache-2.0
"""Several responses to a prompt read its keys once, and say what they would alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import decoding, loss_gradient
from nlhf_jax.algorithms import ipo_md
from nlhf_jax.decoding import sample
from nlhf_jax.models import shared_prompts
from nlhf_jax.types import PromptBatch, Speaker
from tests import decoder_only_toys, t5_toys
from tests.decoder_only_toys import BATCH, LENGTH, PROMPT

MODELS = ("llama_3", "gemma_3", "t5")


def model_of(name):
    if name == "t5":
        return t5_toys.initialised(t5_toys.T5_1_1)
    settings = decoder_only_toys.FAMILIES[name]
    model = decoder_only_toys.decoder_only_language_model(settings)
    return model, decoder_only_toys.parameters(settings)


def test_rows_become_queries_of_their_prompt_and_rows_again():
    """Entry (prompt, response, head, query) stands where it should."""
    shape = (2, 3, 4, 1, 5)  # prompts, responses, heads, queries, width
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    rows = x.reshape(6, 4, 1, 5)
    asked = shared_prompts.as_queries(rows, 2)
    assert asked.shape == (2, 4, 3, 5)
    for p, n, h in np.ndindex(2, 3, 4):
        np.testing.assert_array_equal(asked[p, h, n], x[p, n, h, 0])
    np.testing.assert_array_equal(shared_prompts.as_rows(asked, 6), rows)


@pytest.mark.parametrize("shape", [(6, 2, 3, 4), (6, 2, 5, 3, 4), (6, 3, 4)])
@pytest.mark.parametrize("num_prompts", [1, 2, 3, 6])
def test_each_way_undoes_the_other(shape, num_prompts):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    there = shared_prompts.as_queries(x, num_prompts)
    assert there.shape[0] == num_prompts and there.size == x.size
    np.testing.assert_array_equal(shared_prompts.as_rows(there, 6), x)


def decoded(model, params, cache, tokens_RT, start_B, each):
    params, step_fn = model.for_decoding(params), jax.jit(model.decode_step)
    last_R, logits = jnp.repeat(start_B, each), []
    for step in range(tokens_RT.shape[1]):
        logits_RV, cache = step_fn(params, cache, last_R, step)
        logits.append(logits_RV)
        last_R = tokens_RT[:, step]
    return jnp.stack(logits, axis=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("each", [2, 3])
def test_logits_are_those_of_repeated_rows(name, each):
    model, params = model_of(name)
    prompts = decoder_only_toys.random_prompts()
    start_B, cache = jax.jit(model.prefill, static_argnums=2)(params, prompts, LENGTH)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, each, axis=0), cache)
    shared = model.share(cache, each)
    tokens_RT = np.random.default_rng(3).integers(2, 60, (BATCH * each, LENGTH))
    given = (jnp.asarray(tokens_RT, jnp.int32), start_B, each)
    expected = decoded(model, params, repeated, *given)
    found = decoded(model, params, shared, *given)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert float(jnp.abs(expected[0] - expected[1]).max()) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_the_prompts_keys_stand_once(name):
    model, params = model_of(name)
    prompts = decoder_only_toys.random_prompts()

    def caches(params):
        cache = model.prefill(params, prompts, LENGTH)[1]
        return cache, model.share(cache, 2)

    plain, shared = jax.eval_shape(caches, params)
    wide = [leaf.shape for leaf in jax.tree.leaves(shared) if leaf.ndim == 4]
    assert all(len(s) == 4 and s[2] in (PROMPT, LENGTH) for s in wide)
    assert {s[0] for s in wide if s[2] == PROMPT} == {BATCH}
    assert {s[0] for s in wide if s[2] == LENGTH} == {2 * BATCH}
    size = sum(leaf.size for leaf in jax.tree.leaves(plain) if leaf.ndim == 4)
    assert sum(int(np.prod(s)) for s in wide) * (PROMPT + LENGTH) == size * (
        PROMPT + 2 * LENGTH
    )
    start_R = jnp.zeros(2 * BATCH, jnp.int32)
    _, after = jax.eval_shape(model.decode_step, params, shared, start_R, 0)
    assert jax.tree.structure(after) == jax.tree.structure(shared)
    assert jax.tree.leaves(after) == jax.tree.leaves(shared)


@pytest.mark.battery
@pytest.mark.parametrize("name", MODELS)
def test_a_rollout_is_that_of_repeated_rows(name, monkeypatch):
    """Policy twice, and a mixture whose other set reads the prompt for one row."""
    monkeypatch.setattr(decoding, "platform", lambda: "tpu")
    model, params = model_of(name)
    other = jax.tree.map(lambda leaf: 0.9 * leaf, params)
    speakers = (
        Speaker({"params": 1.0}),
        Speaker({"params": 0.5, "reference": 0.5}),
        Speaker({"params": 1.0}, temperature=0.0),
    )
    prompts = decoder_only_toys.random_prompts()

    def drawn(model):
        sets = {"params": params, "reference": other}
        return jax.jit(
            lambda sets: sample(
                model, sets, speakers, prompts, jax.random.key(1), max_length=LENGTH
            )
        )(sets)

    asked = []

    def share(cache, each):
        asked.append(each)
        return model.share(cache, each)

    ours, theirs = drawn(model._replace(share=share)), drawn(model._replace(share=None))
    assert asked == [3]  # the reference speaks once
    for one, two in zip(ours.samples, theirs.samples, strict=True):
        np.testing.assert_array_equal(one.responses.tokens_BT, two.responses.tokens_BT)
        for name in one.log_probs:
            np.testing.assert_allclose(
                one.log_probs[name], two.log_probs[name], atol=1e-5
            )


def test_on_a_cpu_rows_are_repeated():
    """There one copy of a prompt's keys was measured to save nothing."""
    model, params = model_of("llama_3")

    def refuse(cache, each):
        raise AssertionError

    jax.eval_shape(
        lambda params: sample(
            model._replace(share=refuse),
            {"params": params},
            (Speaker({"params": 1.0}),) * 2,
            decoder_only_toys.random_prompts(),
            jax.random.key(0),
            max_length=2,
        ),
        params,
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_copies_no_prompt(name):
    """No equation of a step makes anything as large as a prompt's repeated keys."""
    model, params = model_of(name)
    wide = PromptBatch(jnp.full((2, 400), 5, jnp.int32), jnp.ones((2, 400), bool))
    _, cache = jax.eval_shape(lambda p: model.prefill(p, wide, 2), params)
    shared = jax.eval_shape(lambda cache: model.share(cache, 2), cache)
    last_R = jnp.zeros(4, jnp.int32)
    jaxpr = jax.make_jaxpr(model.decode_step)(params, shared, last_R, 0).jaxpr
    one = max(leaf.size for leaf in jax.tree.leaves(shared) if leaf.ndim == 4)
    made = [v.aval.size for e in _equations(jaxpr) for v in e.outvars]
    assert max(made) < one


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


@pytest.mark.battery
def test_an_encoder_reads_a_prompt_once_for_all_its_responses():
    """Scores and gradients are those of one response after the other."""
    model, params = model_of("t5")
    prompts = t5_toys.random_prompts()
    both = [t5_toys.random_responses(seed) for seed in (4, 5)]

    def together(params):
        tokens_RT = jnp.stack(both, axis=1).reshape(-1, both[0].shape[1])
        scores = model.token_scores(params, prompts, tokens_RT, None)
        return scores.log_probs_BT.reshape(len(both[0]), 2, -1)

    def apart(params):
        scores = [model.token_scores(params, prompts, one, None) for one in both]
        return jnp.stack([one.log_probs_BT for one in scores], axis=1)

    def slopes(fn):
        def loss(params):
            found = fn(params)
            return jnp.sin(found).sum(), found

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    assert model.reads_prompts_once
    found, expected = slopes(together), slopes(apart)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-5)


def test_a_pair_of_samples_is_scored_in_one_pass_over_the_prompts():
    """What the loss reads is that of a model that has to read them again."""
    model, params = model_of("t5")
    algorithm = ipo_md(tau=0.1, beta=0.25)
    assert len(algorithm.trained_on) == 2
    sets = {"params": params, "reference": jax.tree.map(lambda x: 0.9 * x, params)}
    prompts, rows = t5_toys.random_prompts(), []

    def seen(params, prompts, tokens_BT, dropout_key):
        rows.append(tokens_BT.shape[0])
        return model.token_scores(params, prompts, tokens_BT, dropout_key)

    drawn = jax.jit(
        lambda sets: sample(
            model, sets, algorithm.speakers, prompts, jax.random.key(0), max_length=4
        )
    )(sets).samples

    def scored(network):
        return jax.jit(
            lambda sets: loss_gradient.scored_samples(
                network, algorithm, sets["params"], sets, prompts, drawn
            )
        )(sets)

    once = scored(model._replace(token_scores=seen))
    num_rows = len(prompts.tokens_BS)
    assert rows == [2 * num_rows] * (1 + len(algorithm.scored_under))
    again = scored(model._replace(reads_prompts_once=False))
    for one, two in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
