# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a GGUF file, as Hugging Face's files.

GGUF keeps tokens, their kinds, merges or scores, and the name of how texts are split
before merging. Two kinds of tokenizers are known: "gpt2", pairs of bytes merged in the
order of a list (Llama 3, Qwen, SmolLM), and "llama", characters merged by score, with
bytes for those it lacks (Llama 2, Gemma).
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nlhf_jax.checks import UserError, check_choice

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# Further ends of an answer that a file may name.
OTHER_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
BLANK = "\u2581"

# How texts are split before pairs are merged: what a word is, and how long a number.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBER"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3, QWEN_2 = (_WORDS.replace("NUMBER", size) for size in ("{1,3}", ""))
SINGLE_DIGITS = "digits"  # each digit alone, the rest as GPT-2
SPLITS = {
    "default": GPT_2,
    "gpt-2": GPT_2,
    "smollm": SINGLE_DIGITS,
    "starcoder": SINGLE_DIGITS,
    "refact": SINGLE_DIGITS,
    "command-r": SINGLE_DIGITS,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
    "llama-bpe": LLAMA_3,
    "falcon3": LLAMA_3,
    "smaug-bpe": LLAMA_3,
    "dbrx": LLAMA_3,
    "qwen2": QWEN_2,
    "deepseek-r1-qwen": QWEN_2,
}
# Of these a text begins with <bos> unless the file says otherwise, and a whole word
# that is a token is taken before any merge.
LLAMA_3_KINDS = ("llama3", "llama-v3", "llama-bpe")


def tokenizer_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns file name -> text of the files that a GGUF file's metadata makes.

    These are `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and,
    where the file has one, `chat_template.jinja`.

    Args:
      metadata: key -> value, such as `tokenizer.ggml.tokens`.

    Raises:
      UserError: there is no tokenizer in it, one of an unknown kind, or lists of
        different lengths.
    """
    model = metadata.get("tokenizer.ggml.model", "")
    kind = check_choice("tokenizer.ggml.model", model, ("gpt2", "llama"))
    tokens, types = _tokens(metadata)
    add_bos = _add_bos(metadata, kind)
    named = _named(metadata, tokens)
    spec = (_byte_level if kind == "gpt2" else _by_score)(metadata, tokens, types)
    spec["post_processor"] = _beginning(named, tokens) if add_bos else None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
    } | named
    ends = [_id(metadata, key) for key in (ROLES["eos_token"], *OTHER_ENDS)]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    generation: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    for role in ("bos_token", "pad_token"):
        if role in named:
            generation[f"{role}_id"] = int(metadata[ROLES[role]])
    files = {
        "tokenizer.json": _json(spec),
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json(generation),
    }
    if metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = str(metadata["tokenizer.chat_template"])
    return files


def write_tokenizer(
    metadata: Mapping[str, Any], folder: pathlib.Path
) -> dict[str, pathlib.Path]:
    """Writes the files of `tokenizer_texts`; returns name -> file.

    Raises:
      UserError: as `tokenizer_texts`; nothing is written then.
    """
    files = {}
    for name, text in tokenizer_texts(metadata).items():
        files[name] = folder / name
        files[name].write_text(text, encoding="utf-8")
    return files


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError("the file has no tokenizer.ggml.tokens, so no vocabulary")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(
            f"tokenizer.ggml.token_type must have {len(tokens)} entries, one a token, "
            f"got {len(types)}"
        )
    return [str(token) for token in tokens], [int(one) for one in types]


def _id(metadata: Mapping[str, Any], key: str) -> int | None:
    """Returns the id that a key names; none is no key, or -1 without a sign."""
    number = metadata.get(key)
    return None if number is None or int(number) == 2**32 - 1 else int(number)


def _named(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    """Returns the texts of the special tokens that the file names by their ids."""
    named = {}
    for role, key in ROLES.items():
        number = _id(metadata, key)
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise UserError(
                f"{key} must be less than the {len(tokens)} tokens, got {number}"
            )
        named[role] = tokens[number]
    if "eos_token" not in named:
        raise UserError(f"the file must have {ROLES['eos_token']}, the end of a text")
    return named


def _add_bos(metadata: Mapping[str, Any], kind: str) -> bool:
    is_usual = kind == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA_3_KINDS
    asked = metadata.get("tokenizer.ggml.add_bos_token", is_usual)
    return bool(asked) and _id(metadata, ROLES["bos_token"]) is not None


def _beginning(named: Mapping[str, str], tokens: Sequence[str]) -> dict[str, Any]:
    bos = named["bos_token"]
    special = {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, start, second],
        "special_tokens": {bos: special},
    }


def _spec(
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[Sequence[str]],
    model: Mapping[str, Any],
    parts: Mapping[str, Any],
) -> dict[str, Any]:
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and token
    ]
    vocab = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED
    }
    whole = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    known = {"vocab": vocab, "merges": [list(pair) for pair in merges]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "model": whole | dict(model) | known,
    }


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    split = SPLITS[check_choice("tokenizer.ggml.pre", pre, SPLITS)]
    merges = [str(one).split(" ") for one in metadata.get("tokenizer.ggml.merges", ())]
    known = set(tokens)
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
            raise UserError(
                f"tokenizer.ggml.merges must hold pairs of tokens, got {pair!r:.80}"
            )
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if split == SINGLE_DIGITS:
        steps = [{"type": "Digits", "individual_digits": True}]
        steps.append(bytes_ | {"use_regex": True})
    else:
        words = {"Regex": split}
        steps = [
            {
                "type": "Split",
                "pattern": words,
                "behavior": "Isolated",
                "invert": False,
            },
            bytes_ | {"use_regex": False},
        ]
    parts = {
        "normalizer": {"type": "NFC"} if split == QWEN_2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": bytes_ | {"use_regex": True},
    }
    model = {"ignore_merges": pre in LLAMA_3_KINDS}
    return _spec(tokens, types, merges, model, parts)


def _by_score(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    is_gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise UserError(
            f"tokenizer.ggml.scores must have {len(tokens)} entries, one a token, got "
            f"{0 if scores is None else len(scores)}"
        )
    if is_gemma:
        # Some files spell blanks as blanks there; scores are no order of merges, the
        # places of the tokens are.
        tokens = [BLANK * len(t) if t and not t.strip(" ") else t for t in tokens]
        scores = range(0, -len(tokens), -1)
    prefix = not is_gemma and bool(
        metadata.get("tokenizer.ggml.add_space_prefix", True)
    )
    named = _id(metadata, ROLES["unk_token"])
    model = {
        "unk_token": None if named is None else tokens[named],
        "byte_fallback": True,
        "fuse_unk": True,
    }
    blanks = {"pattern": {"String": BLANK}, "content": " "}
    decoders: list[dict[str, Any]] = [{"type": "Replace"} | blanks]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    parts = {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": BLANK,
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    merges = _merges_of(tokens, types, [float(score) for score in scores])
    return _spec(tokens, types, merges, model, parts)


def _merges_of(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Returns all pairs of tokens that make another, the best one's first."""
    kinds = (NORMAL, USER_DEFINED)
    ids = {t: n for n, t in enumerate(tokens) if types[n] in (*kinds, BYTE)}
    merges = []
    for number in sorted(ids.values(), key=lambda n: (-scores[n], n)):
        token = tokens[number]
        if types[number] not in kinds:
            continue
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        whole = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(whole, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
