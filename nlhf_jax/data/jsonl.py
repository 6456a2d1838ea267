# SPDX-License-Identifier: Apache-2.0
"""The user's own data: JSON lines, checked as a whole before anything reads them.

    {"prompt": "...", "target": "..."}                                     supervised
    {"prompt": "...", "response_a": "...", "response_b": "...",
     "preference": 0.8}                                                    comparisons

`preference` is P(response_a preferred to response_b) in [0, 1]; a tie is 0.5. A file
whose name ends in .gz is gzipped. Further fields are kept; one of them can name the
group (topic, author, ...) that is held out as a whole. An `id` stands once in a file.
"""

import difflib
import functools
import gzip
import hashlib
import io
import json
import os
import pathlib
import sys
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nlhf_jax.checks import UserError, expanded
from nlhf_jax.settings import DataSettings

Row = dict[str, Any]
PROMPT_FIELDS = ("prompt", "target")
COMPARISON_FIELDS = ("prompt", "response_a", "response_b", "preference")
ID_FIELD = "id"
# A longer line is no text of a data set; nothing longer is ever held in memory.
LONGEST_LINE = 64 * 2**20  # bytes

_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    type(None): "null",
}


# ------------------------------------------------------------------------- checking


def check_row(
    row: Any, fields: Sequence[str], where: str, group_field: str = ""
) -> Row:
    """Returns the row if it has the fields with values of the right kind.

    Args:
      row: what a line of JSON gave.
      fields: PROMPT_FIELDS or COMPARISON_FIELDS.
      where: file and line, the beginning of the error's sentence.
      group_field: a further field that must be there; "" for none.

    Raises:
      UserError: one sentence, `WHERE: what is wrong`.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object, got {_JSON_TYPES[type(row)]}")
    for field in (*fields, *([group_field] if group_field else [])):
        if field not in row:
            others = [key for key in row if key not in fields]
            near = _near(field, others, row)
            raise UserError(f"{where}: field {field!r} is missing{near}")
    for field in fields:
        check = _check_preference if field == "preference" else _check_text
        check(row[field], f"{where}: {field!r}")
    if group_field and not isinstance(row[group_field], (str, int)):
        kind = _JSON_TYPES[type(row[group_field])]
        raise UserError(f"{where}: {group_field!r} must be text or integer, got {kind}")
    return row


def _near(field: str, others: Sequence[str], row: Row) -> str:
    close = difflib.get_close_matches(field, others, n=1, cutoff=0.5)
    if close:
        return f" (found {close[0]!r}; did you mean {field!r}?)"
    return f", found {', '.join(repr(key) for key in row) or 'none'}"


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, got {_JSON_TYPES[type(value)]}")
    if _is_blank(value):
        raise UserError(f"{what} must not be empty or blank")
    if "\0" in value:
        raise UserError(f"{what} holds a NUL at character {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half a surrogate pair at character {error.start}"
        ) from None


def _is_blank(text: str) -> bool:
    """Returns whether nothing in a text can be seen."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def _check_preference(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{what} must be a number, got {_JSON_TYPES[type(value)]}")
    if not 0 <= value <= 1:
        raise UserError(f"{what} must be in [0, 1], got {value}")


def check_rows(
    rows: Iterable[Any],
    fields: Sequence[str],
    source: str = "rows",
    group_field: str = "",
) -> list[Row]:
    """Returns rows made in memory, checked as `check_row` checks a line.

    Raises:
      UserError: names `source` and the row (counted from 1), or there are none.
    """
    checked = [
        check_row(row, fields, f"{source} row {number}", group_field)
        for number, row in enumerate(rows, 1)
    ]
    if not checked:
        raise UserError(f"{source} must hold at least one example, got none")
    return checked


# -------------------------------------------------------------------------- reading


def read_rows(path: str, fields: Sequence[str], group_field: str = "") -> list[Row]:
    """Returns all rows of a file of JSON lines; blank lines are passed over.

    Raises:
      UserError: one sentence with the file, the line (counted from 1) and what is
        wrong: no file, not UTF-8, not JSON, or as `check_row`.
    """
    rows, ids = [], {}
    for value, where in parsed_lines(path):
        rows.append(check_row(value, fields, where, group_field))
        if ID_FIELD in value and group_field != ID_FIELD:
            _check_id(value[ID_FIELD], ids, where)
    if not rows:
        raise UserError(f"{path} is empty: it must hold at least one line of JSON")
    return rows


def _check_id(value: Any, seen: dict[str | int, str], where: str) -> None:
    """Raises a UserError for an id that an earlier line has: one was put in twice."""
    if not isinstance(value, (str, int)):
        raise UserError(f"{where}: 'id' must be text or integer")
    if value in seen:
        line = seen[value].rpartition(" ")[2]
        raise UserError(f"{where}: 'id' {value!r:.80} stands in line {line} already")
    seen[value] = where


def parsed_lines(path: str) -> Iterator[tuple[Any, str]]:
    """Yields (value, "FILE line NUMBER") for each line of JSON of a file."""
    for line, where in _lines(path):
        yield _parse(line, where), where


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """Yields (line, "FILE line NUMBER") for the lines that are not blank."""
    offset = 0
    with _opened(path) as stream:
        for number, line in enumerate(_raw_lines(path, stream), 1):
            where = f"{path} line {number}"
            if len(line) > LONGEST_LINE:
                size = f"{LONGEST_LINE >> 20} MiB"
                raise UserError(f"{where}: must be of at most {size}, is longer")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise UserError(
                    f"{where}: is not UTF-8 at byte {at} of the file"
                ) from None
            offset += len(line)
            if text.strip():
                yield text, where


def _opened(path: str) -> io.BufferedIOBase:
    try:
        file = pathlib.Path(path).expanduser()
        return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} can't be read: {reason}") from None


def _raw_lines(path: str, stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Yields the lines as they stand, one at a time: a file may be larger than memory.

    Of a line that is too long the beginning.
    """
    while True:
        try:
            line = stream.readline(LONGEST_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} can't be read: {reason}") from None
        if not line:
            return
        yield line


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_as_object)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: is not JSON: {error.msg} at column {error.colno}"
        ) from None
    except KeyError as error:
        name = str(error.args[0])
        raise UserError(f"{where}: field {name!r:.80} stands twice") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: is not JSON: {error}") from None


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; all lines share its names. KeyError where one repeats."""
    found = {sys.intern(name): value for name, value in pairs}
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def write_rows(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, gzipped when the name ends in .gz, all or nothing."""
    target = expanded("path", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows]
    data = "".join(lines).encode("utf-8")
    if target.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(target)


# ------------------------------------------------------------------------- splitting


def split_by_group(
    rows: Sequence[Row], group_field: str, evaluation_share: float
) -> dict[str, list[Row]]:
    """Holds whole groups out: no group stands in both splits.

    Groups are taken in the order of the sha256 of their names; round(share * groups)
    of them, at least one, are held out, so the same groups always give the same split.

    Raises:
      UserError: there are fewer than two groups.
    """
    groups = sorted(
        {str(row[group_field]) for row in rows},
        key=lambda group: hashlib.sha256(group.encode()).hexdigest(),
    )
    if len(groups) < 2:
        raise UserError(
            f"group_field {group_field!r} must have at least two values to hold one "
            f"out, got {len(groups)}"
        )
    number = min(max(1, round(evaluation_share * len(groups))), len(groups) - 1)
    held_out = set(groups[:number])
    return {
        "train": [row for row in rows if str(row[group_field]) not in held_out],
        "evaluation": [row for row in rows if str(row[group_field]) in held_out],
    }


def read_splits(settings: DataSettings, fields: Sequence[str]) -> dict[str, list[Row]]:
    """Returns the rows of the splits that the settings give files or groups for.

    Raises:
      UserError: neither train_file nor evaluation_file is set, or a file is wrong.
    """
    if not settings.train_file and not settings.evaluation_file:
        raise UserError("task 'jsonl' reads train_file and evaluation_file: set one")
    splits = {}
    if settings.train_file:
        held_out = settings.group_field if not settings.evaluation_file else ""
        rows = read_rows(settings.train_file, fields, held_out)
        splits["train"] = rows
        if held_out:
            splits = split_by_group(rows, held_out, settings.evaluation_share)
    if settings.evaluation_file:
        splits["evaluation"] = read_rows(settings.evaluation_file, fields)
    _warn_of_overlap(settings, splits)
    return splits


def _warn_of_overlap(
    settings: DataSettings, splits: Mapping[str, Sequence[Row]]
) -> None:
    """Says how many held-out rows ask what training has seen."""
    if len(splits) < 2:
        return
    seen = {row["prompt"] for row in splits["train"]}
    count = sum(row["prompt"] in seen for row in splits["evaluation"])
    if count:
        place = settings.evaluation_file or settings.train_file
        _warn(
            f"{place}: {count} of {len(splits['evaluation'])} rows held out have a "
            "prompt that training reads too"
        )


@functools.cache
def _warn(sentence: str) -> None:
    """Prints a sentence; a job reads its files more than once, and says it once."""
    print(f"nlhf: {sentence}", file=sys.stderr, flush=True)
