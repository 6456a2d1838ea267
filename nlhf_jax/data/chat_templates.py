# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a prompt as a user's turn, and the beginning of the answer's.

A template is Jinja, as Hugging Face keeps it beside a tokenizer; `template_sandbox`
renders it. What is asked of one is tested when it is loaded: the user's text stands in
what it writes exactly once, and a response follows right after it.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence

from nlhf_jax.checks import UserError
from nlhf_jax.data.special_tokens import template_source
from nlhf_jax.data.template_sandbox import Compiled

Messages = Sequence[Mapping[str, str]]
# Stand for what is said, where it is looked for in a rendered text.
QUESTION, ANSWER = "\ufdd1", "\ufdd2"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the texts of the special tokens it may name.

    Attributes:
      source: Jinja.
      special_texts: "bos_token" and the like -> how it is written.
      name: what errors call it.
    """

    source: str
    special_texts: Mapping[str, str]
    name: str = "the chat template"

    @functools.cached_property
    def _compiled(self) -> Compiled:
        return Compiled(self.source, self.name)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Returns the text of a conversation.

        Args:
          messages: turns, each with a `role` and its `content`.
          add_generation_prompt: whether the beginning of an answer follows.

        Raises:
          UserError: the template is no Jinja, refuses the messages, or does not end.
        """
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        return self._compiled.render(dict(self.special_texts) | variables)

    def prompt(self, text: str, system_prompt: str = "") -> str:
        """Returns what the model reads before it answers.

        Args:
          text: what the user says.
          system_prompt: what is said before it, "" for nothing.

        Raises:
          UserError: as `render`; a template without a system's turn may refuse one.
        """
        return self.render(_turns(text, system_prompt), True)


def _turns(text: str, system_prompt: str) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": text}]
    if system_prompt:
        turns.insert(0, {"role": "system", "content": system_prompt})
    return turns


def folder_template(
    folder: pathlib.Path, special_texts: Mapping[str, str]
) -> ChatTemplate | None:
    """Returns the template that a folder holds, None for none.

    Raises:
      UserError: its files can't be read.
    """
    source = template_source(folder)
    if not source:
        return None
    return ChatTemplate(source, special_texts, f"the chat template of {folder}")


def end_of_turn(template: ChatTemplate, controls: Mapping[str, int]) -> str:
    """Returns the control token that ends an answer, "" if none does.

    Raises:
      UserError: as `ChatTemplate.render`.
    """
    turns = [*_turns(QUESTION, ""), {"role": "assistant", "content": ANSWER}]
    _, is_there, after = template.render(turns).partition(ANSWER)
    texts = sorted(filter(None, controls), key=len, reverse=True)
    found = texts and re.match(rf"\s*({'|'.join(map(re.escape, texts))})", after)
    return found[1] if is_there and found else ""


def _completes(control: str, before: str, after: str) -> bool:
    """Returns whether some text between the two could make a control token whole."""
    cuts = range(1, len(control))
    return any(
        before.endswith(control[:cut]) or after.startswith(control[cut:])
        for cut in cuts
    )


def check_template(
    template: ChatTemplate,
    controls: Mapping[str, int],
    end: str,
    system_prompt: str = "",
) -> None:
    """Checks that a template can be trained with.

    Args:
      template: to check.
      controls: control tokens by their texts.
      end: the one that ends a response.
      system_prompt: "" for none.

    Raises:
      UserError: the user's text does not stand in a prompt once, or beside a part of
        a control token; the system's prompt does not stand in it; an answer does not
        follow right after a prompt; or it is ended by another token than `end`.
    """
    prompt = template.prompt(QUESTION, system_prompt)
    if prompt.count(QUESTION) != 1:
        raise UserError(
            f"{template.name} must write the user's text once, got it "
            f"{prompt.count(QUESTION)} times"
        )
    before, _, after = prompt.partition(QUESTION)
    cut = next((text for text in controls if _completes(text, before, after)), "")
    if cut:
        raise UserError(
            f"{template.name} writes a part of {cut!r} beside the user's text, which "
            "might be the rest of it"
        )
    if system_prompt and system_prompt.strip() not in prompt:
        raise UserError(f"{template.name} leaves the system prompt out")
    turns = _turns(QUESTION, system_prompt)
    whole = template.render([*turns, {"role": "assistant", "content": ANSWER}])
    header = whole.partition(ANSWER)[0].removeprefix(prompt)
    if whole.startswith(prompt) and any(text in header for text in controls if text):
        raise UserError(
            f"{template.name} must begin the answer where add_generation_prompt is "
            f"true; it leaves out {header!r:.100}"
        )
    found = end_of_turn(template, controls)
    if found and found != end:
        raise UserError(
            f"{template.name} ends an answer with {found!r}, but the model's "
            f"end is {end!r}: set eos_token of tokenizer_config.json and eos_id of "
            "model.json to the template's"
        )
