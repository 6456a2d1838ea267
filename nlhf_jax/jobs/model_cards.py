# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported model: what made it, and what was measured of it.

It is read by strangers, so names of folders are shortened to their last part and
passwords are left out. What comes from a run stands in code blocks, where no text can
become markup.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from nlhf_jax import __version__, metrics
from nlhf_jax.conversion.tensors import Weights
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.jobs import scorings
from nlhf_jax.jobs.run_records import CONFIG_FILE

CARD = "README.md"
LONGEST_CONFIG = 100_000  # characters
HIDDEN = "(not shown)"
_SECRET = re.compile(
    r"(?im)^([^\n=]*(?:password|passwd|secret|credential"
    r"|(?:api|private|access|ssh|signing|encryption)_?key"
    r"|(?:auth|access|bearer|refresh|session|hf|hub|github|api)_?token(?!iz))[^\n=]*=)"
    r"[^\n]*(?:\n[ \t]+[^\n]*)*"
)
_LOGIN = re.compile(r"(\w+://)[^\s/@'\"]+@")
# A path of a machine: absolute, of a home folder, or of a bucket; in quotation marks it
# may have blanks.
_START = r"(?:[a-z][a-z0-9+.-]*:/|~[\w.-]*)?/"
_QUOTED = re.compile(rf"(['\"])({_START}[^'\"\n]*)\1")
_PATH = re.compile(rf"(?<![\w.%/@-]){_START}[^\s/'\",;)\]}}]+[^\s'\",;)\]}}]*")
_JUDGE = re.compile(
    r"(?im)^(?:\w+[./])*preference_checkpoint\w*\s*=\s*\\?\s*['\"]([^'\"\n]+)['\"]"
)


def model_card(
    name: str, folder: pathlib.Path, weights: Weights, step: int | None = None
) -> str:
    """Returns the text of an exported model's card.

    Args:
      name: of the exported folder.
      folder: of the model; its run's config.gin and metrics.jsonl are read, if there.
      weights: what is exported.
      step: the checkpoint's, None for the newest.
    """
    parts = [_front(), f"# {_plain(name)}\n", _summary(weights)]
    if weights.scoring is not None:
        parts.append(_block(without_places(scorings.in_words(weights))))
    config = _read(folder / CONFIG_FILE)[:LONGEST_CONFIG]
    judge = _JUDGE.search(config)
    if judge:
        parts.append(
            "The preference model that judged it in training: "
            f"{_code(_last(judge[1]))}.\n"
        )
    lines = measured(_read(folder / metrics.METRICS_FILE), step)
    if lines:
        rows = "\n".join(f"{key}: {value:.6g}" for key, value in lines.items())
        parts.append(f"## Metrics\n\n{_block(rows)}")
    if config:
        parts.append(f"## Configuration\n\n{_block(without_places(config), 'python')}")
    return "\n".join(parts)


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _front() -> str:
    return "---\nlibrary_name: transformers\ntags:\n- nlhf_jax\n- rlhf\n---\n"


def _summary(weights: Weights) -> str:
    is_decoder_only = isinstance(weights.settings, DecoderOnlySettings)
    kind = "decoder-only model" if is_decoder_only else "T5 encoder-decoder"
    dtypes = sorted({tensor.dtype.name for tensor in weights.tensors.values()})
    return (
        f"A {kind} exported by nlhf_jax {__version__} (Nash Learning from Human "
        f"Feedback), in {' and '.join(dtypes)}.\n"
    )


def measured(lines: str, step: int | None = None) -> dict[str, float]:
    """Returns the last numbers of a metrics.jsonl, those of evaluations among them.

    Args:
      lines: the file's text; a line that is no JSON object is left out.
      step: lines of later steps are left out; None takes all.
    """
    found: dict[str, float] = {}
    for line in lines.splitlines():
        try:
            row = json.loads(line)
            is_later = step is not None and row["step"] > step
            numbers = {key: float(value) for key, value in row.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        if not is_later:
            found = _evaluations(found) | numbers
    return dict(sorted(found.items()))


def _evaluations(found: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in found.items() if key.startswith("eval/")}


def without_places(text: str) -> str:
    """Returns a text without logins and passwords, and of each path the last part."""
    text = _SECRET.sub(lambda found: f"{found[1]} '{HIDDEN}'", text)
    text = _LOGIN.sub(r"\1", text)
    text = _QUOTED.sub(lambda found: found[1] + _last(found[2]) + found[1], text)
    return _PATH.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _plain(text: Any) -> str:
    """Returns a text that no reader of Markdown takes for more than its characters."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&])", r"\\\1", one_line)


def _code(text: str) -> str:
    one_line = " ".join(text.split())
    return f"`{one_line.replace('`', chr(39))}`"


def _block(text: str, language: str = "") -> str:
    """Returns a code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}\n"
