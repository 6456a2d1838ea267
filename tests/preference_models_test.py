# SPDX-License-Identifier: Apache-2.0
"""Learned judges: their inputs, antisymmetry, and what a cycle asks of them."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.preferences import inputs, judges
from nlhf_jax.preferences.pairwise import pairwise_preference_model
from nlhf_jax.preferences.reward import reward_model
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import PreferenceModel, PromptBatch, Responses, RewardModel

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SETTINGS = T5Settings(40, 16, 2, 8, 32, 1, 1)
PAIRWISE = inputs.PairwiseTemplate((31, 32), (33,), (34, 35), (36,), answer_id=7)
REWARD = inputs.RewardTemplate((31,), (33, 34), answer_id=7)
LENGTHS = {"prompt_length": 4, "response_length": 3}
EOS = 1


def _rows(*rows):
    """Ragged rows as padded tokens and mask."""
    width = max(map(len, rows))
    tokens = jnp.array([[*row, *[0] * (width - len(row))] for row in rows])
    mask = jnp.array([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return tokens, mask


def _random_batch(batch: int = 6, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 6)

    def ragged(key, length_key, width):
        tokens = jax.random.randint(key, (batch, width), 2, 30)
        length_B1 = jax.random.randint(length_key, (batch, 1), 1, width + 1)
        mask = jnp.arange(width)[None, :] < length_B1
        return jnp.where(mask, tokens, 0), mask

    return (
        PromptBatch(*ragged(keys[0], keys[1], 4)),
        Responses(*ragged(keys[2], keys[3], 3)),
        Responses(*ragged(keys[4], keys[5], 3)),
    )


@functools.cache
def _pairwise():
    model = pairwise_preference_model(SETTINGS, PAIRWISE, **LENGTHS)
    return model, jax.jit(model.init)(jax.random.key(1)), jax.jit(model.logits)


@functools.cache
def _reward():
    model = reward_model(SETTINGS, REWARD, **LENGTHS)
    return model, jax.jit(model.init)(jax.random.key(1)), jax.jit(model.rewards)


# Inputs.


def test_concatenate_packs_ragged_segments_to_the_left():
    first = (jnp.array([[5, 6, 0], [5, 0, 0], [0, 0, 0]]),)
    first = (*first, jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool))
    # The hole in the last row's middle is closed too.
    second = (
        jnp.array([[0, 7], [8, 9], [8, 9]]),
        jnp.array([[0, 1], [1, 1], [1, 0]], bool),
    )
    tokens_BS, mask_BS = inputs.concatenate([first, inputs.words((3,), 3), second], 6)
    assert tokens_BS.tolist() == [
        [5, 6, 3, 7, 0, 0],
        [5, 3, 8, 9, 0, 0],
        [3, 8, 0, 0, 0, 0],
    ]
    assert mask_BS.sum(axis=1).tolist() == [4, 4, 2]
    assert jnp.array_equal(mask_BS, tokens_BS > 0)


@pytest.mark.parametrize("seed", range(5))
def test_concatenate_equals_python_lists(seed):
    rng = np.random.default_rng(seed)
    segments = [
        (rng.integers(0, 9, (4, n)), rng.random((4, n)) < 0.6) for n in (3, 1, 0, 5)
    ]
    tokens_BS, mask_BS = jax.jit(inputs.concatenate, static_argnums=1)(
        [(jnp.asarray(tokens), jnp.asarray(mask)) for tokens, mask in segments], 9
    )
    for row in range(4):
        expected = [
            int(token)
            for tokens, mask in segments
            for token, keep in zip(tokens[row], mask[row], strict=True)
            if keep
        ]
        padding = [0] * (9 - len(expected))
        assert tokens_BS[row].tolist() == expected + padding
        assert mask_BS[row].tolist() == [True] * len(expected) + [False] * len(padding)


def test_concatenate_drops_what_is_beyond_the_length():
    segments = [(jnp.array([[5, 6, 7]]), jnp.ones((1, 3), bool))]
    tokens_BS, mask_BS = inputs.concatenate(segments, 2)
    assert tokens_BS.tolist() == [[5, 6]]
    assert mask_BS.tolist() == [[True, True]]


def test_pairwise_input_array_by_array():
    """End tokens inside are dropped, one stands at the end; the long document is cut.

    document    first    second        instruction = 31 32, first: 33,
    10 11 1     20 1     21 22 1       second: 34 35, end: 36
    10..15      20 23 24 25
    """
    prompts = PromptBatch(*_rows([10, 11, EOS], [10, 11, 12, 13, 14, 15]))
    first = Responses(*_rows([20, EOS], [20, 23, 24]))
    second = Responses(*_rows([21, 22, EOS], [25]))
    packed = inputs.pairwise_input(PAIRWISE, prompts, first, second, **LENGTHS)
    assert packed.tokens_BS.tolist() == [
        [31, 32, 10, 11, 33, 20, 34, 35, 21, 22, 36, EOS, 0, 0, 0, 0, 0],
        [31, 32, 10, 11, 12, 13, 33, 20, 23, 24, 34, 35, 25, 36, EOS, 0, 0],
    ]
    assert jnp.array_equal(packed.mask_BS, packed.tokens_BS > 0)


def test_reward_input_array_by_array():
    prompts = PromptBatch(*_rows([10, 11, EOS], [10, 11, 12, 13, 14, 15]))
    responses = Responses(*_rows([20, EOS], [20, 23, 24]))
    packed = inputs.reward_input(REWARD, prompts, responses, **LENGTHS)
    assert packed.tokens_BS.tolist() == [
        [31, 10, 11, 33, 34, 20, EOS, 0, 0, 0, 0],
        [31, 10, 11, 12, 13, 33, 34, 20, 23, 24, EOS],
    ]
    assert jnp.array_equal(packed.mask_BS, packed.tokens_BS > 0)


@pytest.mark.parametrize("document_length", [1, 4, 40])
def test_no_document_is_long_enough_to_touch_the_responses(document_length):
    prompts = PromptBatch(*_rows([10] * document_length))
    first, second = Responses(*_rows([20, 21, 22])), Responses(*_rows([23, 24, 25]))
    packed = inputs.pairwise_input(PAIRWISE, prompts, first, second, **LENGTHS)
    read = packed.tokens_BS[0].tolist()
    kept = min(document_length, 4)
    document = [31, 32, *[10] * kept]
    rest = [33, 20, 21, 22, 34, 35, 23, 24, 25, 36, EOS]
    assert [token for token in read if token] == document + rest
    assert len(read) == len(document) + len(rest)


def test_responses_wider_than_the_judge_was_made_for_are_refused():
    prompts, fits, _ = _random_batch(1)
    wide = Responses(*_rows([20, 21, 22, 23]))
    message = "responses must have at most 3 tokens.* got 4"
    with pytest.raises(UserError, match=message):
        inputs.pairwise_input(PAIRWISE, prompts, wide, fits, **LENGTHS)
    with pytest.raises(UserError, match=message):
        inputs.pairwise_input(PAIRWISE, prompts, fits, wide, **LENGTHS)
    with pytest.raises(UserError, match=message):
        inputs.reward_input(REWARD, prompts, wide, **LENGTHS)


def test_templates_are_ids_of_the_given_vocabulary():
    """Every field is encoded, and the scored id is the last of "1"."""
    seen = []

    def encode(text):
        seen.append(text)
        return [ord(letter) for letter in text]

    def decoded(ids):
        return "".join(map(chr, ids))

    pair = inputs.pairwise_template(encode)
    fields = (pair.instruction, pair.before_first, pair.before_second, pair.end)
    assert [decoded(field) for field in fields] == seen[:4]
    assert "1" in decoded(pair.before_first) and "2" in decoded(pair.before_second)
    single = inputs.reward_template(encode)
    assert [decoded(single.context), decoded(single.before_response)] == seen[5:7]
    assert pair.answer_id == single.answer_id == ord("1")
    assert hash(pair) == hash(inputs.pairwise_template(encode))


# The pairwise model.


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_swapping_the_responses_negates_the_logit_exactly(batch):
    _, params, logits = _pairwise()
    prompts, first, second = _random_batch(batch)
    forward_B = logits(params, prompts, first, second)
    backward_B = logits(params, prompts, second, first)
    assert forward_B.dtype == jnp.float32
    assert jnp.array_equal(forward_B, -backward_B)
    assert float(jnp.abs(forward_B).min()) > 1e-4
    # Two sigmoids of opposite numbers: each is off by half a unit in the last place.
    total_B = jax.nn.sigmoid(forward_B) + jax.nn.sigmoid(backward_B)
    np.testing.assert_allclose(total_B, 1.0, rtol=0, atol=2**-23)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_response_ties_with_itself_exactly(batch):
    _, params, logits = _pairwise()
    prompts, first, _ = _random_batch(batch)
    logits_B = logits(params, prompts, first, first)
    assert jnp.array_equal(jax.nn.sigmoid(logits_B), jnp.full(batch, 0.5))


def test_logit_is_half_the_difference_of_the_two_orders():
    """Against the language model asked twice, one row at a time and unpadded."""
    _, params, logits = _pairwise()
    prompts, first, second = _random_batch()
    network = t5_language_model(SETTINGS)
    ask = jax.jit(network.logits)

    def score(one, other, row):
        kept = one.mask_BT[row] & (one.tokens_BT[row] != network.eos_id)
        read = int(kept.sum())
        # The token after the response is never read: any id gives the same logit.
        tokens = jnp.pad(one.tokens_BT[row : row + 1, :read], ((0, 0), (0, 1)))
        whole = inputs.pairwise_input(PAIRWISE, prompts, one, other, **LENGTHS)
        asked = type(whole)(*(leaf[row : row + 1] for leaf in whole))
        return ask(params, asked, tokens)[0, read, PAIRWISE.answer_id]

    logits_B = logits(params, prompts, first, second)
    for row in range(3):
        half = (score(first, second, row) - score(second, first, row)) / 2
        np.testing.assert_allclose(logits_B[row], half, atol=1e-5)


def test_padding_of_prompts_and_responses_is_inert():
    _, params, logits = _pairwise()
    _, reward_params, rewards = _reward()
    batch = _random_batch()

    def poison(ragged):
        return type(ragged)(jnp.where(ragged[1], ragged[0], 29), ragged[1])

    poisoned = tuple(map(poison, batch))
    assert not jnp.array_equal(poisoned[0].tokens_BS, batch[0].tokens_BS)
    assert jnp.array_equal(logits(params, *poisoned), logits(params, *batch))
    assert jnp.array_equal(
        rewards(reward_params, *poisoned[:2]), rewards(reward_params, *batch[:2])
    )


def test_the_end_token_of_a_response_does_not_change_the_judgement():
    _, params, logits = _pairwise()
    prompts = PromptBatch(*_rows([10, 11], [12]))
    other = Responses(*_rows([25, 26, 27], [28]))
    ended = Responses(*_rows([20, 21, EOS], [22, EOS]))
    bare = Responses(ended.tokens_BT, ended.mask_BT & (ended.tokens_BT != EOS))
    ended_B = logits(params, prompts, ended, other)
    assert jnp.array_equal(logits(params, prompts, bare, other), ended_B)


def test_parameters_are_those_of_the_language_model():
    """So that a judge starts from a fine-tuned language model."""
    network, key = t5_language_model(SETTINGS), jax.random.key(3)
    for model in (_pairwise()[0], _reward()[0]):
        assert model.logical_axes == network.logical_axes
        expected = jax.eval_shape(network.init, key)
        assert jax.eval_shape(model.init, key) == expected


@pytest.mark.battery
def test_every_judge_has_a_gradient_in_every_block():
    prompts, first, second = _random_batch()
    pairwise, pairwise_params, _ = _pairwise()
    reward, reward_params, _ = _reward()

    @jax.jit
    @jax.grad
    def pairwise_gradient(params):
        return (pairwise.logits(params, prompts, first, second) ** 2).sum()

    @jax.jit
    @jax.grad
    def reward_gradient(params):
        return (reward.rewards(params, prompts, first) ** 2).sum()

    gradients = pairwise_gradient(pairwise_params), reward_gradient(reward_params)
    for gradient in gradients:
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
            name = jax.tree_util.keystr(path)
            assert bool(jnp.any(leaf != 0)), name


# A cycle: rock beats scissors, scissors beat paper, paper beats rock.


def _cycle_batch():
    words = jnp.array([[20], [21], [22]])
    ones_B1 = jnp.ones((3, 1), bool)
    prompts = PromptBatch(jnp.full((3, 1), 10), ones_B1)
    first = Responses(words, ones_B1)
    return prompts, first, Responses(jnp.roll(words, -1, axis=0), ones_B1)


def _fit(logits_fn, params, num_steps=60):
    """Returns logits P(first > second) after Adam on the three comparisons."""
    optimizer = optax.adam(1e-2)

    def loss_fn(params):
        return jax.nn.softplus(-logits_fn(params)).mean()

    @jax.jit
    def fit(params):
        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
            return optax.apply_updates(params, updates), state

        carry = params, optimizer.init(params)
        params, _ = jax.lax.fori_loop(0, num_steps, step, carry)
        return logits_fn(params)

    return fit(params)


def test_the_pairwise_model_learns_a_cycle():
    model, params, _ = _pairwise()
    batch = _cycle_batch()
    logits_B = _fit(lambda params: model.logits(params, *batch), params)
    assert float(jax.nn.sigmoid(logits_B).min()) > 0.95


@pytest.mark.battery
def test_a_scalar_reward_cannot_learn_a_cycle():
    """The three differences of rewards sum to 0, so by convexity the mean loss is at
    least log 2 and at most two of three comparisons are right."""
    model, params, _ = _reward()
    prompts, first, second = _cycle_batch()

    def logits_fn(params):
        first_B = model.rewards(params, prompts, first)
        return first_B - model.rewards(params, prompts, second)

    logits_B = _fit(logits_fn, params)
    assert int((logits_B > 0).sum()) <= 2
    loss = float(jax.nn.softplus(-logits_B).mean())
    # The training found the best of a bad lot: near log 2, never below.
    assert math.log(2) - 1e-5 <= loss < math.log(2) + 0.05


# Judges.


def test_learned_judge_asks_the_model_of_each_question():
    pairwise, pairwise_params, logits = _pairwise()
    reward, reward_params, rewards = _reward()
    prompts, first, second = _random_batch()
    judge = judges.learned_judge(pairwise, reward)
    frozen = {"preference": pairwise_params, "reward": reward_params}
    preference_B = jax.jit(judge.preference)(frozen, prompts, first, second)
    expected_B = jax.nn.sigmoid(logits(pairwise_params, prompts, first, second))
    np.testing.assert_allclose(preference_B, expected_B, atol=1e-6)
    reward_B = jax.jit(judge.reward)(frozen, prompts, first)
    expected_B = rewards(reward_params, prompts, first)
    np.testing.assert_allclose(reward_B, expected_B, atol=1e-5)


def test_bradley_terry_judge_is_the_sigmoid_of_the_difference():
    """Rewards are counts of tokens, so that P is known: 1 / (1 + e^-(n - m))."""
    counting = RewardModel(
        lambda key: {},
        {},
        lambda params, prompts, responses: responses.mask_BT.sum(axis=1) * params,
    )
    judge = judges.bradley_terry_judge(counting)
    prompts = PromptBatch(*_rows(*[[5]] * 9))
    pairs = list(itertools.product((1, 2, 3), repeat=2))
    first = Responses(*_rows(*([5] * n for n, _ in pairs)))
    second = Responses(*_rows(*([5] * m for _, m in pairs)))
    preference_B = judge.preference({"reward": 0.5}, prompts, first, second)
    expected = [1 / (1 + math.exp(0.5 * (m - n))) for n, m in pairs]
    np.testing.assert_allclose(preference_B, expected, atol=1e-6)
    reward_B = judge.reward({"reward": 0.5}, prompts, first)
    np.testing.assert_allclose(reward_B, [0.5 * n for n, _ in pairs])


def test_a_question_without_its_model_is_a_user_error_when_traced():
    prompts, first, second = _random_batch()
    nobody = judges.learned_judge(None, None)
    with pytest.raises(UserError, match="needs a preference model, got none"):
        jax.eval_shape(nobody.preference, {}, prompts, first, second)
    with pytest.raises(UserError, match="needs a reward model, got none"):
        jax.eval_shape(nobody.reward, {}, prompts, first)
    # Only the question that is asked needs its model.
    fixed = PreferenceModel(lambda key: {}, {}, lambda *batch: jnp.zeros(6))
    only_pairs = judges.learned_judge(fixed, None)
    preference_B = only_pairs.preference({"preference": {}}, prompts, first, second)
    assert preference_B.tolist() == [0.5] * 6
