# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models as tokenizers that `transformers` loads: the same ids."""

import io
import json
import pathlib

import pytest
import sentencepiece
from tokenizers import Tokenizer

from nlhf_jax.conversion import sentence_pieces
from tests.conversion_toys import exported, imported

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "nlhf_jax" / "pretrained" / "docstrings_t5"
TEXTS = [
    "",
    " ",
    "a",
    "  blanks   before and after  ",
    "Returns the  number of café items 日本\n x_y = 3",
    "tab\there, line\r\nnext\n\n\nthird",
    "\uff46\uff55\uff4c\uff4c \ufb01 \u00bd e\u0301 a\u00a0b\u200bc",
    "emoji 🙂👍🏽 z",
    "▁under ▁",
    "x" * 200,
    "\x07",
    *(ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines(),
]


def trained(tmp_path, **switches):
    """Returns the file of a small SentencePiece model."""
    model = io.BytesIO()
    given = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 300}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **given | switches,
    )
    file = tmp_path / "pieces.model"
    file.write_bytes(model.getvalue())
    return file


def test_ids_and_texts_are_those_of_the_model():
    file = SHIPPED / "vocabulary.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = Tokenizer.from_str(sentence_pieces.tokenizer_json(file))
    assert tokenizer.get_vocab_size() == pieces.vocab_size()
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == [*pieces.encode(text), pieces.eos_id()], text
        assert tokenizer.decode(ids) == pieces.decode(ids[:-1]), text
    # Letters that the model lacks are bytes, not unknown.
    assert pieces.unk_id() not in tokenizer.encode("日本 🙂").ids


def test_an_export_names_its_tokenizer(tmp_path):
    assert exported(SHIPPED, tmp_path / "theirs") == 0
    config = json.loads((tmp_path / "theirs/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["eos_token"], config["pad_token"]) == ("</s>", "<pad>")
    spiece = (tmp_path / "theirs/spiece.model").read_bytes()
    assert spiece == (SHIPPED / "vocabulary.model").read_bytes()
    # Back again it is the same model: a T5's vocabulary is its SentencePiece model.
    assert imported(tmp_path / "theirs", tmp_path / "ours") == 0
    assert (tmp_path / "ours/vocabulary.model").read_bytes() == spiece
    again = (tmp_path / "ours/params.safetensors").read_bytes()
    assert again == (SHIPPED / "params.safetensors").read_bytes()


def test_t5s_own_models_are_left_to_transformers(tmp_path):
    file = trained(tmp_path)
    assert sentence_pieces.tokenizer_json(file) is None
    config = sentence_pieces.tokenizer_config(file, 1000)
    assert (config["tokenizer_class"], config["extra_ids"]) == ("T5Tokenizer", 100)
    size = sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size()
    assert sentence_pieces.tokenizer_config(file, size + 28)["extra_ids"] == 0


@pytest.mark.parametrize(
    "switches",
    [{"bos_id": 3}, {"pad_id": -1}, {"pad_id": 3, "unk_id": 0, "byte_fallback": True}],
)
def test_other_conventions_are_left_alone(tmp_path, switches):
    file = trained(tmp_path, vocab_size=500, **switches)
    assert sentence_pieces.tokenizer_config(file, 1000) is None
    assert sentence_pieces.tokenizer_json(file) is None


def test_other_kinds_of_models_are_left_alone(tmp_path):
    file = trained(tmp_path, vocab_size=500, model_type="bpe", byte_fallback=True)
    assert sentence_pieces.tokenizer_json(file) is None


@pytest.mark.battery
def test_transformers_reads_an_export_as_we_do(tmp_path):
    reason = "transformers is not installed"
    transformers = pytest.importorskip("transformers", reason=reason)
    assert exported(SHIPPED, tmp_path / "theirs") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    file = str(SHIPPED / "vocabulary.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=file)
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*pieces.encode(text), 1]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
    assert len(tokenizer) == 4096
