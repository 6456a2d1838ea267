# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json as a vocabulary: ids, special tokens, and texts that spell them."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlhf_jax.checks import UserError
from nlhf_jax.data import batches, prompts, special_tokens, tokenizer_files
from nlhf_jax.data.tokenizer_files import TokenizerFile
from nlhf_jax.data.vocabularies import load_vocabulary
from tests.small_tokenizers import STYLES, TEXTS, write_tokenizer

PIECES = ["<|im_end|>", "<|", "im", "_end", "|>", ">", "<", "x", "\ufdd0", "\n", " "]
PLAIN = (
    "Hello, how are you?",
    "  blanks around \n",
    "日本語 ☂ naïve \n\n\n x",
    "def f(x):\n    return 1_000",
    "9.99 % of 2,048",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Style -> its tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {style: write_tokenizer(folder / style, style) for style in STYLES}


@pytest.fixture
def own(files, tmp_path):
    """A function: style -> a copy of its folder, to be changed."""

    def copy(style):
        target = tmp_path / style
        shutil.copytree(files[style].parent, target)
        return target

    return copy


def _config(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# -------------------------------------------------------------------- ids, texts


@pytest.mark.parametrize("style", STYLES)
def test_texts_come_back(files, style):
    file = TokenizerFile(str(files[style]))
    for text in PLAIN:
        ids = file.encode(text)
        assert file.decode([*ids, file.eos_id, file.pad_id]) == text
        assert max(ids) < file.vocab_size


# The ids are places in the lists of special tokens in small_tokenizers.
@pytest.mark.parametrize(
    "style, pad, eos, bos, unk, start",
    [
        ("chatml", 2, 2, 1, 0, ()),  # says add_bos_token: false
        ("llama3", 4, 4, 0, -1, (0,)),  # by its post-processor; no padding of its own
        ("gemma", 0, 5, 2, 3, (2,)),
    ],
)
def test_special_ids(files, style, pad, eos, bos, unk, start):
    """Of several ends it is the one that the chat template puts after an answer."""
    file = TokenizerFile(str(files[style]))
    assert (file.pad_id, file.eos_id, file.bos_id, file.unk_id) == (pad, eos, bos, unk)
    assert (file.prompt_start, file.prompt_end) == (start, ())


def test_end_is_the_configured_one_where_the_template_ends_with_no_known_end(own):
    folder = own("llama3")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1]}')
    assert TokenizerFile(str(folder / "tokenizer.json")).eos_id == 1


def test_generation_config_alone_says_the_end(own):
    folder = own("llama3")
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    file = TokenizerFile(str(folder / "tokenizer.json"))
    assert (file.bos_id, file.eos_id, file.pad_id) == (0, 1, 1)


def test_special_tokens_map_and_objects_are_read(own):
    folder = own("gemma")
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    named = {"eos_token": {"content": "<eos>"}, "bos_token": "<bos>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    file = TokenizerFile(str(folder / "tokenizer.json"))
    assert (file.bos_id, file.eos_id, file.pad_id) == (2, 1, 1)
    assert file.special_texts == {"eos_token": "<eos>", "bos_token": "<bos>"}


@pytest.mark.parametrize("add, start", [(True, (0,)), (False, ())])
def test_add_bos_token_counts_more_than_the_tokenizer(own, add, start):
    folder = own("llama3")
    _config(folder, add_bos_token=add)
    assert TokenizerFile(str(folder / "tokenizer.json")).prompt_start == start


def test_truncation_and_padding_of_the_file_are_not_applied(own):
    path = own("chatml") / "tokenizer.json"
    spec = json.loads(path.read_text())
    long = "pipe " * 30
    whole = TokenizerFile(str(path)).encode(long)
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(spec))
    assert TokenizerFile(str(path)).encode(long) == whole
    assert len(whole) > 30


# ------------------------------------------------------- texts that spell controls


@pytest.mark.parametrize("style", STYLES)
def test_a_text_never_becomes_a_control_token(files, style):
    file = TokenizerFile(str(files[style]))
    for control in STYLES[style][1]:
        for text in (control, f"a{control}{control}b", f" {control}\n", control * 3):
            ids = file.encode(text)
            assert not set(ids) & set(file.controls.values())
            assert file.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_the_separator_in_a_text_is_dropped_before_spellings_are_looked_for(files):
    file = TokenizerFile(str(files["chatml"]))
    separator = tokenizer_files.SEPARATOR
    text = f"<|im{separator}_end|>{separator}"
    assert file.encode(text) == file.encode("<|im_end|>")
    assert file.decode(file.encode(text)) == "<|im_end|>"
    assert file.vocab_size == len(
        json.loads(files["chatml"].read_text())["model"]["vocab"]
    )


@given(st.lists(st.sampled_from(PIECES), max_size=8))
@settings(max_examples=60, deadline=None)
def test_no_pieces_make_a_control_token(files, parts):
    file = TokenizerFile(str(files["chatml"]))
    assert not set(file.encode("".join(parts))) & set(file.controls.values())


def test_spelling_that_normalising_makes_a_control_is_broken_too(own):
    """NFKC turns wide letters into those of the token, which is normalised as well."""
    path = own("chatml") / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["normalizer"] = {"type": "NFKC"}
    for token in spec["added_tokens"]:
        token["normalized"] = True
    path.write_text(json.dumps(spec))
    file = TokenizerFile(str(path))
    wide = "a \uff1c|im_end|\uff1e b"
    assert file.controls["<|im_end|>"] in file.encode_rendered(wide)
    assert not set(file.encode(wide)) & set(file.controls.values())


# ----------------------------------------------------------------- as a vocabulary


def test_vocabulary_has_seqio_s_methods(files):
    vocabulary = load_vocabulary(str(files["gemma"]))
    ids = vocabulary.encode("Which pipe leaks?")
    assert vocabulary.encode_tf("Which pipe leaks?").numpy().tolist() == ids
    assert vocabulary.decode_tf(np.array(ids)).numpy() == b"Which pipe leaks?"
    assert vocabulary.decode([*ids, 5, *ids]) == "Which pipe leaks?"
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 5, 3)
    assert vocabulary == load_vocabulary(str(files["gemma"]))
    assert vocabulary != load_vocabulary(str(files["llama3"]))


def test_rows_begin_as_the_model_s_texts_do_and_responses_end(files):
    vocabulary = load_vocabulary(str(files["llama3"]))
    rows = [{"prompt": "Which pipe?", "target": "The one in the cellar."}]
    data = batches.supervised_from_rows(rows, {"inputs": 20, "targets": 30}, vocabulary)
    asked, said = (vocabulary.encode(rows[0][key]) for key in ("prompt", "target"))
    (prompts_, targets) = data.examples
    tokens = prompts_.tokens_BS[0][prompts_.mask_BS[0]].tolist()
    assert tokens == [0, *asked]
    assert targets.tokens_BT[0][targets.mask_BT[0]].tolist() == [*said, 4]
    # No padding of its own: the end fills, and only the mask tells them apart.
    assert (targets.tokens_BT[0][~targets.mask_BT[0]] == 4).all()
    assert targets.mask_BT[0].sum() == len(said) + 1
    assert data.prompt_texts == ["Which pipe?"]
    again, _ = batches.prompt_batch(data.prompt_texts, vocabulary, 20)
    assert np.array_equal(again.tokens_BS, prompts_.tokens_BS)
    texts = batches.decode_responses(*targets, vocabulary)
    assert texts == ["The one in the cellar."]


# ------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda f: (f / "tokenizer.json").unlink(), "which is no file"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is no tokenizer.json: "),
        (lambda f: _config(f, eos_token="<|im_fin|>"), "eos_token '<|im_fin|>' of the"),
        (
            lambda f: (f / "generation_config.json").write_text('{"eos_token_id":999}'),
            "eos_token_id of the files .* must be less than its 381 ids, got 999",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text("[1]"),
            "tokenizer_config.json must hold a JSON object, got list",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text("{"),
            "tokenizer_config.json can't be read as JSON",
        ),
    ],
)
def test_mistakes_are_sentences(own, change, complaint):
    folder = own("chatml")
    change(folder)
    with pytest.raises(UserError, match=complaint.replace("|", r"\|")) as caught:
        load_vocabulary(str(folder / "tokenizer.json"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused(own):
    folder = own("chatml")
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match="has no end of a text: name its eos_token"):
        TokenizerFile(str(folder / "tokenizer.json"))


def test_files_are_read_as_people_write_them(tmp_path):
    assert special_tokens.template_source(tmp_path) == ""
    named = [
        {"name": "tool_use", "template": "T"},
        {"name": "default", "template": "D"},
    ]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": named}))
    assert special_tokens.template_source(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert special_tokens.template_source(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="can't be read: is not UTF-8"):
        special_tokens.template_source(tmp_path)


# ---------------------------------------------------------------------- SentencePiece


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory):
    """Convention -> a SentencePiece model with its ids."""
    import sentencepiece

    folder, made = tmp_path_factory.mktemp("pieces"), {}
    for name, ids in {
        "llama": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
        "gemma": {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    }.items():
        made[name] = folder / f"{name}.model"
        with made[name].open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXTS),
                model_writer=file,
                vocab_size=70,
                minloglevel=2,
                **ids,
            )
    return made


@pytest.mark.parametrize(
    "convention, pad, eos, start, end",
    [("llama", 2, 2, (1,), ()), ("gemma", 0, 1, (2,), ()), ("t5", 0, 1, (), (1,))],
)
def test_sentencepiece_conventions(sentencepieces, convention, pad, eos, start, end):
    vocabulary = load_vocabulary(str(sentencepieces[convention]))
    assert (vocabulary.pad_id, vocabulary.eos_id) == (pad, eos)
    assert prompts.frame_of(vocabulary) == (start, end)
    ids = vocabulary.encode("the pipe")
    rows = [{"prompt": "the pipe", "target": "leaks"}] * 2
    data = batches.supervised_from_rows(rows, {"inputs": 30, "targets": 9}, vocabulary)
    (tokens, mask), _ = data.examples
    assert tokens[0][mask[0]].tolist() == [*start, *ids, *end]
    assert (tokens[0][~mask[0]] == pad).all()
    assert vocabulary.decode(ids) == "the pipe"
