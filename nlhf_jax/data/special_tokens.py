# SPDX-License-Identifier: Apache-2.0
"""What the files beside a `tokenizer.json` say of its special tokens.

Hugging Face folders say it up to three times: `tokenizer_config.json` and
`special_tokens_map.json` by the tokens' texts, `generation_config.json` by their ids.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nlhf_jax.checks import UserError

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# What belongs to a vocabulary and lies beside it, whatever its own name.
COMPANIONS = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG, TEMPLATE_FILE)
ROLES = ("bos", "eos", "pad", "unk")


class SpecialTokens(NamedTuple):
    """The special tokens that a folder names; what it does not name is empty.

    Attributes:
      texts: "bos", "eos", "pad" and "unk" -> the token's text, "" for none.
      ids: "bos", "eos" and "pad" -> ids of the generation config, several or none.
      add_bos: whether each text begins with "bos"; None leaves it to the tokenizer.
    """

    texts: dict[str, str]
    ids: dict[str, tuple[int, ...]]
    add_bos: bool | None


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Returns the object of a JSON file, an empty one where there is no such file.

    Raises:
      UserError: it can't be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} can't be read as JSON: {error!s:.200}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(found).__name__}")
    return found


def _text_of(value: Any) -> str:
    """A token is written as its text, or as an object with it."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ids_of(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(one for one in values if type(one) is int and one >= 0)


def read_special_tokens(folder: pathlib.Path) -> SpecialTokens:
    """Returns the special tokens that the files of a folder name.

    Raises:
      UserError: one of the files is no JSON object.
    """
    config = read_json(folder / TOKENIZER_CONFIG)
    mapped = read_json(folder / SPECIAL_TOKENS_MAP)
    generation = read_json(folder / GENERATION_CONFIG)
    texts = {
        role: _text_of(config.get(f"{role}_token"))
        or _text_of(mapped.get(f"{role}_token"))
        for role in ROLES
    }
    ids = {role: _ids_of(generation.get(f"{role}_token_id")) for role in ROLES[:3]}
    add_bos = config.get("add_bos_token")
    return SpecialTokens(texts, ids, add_bos if isinstance(add_bos, bool) else None)


def template_source(folder: pathlib.Path) -> str:
    """Returns the chat template that a folder holds, "" for none.

    Raises:
      UserError: it is no text.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return read_template(file)
    found = read_json(folder / TOKENIZER_CONFIG).get("chat_template") or ""
    if isinstance(found, list):
        if not all(isinstance(one, dict) for one in found):
            raise UserError(
                f"chat_template of {folder / TOKENIZER_CONFIG} must be text or a list "
                "of objects with a name and a template"
            )
        named = [one.get("template") for one in found if one.get("name") == "default"]
        found = (named and named[-1]) or ""
    if not isinstance(found, str):
        raise UserError(
            f"chat_template of {folder / TOKENIZER_CONFIG} must be text, got "
            f"{type(found).__name__}"
        )
    return found


def read_template(file: pathlib.Path) -> str:
    """Returns the text of a template's file.

    Raises:
      UserError: there is no such file, or home folder, or it is no UTF-8.
    """
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        reason = "is not UTF-8"
    except RuntimeError:  # of expanduser
        reason = "there is no such home folder"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise UserError(f"chat template {file} can't be read: {reason}")
