# SPDX-License-Identifier: Apache-2.0
"""How a chat model is asked: as it was in training, which its folder says."""

import dataclasses
import json
import shutil

import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.data import batches, prompts
from nlhf_jax.data.vocabularies import load_vocabulary
from nlhf_jax.jobs import folders, our_weights
from nlhf_jax.jobs.sample import sample
from nlhf_jax.settings import DataSettings
from tests.chat_jobs_test import DESCRIBED, LENGTHS, SETTINGS, write_chat_model
from tests.jobs_pipeline_test import run_sft, steps, write_lines
from tests.small_tokenizers import CHATML

pytestmark = [pytest.mark.usefixtures("compiled_quickly"), pytest.mark.battery]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A chat model's folder with random parameters."""
    return write_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def asked(monkeypatch):
    """The ids of each first prompt that is read from now on."""
    asked = []
    whole = batches.prompt_batch

    def spy(texts, vocabulary, length, form):
        found = whole(texts, vocabulary, length, form)
        asked.append(found[0].tokens_BS[0][found[0].mask_BS[0]].tolist())
        return found

    monkeypatch.setattr(batches, "prompt_batch", spy)
    return asked


def test_sample_asks_in_the_model_s_own_template(chat, asked):
    common = {"checkpoint": str(chat), "prompt": "Which?", "max_decode_length": 2}
    sample(**common)
    sample(**common, system_prompt="Be brief")
    sample(**common, chat_template="")
    vocabulary = load_vocabulary(str(chat / "tokenizer.json"))
    own, system = (
        prompts.prompt_format(vocabulary, "model", said) for said in ("", "Be brief")
    )
    assert asked == [
        own.encode("Which?"),
        system.encode("Which?"),
        vocabulary.encode("Which?"),
    ]
    with pytest.raises(UserError, match="can't be read: No such file"):
        sample(**common, chat_template="nowhere.jinja")
    with pytest.raises(UserError, match="system_prompt needs a chat_template"):
        sample(**common, chat_template="", system_prompt="Be brief")


def test_a_folder_says_how_prompts_were_put(chat, tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text(CHATML)
    vocabulary = folders.vocabulary_file(chat)
    for asked, said in {
        "": "",
        "model": "model",
        "auto": "model",
        str(mine): "model",
    }.items():
        folders.describe(tmp_path / "next", DESCRIBED, vocabulary, asked, "Be kind")
        found = folders.read_description(tmp_path / "next")
        assert (found.chat_template, found.system_prompt) == (said, "Be kind")
    folders.describe(tmp_path / "bytes", DESCRIBED, "byte", "auto")
    assert folders.read_description(tmp_path / "bytes").chat_template == ""
    # A set of parameters takes its run's along; folders of old say nothing.
    folders.describe(tmp_path / "set", found, vocabulary)
    assert folders.read_description(tmp_path / "set") == found
    assert "chat_template" not in (chat / "model.json").read_text()
    assert folders.read_description(chat).chat_template is None


@pytest.mark.parametrize(
    "name, wrong",
    [("chat_template", "auto"), ("chat_template", 1), ("system_prompt", None)],
)
def test_a_folder_that_says_it_wrongly_is_a_sentence(chat, tmp_path, name, wrong):
    folders.describe(tmp_path, DESCRIBED, folders.vocabulary_file(chat), "model")
    file = tmp_path / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: wrong}))
    with pytest.raises(UserError, match=f"no.* description: {name}.* must be"):
        folders.read_description(tmp_path)


def test_auto_asks_as_training_did(chat, tmp_path, asked):
    vocabulary = load_vocabulary(str(chat / "tokenizer.json"))
    brief = ("model", "Be brief")
    for put in (("", ""), ("model", ""), brief):
        folder = tmp_path / "-".join(put)
        shutil.copytree(chat, folder)
        folders.describe(folder, DESCRIBED, str(chat / "tokenizer.json"), *put)
        sample(checkpoint=str(folder), prompt="Which?", max_decode_length=2)
        form = prompts.prompt_format(vocabulary, *put)
        assert asked.pop() == form.encode("Which?")
    common = {"checkpoint": str(folder), "prompt": "Which?", "max_decode_length": 2}
    sample(**common, system_prompt="Sing")
    sample(**common, chat_template="model")
    sung, plain = (
        prompts.prompt_format(vocabulary, "model", said) for said in ("Sing", "")
    )
    assert asked == [sung.encode("Which?"), plain.encode("Which?")]


def test_imported_folders_were_trained_in_their_template(chat, tmp_path):
    options = {"feature_lengths": LENGTHS}
    weights = our_weights.open_folder(chat, {})
    kept = dataclasses.replace(weights, chat_template="", system_prompt="Be kind")
    bare = dataclasses.replace(weights, files={}, vocabulary="byte")
    said = {}
    for name, one in {"theirs": weights, "kept": kept, "bare": bare}.items():
        (tmp_path / name).mkdir()
        our_weights.write_folder(tmp_path / name, one, options)
        found = folders.read_description(tmp_path / name)
        said[name] = (found.chat_template, found.system_prompt)
    assert said == {
        "theirs": ("model", ""),
        "kept": ("", "Be kind"),
        "bare": (None, ""),
    }
    again = our_weights.open_folder(tmp_path / "kept", {})
    assert (again.chat_template, again.system_prompt) == ("", "Be kind")


def test_fine_tuning_writes_down_how_prompts_were_put(chat, tmp_path):
    rows = [{"prompt": f"the {w}?", "target": f"{w}."} for w in ("map", "sum")]
    file = write_lines(tmp_path / "train.jsonl", rows)
    data = DataSettings("jsonl", LENGTHS, train_file=file, evaluation_file=file)
    for put in (("", ""), ("model", "Be brief")):
        folder = run_sft(
            tmp_path / f"sft{put[0]}",
            dataclasses.replace(data, chat_template=put[0], system_prompt=put[1]),
            steps(1),
            model=SETTINGS,
            initial_checkpoint_path=str(chat),
        )
        found = folders.read_description(folder)
        assert (found.chat_template, found.system_prompt) == put
