# SPDX-License-Identifier: Apache-2.0
"""Tables of wins between named players, from CSV or JSON files.

A CSV file has the players' names in its first row and first column; the cell of row A
and column B is P(A beats B) in [0, 1], or `wins/total`, or, read as wins, how often A
beat B. A JSON file has `names` and `preference` or `wins`, lists of rows; null is a
missing cell. An empty cell, "-" or "NA" is missing.
"""

import csv
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.games.cycles import bradley_terry_preference, fit_bradley_terry
from nlhf_jax.games.matrices import Matrix, check_preference_matrix

MISSING = ("", "-", "na", "n/a", "null")
# Tables are published with six decimals or so; both halves are rounded.
ROUNDING = 2e-6
LONGEST_NAME = 200  # characters of a player's name
LARGEST_LIST = 3  # missing cells that an error names


class WinTable(NamedTuple):
    """Named players and P[i, j] = P(player i beats player j)."""

    names: tuple[str, ...]
    preference_NN: Matrix


def load_table(
    path: str | pathlib.Path,
    *,
    cells: str = "preference",
    totals: str | pathlib.Path = "",
    fill: str = "",
) -> WinTable:
    """Returns the table in a CSV or JSON file.

    A cell whose mirror image is there follows from it. Halves that are rounded to
    2e-6 or closer are made antisymmetric.

    Args:
      path: the file; `.json` is JSON, anything else CSV.
      cells: "preference", numbers in [0, 1] or `wins/total`; "wins", counts, with ties
        as half a win for both.
      totals: a second table of the same form with the number of games of each pair;
        with it the cells are wins.
      fill: what a pair that never met gets: "" refuses it, "half" is a tie,
        "bradley_terry" is what scores fitted to the other pairs say.

    Raises:
      UserError: the file is missing or malformed, a name is missing or stands twice, a
        cell is no number or out of range, halves contradict each other, or a pair never
        met and `fill` is "".
    """
    check_choice("cells", cells, ("preference", "wins"))
    if fill:
        check_choice("fill", fill, FILLS)
    names, value_NN, is_wins = _read(path)
    if totals:
        other_names, total_NN, _ = _read(totals)
        if other_names != names:
            raise UserError(
                f"{totals} must name the players of {path} in the same order, got "
                f"{', '.join(other_names)}"
            )
        value_NN = _share(path, names, value_NN, total_NN)
    elif is_wins or cells == "wins":
        value_NN = _share(path, names, value_NN, value_NN + value_NN.T)
    if cells == "preference" and not (totals or is_wins):
        _check_diagonal(path, names, value_NN)
    np.fill_diagonal(value_NN, 0.5)
    _check_cells(path, names, value_NN)
    preference_NN = _mirrored(path, names, value_NN)
    missing = np.argwhere(np.triu(np.isnan(preference_NN), 1))
    if len(missing) and not fill:
        shown = [f"{names[i]} against {names[j]}" for i, j in missing[:LARGEST_LIST]]
        more = len(missing) - len(shown)
        raise UserError(
            f"{path} has no result for {', '.join(shown)}"
            + (f" and {more} more" if more else "")
            + f": choose what they get with fill, one of {', '.join(FILLS)}"
        )
    if len(missing):
        preference_NN = FILLS[fill](preference_NN)
    return WinTable(names, check_preference_matrix(preference_NN))


def _check_diagonal(path, names, value_NN: np.ndarray) -> None:
    """Raises a UserError where a player's own cell says neither nothing nor 1/2."""
    own_N = np.diagonal(value_NN)
    for name, value in zip(names, own_N, strict=True):
        if not (np.isnan(value) or value == 0.5):
            raise UserError(
                f"{path}: P({name} beats {name}) must be 0.5 or empty, got {value:g}"
            )


def _half(preference_NN: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(preference_NN), 0.5, preference_NN)


def _by_scores(preference_NN: np.ndarray) -> np.ndarray:
    """Fills with a Bradley-Terry fit of the pairs that met; players apart are even."""
    has_met_NN = ~np.isnan(preference_NN)
    scores_BN = fit_bradley_terry(
        _half(preference_NN)[None], weight_NN=has_met_NN.astype(float)
    )
    guess_NN = bradley_terry_preference(scores_BN)[0]
    return np.where(has_met_NN, preference_NN, guess_NN)


FILLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "half": _half,
    "bradley_terry": _by_scores,
}


def _read(text_path: str | pathlib.Path) -> tuple[tuple[str, ...], np.ndarray, bool]:
    """Returns names, cells (NaN where missing), and whether they are called wins."""
    try:
        path = pathlib.Path(text_path).expanduser()
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (OSError, RuntimeError, ValueError):
        raise UserError(f"there is no table {str(text_path)!r}") from None
    is_json = path.suffix.lower() == ".json"
    names, rows, is_wins = _json(path, text) if is_json else _csv(path, text)
    value_NN = np.full((len(names),) * 2, np.nan)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            value_NN[i, j] = _number(path, names[i], names[j], cell)
    return names, value_NN, is_wins


def _check_names(path: pathlib.Path, names: Sequence[str]) -> None:
    """Raises a UserError for a player without a name of their own."""
    seen = set()
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{path} has no name for player {number}")
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(
                f"{path}: the name of player {number} must be printable and of at most "
                f"{LONGEST_NAME} characters, got {name!r:.80}"
            )
        if name in seen:
            raise UserError(f"{path} names {name!r} twice")
        seen.add(name)


def _csv(path: pathlib.Path, text: str) -> tuple[tuple[str, ...], list[list], bool]:
    try:
        lines = [
            line for line in csv.reader(text.splitlines()) if any(map(str.strip, line))
        ]
    except csv.Error as error:
        raise UserError(f"{path} is no CSV table: {error}") from None
    if len(lines) < 2:
        raise UserError(
            f"{path} must have a row of names and a row for each, got {len(lines)} rows"
        )
    head, body = [cell.strip() for cell in lines[0]], lines[1:]
    names = tuple(head[1:])
    _check_names(path, names)
    if len(body) != len(names):
        raise UserError(
            f"{path} must be square: {len(names)} names in the first row, "
            f"{len(body)} rows below it"
        )
    rows = []
    for name, line in zip(names, body, strict=True):
        if line[0].strip() != name:
            raise UserError(
                f"{path}: the first column must repeat the first row's names in order, "
                f"got {line[0].strip()!r:.80} for {name!r}"
            )
        if len(line) != len(names) + 1:
            raise UserError(
                f"{path}: row {name!r} must have {len(names)} cells, got "
                f"{len(line) - 1}"
            )
        rows.append(line[1:])
    return names, rows, False


def _json(path: pathlib.Path, text: str) -> tuple[tuple[str, ...], list[list], bool]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is no table: {error}") from None
    is_object = isinstance(found, dict)
    kinds = [kind for kind in ("preference", "wins") if is_object and kind in found]
    if len(kinds) != 1 or "names" not in found:
        raise UserError(
            f"{path} must be an object with `names` and one of `preference` and `wins`"
        )
    names, rows = found["names"], found[kinds[0]]
    if not _is_list_of(names, str) or not names:
        raise UserError(f"{path}: names must be a list of texts, got {names!r:.60}")
    _check_names(path, names)
    size = len(names)
    if not _is_list_of(rows, list) or [len(row) for row in rows] != [size] * size:
        raise UserError(f"{path}: {kinds[0]} must be {size} rows of as many cells")
    return tuple(names), rows, kinds[0] == "wins"


def _is_list_of(value, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _number(path, row: str, column: str, cell) -> float:
    """Returns a cell's number, NaN where it is missing; `3/4` is three of four."""
    if cell is None:
        return np.nan
    text = str(cell).strip()
    if text.lower() in MISSING:
        return np.nan
    try:
        above, is_share, below = text.partition("/")
        if is_share and float(below) == 0 == float(above):
            return np.nan  # they never met
        value = float(above) / float(below) if is_share else float(text)
        if is_share and float(below) < 0:
            value = np.nan
    except (ValueError, ZeroDivisionError):
        value = np.nan
    if not np.isfinite(value):
        raise UserError(
            f"{path}: {row} against {column} must be a number, got {text!r:.80}"
        )
    return value


def _share(path, names: Sequence[str], wins_NN, total_NN) -> np.ndarray:
    """Returns wins / total; a pair that never met is missing."""
    bad = np.argwhere(~((wins_NN >= 0) & (total_NN >= wins_NN)) & ~np.isnan(wins_NN))
    bad = [(i, j) for i, j in bad if i != j and not np.isnan(total_NN[i, j])]
    if bad:
        i, j = bad[0]
        raise UserError(
            f"{path}: wins of {names[i]} against {names[j]} must be at least 0 and at "
            f"most the number of games, got {wins_NN[i, j]:g} of {total_NN[i, j]:g}"
        )
    met_NN = total_NN > 0
    return np.where(met_NN, wins_NN / np.where(met_NN, total_NN, 1), np.nan)


def _check_cells(path, names: Sequence[str], value_NN: np.ndarray) -> None:
    bad = np.argwhere((value_NN < 0) | (value_NN > 1))
    if len(bad):
        i, j = bad[0]
        raise UserError(
            f"{path}: P({names[i]} beats {names[j]}) must be in [0, 1], got "
            f"{value_NN[i, j]:g} (counts of wins are read with cells=wins)"
        )


def _mirrored(path, names: Sequence[str], value_NN: np.ndarray) -> np.ndarray:
    """Returns P with each half filled from the other, antisymmetric exactly."""
    value_NN = np.where(np.isnan(value_NN), 1 - value_NN.T, value_NN)
    gap_NN = np.abs(value_NN + value_NN.T - 1)
    worst = np.nanmax(gap_NN)
    if worst > ROUNDING:
        i, j = np.argwhere(gap_NN == worst)[0]
        raise UserError(
            f"{path}: P({names[i]} beats {names[j]}) and P({names[j]} beats "
            f"{names[i]}) "
            f"must sum to 1, got {value_NN[i, j]:g} + {value_NN[j, i]:g}"
        )
    margin_NN = (value_NN - value_NN.T) / 2
    return 0.5 + margin_NN
