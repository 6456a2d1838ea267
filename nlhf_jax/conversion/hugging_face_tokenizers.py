# SPDX-License-Identifier: Apache-2.0
"""What goes with the weights in a Hugging Face folder: vocabulary, chat, generation."""

import json
import pathlib
import shutil
from typing import Any

from nlhf_jax.conversion import sentence_pieces
from nlhf_jax.conversion.tensors import Weights
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.models.t5 import EOS_ID, PAD_ID, START_ID

BYTE = "byte"
VOCABULARY = "vocabulary.model"  # our name of a SentencePiece model
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
# Theirs of the same, by what they were first used for.
SENTENCE_PIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
# Copied under their own names, in and out.
COMPANIONS = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    GENERATION,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def found_in(
    path: pathlib.Path, *, is_pair: bool
) -> tuple[dict[str, pathlib.Path], str]:
    """Returns what to copy from a folder under which of our names, and "byte" or "".

    Args:
      path: the folder.
      is_pair: whether it is an encoder-decoder's, whose vocabulary is a SentencePiece
        model, if there is one; others' is a tokenizer.json.
    """
    files = {name: path / name for name in COMPANIONS if (path / name).is_file()}
    pieces = [path / name for name in SENTENCE_PIECE if (path / name).is_file()]
    if pieces and (is_pair or TOKENIZER not in files):
        files[VOCABULARY] = pieces[0]
    is_byte = not {VOCABULARY, TOKENIZER} & files.keys() and _class(path) == "ByT5"
    return files, BYTE if is_byte else ""


def _class(path: pathlib.Path) -> str:
    """Returns which tokenizer a folder's configuration names, without its ending."""
    try:
        config = json.loads((path / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        return str(config.get("tokenizer_class", "")).split("Tokenizer")[0]
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def write(folder: pathlib.Path, weights: Weights) -> None:
    """Writes the vocabulary and its companions as `transformers` looks for them."""
    for name in COMPANIONS:
        if name in weights.files:
            shutil.copyfile(weights.files[name], folder / name)
    is_decoder_only = isinstance(weights.settings, DecoderOnlySettings)
    if VOCABULARY in weights.files:
        theirs = SENTENCE_PIECE[1 if is_decoder_only else 0]
        shutil.copyfile(weights.files[VOCABULARY], folder / theirs)
        if TOKENIZER not in weights.files and TOKENIZER_CONFIG not in weights.files:
            _write_pieces(folder, weights)
    if weights.vocabulary == BYTE and not (folder / TOKENIZER_CONFIG).exists():
        _write(folder / TOKENIZER_CONFIG, BYTE_TOKENIZER)
    if not (folder / GENERATION).exists():
        _write(folder / GENERATION, _generation(weights))


def _write_pieces(folder: pathlib.Path, weights: Weights) -> None:
    """Writes what makes `transformers` read a SentencePiece model as we do."""
    file = weights.files[VOCABULARY]
    config = sentence_pieces.tokenizer_config(file, weights.settings.vocab_size)
    text = sentence_pieces.tokenizer_json(file)
    if config is not None:
        _write(folder / TOKENIZER_CONFIG, config)
    if text is not None:
        (folder / TOKENIZER).write_text(text, encoding="utf-8")


BYTE_TOKENIZER = {
    "tokenizer_class": "ByT5Tokenizer",
    "extra_ids": 0,
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def _generation(weights: Weights) -> dict[str, Any]:
    settings = weights.settings
    if isinstance(settings, DecoderOnlySettings):
        return {"pad_token_id": settings.pad_id, "eos_token_id": settings.eos_id}
    return {
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "decoder_start_token_id": START_ID,
    }


def _write(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
