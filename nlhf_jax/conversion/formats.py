# SPDX-License-Identifier: Apache-2.0
"""The formats that weights are read from and written in, by name.

A format's module is imported when it is used, since some of them need libraries that
others do not, and holds a `Format` named `FORMAT`.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.conversion.tensors import Weights

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Format:
    """How a format is told from others, read and written.

    Attributes:
      looks_for: what `recognises` wants to find, as a reader would say it.
      recognises: whether a folder or file is of this format; reads as little as it can
        and never raises for what is none.
      open: (folder or file, options) -> its weights, no tensor read. Names in
        `open_flags` are the options it gets, as text. Raises a UserError for what it
        cannot take whole.
      write: (empty folder, weights, options) -> None; None where it is only read.
      open_flags: flags of `nlhf import` that are this format's own -> their help.
      write_flags: flags of `nlhf export`, likewise.
    """

    looks_for: str
    recognises: Callable[[pathlib.Path], bool]
    open: Callable[[pathlib.Path, Options], Weights]
    write: Callable[[pathlib.Path, Weights, Options], None] | None = None
    open_flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    write_flags: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Name -> its module. A source is what the first of them recognises.
FORMATS = {
    "nlhf": "nlhf_jax.jobs.our_weights",
    "peft": "nlhf_jax.jobs.peft_folders",
    "hugging_face": "nlhf_jax.conversion.hugging_face_folders",
    "t5x": "nlhf_jax.conversion.t5x_writer",
    "gguf": "nlhf_jax.conversion.gguf_files",
}


def load(name: str) -> Format:
    """Returns a format by its name.

    Raises:
      UserError: lists the names.
    """
    module = FORMATS[check_choice("format", name, FORMATS)]
    return importlib.import_module(module).FORMAT


def recognised(path: pathlib.Path) -> str:
    """Returns the name of the format that a folder or file is in.

    Raises:
      UserError: there is nothing, or nothing of a format that is known; says what was
        looked for.
    """
    if not path.exists():
        raise UserError(f"there is nothing to import at {str(path)!r}")
    known = {name: load(name) for name in FORMATS}
    for name, found in known.items():
        if found.recognises(path):
            return name
    wanted = "; ".join(f"{name}: {found.looks_for}" for name, found in known.items())
    raise UserError(f"{str(path)!r} is in no format that is known ({wanted})")
