# SPDX-License-Identifier: Apache-2.0
"""`nlhf export` of judges: as sequence classification, as text to text, as ours."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import cli
from nlhf_jax.conversion import safetensors_files
from nlhf_jax.data import vocabularies
from nlhf_jax.jobs import adapters, folders, judges, our_weights, policies, scorings
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
