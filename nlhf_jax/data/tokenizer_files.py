# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's `tokenizer.json` as a vocabulary.

A text that somebody wrote never becomes a control token: where it spells one
(`<|im_end|>`), the spelling is broken up and read as letters. Control tokens come from
a chat template, from the tokenizer's own beginning of a text, and from the end that
responses get. SEPARATOR is what breaks a spelling: a character that Unicode reserves
for such uses, as a token of its own whose id is dropped.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nlhf_jax.checks import UserError, expanded, nearest
from nlhf_jax.data import chat_templates
from nlhf_jax.data.special_tokens import SpecialTokens, read_special_tokens
from nlhf_jax.data.tensorflow_setup import import_seqio, import_tensorflow

SEPARATOR = "\ufdd0"
REPLACEMENT = "\ufffd"


class TokenizerFile:
    """A `tokenizer.json` with the special tokens that the files beside it name.

    Attributes:
      path: of the file.
      vocab_size: one more than the largest id.
      pad_id: fills the padding; the end's where the model has no padding, so nobody
        may take an entry for padding by its id.
      eos_id: ends a response.
      bos_id: begins a text, -1 if there is none.
      unk_id: stands for what the vocabulary lacks, -1 if there is none.
      controls: text -> id of every control token.
      prompt_start: ids before a prompt without a template.
      prompt_end: ids after it.
    """

    def __init__(self, path: str):
        self.path = path
        self._tokenizer = _opened(path)
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(known.values(), default=-1) + 1
        self._separator_id = self._add_separator()
        folder = pathlib.Path(path).parent
        special = read_special_tokens(folder)
        self._check_texts(special, known)
        named = {text: known[text] for text in special.texts.values() if text}
        added = self._tokenizer.get_added_tokens_decoder()
        self.controls = named | {
            token.content: number for number, token in added.items() if token.special
        }
        self._breakable = _pattern(self.controls)
        self._texts = {number: text for text, number in self.controls.items()}
        self.bos_id = self._id("bos", special, -1)
        self.unk_id = self._id("unk", special, -1)
        self.eos_id = self._end(special, folder)
        self.pad_id = self._id("pad", special, self.eos_id)
        self._never = {*self.controls.values()} - {self.unk_id}
        self.prompt_start, self.prompt_end = self._frame(special)

    def _add_separator(self) -> int:
        from tokenizers import AddedToken

        token = AddedToken(SEPARATOR, special=False, normalized=False)
        self._tokenizer.add_tokens([token])
        return self._tokenizer.token_to_id(SEPARATOR)

    def _check_texts(self, special: SpecialTokens, known: dict[str, int]) -> None:
        for role, text in special.texts.items():
            if text and text not in known:
                raise UserError(
                    f"{role}_token {text!r} of the files beside {self.path} is none of "
                    f"its tokens{nearest(text, known)}"
                )
        for role, ids in special.ids.items():
            for number in ids:
                if number >= self.vocab_size:
                    raise UserError(
                        f"{role}_token_id of the files beside {self.path} must be less "
                        f"than its {self.vocab_size} ids, got {number}"
                    )

    def _id(self, role: str, special: SpecialTokens, otherwise: int) -> int:
        text, ids = special.texts[role], special.ids.get(role, ())
        if text:
            return self._tokenizer.token_to_id(text)
        return ids[0] if ids else otherwise

    def _end(self, special: SpecialTokens, folder: pathlib.Path) -> int:
        """Returns the end of a response; of several that of a turn of the template."""
        end = self._id("eos", special, -1)
        if end < 0:
            raise UserError(
                f"{self.path} has no end of a text: name its eos_token in "
                "tokenizer_config.json beside it"
            )
        others = {end, *special.ids["eos"]}
        if len(others) > 1:
            template = chat_templates.folder_template(folder, self.special_texts)
            turn_end = template and chat_templates.end_of_turn(template, self.controls)
            if turn_end and self.controls[turn_end] in others:
                return self.controls[turn_end]
        return end

    @functools.cached_property
    def special_texts(self) -> dict[str, str]:
        """The texts a chat template may name: `bos_token` and the like."""
        special = read_special_tokens(pathlib.Path(self.path).parent)
        return {f"{role}_token": text for role, text in special.texts.items() if text}

    def _frame(self, special: SpecialTokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns what the tokenizer itself puts around a text."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        start, end = tuple(whole[:at]), tuple(whole[at + len(bare) :])
        if special.add_bos is not None and self.bos_id >= 0:
            rest = tuple(i for i in start if i != self.bos_id)
            start = (self.bos_id, *rest) if special.add_bos else rest
        return start, end

    def guarded(self, text: str) -> str:
        """Returns the text with every control token that it spells broken up."""
        return self._guarded(text)[0]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, none of which is a control token's."""
        return self._guarded(text)[1]

    def _guarded(self, text: str) -> tuple[str, list[int]]:
        guarded = self._breakable(text.replace(SEPARATOR, ""))
        ids = self.encode_rendered(guarded)
        if not self._never.isdisjoint(ids):
            # Spelled in a way that the tokenizer's own normalising makes one.
            guarded = SEPARATOR.join(guarded.replace(SEPARATOR, ""))
            ids = [i for i in self.encode_rendered(guarded) if i not in self._never]
        return guarded, ids

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of a text in which control tokens are meant."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i != self._separator_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids; control tokens are left out."""
        return self._tokenizer.decode(
            [int(i) for i in ids if i not in self._never and i < self.vocab_size],
            skip_special_tokens=True,
        )

    def text_of(self, control_id: int) -> str:
        """Returns how a control token is written, an id's number if it is none."""
        return self._texts.get(control_id, str(control_id))


def _opened(path: str) -> Any:
    from tokenizers import Tokenizer

    file = expanded("vocabulary_path", path)
    if not file.is_file():
        raise UserError(f"vocabulary_path {path!r} is no file")
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more special
        raise UserError(
            f"vocabulary_path {path!r} is no tokenizer.json: {error!s:.200}"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _pattern(controls: Iterable[str]) -> Callable[[str], str]:
    """Returns a function that breaks up the control tokens which a text spells."""
    texts = sorted(filter(None, controls), key=len, reverse=True)
    if not texts:
        return lambda text: text
    whole = re.compile("|".join(map(re.escape, texts)))

    def broken(match: re.Match) -> str:
        found = match[0]
        return found[0] + SEPARATOR + found[1:] if len(found) > 1 else REPLACEMENT

    return lambda text: whole.sub(broken, text)


def load_tokenizer(path: str) -> Any:
    """Returns the seqio vocabulary of a `tokenizer.json`.

    Its attribute `file` is the `TokenizerFile`; `prompt_start` and `prompt_end` are
    that file's.

    Raises:
      UserError: there is no such file, it is no tokenizer, or the special tokens that
        the files beside it name are none of its tokens.
    """
    return _vocabulary_class()(TokenizerFile(path))


@functools.cache
def _vocabulary_class() -> type:
    seqio, tf = import_seqio(), import_tensorflow()

    class HuggingFaceVocabulary(seqio.Vocabulary):
        """A `TokenizerFile` with the methods that seqio asks for."""

        def __init__(self, file: TokenizerFile):
            super().__init__()
            self.file = file
            self.prompt_start, self.prompt_end = file.prompt_start, file.prompt_end

        @property
        def pad_id(self):
            return self.file.pad_id

        @property
        def eos_id(self):
            return self.file.eos_id

        @property
        def bos_id(self):
            return self.file.bos_id

        @property
        def unk_id(self):
            return None if self.file.unk_id < 0 else self.file.unk_id

        @property
        def _base_vocab_size(self):
            return self.file.vocab_size

        def _encode(self, s):
            return self.file.encode(s)

        def _decode(self, ids):
            return self.file.decode(ids)

        def _encode_tf(self, s):
            return encode_tf(self.file.encode, s)

        def _decode_tf(self, ids):
            decoded = tf.numpy_function(
                lambda found: self.file.decode(found.tolist()), [ids], tf.string
            )
            return tf.ensure_shape(decoded, [])

        def __eq__(self, other):
            theirs = getattr(getattr(other, "file", None), "path", None)
            return self.file.path == theirs

        __hash__ = None

    return HuggingFaceVocabulary


def encode_tf(encode: Any, text: Any) -> Any:
    """Returns the ids of one text as a TensorFlow value, int32; runs Python."""
    import numpy as np

    tf = import_tensorflow()

    def ids_of(value):
        # Bytes inside a pipeline, an array of one outside.
        word = tf.compat.as_text(np.asarray(value).item())
        return np.array(encode(word), np.int32)

    return tf.ensure_shape(tf.numpy_function(ids_of, [text], tf.int32), [None])
