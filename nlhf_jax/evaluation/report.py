# SPDX-License-Identifier: Apache-2.0
"""The report: one self-contained page about a run, for people who did not run it.

The page needs no network and has no scripts; styles and figures are inside it, and it
forbids itself to load anything. Every text of a model, a data set or a configuration is
escaped.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from nlhf_jax.checks import check_choice
from nlhf_jax.evaluation import plots, tournament
from nlhf_jax.evaluation.cyclicity import Cyclicity
from nlhf_jax.evaluation.summaries import SummaryStatistics
from nlhf_jax.evaluation.tournament import WinRates
from nlhf_jax.evaluation.verdict import (
    cyclicity_paragraph,
    digits_of,
    format_interval,
    verdict,
)

TEMPLATE = "report.html.j2"
POPULATION_LABEL = "Held-out population of raters"
LEARNED_LABEL = "Learned preference model"
UNKNOWN = "-"


@dataclasses.dataclass(frozen=True)
class PolicyFigures:
    """What is measured of one policy besides its comparisons.

    Attributes:
      kl: estimate of the sequence-level KL to the reference, nats per response; NaN if
        it was not measured.
      kl_standard_error: of that estimate.
      statistics: length, ROUGE and the like; None if they were not measured.
    """

    kl: float = math.nan
    kl_standard_error: float = math.nan
    statistics: SummaryStatistics | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with what everyone answered.

    Attributes:
      prompt: the document.
      reference: the person-written answer.
      responses: policy -> its answer.
    """

    prompt: str
    reference: str
    responses: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything the page shows; what is empty or None is left out of it.

    Attributes:
      title: heading of the page.
      population: win rates under the held-out population of raters; the verdict is
        computed from them.
      baseline: the policy training started from, one of the tournament's names.
      learned: win rates under the preference model that training used.
      rlhf: policies trained on a scalar reward.
      nash: policies trained to pursue the equilibrium.
      figures: policy -> KL, length, ROUGE.
      stages: stage of the run -> its learning curves (`metrics.read_metrics`).
      cyclicity: how cyclic the population is on held-out candidates.
      raters: criterion -> weight of its group in the population.
      examples: prompts with every policy's answer.
      config: operative configuration, as text.
      versions: package -> version.
    """

    title: str
    population: WinRates
    baseline: str = "SFT"
    learned: WinRates | None = None
    rlhf: tuple[str, ...] = ()
    nash: tuple[str, ...] = ()
    figures: Mapping[str, PolicyFigures] = dataclasses.field(default_factory=dict)
    stages: Mapping[str, plots.Curves] = dataclasses.field(default_factory=dict)
    cyclicity: Cyclicity | None = None
    raters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    config: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in (self.baseline, *self.rlhf, *self.nash):
            check_choice("policy", name, self.population.names)

    @property
    def tournaments(self) -> dict[str, WinRates]:
        """Win rates by judge, the held-out population first."""
        judged = {POPULATION_LABEL: self.population}
        return (
            judged if self.learned is None else judged | {LEARNED_LABEL: self.learned}
        )


def write_report(path: str | os.PathLike, data: ReportData) -> None:
    """Writes the page to `path` and its main figure beside it, as `win_rates.png`."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(data), encoding="utf-8")
    plots.save_png(
        plots.tournament_figure(data.tournaments), path.with_name("win_rates.png")
    )


def render(data: ReportData) -> str:
    """Returns the page as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nlhf_jax.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    columns, rows = policy_table(data)
    return environment.get_template(TEMPLATE).render(
        data=data,
        verdict=verdict(
            data.population,
            baseline=data.baseline,
            rlhf=data.rlhf,
            nash=data.nash,
            learned=data.learned,
        ),
        columns=columns,
        rows=rows,
        judges=[_heat_map(name, rates) for name, rates in data.tournaments.items()],
        confidence=f"{data.population.confidence:.0%}",
        num_prompts=data.population.num_prompts,
        raters=", ".join(f"{name} {w:g}" for name, w in data.raters.items()),
        trade_off=_trade_off(data),
        curves=[
            {"title": title, "image": plots.svg_data_uri(figure)}
            for title, figure in plots.curve_figures(
                data.stages, data.population.names
            ).items()
        ],
        cyclicity=data.cyclicity and cyclicity_paragraph(data.cyclicity),
        example_names=_example_names(data),
    )


def _number(value: float, form: str = ".2f") -> str:
    return UNKNOWN if math.isnan(value) else format(value, form)


def policy_table(data: ReportData) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns column titles, and per policy its name and cells, best first.

    Columns of figures that no policy has are left out.
    """
    means = tournament.mean_win_rates(data.population)
    weights = tournament.nash_average(data.population)
    columns = [
        "Mean win rate",
        f"Over {data.baseline}",
        "Nash weight",
        "KL (nats)",
        "Words",
        "Ended",
        "ROUGE-L",
        "Copied",
        "Distinct",
    ]
    rows = []
    for name in sorted(means, key=means.__getitem__, reverse=True):
        interval = data.population.interval(name, data.baseline)
        over = UNKNOWN if name == data.baseline else format_interval(interval)
        figures = data.figures.get(name, PolicyFigures())
        cells = [f"{means[name]:.2f}", over, f"{weights[name]:.2f}"]
        rows.append({"name": name, "cells": cells + _figure_cells(figures)})
    kept = [
        index
        for index in range(len(columns))
        if any(row["cells"][index] != UNKNOWN for row in rows)
    ]
    for row in rows:
        row["cells"] = [row["cells"][index] for index in kept]
    return [columns[index] for index in kept], rows


def _figure_cells(figures: PolicyFigures) -> list[str]:
    kl = _number(figures.kl)
    if not math.isnan(figures.kl_standard_error):
        kl += f" ± {figures.kl_standard_error:.2f}"
    texts = figures.statistics
    if texts is None:
        return [kl] + [UNKNOWN] * 5
    return [
        kl,
        _number(texts.words, ".1f"),
        _number(texts.ended_share, ".0%"),
        _number(texts.rougeL, ".3f"),
        _number(texts.copied_share, ".0%"),
        f"{texts.num_distinct}/{texts.num_summaries}",
    ]


def _heat_map(judge: str, rates: WinRates) -> dict[str, Any]:
    """Returns the cells of a judge's matrix; None on the diagonal."""
    size = range(len(rates.names))
    rows = [
        {
            "name": rates.names[i],
            "cells": [None if i == j else _cell(rates, i, j) for j in size],
        }
        for i in size
    ]
    return {"name": judge, "names": rates.names, "rows": rows}


def _cell(rates: WinRates, i: int, j: int) -> dict[str, Any]:
    interval = rates.interval(rates.names[i], rates.names[j])
    mean, low, high = digits_of(interval)
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "background": plots.win_rate_colour(interval.mean),
        "decided": interval.low > 0.5 or interval.high < 0.5,
    }


def _trade_off(data: ReportData) -> str:
    divergences = {
        name: (figures.kl, figures.kl_standard_error)
        for name, figures in data.figures.items()
        if not math.isnan(figures.kl)
    }
    if not divergences:
        return ""
    figure = plots.trade_off_figure(data.tournaments, data.baseline, divergences)
    return plots.svg_data_uri(figure)


def _example_names(data: ReportData) -> list[str]:
    """Returns the policies that answered, in the tournament's order, others after."""
    answered = {name for example in data.examples for name in example.responses}
    known = [name for name in data.population.names if name in answered]
    return known + sorted(answered - set(known))
