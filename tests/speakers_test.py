# SPDX-License-Identifier: Apache-2.0
"""Speakers served from model folders: the mixture is the one that training decodes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import mixture
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import folders
from nlhf_jax.jobs.policies import load_policy
from nlhf_jax.jobs.speakers import load_speaker, with_the_rest
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.parameter_files import save_params
from nlhf_jax.types import PromptBatch, Speaker
from tests.jobs_pipeline_test import LENGTHS, MODEL

pytestmark = pytest.mark.usefixtures("compiled_quickly")
PROMPTS = ["the map", "two of it"]
LONGEST = 6


def model_folder(folder, seed, settings=MODEL):
    """Writes a model with random parameters that say something."""
    params = t5_language_model(settings).init(jax.random.key(seed))
    # As they are drawn, every token is about equally likely.
    params = jax.tree.map(lambda leaf: 3 * leaf, params)
    folders.describe(
        folder,
        folders.ModelDescription("language_model", settings, LENGTHS),
        folders.BYTE_VOCABULARY,
    )
    save_params(folder, params, "float32")
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one shape, and one of another."""
    place = tmp_path_factory.mktemp("speakers")
    wider = dataclasses.replace(MODEL, mlp_dim=2 * MODEL.mlp_dim)
    return {
        "a": model_folder(place / "a", 0),
        "b": model_folder(place / "b", 1),
        "wider": model_folder(place / "wider", 0, wider),
    }


@functools.cache
def loaded(folder):
    policy = load_policy(folder)
    return policy, jax.jit(policy.network.logits)


def next_log_probs(folder, text, answer):
    """Returns the model's log-probabilities of what may follow the answer, [V]."""
    policy, logits = loaded(folder)
    ids = [*policy.vocabulary.encode(text), policy.vocabulary.eos_id]
    mask_1S = jnp.arange(LENGTHS["inputs"])[None, :] < len(ids)
    tokens_1S = np.zeros(mask_1S.shape, np.int32)
    tokens_1S[0, : len(ids)] = ids
    tokens_1T = np.zeros((1, LONGEST), np.int32)
    tokens_1T[0, : len(answer)] = answer
    prompts = PromptBatch(jnp.asarray(tokens_1S), mask_1S)
    logits_1TV = logits(policy.params, prompts, jnp.asarray(tokens_1T))
    return jax.nn.log_softmax(logits_1TV[0, len(answer)])


def greedy(weights, text):
    """Returns the mixture's most likely answer, written anew: no cache, one by one."""
    answer = []
    while len(answer) < LONGEST and 1 not in answer:
        mixed_V = sum(
            weight * next_log_probs(folder, text, answer)
            for folder, weight in weights.items()
        )
        answer.append(int(jnp.argmax(mixed_V)))
    vocabulary = loaded(next(iter(weights)))[0].vocabulary
    return vocabulary.decode([token for token in answer if token != 1])


@pytest.mark.parametrize("beta", [0.3, -0.4])
def test_the_mixture_is_log_linear(models, beta):
    weights = {models["a"]: 1 - beta, models["b"]: beta}
    speaker = load_speaker(weights, temperature=0.0, max_decode_length=LONGEST)
    assert speaker(PROMPTS) == [[greedy(weights, text)] for text in PROMPTS]


def test_the_parts_say_other_things(models):
    """Else the test above could not fail."""
    said = [
        load_speaker(models[name], temperature=0.0, max_decode_length=LONGEST)(PROMPTS)
        for name in ("a", "b")
    ]
    assert said[0] != said[1]


@pytest.mark.battery
def test_samples_follow_the_mixtures_probabilities(models):
    weights = {models["a"]: 0.5, models["b"]: 0.5}
    speaker = load_speaker(weights, max_decode_length=1)
    (answers,) = speaker(["the map"], num_samples=400, seed=3)
    mixed_V = mixture.mix(
        {f: next_log_probs(f, "the map", [])[None] for f in weights}, weights
    )[0]
    likely = int(jnp.argmax(mixed_V.at[:3].set(-jnp.inf)))
    share = float(jax.nn.softmax(mixed_V)[likely])
    word = speaker.policy.vocabulary.decode([likely])
    error = np.sqrt(share * (1 - share) / len(answers))
    # Five standard errors: 1 of 1.7 million draws of a right decoder fails.
    assert abs(answers.count(word) / len(answers) - share) < 5 * error


@pytest.mark.battery
def test_answers_repeat_with_their_seed(models):
    speaker = load_speaker(models["a"], max_decode_length=LONGEST)
    first = speaker(PROMPTS, num_samples=2, seed=1)
    assert [len(answers) for answers in first] == [2, 2]
    assert speaker(PROMPTS, num_samples=2, seed=1) == first
    assert speaker(PROMPTS, num_samples=2, seed=2) != first


@pytest.mark.battery
def test_small_batches_have_as_many_answers(models):
    speaker = load_speaker(models["a"], temperature=0.0, max_decode_length=LONGEST)
    assert speaker(PROMPTS * 2, batch_size=3) == speaker(PROMPTS * 2)


def test_a_speaker_is_the_one_that_training_has(models):
    weights = {models["a"]: 0.75, models["b"]: 0.25}
    found = load_speaker(weights, top_k=3)
    assert mixture.speaker_weights(Speaker(found.weights), 0) == weights
    assert found.sampling.top_k == 3
    assert found.sampling.max_decode_length == LENGTHS["targets"]


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, {"p": 1.0}),
        ({"r": 0.9}, {"p": 0.1, "r": 0.9}),
        ({"r": 1.0}, {"r": 1.0}),
        ({"r": 0.0}, {"p": 1.0}),
        ({"p": 0.5}, {"p": 1.0}),
        ({"r": -0.5, "q": 0.25}, {"p": 1.25, "r": -0.5, "q": 0.25}),
    ],
)
def test_the_policy_has_what_is_left(others, expected):
    found = with_the_rest("p", others)
    assert found == expected
    assert next(iter(found)) == next(iter(expected))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, "must name at least one model folder, got {}"),
        ({"a": 0.5, "b": 0.6}, "must sum to 1, got"),
        ({"a": float("nan")}, r"weight of .* must be in \(-inf, inf\), got nan"),
        ({"a": 0.5, "wider": 0.5}, "must have one shape, got"),
        ({"a": 0.5, "nowhere": 0.5}, "'nowhere' does not exist"),
    ],
)
def test_what_is_no_mixture_is_one_sentence(models, weights, expected):
    weights = {models.get(name, name): weight for name, weight in weights.items()}
    with pytest.raises(UserError, match=expected) as caught:
        load_speaker(weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"prompts": []}, "at least one text, got none"),
        ({"prompts": "the map"}, "must be a list of texts, got one text"),
        ({"prompts": ["a", " "]}, "prompt 2 is empty"),
        ({"prompts": ["a"], "num_samples": 0}, "num_samples must be an integer"),
        ({"prompts": ["a"], "seed": 2**40}, "seed must be in"),
        ({"prompts": ["a"], "batch_size": -1}, "batch_size must be an integer"),
    ],
)
def test_what_is_no_question_is_one_sentence(models, arguments, expected):
    speaker = load_speaker(models["a"], max_decode_length=LONGEST)
    with pytest.raises(UserError, match=expected):
        speaker(**arguments)
