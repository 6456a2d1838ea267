# SPDX-License-Identifier: Apache-2.0
"""How the text of a prompt becomes the ids a model reads before it answers.

    T5's vocabularies           text <eos>
    those of Llama, Gemma, Qwen <bos> text          (<bos> where the model has one)
    a chat template             what it writes around the text

A prompt that is too long loses the end of its text, never what stands after the text.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from nlhf_jax.checks import UserError
from nlhf_jax.data import chat_templates
from nlhf_jax.data.special_tokens import read_template
from nlhf_jax.data.tensorflow_setup import import_seqio
from nlhf_jax.data.tokenizer_files import encode_tf

NO_TEMPLATE, OWN_TEMPLATE, OWN_IF_ANY = "", "model", "auto"


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """What stands around a prompt's text.

    Attributes:
      encode: a prompt's text -> all its ids.
      num_before: ids before the text.
      num_after: ids after the text, which a prompt that is cut keeps.
      is_plain: whether seqio's own way, text and end, gives the same ids.
    """

    encode: Callable[[str], list[int]]
    num_before: int
    num_after: int
    is_plain: bool

    def check_length(self, length: int) -> None:
        """Raises a UserError where prompts of `length` ids have no room for a text."""
        frame = self.num_before + self.num_after
        if length <= frame and not self.is_plain:
            raise UserError(
                "task_feature_lengths['inputs'] must be more than the "
                f"{frame} tokens that stand around a prompt's text, got {length}"
            )


def prompt_format(
    vocabulary: Any, chat_template: str = NO_TEMPLATE, system_prompt: str = ""
) -> PromptFormat:
    """Returns the format of a model's prompts.

    Args:
      vocabulary: a seqio vocabulary; T5's way where it does not say another.
      chat_template: "" for none, "model" for the one beside the vocabulary, "auto" for
        that one if there is one, or a file.
      system_prompt: what the template puts before the user's text; "" for nothing.

    Raises:
      UserError: there is no such template, it is a bad one, or the vocabulary has no
        control tokens.
    """
    if chat_template == OWN_IF_ANY:
        chat_template = OWN_TEMPLATE if has_template(vocabulary) else NO_TEMPLATE
    if chat_template:
        return _templated(vocabulary, chat_template, system_prompt)
    if system_prompt:
        raise UserError(
            "system_prompt needs a chat_template to say it; set chat_template='model'"
        )
    start, end = frame_of(vocabulary)
    return PromptFormat(
        lambda text: [*start, *map(int, vocabulary.encode(text)), *end],
        len(start),
        len(end),
        not start and end == (vocabulary.eos_id,),
    )


def frame_of(vocabulary: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids before and after a prompt that no template is used for."""
    if hasattr(vocabulary, "prompt_start"):
        return vocabulary.prompt_start, vocabulary.prompt_end
    return (), (vocabulary.eos_id,)


def has_template(vocabulary: Any) -> bool:
    """Returns whether a chat template lies beside a vocabulary's file."""
    file = getattr(vocabulary, "file", None)
    return file is not None and _own(file) is not None


def _own(file: Any) -> chat_templates.ChatTemplate | None:
    folder = pathlib.Path(file.path).parent
    return chat_templates.folder_template(folder, file.special_texts)


def _templated(vocabulary: Any, named: str, system_prompt: str) -> PromptFormat:
    file = getattr(vocabulary, "file", None)
    if file is None:
        raise UserError(
            f"chat_template {named!r} needs a model whose vocabulary is a "
            "tokenizer.json; this one has no control tokens"
        )
    if named == OWN_TEMPLATE:
        template = _own(file)
        if template is None:
            raise UserError(
                "chat_template 'model' needs a chat_template.jinja beside the "
                f"vocabulary {file.path!r}; there is none"
            )
    else:
        source = read_template(pathlib.Path(named))
        template = chat_templates.ChatTemplate(
            source, file.special_texts, f"chat template {named}"
        )
    system_prompt = file.guarded(system_prompt) if system_prompt else ""
    end = file.text_of(file.eos_id)
    chat_templates.check_template(template, file.controls, end, system_prompt)

    def encode(text: str) -> list[int]:
        return file.encode_rendered(template.prompt(file.guarded(text), system_prompt))

    rendered = template.prompt(chat_templates.QUESTION, system_prompt)
    before, _, after = rendered.partition(chat_templates.QUESTION)
    sizes = (len(file.encode_rendered(part)) for part in (before, after))
    return PromptFormat(encode, *sizes, False)


def prompt_vocabulary(vocabulary: Any, form: PromptFormat) -> Any:
    """Returns a seqio vocabulary that encodes a prompt's text with all around it."""
    return _prompt_vocabulary_class()(vocabulary, form)


@functools.cache
def _prompt_vocabulary_class() -> type:
    seqio = import_seqio()

    class PromptVocabulary(seqio.Vocabulary):
        """Another vocabulary, whose `encode` is a format's."""

        def __init__(self, vocabulary, form: PromptFormat):
            super().__init__()
            self._vocabulary, self._form = vocabulary, form

        @property
        def pad_id(self):
            return self._vocabulary.pad_id

        @property
        def eos_id(self):
            return self._vocabulary.eos_id

        @property
        def bos_id(self):
            return self._vocabulary.bos_id

        @property
        def unk_id(self):
            return self._vocabulary.unk_id

        @property
        def _base_vocab_size(self):
            return self._vocabulary.vocab_size

        def _encode(self, s):
            return self._form.encode(s)

        def _decode(self, ids):
            return self._vocabulary.decode(ids)

        def _encode_tf(self, s):
            return encode_tf(self._form.encode, s)

        def _decode_tf(self, ids):
            return self._vocabulary.decode_tf(ids)

    return PromptVocabulary
