# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: SentencePiece, tokenizer.json, bytes, one trained on the docstrings.

Ids of our own follow T5: padding 0, end of sequence 1, unknown 2, no beginning of
sequence. Other models' have theirs, and padding may be any of them: what is padding
is said by masks, which come from lengths.
"""

import functools
import io
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nlhf_jax.checks import UserError, check_integer, expanded
from nlhf_jax.data.tensorflow_setup import import_seqio, progress_bar
from nlhf_jax.data.tokenizer_files import load_tokenizer
from nlhf_jax.settings import DataSettings

VOCAB_SIZE = 4096
Vocabulary = Any  # seqio.Vocabulary, whose import takes seconds


def train_vocabulary(
    texts: Iterable[str], path: str, vocab_size: int = VOCAB_SIZE
) -> None:
    """Trains a SentencePiece unigram model on the texts and writes it to `path`.

    Characters outside the model fall back to bytes, so no text is unknown.

    Raises:
      UserError: the texts are too few for `vocab_size` pieces.
    """
    import sentencepiece

    check_integer("vocab_size", vocab_size, 260)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"a vocabulary of {vocab_size} can't be trained: {error}"
        ) from None
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_bytes(model.getvalue())
    partial.replace(target)


def load_vocabulary(path: str) -> Vocabulary:
    """Returns the seqio vocabulary of a file, or "byte".

    Args:
      path: a SentencePiece model, a `tokenizer.json` (any name that ends in .json), or
        "byte".

    Raises:
      UserError: there is no such file, it is no vocabulary, or has no end of a text.
    """
    import sentencepiece

    if path == "byte":
        return import_seqio().ByteVocabulary()
    file = expanded("vocabulary_path", path)
    if not file.is_file():
        raise UserError(
            "vocabulary_path must be a SentencePiece model, a tokenizer.json, 'byte' "
            f"or '', got {path!r}, which is no file"
        )
    if file.suffix == ".json":
        return load_tokenizer(str(file))
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise UserError(f"vocabulary_path {path!r} is no SentencePiece model") from None
    if model.eos_id() < 0:
        raise UserError(
            f"vocabulary_path {path!r} must have an end token, got eos_id "
            f"{model.eos_id()}"
        )
    if model.bos_id() >= 0 or model.pad_id() != 0:
        return _sentencepiece_class()(str(file))
    return import_seqio().SentencePieceVocabulary(str(file))


@functools.cache
def _sentencepiece_class() -> type:
    class OtherSentencePieceVocabulary(import_seqio().SentencePieceVocabulary):
        """A SentencePiece model with other ids than T5's: Llama's, Gemma's.

        A prompt begins with the beginning of a sequence, if there is one, and has no
        end; padding that the model has no id for is the end's.
        """

        @property
        def pad_id(self):
            own = self.tokenizer.pad_id()
            return self.eos_id if own < 0 else own

        @property
        def prompt_start(self):
            return (self.bos_id,) if self.bos_id >= 0 else ()

        @property
        def prompt_end(self):
            return ()

    return OtherSentencePieceVocabulary


def docstring_vocabulary_path(settings: DataSettings) -> str:
    """Returns the SentencePiece model beside the docstring corpus, training it once."""
    from nlhf_jax.data import docstring_builder
    from nlhf_jax.data.tensorflow_setup import import_tfds

    of_docstrings = settings.mixture_or_task_name.startswith("docstrings")
    data_dir = settings.data_dir if of_docstrings else ""
    folder = docstring_builder.corpus_folder(
        settings.cache_dir, data_dir, settings.lock_file
    )
    path = pathlib.Path(folder, f"sentencepiece_{VOCAB_SIZE}.model")
    if not path.exists():
        builder = docstring_builder.prepare(folder, settings.lock_file)
        rows = import_tfds().as_numpy(builder.as_dataset(split="train"))
        texts = [row[k].decode() for row in rows for k in ("prompt", "target")]
        for _ in progress_bar(f"Training a vocabulary of {VOCAB_SIZE} pieces")([0]):
            train_vocabulary(texts, str(path), VOCAB_SIZE)
    return str(path)


def vocabulary_for(settings: DataSettings) -> Vocabulary:
    """Returns the vocabulary that `settings.vocabulary_path` names."""
    path = settings.vocabulary_path or docstring_vocabulary_path(settings)
    return load_vocabulary(path)


def check_vocabulary(vocabulary: Vocabulary, model_vocab_size: int) -> None:
    """Raises a UserError when the vocabulary has ids the model has no row for."""
    if vocabulary.vocab_size > model_vocab_size:
        raise UserError(
            f"the vocabulary has {vocabulary.vocab_size} ids, but the model has only "
            f"{model_vocab_size} rows: vocab_size must be at least "
            f"{vocabulary.vocab_size}"
        )


def encode(text: str, vocabulary: Vocabulary) -> list[int]:
    """Returns the text's ids, without an end-of-sequence id."""
    return [int(i) for i in vocabulary.encode(text)]


def decode(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> str:
    """Returns the text before the first end-of-sequence id; padding is dropped."""
    ids = [int(i) for i in ids]
    if vocabulary.eos_id in ids:
        ids = ids[: ids.index(vocabulary.eos_id)]
    return vocabulary.decode(ids)
