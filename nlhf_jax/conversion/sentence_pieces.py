# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece model as the tokenizer that `transformers` loads.

`transformers` makes a tokenizer of T5's SentencePiece file itself, and leaves out that
unknown characters fall back to bytes: the models trained here would lose every letter
that their vocabulary lacks. Theirs are therefore written as a tokenizer.json.
"""

import pathlib
from typing import Any

UNIGRAM = 1  # of the model types in the file
EXTRA_IDS = 100  # of T5's, which have rows in the table and no pieces


def tokenizer_config(file: pathlib.Path, num_rows: int) -> dict[str, Any] | None:
    """Returns the tokenizer_config.json of a SentencePiece model of T5's conventions.

    Args:
      file: the model.
      num_rows: of the network's table of tokens.

    Returns:
      None where the model has other conventions (padding that is not 0, a beginning),
      of which nothing is known.
    """
    pieces = _opened(file)
    if not _has_our_ids(pieces):
        return None
    named = {
        "pad_token": pieces.id_to_piece(0),
        "eos_token": pieces.id_to_piece(pieces.eos_id()),
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
    }
    if _falls_back(pieces):
        return named | {"tokenizer_class": "PreTrainedTokenizerFast"}
    room = num_rows - pieces.vocab_size()
    extra = EXTRA_IDS if room >= EXTRA_IDS else 0
    return named | {"tokenizer_class": "T5Tokenizer", "extra_ids": extra}


def tokenizer_json(file: pathlib.Path) -> str | None:
    """Returns the tokenizer.json of a SentencePiece model that falls back to bytes.

    A text gets the end token after it, as the prompts that the model was trained on. A
    text that spells a control token (`</s>`) becomes one, as with all of theirs.

    Returns:
      None where `transformers` makes the same of the model itself, or where the model
      has other ids than T5's, or is no unigram model.
    """
    pieces = _opened(file)
    if not (_has_our_ids(pieces) and _falls_back(pieces)):
        return None
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    model = sentencepiece_model_pb2.ModelProto.FromString(
        pieces.serialized_model_proto()
    )
    if model.trainer_spec.model_type != UNIGRAM:
        return None
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = Tokenizer(
        models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True)
    )
    steps: list[Any] = []
    if model.normalizer_spec.precompiled_charsmap:
        steps.append(
            normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
        )
    if model.normalizer_spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Strip())
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    end = pieces.id_to_piece(pieces.eos_id())
    tokenizer.add_special_tokens([pieces.id_to_piece(pieces.pad_id()), end])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}",
        pair=f"$A {end} $B {end}",
        special_tokens=[(end, pieces.eos_id())],
    )
    return tokenizer.to_str(pretty=True)


def _opened(file: pathlib.Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def _has_our_ids(pieces: Any) -> bool:
    """Whether padding is 0, texts have an end and no beginning, as T5's."""
    return pieces.pad_id() == 0 and pieces.bos_id() < 0 and pieces.eos_id() > 0


def _falls_back(pieces: Any) -> bool:
    return any(pieces.is_byte(i) for i in range(min(pieces.vocab_size(), 300)))
