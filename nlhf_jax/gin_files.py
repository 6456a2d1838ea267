# SPDX-License-Identifier: Apache-2.0
"""Gin files as plain statements, each with the file and line it stands on."""

import ast
import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Sequence

from nlhf_jax.checks import UserError, nearest

_PACKAGE = pathlib.Path(__file__).resolve().parent
# A clone keeps configs/ beside the package, a wheel keeps a copy inside it.
REPOSITORY = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent

_STATEMENT = re.compile(r"^([A-Za-z_][\w./]*)\s*=\s*(.*)$")
_INCLUDE = re.compile(r"^include\s+['\"]([^'\"]+)['\"]\s*$")
_IMPORT = re.compile(r"^import\s+([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\s*$")
# A key that no binding can have, since it is a word of the language.
IMPORT = "import"
_PLAIN_TEXT = re.compile(r"[\w./~:+-]+")
# What Python's parser raises for text that is no literal, or is far too deep for it.
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
LONGEST_SHOWN = 120  # characters of a value in an error


@dataclasses.dataclass(frozen=True)
class Statement:
    """One binding or macro: `key = value`, and where it stands.

    `import MODULE` is the statement with the key IMPORT and the module as its value.
    """

    key: str
    value: str
    place: str

    @property
    def shown(self) -> str:
        """The value as an error shows it: on one line, and not all of a long one."""
        value = " ".join(self.value.split())
        return value if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]}..."


def quoted(value: str) -> str:
    """Returns a command line's value as a gin literal: bare words become strings."""
    try:
        ast.literal_eval(value)
    except NO_LITERAL:
        if _PLAIN_TEXT.fullmatch(value):
            return repr(value)
    return value


def read(
    file: str,
    folders: Sequence[pathlib.Path],
    where: str,
    including: Sequence[pathlib.Path] = (),
) -> list[Statement]:
    """Returns the statements of a file and of the files it includes, in order.

    Args:
      file: path of the file, as written.
      folders: where it is looked up besides the current folder.
      where: who names it, for the error.
      including: the files whose includes led here.

    Raises:
      UserError: a file is missing or unreadable, includes itself, or a line is no
        statement.
    """
    path = _find(file, folders, where)
    if path.resolve() in including:
        raise UserError(f"{where}: {file!r} includes itself")
    found: list[Statement] = []
    for number, line in _logical_lines(_lines(path, where)):
        place = f"{path}:{number}"
        if match := _INCLUDE.match(line):
            found += read(match[1], folders, place, (*including, path.resolve()))
        elif match := _IMPORT.match(line):
            found.append(Statement(IMPORT, match[1], place))
        elif match := _STATEMENT.match(line):
            found.append(Statement(match[1], match[2].strip(), place))
        else:
            got = Statement("", line.strip(), place).shown
            raise UserError(
                f"{place}: expected NAME = VALUE, FUNCTION.PARAMETER = VALUE, "
                f"include 'FILE' or import MODULE, got {got!r}"
            )
    return found


def _lines(path: pathlib.Path, where: str) -> list[str]:
    """Returns the lines of a file; UserError where it cannot be read as text."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(
        f"gin file {str(path)!r} (named by {where}) cannot be read: {reason}"
    )


def _find(file: str, folders: Sequence[pathlib.Path], where: str) -> pathlib.Path:
    is_folder = False
    for path in (pathlib.Path(file), *(folder / file for folder in folders)):
        # A name may be too long, or hold a character that no name can.
        with contextlib.suppress(OSError, ValueError):
            if path.is_file():
                return path
            is_folder |= path.is_dir()
    if file and is_folder:
        raise UserError(f"gin file {file!r} (named by {where}) is a folder")
    known = REPOSITORY.glob("configs/**/*.gin")
    names = [path.relative_to(REPOSITORY).as_posix() for path in known]
    raise UserError(
        f"gin file {file!r} (named by {where}) does not exist{nearest(file, names)}"
    )


def _logical_lines(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Returns (line number, text) without comments, continued lines joined.

    A line goes on where a bracket is open or where it ends in a backslash.
    """
    joined: list[tuple[int, str]] = []
    depth, continued = 0, False
    for number, line in enumerate(lines, start=1):
        text, change = _without_comment(line)
        goes_on = depth > 0 or continued
        continued = text.endswith("\\")
        text = text.removesuffix("\\")
        if goes_on:
            start, before = joined.pop()
            joined.append((start, f"{before.rstrip()} {text.strip()}"))
        elif text.strip():
            joined.append((number, text))
        depth = max(0, depth + change)
    return joined


def _without_comment(line: str) -> tuple[str, int]:
    """Returns the line up to its comment, and brackets opened minus closed."""
    quote, depth = "", 0
    escaped = False
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character == "#":
            return line[:index].rstrip(), depth
        else:
            depth += (character in "([{") - (character in ")]}")
    return line.rstrip(), depth
