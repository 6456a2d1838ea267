# SPDX-License-Identifier: Apache-2.0
"""The launcher's own flags: one table, read by the parser, `--help` and the docs."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

from launch import backends
from launch.errors import SubmitError, nearest

SWITCH = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of the launcher.

    Attributes:
      name: as on the command line, without the dashes.
      default: its value where it is not given; its type is the flag's type.
      meaning: one line for `--help` and docs/launching.md.
      required: the backend cannot do without it.
      least: the smallest number allowed.
      names_it: whether `--delete` needs it too.
    """

    name: str
    default: Any
    meaning: str
    required: bool = False
    least: float = 0
    names_it: bool = False

    def read(self, text: str) -> Any:
        """Returns the value of the text after `=`.

        Raises:
          SubmitError: the text is no value of the flag's type or below the least.
        """
        if isinstance(self.default, bool):
            if text.lower() not in SWITCH:
                raise SubmitError(f"--{self.name} must be true or false, got {text!r}")
            return SWITCH[text.lower()]
        if isinstance(self.default, str):
            if not text or not text.isprintable():
                raise SubmitError(
                    f"--{self.name} must be text without control characters, "
                    f"got {text!r}"
                )
            return text
        return self._number(text)

    def _number(self, text: str) -> float | int:
        kind = type(self.default)
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not self.least <= value < math.inf:
            noun = "an integer" if kind is int else "a number"
            raise SubmitError(
                f"--{self.name} must be {noun} of at least {self.least}, got {text!r}"
            )
        return value


COMMON = (
    Flag("name", "", "the job's name; made safe for cloud objects and labels"),
    Flag("dry_run", False, "print the exact commands and run nothing"),
    Flag("log_dir", "runs/launch", "folder of the logs: LOG_DIR/NAME/attempt_K/..."),
    Flag("max_failures", 10, "restarts after failures, in all"),
    Flag("max_preemptions", 1000, "restarts after preemptions, in all"),
    Flag("grace_seconds", 300.0, "how long a job that is asked to stop may save"),
)


def parse(words: list[str]) -> tuple[str, SimpleNamespace | None, list[str]]:
    """Returns (backend, options, words of the job); options None asks for the usage.

    Raises:
      SubmitError: a flag, a value or the job is missing or not known.
    """
    own, job = _split(words)
    given = _read_words(own)
    backend = given.pop("backend", "")
    if not words or "help" in given:
        return backend, None, job
    if not backend:
        known = ", ".join(backends.BACKENDS)
        raise SubmitError(f"--backend is missing: one of {known}")
    table = {flag.name: flag for flag in (*COMMON, *backends.load(backend).FLAGS)}
    for name in given:
        if name not in table:
            known = (*table, "backend", "help")
            raise SubmitError(
                f"{backend} has no flag --{name}{nearest(name, known)}; the job's own "
                "flags stand after --"
            )
    options = {
        flag.name: flag.read(given[flag.name]) if flag.name in given else flag.default
        for flag in table.values()
    }
    missing = [
        f"--{flag.name}"
        for flag in table.values()
        if flag.required and not given.get(flag.name)
        if flag.names_it or not options.get("delete")
    ]
    if options.get("delete") and not options["name"]:
        missing.append("--name, to delete it")
    if missing:
        raise SubmitError(f"--backend {backend} also needs {', '.join(missing)}")
    _check_job(job, options)
    return backend, SimpleNamespace(**options), job


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return list(words), []
    place = words.index("--")
    return list(words[:place]), list(words[place + 1 :])


def _read_words(words: list[str]) -> dict[str, str]:
    """Flag -> text; a flag without `=` takes the next word, or is a switch."""
    given: dict[str, str] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            raise SubmitError(
                f"unexpected word {word!r}: the job stands after --, as in "
                "submit.py --backend local -- train --gin_file=FILE"
            )
        name, has_value, value = word[2:].partition("=")
        if name in given:
            raise SubmitError(f"--{name} is given twice")
        if not has_value:
            follows = bool(words) and not words[0].startswith("--")
            value = words.pop(0) if follows else "true"
        given[name] = value
    return given


def _check_job(job: list[str], options: dict[str, Any]) -> None:
    if not job and not options.get("delete"):
        raise SubmitError(
            "say what to run, after --: quickstart, or another nlhf job and its flags"
        )
    for word in job:
        if not word.isprintable():
            raise SubmitError(
                f"a word of the job must not hold control characters, got {word!r}"
            )


def usage(backend: str = "") -> str:
    """Returns the help of the launcher, or of one backend with its flags."""
    head = "usage: submit.py --backend BACKEND [flags] -- JOB [nlhf flags]\n"
    if not backend:
        lines = [f"  {name:<8}{what}" for name, what in backends.BACKENDS.items()]
        return (
            head
            + "backends (--backend BACKEND --help prints the flags):\n"
            + "\n".join(lines)
        )
    shown = (*backends.load(backend).FLAGS, *COMMON)
    lines = [f"  --{flag.name:<22}{describe(flag)}" for flag in shown]
    return head + f"{backend}: {backends.BACKENDS[backend]}\n" + "\n".join(lines)


def describe(flag: Flag) -> str:
    """Returns a flag's meaning with its default."""
    if flag.required:
        return f"{flag.meaning} (required)"
    if flag.default in ("", False):
        return flag.meaning
    shown = f"{flag.default:g}" if isinstance(flag.default, float) else flag.default
    return f"{flag.meaning} ({shown})"
