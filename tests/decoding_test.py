# SPDX-License-Identifier: Apache-2.0
"""The decode loop: rigged models, exact probabilities, frequencies, early stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from nlhf_jax.checks import UserError
from nlhf_jax.decoding import draw, sample
from nlhf_jax.games import solutions
from nlhf_jax.models import tabular
from nlhf_jax.types import POLICY, REFERENCE, PromptBatch, Speaker

TOY = {
    POLICY: tabular.table([0.4, -0.2], [[1.0, -0.5], [-0.3, 0.8]]),
    REFERENCE: tabular.table(np.log([0.5, 0.5]), np.log([[0.7, 0.3], [0.6, 0.4]])),
}
# By weight of the reference: the token-level products, in the order AA, AB, BA, BB;
# computed independently (numpy, float64, twelve decimals), as all below.
MIXTURES = {
    0.0: (0.527872116364, 0.117784189862, 0.088493756666, 0.265849937108),
    0.125: (0.505850692919, 0.122465495377, 0.106535060103, 0.265148751602),
    0.25: (0.483606269257, 0.127032964692, 0.127162623236, 0.262198142814),
    0.5: (0.438761459701, 0.135681057111, 0.176200039530, 0.249357443658),
    1.0: (0.35, 0.15, 0.3, 0.2),
}
# What the mixture of whole sequences would give instead.
SEQUENCE_LEVEL = {
    0.125: (0.510383249439, 0.123562818732, 0.104921377795, 0.261132554034),
    0.25: (0.491509637013, 0.129109009402, 0.123903413839, 0.255477939746),
    0.5: (0.449486135582, 0.138997518319, 0.170386373908, 0.241129972190),
}
# The token-level factors: P(A), P(A after A), P(A after B).
FACTORS = {
    0.125: (0.628316188295, 0.805089383884, 0.286628195116),
    0.25: (0.610639233949, 0.791967240836, 0.326593314797),
    0.5: (0.574442516812, 0.763803943580, 0.414045214785),
}


def mixture_speaker(beta, **how):
    weights = {POLICY: 1 - beta, REFERENCE: beta}
    return Speaker({name: w for name, w in weights.items() if w}, **how)


def run(speakers, *, batch=4, seed=0, length=2, sets=TOY, vocab_size=2, step=0):
    model = tabular.tabular_model(vocab_size, length)

    @jax.jit
    def go(sets, key, step):
        context = tabular.empty_prompts(batch)
        return sample(model, sets, speakers, context, key, step, max_length=length)

    return go(sets, jax.random.key(seed), step)


def place(samples):
    return np.asarray(tabular.index_of(tabular.tabular_model(2, 2), samples.responses))


@pytest.mark.parametrize("beta", MIXTURES)
def test_log_probs_are_those_of_the_token_level_mixture(beta, float64):
    drawn = run((mixture_speaker(beta),), batch=64).samples[0]
    total = np.asarray(drawn.sampling_log_probs_BT.sum(axis=1))
    known = np.log(np.array(MIXTURES[beta]))[place(drawn)]
    np.testing.assert_allclose(total, known, atol=1e-11)
    assert len(set(place(drawn))) == 4


@pytest.mark.parametrize("beta", SEQUENCE_LEVEL)
def test_log_probs_are_not_those_of_the_sequence_level_mixture(beta, float64):
    whole = solutions.geometric_mixture(
        np.array(MIXTURES[0.0]), np.array(MIXTURES[1.0]), beta
    )
    np.testing.assert_allclose(whole, SEQUENCE_LEVEL[beta], rtol=0, atol=1e-12)
    drawn = run((mixture_speaker(beta),), batch=64).samples[0]
    said = np.exp(np.asarray(drawn.sampling_log_probs_BT.sum(axis=1)))
    # Of the vectors above, the two least apart differ by 0.0011.
    assert np.abs(said - whole[place(drawn)]).min() > 1e-3


@pytest.mark.parametrize("beta", FACTORS)
def test_each_token_is_drawn_from_its_own_mixture(beta, float64):
    drawn = run((mixture_speaker(beta),), batch=64).samples[0]
    first, second = np.asarray(drawn.responses.tokens_BT).T
    p_first, p_after_a, p_after_b = FACTORS[beta]
    p_second = np.where(first == 0, p_after_a, p_after_b)
    known = np.stack(
        [
            np.where(first == 0, p_first, 1 - p_first),
            np.where(second == 0, p_second, 1 - p_second),
        ],
        axis=1,
    )
    said = np.exp(drawn.sampling_log_probs_BT)
    np.testing.assert_allclose(said, known, rtol=0, atol=1e-11)


@pytest.mark.parametrize("beta", MIXTURES)
def test_frequencies_are_the_probabilities(beta):
    count = 20_000
    drawn = run((mixture_speaker(beta),), batch=count).samples[0]
    frequency = np.bincount(place(drawn), minlength=4) / count
    known = np.array(MIXTURES[beta])
    standard_error = np.sqrt(known * (1 - known) / count)
    assert (np.abs(frequency - known) < 4.5 * standard_error).all()


def test_each_set_reports_its_own_log_probs(float64):
    drawn = run((mixture_speaker(0.5),), batch=16).samples[0]
    model = tabular.tabular_model(2, 2)
    for name in (POLICY, REFERENCE):
        alone = tabular.response_log_probs(
            model, TOY, Speaker({name: 1.0}), drawn.responses
        )
        np.testing.assert_allclose(drawn.log_probs[name].sum(axis=1), alone, atol=1e-12)


def test_speakers_draw_independently_of_each_other():
    count = 20_000
    policy = mixture_speaker(0.0)
    first, second = run((policy, policy), batch=count).samples
    joint = np.bincount(4 * place(first) + place(second), minlength=16) / count
    known = np.outer(MIXTURES[0.0], MIXTURES[0.0]).ravel()
    standard_error = np.sqrt(known * (1 - known) / count)
    assert (np.abs(joint - known) < 4.5 * standard_error).all()


def test_a_scheduled_weight_is_that_of_the_step(float64):
    speaker = Speaker({POLICY: lambda s: 1 - s / 8, REFERENCE: lambda s: s / 8})
    for step in (1, 4):
        drawn = run((speaker,), batch=16, step=step).samples[0]
        total = np.asarray(drawn.sampling_log_probs_BT.sum(axis=1))
        known = np.log(np.array(MIXTURES[step / 8]))[place(drawn)]
        np.testing.assert_allclose(total, known, atol=1e-11)


def test_greedy_takes_the_most_likely_token_everywhere():
    drawn = run((mixture_speaker(0.0, temperature=0.0),)).samples[0]
    np.testing.assert_array_equal(drawn.responses.tokens_BT, [[0, 0]] * 4)


def test_temperature_sharpens_after_mixing(float64):
    speaker = mixture_speaker(0.5, temperature=0.5)
    drawn = run((speaker,), batch=32).samples[0]
    known = tabular.response_log_probs(
        tabular.tabular_model(2, 2), TOY, speaker, drawn.responses
    )
    np.testing.assert_allclose(
        drawn.sampling_log_probs_BT.sum(axis=1), known, atol=1e-12
    )


@pytest.mark.parametrize(
    "how, kept", [({"top_k": 2}, {0, 3}), ({"top_p": 0.6}, {0, 3}), ({"top_k": 1}, {3})]
)
def test_truncation_keeps_the_likely_tokens_only(how, kept):
    sets = {POLICY: tabular.table(np.log([0.3, 0.1, 0.2, 0.4]))}
    speaker = Speaker({POLICY: 1.0}, **how)
    drawn = run((speaker,), batch=500, length=1, sets=sets, vocab_size=4).samples[0]
    assert set(np.asarray(drawn.responses.tokens_BT).ravel()) == kept


def test_a_token_one_set_forbids_is_no_nan():
    sets = {
        POLICY: tabular.table([0.0, -np.inf, 0.0]),
        REFERENCE: tabular.table([0.0, 0.0, 0.0]),
    }
    speaker = Speaker({POLICY: lambda s: 0.0 * s, REFERENCE: lambda s: 1.0 + 0.0 * s})
    drawn = run((speaker,), batch=300, length=1, sets=sets, vocab_size=3).samples[0]
    assert np.isfinite(drawn.sampling_log_probs_BT).all()
    assert set(np.asarray(drawn.responses.tokens_BT).ravel()) == {0, 1, 2}


def counting_model(script_BT, vocab_size):
    """A model that surely says row i of the script; its cache holds the row number."""
    script_BT = jnp.asarray(script_BT)
    length = script_BT.shape[1]

    def prefill(params, prompts, max_length):
        del params, max_length
        return jnp.zeros_like(prompts.tokens_BS[:, 0]), prompts.tokens_BS[:, 0]

    def decode_step(params, cache, tokens_R, step):
        del params, tokens_R
        said_R = script_BT[cache, jnp.minimum(step, length - 1)]
        return jnp.where(jax.nn.one_hot(said_R, vocab_size) > 0, 0.0, -1e9), cache

    model = tabular.tabular_model(vocab_size, 1)
    return model._replace(prefill=prefill, decode_step=decode_step, eos_id=1)


def test_a_rigged_model_gives_the_exact_arrays():
    # 1 ends a response; row 2 never ends.
    script = [[5, 1, 7, 7, 7], [6, 2, 1, 7, 7], [3, 3, 3, 3, 3]]
    rows = PromptBatch(jnp.array([[0], [1], [2]]), jnp.ones((3, 1), bool))
    drawn = sample(
        counting_model(script, 8),
        {POLICY: {}},
        (Speaker({POLICY: 1.0}),),
        rows,
        jax.random.key(0),
        max_length=4,
    )
    tokens, mask = drawn.samples[0].responses
    np.testing.assert_array_equal(tokens, [[5, 1, 0, 0], [6, 2, 1, 0], [3, 3, 3, 3]])
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert int(drawn.num_steps) == 4


def test_the_loop_stops_when_every_row_has_ended():
    script = [[5, 1, 7, 7], [6, 2, 1, 7]]
    rows = PromptBatch(jnp.array([[0], [1]]), jnp.ones((2, 1), bool))
    drawn = sample(
        counting_model(script, 8),
        {POLICY: {}},
        (Speaker({POLICY: 1.0}),),
        rows,
        jax.random.key(0),
        max_length=100,
    )
    assert int(drawn.num_steps) == 3
    assert not np.asarray(drawn.samples[0].responses.mask_BT)[:, 3:].any()


@pytest.mark.parametrize("size", [8, 128, 300, 512])
def test_drawing_is_as_likely_as_the_softmax(size):
    # Whole blocks of the vocabulary, and a part of one: ids of all of them are drawn.
    logits = jax.random.normal(jax.random.key(0), (size,))
    count = 200 * size
    rows = jnp.broadcast_to(logits, (count, size))
    observed = np.bincount(draw(jax.random.key(1), rows), minlength=size)
    expected = count * np.asarray(jax.nn.softmax(logits), np.float64)
    statistic = np.sum((observed - expected) ** 2 / expected)
    # Exceeded once in a thousand; the seed is fixed.
    assert statistic < scipy.stats.chi2.ppf(0.999, df=size - 1)


@pytest.mark.parametrize("size", [5, 128, 500])
def test_drawing_never_takes_a_token_of_probability_zero(size):
    likely = {1: 0.0, size - 2: -1.0}
    logits = jnp.full((size,), -jnp.inf)
    for index, value in likely.items():
        logits = logits.at[index].set(value)
    drawn = draw(jax.random.key(0), jnp.broadcast_to(logits, (50_000, size)))
    assert set(np.asarray(drawn)) == set(likely)


@pytest.mark.parametrize("uniform", [0.0, 0.25, 1 - 2.0**-24])
def test_the_ends_of_the_unit_interval_draw_what_is_possible(uniform, monkeypatch):
    # 0 and the largest float32 below 1 are what the generator may return.
    size, possible = 300, [131, 132, 260]
    logits = jnp.full((1, size), -jnp.inf).at[0, jnp.array(possible)].set(0.0)
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, uniform, dtype)
    )
    assert int(draw(jax.random.key(0), logits)[0]) == possible[int(3 * uniform)]


def test_weights_that_do_not_sum_to_one_are_refused():
    with pytest.raises(UserError, match="sum to 1, got"):
        run((Speaker({POLICY: 0.5, REFERENCE: 0.6}),))
