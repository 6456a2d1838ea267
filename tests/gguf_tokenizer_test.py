# SPDX-License-Identifier: Apache-2.0
"""Tokenizers out of GGUF's metadata, against the tokenizers they were made of."""

import itertools
import json

import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.conversion.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    tokenizer_texts,
    write_tokenizer,
)
from nlhf_jax.data.tokenizer_files import TokenizerFile
from tests.small_tokenizers import CHATML, STYLES, TEXTS
from tests.small_tokenizers import write_tokenizer as write_style

ASKED = (
    *TEXTS,
    "日本語 ☂ naïve\n\n\n  x",
    " 1 22 333 4444,5",
    "I'LL don't",
    "a\u00a0b",
    "",
)


def _byte_metadata(spec, **changes):
    """What GGUF says of a byte-level tokenizer.json."""
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    special = {one["content"] for one in spec["added_tokens"]}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            CONTROL if token in special else NORMAL for token in tokens
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHATML,
    } | changes


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """(a tokenizer.json's content, its TokenizerFile)."""
    path = write_style(tmp_path_factory.mktemp("bytes"), "chatml")
    return json.loads(path.read_text()), TokenizerFile(str(path))


def _opened(metadata, folder):
    write_tokenizer(metadata, folder)
    return TokenizerFile(str(folder / "tokenizer.json"))


# ----------------------------------------------------------------- pairs of bytes


def test_ids_are_those_of_the_tokenizer_it_was_made_of(byte_level, tmp_path):
    spec, theirs = byte_level
    ours = _opened(_byte_metadata(spec), tmp_path)
    for text in ASKED:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id) == (1, 2, 0, 2)
    assert ours.controls == theirs.controls
    assert ours.vocab_size == theirs.vocab_size
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML


def test_user_defined_tokens_are_whole_but_no_controls(byte_level, tmp_path):
    spec, _ = byte_level
    metadata = _byte_metadata(spec)
    metadata["tokenizer.ggml.tokens"] += ["<think> now", "<unused>"]
    metadata["tokenizer.ggml.token_type"] += [USER_DEFINED, UNUSED]
    ours = _opened(metadata, tmp_path)
    number = len(metadata["tokenizer.ggml.tokens"]) - 2
    assert ours.encode("a<think> now") == [*ours.encode("a"), number]
    assert ours.decode([number]) == "<think> now"
    assert ours.vocab_size == number + 1


# A vocabulary of bytes and a few pairs, whose merges say where a text is split.
SPLIT_TOKENS = ["1", "2", "12", "123", "Ċ", "ĊĊ", "Ġ", "ĠĊ", "'", "L", "'L", "a", "'a"]
SPLIT_MERGES = ["1 2", "12 3", "Ċ Ċ", "Ġ Ċ", "' L", "' a"]


@pytest.mark.parametrize(
    "pre, text, expected",
    [
        ("gpt-2", "12", ["12"]),
        ("smollm", "12", ["1", "2"]),
        ("qwen2", "12", ["1", "2"]),
        ("llama-bpe", "1231", ["123", "1"]),
        # Two line breaks before a digit stay together where digits are cut off first.
        ("smollm", "\n\n1", ["ĊĊ", "1"]),
        ("gpt-2", "\n\n1", ["Ċ", "Ċ", "1"]),
        ("llama-bpe", "'L", ["'L"]),
        ("llama-bpe", "'a", ["'a"]),
        ("gpt-2", "'L", ["'", "L"]),
    ],
)
def test_texts_are_split_as_the_named_kind_splits_them(pre, text, expected, tmp_path):
    tokens = [*dict.fromkeys([*SPLIT_TOKENS, "3"]), "<end>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) - 1) + [CONTROL],
        "tokenizer.ggml.merges": SPLIT_MERGES,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    ours = _opened(metadata, tmp_path)
    assert [tokens[i] for i in ours.encode(text)] == expected


def test_whole_words_go_before_merges_in_llama_3_only(tmp_path):
    tokens = ["a", "b", "c", "ab", "abc", "<end>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * 5 + [CONTROL],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 5,
    }
    found = {}
    for pre in ("llama-bpe", "qwen2"):
        folder = tmp_path / pre
        folder.mkdir()
        found[pre] = _opened(metadata | {"tokenizer.ggml.pre": pre}, folder).encode(
            "abc"
        )
    assert found == {"llama-bpe": [4], "qwen2": [3, 2]}


@pytest.mark.parametrize(
    "pre, said, start",
    [
        ("llama-bpe", {}, (1,)),
        ("gpt-2", {}, ()),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, (1,)),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, ()),
    ],
)
def test_beginnings(byte_level, tmp_path, pre, said, start):
    metadata = _byte_metadata(byte_level[0], **{"tokenizer.ggml.pre": pre} | said)
    assert _opened(metadata, tmp_path).prompt_start == start


def test_an_end_of_turn_is_another_end(byte_level):
    metadata = _byte_metadata(byte_level[0])
    said = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2}
    made = json.loads(tokenizer_texts(metadata | said)["generation_config.json"])
    assert made["eos_token_id"] == [0, 2]


def test_an_id_that_is_minus_one_without_a_sign_is_none(byte_level):
    metadata = _byte_metadata(byte_level[0], **{"tokenizer.ggml.pre": "llama-bpe"})
    keys = ("bos_token_id", "padding_token_id", "eot_token_id", "eom_token_id")
    none = {f"tokenizer.ggml.{key}": 2**32 - 1 for key in keys}
    end = {"tokenizer.ggml.eos_token_id": 2}
    made = tokenizer_texts(metadata | none | end)
    assert json.loads(made["generation_config.json"]) == {"eos_token_id": 2}
    assert json.loads(made["tokenizer.json"])["post_processor"] is None
    scored = _scored() | {"tokenizer.ggml.unknown_token_id": 2**32 - 1}
    model = json.loads(tokenizer_texts(scored)["tokenizer.json"])["model"]
    assert model["unk_token"] is None


# --------------------------------------------------------------------- merged by score


def _scored(architecture="llama", **changes):
    """Characters, bytes, and words whose scores say which are merged first."""
    words = ["▁the", "▁t", "he", "th", "▁pipe", "pi", "pe", "▁pi", "▁", *"thepi"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    scores = [0.0] * 259 + [-float(n) for n in range(len(words))]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def _by_hand(text, metadata):
    """SentencePiece's way: the best-scored neighbours become one, until none do."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: number for number, token in enumerate(tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[ids[a + b]], at)
            for at, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in ids and ids[a + b] >= 259
        ]
        if not pairs:
            break
        _, at = min(pairs)
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    out = []
    for part in parts:
        whole = [ids[part]] if part in ids else [3 + b for b in part.encode()]
        out += whole
    return out


@pytest.mark.parametrize(
    "text", ["the pipe", "thepipe", "pipe the  pe", "hé ☂ t", "hetp"]
)
def test_merges_by_score_are_sentencepiece_s(text, tmp_path):
    metadata = _scored()
    ours = _opened(metadata, tmp_path)
    assert ours.encode(text) == _by_hand(" " + text, metadata)
    assert ours.decode(ours.encode(text)) == text
    assert ours.prompt_start == (1,)


def test_gemma_puts_no_blank_before_a_text_and_merges_by_place(tmp_path):
    metadata = _scored("gemma2")
    metadata["tokenizer.ggml.tokens"] += ["  "]  # two blanks, spelled as blanks
    metadata["tokenizer.ggml.token_type"] += [NORMAL]
    metadata["tokenizer.ggml.scores"] = [-1.0] * len(metadata["tokenizer.ggml.tokens"])
    ours = _opened(metadata, tmp_path)
    by_place = metadata | {
        "tokenizer.ggml.scores": [
            -n for n in range(len(metadata["tokenizer.ggml.tokens"]))
        ]
    }
    for text in ("the pipe", "thepipe"):
        assert ours.encode(text) == _by_hand(text, by_place)
    assert ours.encode("  ") == [len(metadata["tokenizer.ggml.tokens"]) - 1]
    assert ours.decode(ours.encode(" the  pipe ")) == " the  pipe "


def test_a_text_that_spells_a_control_stays_text(tmp_path):
    ours = _opened(_scored(), tmp_path)
    ids = ours.encode("the </s> pipe<s>")
    assert not {1, 2} & set(ids)
    assert "s>" in ours.decode(ids)


# ------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            {"tokenizer.ggml.model": "bert"},
            "tokenizer.ggml.model must be one of gpt2, ll",
        ),
        ({"tokenizer.ggml.pre": "qwen3"}, "tokenizer.ggml.pre .*did you mean 'qwen2'"),
        ({"tokenizer.ggml.tokens": []}, "has no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type must have 381 entries.*got 1"),
        (
            {"tokenizer.ggml.eos_token_id": None},
            "must have tokenizer.ggml.eos_token_id",
        ),
        (
            {"tokenizer.ggml.eos_token_id": 999},
            "must be less than the 381 tokens, got 999",
        ),
        ({"tokenizer.ggml.merges": ["a"]}, "merges must hold pairs of tokens, got"),
        ({"tokenizer.ggml.model": "llama"}, "scores must have 381 entries.*got 0"),
    ],
)
def test_mistakes_are_sentences(byte_level, tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        write_tokenizer(_byte_metadata(byte_level[0], **change), tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.battery
def test_transformers_reads_what_is_written(byte_level, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    ours = _opened(_byte_metadata(byte_level[0]), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == "<|im_end|>" and theirs.bos_token == "<|im_start|>"
    for text in ASKED:
        assert theirs(text).input_ids == ours.encode(text)
    assert set(STYLES["chatml"][1]) <= set(theirs.all_special_tokens)
