# SPDX-License-Identifier: Apache-2.0
"""A tournament beside the paper's own two tables.

A cell is the preference of the column's policy over the row's, as the paper prints it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError
from nlhf_jax.games import published

# What a tournament calls its judges -> the paper's table of the same role.
JUDGES = {
    "population": (
        "Table 1: another judge (here the raters, on held-out prompts)",
        published.munos_palm,
    ),
    "preference_model": (
        "Table 2: the preference model of training",
        published.munos_own,
    ),
}


def comparison(win_rates: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns ours and the paper's win rates, and how far they agree, by judge.

    Args:
      win_rates: judge -> {"names", "mean", "low", "high"}, the row preferred to the
        column, as `tournament.json` has them.

    Returns:
      Judge -> {"names", "ours", "low", "high", "paper" (all column over row),
      "rank_correlation" of the mean win rates (Spearman), "decided": pairs whose
      interval excludes one half, "same_side": those where the paper's mean is on the
      same side}.

    Raises:
      UserError: fewer than three of the paper's policies took part.
    """
    return {judge: _compare(judge, table) for judge, table in win_rates.items()}


def _compare(judge: str, table: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in published.POLICIES if name in table["names"]]
    if len(names) < 3:
        raise UserError(
            "at least three policies must be of the paper's "
            f"{', '.join(published.POLICIES)}; got {', '.join(table['names'])}"
        )
    at = [table["names"].index(name) for name in names]
    ours, low, high = (
        np.array(table[k])[np.ix_(at, at)] for k in ("mean", "low", "high")
    )
    theirs = JUDGES[judge][1]()
    place = [published.POLICIES.index(name) for name in names]
    theirs = theirs[np.ix_(place, place)]
    above = np.triu_indices(len(names), 1)
    decided = ((low > 0.5) | (high < 0.5))[above]
    same = (np.sign(ours - 0.5) == np.sign(theirs - 0.5))[above]
    return {
        "names": names,
        # Column over row.
        "ours": ours.T.tolist(),
        "low": low.T.tolist(),
        "high": high.T.tolist(),
        "paper": theirs.T.tolist(),
        "rank_correlation": rank_correlation(_mean_rates(ours), _mean_rates(theirs)),
        "decided": int(decided.sum()),
        "same_side": int((decided & same).sum()),
    }


def _mean_rates(mean_NN: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N"]:
    return (mean_NN.sum(axis=1) - 0.5) / (len(mean_NN) - 1)


def rank_correlation(
    first_N: Float[np.ndarray, "N"], second_N: Float[np.ndarray, "N"]
) -> float:
    """Returns Spearman's correlation: Pearson's of the ranks, ties at their mean.

    It is in [-1, 1], and 0 where all values of one side are equal.
    """
    ranks = [_ranks(values) for values in (first_N, second_N)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / norm) if norm else 0.0


def _ranks(values_N: np.ndarray) -> np.ndarray:
    below = (values_N[None, :] < values_N[:, None]).sum(axis=1)
    equal = (values_N[None, :] == values_N[:, None]).sum(axis=1)
    return below + (equal - 1) / 2


def markdown(found: Mapping[str, Any]) -> str:
    """Returns `comparison` as text: a table and a sentence by judge."""
    parts = []
    for judge, table in found.items():
        pairs = len(table["names"]) * (len(table["names"]) - 1) // 2
        parts.append(
            f"## {JUDGES[judge][0]}\n\n"
            "Preference of the column over the row: ours ± half its 95 % interval, in "
            "brackets the paper's.\n\n"
            f"{_grid(table)}\n\n"
            f"Rank correlation of the mean win rates with the paper's: "
            f"{table['rank_correlation']:.2f}. Of {pairs} pairs our intervals decide "
            f"{table['decided']}; in {table['same_side']} of these the paper has the "
            "same winner."
        )
    return "\n\n".join(parts) + "\n"


def _grid(table: Mapping[str, Any]) -> str:
    names = table["names"]
    rows = [["row \\ column", *names], ["---"] * (len(names) + 1)]
    for i, name in enumerate(names):
        rows.append([name, *(_cell(table, i, j) for j in range(len(names)))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(table: Mapping[str, Any], i: int, j: int) -> str:
    if i == j:
        return "."
    half = (table["high"][i][j] - table["low"][i][j]) / 2
    return f"{table['ours'][i][j]:.2f} ± {half:.2f} ({table['paper'][i][j]:.2f})"


def sweep_table(
    labels: Sequence[str],
    win_rates: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, Any],
    baseline: str,
) -> str:
    """Returns a Markdown table: each value's win rate over the baseline, and its KL."""
    rows = [["value", "held-out judge", "preference model", "KL (nats)"]]
    rows.append(["---"] * 4)
    for label in labels:
        cells = [_over(win_rates[judge], label, baseline) for judge in JUDGES]
        one = figures[label]
        error = one["kl_standard_error"]
        rows.append([label, *cells, f"{one['kl']:.2f} ± {error:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _over(table: Mapping[str, Any], name: str, baseline: str) -> str:
    i, j = table["names"].index(name), table["names"].index(baseline)
    return (
        f"{table['mean'][i][j]:.3f} [{table['low'][i][j]:.3f}, "
        f"{table['high'][i][j]:.3f}]"
    )
