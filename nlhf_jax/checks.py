# SPDX-License-Identifier: Apache-2.0
"""One wording for every user error: what was wrong, the value, what is allowed."""

import difflib
import math
import pathlib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake in the user's input; the command line prints it and exits with 2."""


class CheckpointError(RuntimeError):
    """What a run leaves could not be written, or is damaged; a sentence and code 74.

    The code is that of the system's list for errors of input and output.
    """


class RunFailed(RuntimeError):
    """Ends a run that would end the same way again; printed as one sentence.

    Attributes:
      sentence: what is printed; whoever passes the exception on may add to its text.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence)
        self.sentence = sentence


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_choice(name: str, value: str, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`.

    Raises:
      UserError: lists the known names and the nearest one.
    """
    known = sorted(known)
    if value not in known:
        raise UserError(
            f"{name} must be one of {', '.join(known)}; got {value!r}"
            f"{nearest(str(value), known)}"
        )
    return value


def expanded(name: str, path: str | pathlib.Path) -> pathlib.Path:
    """Returns a path whose `~` or `~user` is the home folder.

    Args:
      name: of the flag or setting, for a sentence.
      path: as the user wrote it.

    Raises:
      UserError: there is no such user.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no home folder for {str(path)!r}") from None


def check_local_folder(name: str, folder: str) -> str:
    """Returns `folder` if it is a path of this machine's file systems.

    Raises:
      UserError: it is empty, or the address of a bucket.
    """
    if not folder:
        raise UserError(f"{name} must be a folder to write to, got an empty string")
    if "://" in folder:
        raise UserError(
            f"{name} must be a folder of a file system that every host mounts, got "
            f"{folder!r}; mount the bucket and name the folder"
        )
    return folder


def check_range(
    name: str,
    value: float | int,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> float | int:
    """Returns `value` if it is a number in the interval from `low` to `high`.

    Raises:
      UserError: `NAME must be in [LOW, HIGH], got VALUE`; NaN is never inside.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    above = is_number and (value > low if low_open else value >= low)
    below = is_number and (value < high if high_open else value <= high)
    if not (above and below):
        left = "(" if low_open or low == -math.inf else "["
        right = ")" if high_open or high == math.inf else "]"
        raise UserError(f"{name} must be in {left}{low}, {high}{right}, got {value!r}")
    return value


LARGEST_SEED = 2**31 - 1


def check_integer(name: str, value: int, low: int = 0) -> int:
    """Returns `value` if it is an integer of at least `low`.

    Raises:
      UserError: `NAME must be an integer of at least LOW, got VALUE`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{name} must be an integer of at least {low}, got {value!r}")
    return value


def check_increasing(name: str, values: Sequence[int], below: int) -> Sequence[int]:
    """Returns `values` if they are integers from 1 on that rise and stay below `below`.

    Raises:
      UserError: `NAME must be integers that rise from at least 1 and stay below BELOW,
        got VALUES`.
    """
    edges = (0, *values, below) if isinstance(values, (list, tuple)) else ()
    are_numbers = all(type(value) is int for value in edges)
    if not edges or not are_numbers or sorted(set(edges)) != list(edges):
        raise UserError(
            f"{name} must be integers that rise from at least 1 and stay below "
            f"{below}, got {values!r}"
        )
    return values


LONGEST_NAME = 100  # characters; file systems take 255 bytes


def check_folder_name(what: str, name: str) -> str:
    """Returns `name` if a folder of that name lies in the folder it is made in.

    Raises:
      UserError: it is empty, has a slash, a backslash or a control character in it,
        begins with a dot, or is longer than 100 characters.
    """
    is_plain = isinstance(name, str) and name.isprintable() and not set(name) & {*"/\\"}
    if (
        not is_plain
        or not name.strip(" .")
        or name[0] == "."
        or len(name) > LONGEST_NAME
    ):
        raise UserError(
            f"{what} must be a plain name for a folder, without slashes and a dot at "
            f"its start, got {str(name)[:LONGEST_NAME]!r}"
        )
    return name
