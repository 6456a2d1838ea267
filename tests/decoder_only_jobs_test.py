# SPDX-License-Identifier: Apache-2.0
"""The jobs on a decoder-only model, each on what the job before it wrote."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import algorithms, compile_command
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import folders, judges
from nlhf_jax.jobs.policies import load_policy
from nlhf_jax.jobs.programs import Share
from nlhf_jax.jobs.sample import sample
from nlhf_jax.jobs.supervised import preference
from nlhf_jax.jobs.train import train
from nlhf_jax.models.families import check_end, end_of, language_model
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.settings import MemorySettings
from nlhf_jax.types import PromptBatch, Responses
from tests.battery import all_but
from tests.decoder_only_toys import FAMILIES, shape
from tests.decoder_only_toys import GEMMA as TOY_GEMMA
from tests.jobs_pipeline_test import (
    ADAM,
    LENGTHS,
    MODEL,
    WORDS,
    data_in,
    run_sft,
    steps,
    write_lines,
)
from tests.jobs_pipeline_test import read_rows as rows_of

pytestmark = pytest.mark.usefixtures("compiled_quickly")
# The caps of the toy keep every loss near that of equal chances.
GEMMA = dataclasses.replace(
    FAMILIES["gemma_2"], vocab_size=384, num_layers=1, logit_soft_cap=30.0
)


# --- which network, and its description


def test_settings_say_which_network():
    assert language_model(MODEL) is t5_language_model(MODEL)
    assert language_model(GEMMA).vocab_size == 384
    assert "layers_0" in language_model(GEMMA).logical_axes
    chunks = MemorySettings(num_vocab_chunks=2)
    assert language_model(MODEL, chunks) is t5_language_model(MODEL, chunks)


def test_both_end_as_their_vocabulary_does():
    assert (end_of(MODEL), end_of(GEMMA)) == (1, 1)
    check_end(GEMMA, 1)
    check_end(MODEL, 5)  # a T5's end is its vocabulary's affair
    with pytest.raises(UserError, match=r"must be 5, the vocabulary's end .* got 1"):
        check_end(GEMMA, 5)
    other = dataclasses.replace(GEMMA, eos_id=7)
    assert end_of(other) == 7


@pytest.mark.parametrize("settings", [GEMMA, MODEL], ids=["gemma", "t5"])
def test_a_description_is_read_as_it_was_written(settings):
    written = folders.ModelDescription("reward", settings, LENGTHS)
    text = written.to_json()
    assert folders.ModelDescription.from_json(text) == written
    # Files that were written before there were others are T5's.
    assert ("family" in json.loads(text)) == (settings is GEMMA)


def test_an_unknown_family_is_named(tmp_path):
    text = folders.ModelDescription("reward", GEMMA, LENGTHS).to_json()
    (tmp_path / "model.json").write_text(text.replace("decoder_only", "decoder_onl"))
    with pytest.raises(UserError, match=r"family must be one of .*'decoder_only'"):
        folders.read_description(tmp_path, "reward")


@pytest.mark.parametrize(
    "heads, parts, expected",
    [
        ((8, 2), 2, (4, 1)),
        ((8, 2), 4, (2, 1)),
        ((9, 3), 2, (6, 2)),
        ((4, 4), 4, (1, 1)),
    ],
)
def test_a_devices_share_is_a_network(heads, parts, expected):
    """9 heads on 2 devices are 5 each, and 2 keys: 6 is the next that 2 divides."""
    settings = shape(num_heads=heads[0], num_kv_heads=heads[1])
    found = Share(tensor=parts).of(settings, MemorySettings())
    assert (found.num_heads, found.num_kv_heads) == expected
    assert found.mlp_dim == settings.mlp_dim // parts


def test_a_shape_is_read_from_a_file(tmp_path):
    file = tmp_path / "shape.gin"
    fields = dataclasses.asdict(GEMMA)
    lines = [f"DecoderOnlySettings.{name} = {x!r}" for name, x in fields.items()]
    file.write_text("\n".join(lines))
    assert compile_command.read_shape(str(file)) == GEMMA
    file.write_text(lines[0])
    with pytest.raises(UserError, match="DecoderOnlySettings missing"):
        compile_command.read_shape(str(file))


# Numbers of parameters that their publishers' files have.
SIZES = {
    "llama_3_2_1b": 1_235_814_400,
    "gemma_2_2b": 2_614_341_888,
    "gemma_3_1b": 999_885_952,
    "qwen_2_5_0_5b": 494_032_768,
    "qwen_3_0_6b": 596_049_920,
}


@pytest.mark.parametrize("name", all_but(["gemma_3_1b"], SIZES))
def test_shapes_that_ship_have_as_many_parameters_as_the_models(name):
    settings = compile_command.read_shape(f"configs/models/{name}.gin")
    init = language_model(settings).init
    params = jax.eval_shape(init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == SIZES[name]


# --- judges


def words(text):
    """Stands for a vocabulary."""
    return [2 + ord(letter) % 50 for letter in text if letter.isalnum()][:3]


def batch(seed):
    """Returns random prompts and two random responses, padded."""
    rng = np.random.default_rng(seed)

    def ragged(width):
        mask = np.arange(width)[None, :] < rng.integers(1, width + 1, (4, 1))
        tokens = np.where(mask, rng.integers(2, 60, mask.shape), 0)
        return jnp.asarray(tokens), jnp.asarray(mask)

    return PromptBatch(*ragged(6)), Responses(*ragged(5)), Responses(*ragged(5))


def poisoned(part):
    """Returns other tokens where nothing counts."""
    tokens, mask = part
    return type(part)(jnp.where(mask, tokens, 33), mask)


def test_a_preference_is_antisymmetric_and_padding_inert():
    settings = shape(1, **TOY_GEMMA)
    lengths = {"prompt_length": 6, "response_length": 5}
    model = judges.preference_network(settings, words, **lengths)
    params = jax.jit(model.init)(jax.random.key(0))
    prompts, first, second = batch(0)
    logits = jax.jit(model.logits)
    found_B = logits(params, prompts, first, second)
    assert float(jnp.abs(found_B).min()) > 1e-4
    np.testing.assert_allclose(logits(params, prompts, second, first), -found_B)
    assert not logits(params, prompts, first, first).any()
    again_B = logits(params, *map(poisoned, (prompts, first, second)))
    np.testing.assert_array_equal(again_B, found_B)


def test_a_reward_reads_the_response_without_padding_and_end():
    settings = shape(1, eos_id=59)
    lengths = {"prompt_length": 6, "response_length": 5}
    model = judges.reward_network(settings, words, **lengths)
    params = jax.jit(model.init)(jax.random.key(0))
    prompts, first, second = batch(1)
    rewards = jax.jit(model.rewards)
    found_B = rewards(params, prompts, first)
    other_B = rewards(params, prompts, second)
    assert float(jnp.abs(found_B - other_B).min()) > 1e-4
    again_B = rewards(params, poisoned(prompts), poisoned(first))
    np.testing.assert_array_equal(again_B, found_B)
    tokens_BT = jnp.where(first.mask_BT, first.tokens_BT, settings.eos_id)
    ended = Responses(tokens_BT, jnp.ones_like(first.mask_BT))
    np.testing.assert_allclose(rewards(params, prompts, ended), found_B, atol=1e-6)


# --- jobs


@pytest.mark.battery
@pytest.mark.timeout(280)
def test_the_pipeline_on_a_decoder_only_model(tmp_path, capsys):
    data = data_in(tmp_path)
    policy = run_sft(tmp_path / "sft", data, steps(20), model=GEMMA)
    losses = [
        row["loss/token_nll"] for row in rows_of(policy) if "loss/token_nll" in row
    ]
    assert np.mean(losses[-3:]) < 0.6 * losses[0]
    assert load_policy(str(policy)).description.settings == GEMMA
    pair = {"response_a": "it", "response_b": "two", "preference": 1.0}
    rows = [{"prompt": f"the {word}"} | pair for word in WORDS]
    judge = tmp_path / "judge"
    preference(
        model_dir=str(judge),
        data=dataclasses.replace(
            data,
            train_file=write_lines(tmp_path / "votes.jsonl", rows),
            evaluation_file=write_lines(tmp_path / "held_out.jsonl", rows[:4]),
        ),
        optimizer=ADAM,
        loop=steps(2),
        initial_checkpoint_path=str(policy),
        num_eval_examples=4,
    )
    assert folders.read_description(judge, "preference").settings == GEMMA
    train(
        model_dir=str(tmp_path / "nash"),
        algorithm=algorithms.nash_md_pg(tau=0.1, beta=0.25),
        reference_checkpoint=str(policy),
        preference_checkpoint=str(judge),
        data=data,
        optimizer=ADAM,
        loop=steps(2),
        num_eval_examples=4,
        num_gap_samples=0,
    )
    rows = rows_of(tmp_path / "nash")
    assert rows[-1]["step"] == 2
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    capsys.readouterr()
    sample(checkpoint=str(tmp_path / "nash"), prompt="map\nthe map of two")
    assert capsys.readouterr().out.strip()
