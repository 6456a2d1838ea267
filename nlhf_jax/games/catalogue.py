# SPDX-License-Identifier: Apache-2.0
"""Games by name, and how a name or a file becomes a table."""

import pathlib
from collections.abc import Callable

import numpy as np

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.games import matrices, published
from nlhf_jax.games.matrices import Matrix
from nlhf_jax.games.win_tables import WinTable, load_table

FILE_ENDINGS = (".csv", ".json")

NAMED: dict[str, tuple[tuple[str, ...], Callable[[], Matrix]]] = {
    "rock_paper_scissors": (
        ("paper", "rock", "scissors"),
        matrices.rock_paper_scissors,
    ),
    "skew": (("first", "second", "third"), matrices.skew),
    "dice": (
        ("2-4-9", "1-6-8", "3-5-7"),
        lambda: matrices.dice(matrices.INTRANSITIVE_FACES),
    ),
    "three_types": (("y1", "y2", "y3"), matrices.three_types),
    "three_raters": (
        ("y1", "y2", "y3"),
        # Munos et al., 2024, Appendix C.2: scores of three raters, each consistent.
        lambda: matrices.annotators([[2, 1, 3], [4, 6, 5], [9, 8, 7]]),
    ),
    "linear_utility": (
        ("0", "0.3", "0.8"),
        lambda: matrices.linear_utility(np.array([0.0, 0.3, 0.8])),
    ),
    # Munos et al., 2024, Appendix A: rewards 0, log 9, log 2.
    "bradley_terry": (
        ("y1", "y2", "y3"),
        lambda: matrices.bradley_terry(np.log([1.0, 9.0, 2.0])),
    ),
    "munos_palm": (published.POLICIES, published.munos_palm),
    "munos_own": (published.POLICIES, published.munos_own),
}


def find_game(
    name: str, *, cells: str = "preference", totals: str = "", fill: str = ""
) -> WinTable:
    """Returns a named game, or the table in a file that ends in .csv or .json.

    Args:
      name: a key of `NAMED`, or a path.
      cells: as for `load_table`; for files only, as the others.
      totals: a second table with the number of games.
      fill: what pairs that never met get.

    Raises:
      UserError: no such game (with the nearest name), or the file is unusable.
    """
    if name in NAMED:
        for flag, is_given in (
            ("cells", cells != "preference"),
            ("totals", totals),
            ("fill", fill),
        ):
            if is_given:
                raise UserError(f"{flag} is for files; {name!r} is a named game")
        names, make = NAMED[name]
        return WinTable(names, matrices.check_preference_matrix(make()))
    if pathlib.Path(name).suffix.lower() in FILE_ENDINGS:
        return load_table(name, cells=cells, totals=totals, fill=fill)
    raise UserError(
        f"there is no game {name!r}{nearest(name, NAMED)}; a table's file ends in "
        f"{' or '.join(FILE_ENDINGS)}"
    )
