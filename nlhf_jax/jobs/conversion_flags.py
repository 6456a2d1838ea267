# SPDX-License-Identifier: Apache-2.0
"""The flags of `nlhf import` and `nlhf export`, those of single formats among them."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from nlhf_jax.checks import UserError, check_integer, check_range
from nlhf_jax.conversion import formats
from nlhf_jax.conversion.tensors import DTYPES

INPUTS_LENGTH, TARGETS_LENGTH = 512, 128
SHARD_GIGABYTES, LARGEST_SHARD = 5.0, 1e9


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message} ({self.prog} --help)")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"nlhf {name}", allow_abbrev=False, description=description)
    parser.add_argument("--to", required=True, help="the folder to make")
    parser.add_argument(
        "--dtype", default="", choices=["", *DTYPES], help="of the result; its own"
    )
    parser.add_argument(
        "--allow_rounding", action="store_true", help="where --dtype loses digits"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare logits with those of others"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="to compare on; several times"
    )
    return parser


def import_options(
    words: Sequence[str],
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns the flags of `nlhf import`, and those that single formats have.

    Raises:
      UserError: an unknown flag, or a value out of range.
    """
    parser = _parser("import", "Makes a model folder of weights in another format.")
    parser.add_argument(
        "--from", dest="source", required=True, help="folder or file of the weights"
    )
    parser.add_argument(
        "--format", default="", choices=["", *formats.FORMATS], help="if not recognised"
    )
    parser.add_argument(
        "--vocabulary", default="", help="SentencePiece model, tokenizer.json, or byte"
    )
    for flag, default in (
        ("inputs_length", INPUTS_LENGTH),
        ("targets_length", TARGETS_LENGTH),
    ):
        parser.add_argument(
            f"--{flag}", type=int, default=default, help=f"tokens; default {default}"
        )
    options, own = _parse(parser, words, "open_flags")
    check_integer("inputs_length", options.inputs_length, 1)
    check_integer("targets_length", options.targets_length, 1)
    return options, own


def export_options(
    words: Sequence[str],
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns the flags of `nlhf export`, and those that single formats have.

    Raises:
      UserError: an unknown flag, or a value out of range.
    """
    parser = _parser("export", "Writes a model folder's weights in another format.")
    parser.add_argument(
        "--checkpoint", required=True, help="model folder, or one step's in it"
    )
    parser.add_argument("--format", required=True, choices=list(formats.FORMATS))
    parser.add_argument(
        "--shard_gigabytes", type=float, default=SHARD_GIGABYTES, help="largest file"
    )
    options, own = _parse(parser, words, "write_flags")
    size = options.shard_gigabytes
    check_range("shard_gigabytes", size, 0.0, LARGEST_SHARD, low_open=True)
    return options, own


def _parse(
    parser: argparse.ArgumentParser, words: Sequence[str], kind: str
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns the common flags, and by name those of formats that were given."""
    flags: dict[str, str] = {}
    for name in formats.FORMATS:
        for flag, text in getattr(formats.load(name), kind).items():
            before = f"{flags[flag]}; " if flag in flags else ""
            flags[flag] = f"{before}{name}: {text}"
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", default=None, help=text)
    options = parser.parse_args(list(words))
    if options.prompt and not options.check:
        raise UserError("--prompt is read by --check, which is not given")
    own = {flag: getattr(options, flag) for flag in flags}
    return options, {flag: value for flag, value in own.items() if value is not None}


def check_flags(name: str, given: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Checks that a format has the flags that are given.

    Raises:
      UserError: names the first that it has not.
    """
    for flag in given:
        if flag not in known:
            has = ", ".join(f"--{one}" for one in known) or "none"
            raise UserError(
                f"format {name} has no flag --{flag}; of its own it has {has}"
            )
