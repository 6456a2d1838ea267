# SPDX-License-Identifier: Apache-2.0
"""`nlhf export` of judges: as sequence classification, as text to text, as ours."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import cli
from nlhf_jax.checks import UserError
from nlhf_jax.conversion import hugging_face_writing, safetensors_files
from nlhf_jax.data import vocabularies
from nlhf_jax.jobs import (
    adapters,
    folders,
    judges,
    model_cards,
    our_weights,
    policies,
    scorings,
)
from nlhf_jax.parameter_files import save_params
from nlhf_jax.settings import LoraSettings
from nlhf_jax.types import PromptBatch, Responses
from tests.conversion_toys import SHAPES, numbers_of, parameters, refused, same_numbers
from tests.lora_peft_test import adapters_of

pytestmark = pytest.mark.usefixtures("compiled_quickly")
LENGTHS = {"inputs": 12, "targets": 6}


def judge_in(folder, name, kind):
    """A judge's folder with random weights, and bytes as its vocabulary."""
    description = folders.ModelDescription(kind, SHAPES[name], LENGTHS)
    folders.describe(folder, description, "byte")
    save_params(folder, parameters(name), "float32")
    return folder


def exported(source, target, form, *words):
    command = ["export", f"--checkpoint={source}", f"--to={target}"]
    return cli.main([*command, f"--format={form}", *words])


def ids_of(folder, x, y, other=()):
    """What a judge reads, put together from the card's parts."""
    named = {"x": list(x), "y": list(y), "y'": list(other)}
    scoring = our_weights.open_folder(folder, {"judges": True}).scoring
    parts = [named[p] if isinstance(p, str) else list(p) for p in scoring.reads]
    return scoring, parts


def rows(*ids):
    tokens_BS = jnp.asarray([ids])
    return tokens_BS, jnp.ones(tokens_BS.shape, bool)


X, Y, OTHER = (70, 71, 72), (80, 81), (90, 91, 92)


def loaded(folder, kind):
    description = folders.description_of(folder)
    vocabulary = vocabularies.load_vocabulary("byte")
    model = judges.BUILDERS[kind](description, vocabulary)
    return model, policies.load_params(str(folder), model)


def our_number(folder, kind):
    """The reward, or the logit of the preference."""
    model, params = loaded(folder, kind)
    prompts, first = PromptBatch(*rows(*X)), Responses(*rows(*Y))
    if kind == "reward":
        return float(model.rewards(params, prompts, first)[0])
    second = Responses(*rows(*OTHER))
    return float(model.logits(params, prompts, first, second)[0])


def their_score(model, parts):
    import torch

    ids = torch.tensor([[token for part in parts for token in part]])
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize(
    "name, kind",
    [
        ("llama", "reward"),
        ("qwen_3", "preference"),
    ],
)
@pytest.mark.battery
def test_transformers_scores_as_we_do(tmp_path, name, kind):
    """The number of sequence classification is the score, by the card's recipe."""
    pytest.importorskip("torch", reason="transformers is not installed")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    source = judge_in(tmp_path / "judge", name, kind)
    assert exported(source, tmp_path / "out", "hugging_face") == 0
    model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", local_files_only=True, output_loading_info=True
    )
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys"))
    assert type(model).__name__.endswith("ForSequenceClassification")
    model = model.float().eval()
    _, parts = ids_of(source, X, Y, OTHER)
    found = their_score(model, parts)
    if kind == "preference":
        _, parts = ids_of(source, X, OTHER, Y)
        found = 0.5 * (found - their_score(model, parts))
    assert found == pytest.approx(our_number(source, kind), abs=1e-4)


def rewards_of(folder, responses):
    """The reward of each response, one by one."""
    model, params = loaded(folder, "reward")
    prompts = PromptBatch(*rows(*X))
    return [
        float(model.rewards(params, prompts, Responses(*rows(*one)))[0])
        for one in responses
    ]


@pytest.mark.parametrize("kept_padding", [None, 7])
@pytest.mark.battery
def test_a_padded_batch_is_scored_as_the_card_says(tmp_path, kept_padding):
    """Rows of different lengths, padded on either side; and one that ends in padding.

    The configuration that the model came with may name no padding, or another id.
    """
    torch = pytest.importorskip("torch", reason="transformers is not installed")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    source = judge_in(tmp_path / "judge", "llama", "reward")
    keep_config(source, pad_token_id=kept_padding)
    assert exported(source, tmp_path / "out", "hugging_face") == 0
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "out", local_files_only=True
    )
    model = model.float().eval()
    pad = SHAPES["llama"].pad_id
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"padded with id {pad} (pad_token_id)" in card
    responses = [(80, 81), (90, 91, 92, 93), (100,)]
    parts = [ids_of(source, X, one)[1] for one in responses]
    ids = [[token for part in one for token in part] for one in parts]
    width = max(map(len, ids))
    wanted = rewards_of(source, responses)
    for is_right in (True, False):
        tokens, mask = [], []
        for row in ids:
            fill = width - len(row)
            padding, ones = [pad] * fill, [1] * len(row)
            tokens.append(row + padding if is_right else padding + row)
            mask.append(ones + [0] * fill if is_right else [0] * fill + ones)
        with torch.no_grad():
            found = model(
                input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)
            ).logits[:, 0]
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)
    # Whatever ends in padding is scored elsewhere, unless none is named.
    (reward,) = rewards_of(source, [(80, pad)])
    _, parts = ids_of(source, X, (80, pad))
    assert abs(their_score(model, parts) - reward) > 1e-3
    assert f"last id that is not {pad}, so what is read must not end in it" in card
    model.config.pad_token_id = None
    assert their_score(model, parts) == pytest.approx(reward, abs=1e-4)


def keep_config(folder, **changes):
    """Puts the configuration beside a judge that its network may have come with."""
    config = hugging_face_writing.config_of(SHAPES["llama"], 64)
    text = json.dumps(config | changes)
    (folder / our_weights.THEIR_CONFIG).write_text(text)


@pytest.mark.parametrize("named", [None, [], ["LlamaModel", "LlamaForCausalLM"]])
def test_the_class_does_not_hang_on_what_a_configuration_named(tmp_path, named):
    source = judge_in(tmp_path / "judge", "llama", "reward")
    keep_config(source, architectures=named, num_labels=5, mark="kept")
    assert exported(source, tmp_path / "out", "hugging_face") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mark"] == "kept"
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "num_labels" not in config
    assert config["pad_token_id"] == SHAPES["llama"].pad_id


@pytest.mark.parametrize(
    "put, system, said",
    [
        (None, "", "Whether x was put in a chat template in training is not recorded"),
        ("", "", "x is the prompt as it is, in no chat template."),
        ("model", "", "tokenizer's chat template, as the user's turn, with no system "),
        ("model", "Be 'kind'", "with the system prompt \"Be 'kind'\" before it"),
    ],
)
def test_the_card_says_what_of_a_prompt_is_read(tmp_path, put, system, said):
    folder = judge_in(tmp_path / "judge", "t5_1_1", "reward")
    description = dataclasses.replace(
        folders.description_of(folder), chat_template=put, system_prompt=system
    )
    (folder / folders.DESCRIPTION_FILE).write_text(description.to_json())
    weights = our_weights.open_folder(folder, {"judges": True})
    assert weights.scoring.prompt_length == LENGTHS["inputs"]
    assert weights.scoring.response_length == LENGTHS["targets"]
    text = scorings.in_words(weights)
    assert said in text
    assert "Of a prompt only the first 12 tokens are read" in text
    assert "A response has at most 6 tokens, its end counted" in text
    assert "padded" not in text  # of text to text no token is pooled
    card = model_cards.model_card("judge", folder, weights)
    assert text.strip() in card


def test_only_the_first_tokens_of_a_prompt_are_read(tmp_path):
    """The card's lengths are those of our judge, on which the rest is lost."""
    source = judge_in(tmp_path / "judge", "llama", "reward")
    model, params = loaded(source, "reward")
    scoring, _ = ids_of(source, X, Y)

    def reward(prompt, response=Y):
        batch = PromptBatch(*rows(*prompt)), Responses(*rows(*response))
        return float(model.rewards(params, *batch)[0])

    read = tuple(range(60, 60 + scoring.prompt_length))
    assert reward((*read, 99, 98)) == pytest.approx(reward(read), abs=1e-5)
    assert abs(reward((*read[:-1], 99)) - reward(read)) > 1e-4
    with pytest.raises(UserError, match="at most 6 tokens"):
        reward(read, (80,) * (scoring.response_length + 1))


@pytest.mark.parametrize("name", ["llama", "qwen_3"])
def test_the_score_layer_is_one_row_of_the_output(tmp_path, name):
    source = judge_in(tmp_path / "judge", name, "reward")
    assert exported(source, tmp_path / "out", "hugging_face") == 0
    tensors = safetensors_files.tensors_of(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    scoring, _ = ids_of(source, X, Y)
    numbers = numbers_of_judge(source)
    if SHAPES[name].tied_output:
        wanted = numbers["token_embedder/embedding"][scoring.answer_id]
    else:
        (path,) = (path for path in numbers if "logits" in path)
        wanted = numbers[path][:, scoring.answer_id]
    np.testing.assert_array_equal(tensors["score.weight"].read()[0], wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert config["id2label"] == {"0": "SCORE"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "one number of sequence classification" in card


def numbers_of_judge(folder):
    weights = our_weights.open_folder(folder, {"judges": True})
    return {path: tensor.read() for path, tensor in weights.tensors.items()}


@pytest.mark.parametrize("name", ["t5_1_1", "gemma_2"])
def test_where_no_class_holds_it_a_judge_stays_text_to_text(tmp_path, name):
    source = judge_in(tmp_path / "judge", name, "preference")
    assert exported(source, tmp_path / "out", "hugging_face") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    scoring, _ = ids_of(source, X, Y)
    assert f"score is the logit of id {scoring.answer_id} after the last" in card
    assert "sigmoid((f(x, y, y') - f(x, y', y)) / 2)" in card
    assert ("Its decoder reads y after the start id" in card) == (name == "t5_1_1")
    words = [f"--from={tmp_path / 'out'}", f"--to={tmp_path / 'back'}"]
    assert cli.main(["import", *words, "--vocabulary=byte"]) == 0
    same_numbers(numbers_of(tmp_path / "back"), numbers_of_judge(source))


@pytest.mark.parametrize("kind", ["preference", "reward"])
def test_the_recipe_is_what_our_judge_reads(kind):
    """The ids of the card are those of the template, in its order."""
    vocabulary = vocabularies.load_vocabulary("byte")
    description = folders.ModelDescription(kind, SHAPES["llama"], LENGTHS)
    found = scorings.scoring_of(description, vocabulary)
    assert found.kind == kind
    named = {"x": X, "y": Y, "y'": OTHER}
    *parts, last = found.reads
    assert last == "y"
    ids = [i for p in parts for i in (named[p] if isinstance(p, str) else p)]
    end = SHAPES["llama"].eos_id
    prompts, first = PromptBatch(*rows(*X)), Responses(*rows(*Y, end))
    second = Responses(*rows(*OTHER, end))
    lengths = {"prompt_length": 12, "response_length": 6}
    encode = lambda text: vocabularies.encode(text, vocabulary)  # noqa: E731
    if kind == "reward":
        template = judges.inputs.reward_template(encode)
        template = dataclasses.replace(template, eos_id=end)
        read = judges.inputs.reward_input(template, prompts, first, **lengths)
    else:
        template = judges.inputs.pairwise_template(encode)
        template = dataclasses.replace(template, eos_id=end)
        read = judges.inputs.pairwise_input(template, prompts, first, second, **lengths)
    assert np.asarray(read.tokens_BS)[np.asarray(read.mask_BS)].tolist() == ids


def test_in_our_own_format_it_is_a_judge_again(tmp_path):
    source = judge_in(tmp_path / "judge", "llama", "reward")
    assert exported(source, tmp_path / "out", "nlhf", "--check") == 0
    assert folders.kind_of(tmp_path / "out") == "reward"
    same_numbers(numbers_of_judge(tmp_path / "out"), numbers_of_judge(source))


def test_what_a_judge_cannot_be_is_one_sentence(tmp_path, capsys):
    base = judge_in(tmp_path / "base", "llama", "reward")
    out = tmp_path / "out"
    code = exported(base, out, "hugging_face", "--check")
    assert "--check compares what language models say" in refused(capsys, out, code)
    lora = LoraSettings(2, 4.0, ("query",))
    stand = adapters.stand_on(str(base), lora)
    whole = folders.ModelDescription("reward", SHAPES["llama"], LENGTHS)
    folders.describe(tmp_path / "on", stand.describes(whole), "byte")
    save_params(tmp_path / "on", adapters_of(SHAPES["llama"], lora), "float32")
    code = exported(tmp_path / "on", out, "peft")
    assert "holds adapters of language models" in refused(capsys, out, code)
    code = cli.main(["import", f"--from={base}", f"--to={out}"])
    assert "must hold a language_model model" in refused(capsys, out, code)
    assert exported(tmp_path / "on", out, "nlhf") == 0
    assert folders.description_of(out).kind == "reward"
