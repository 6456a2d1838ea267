# SPDX-License-Identifier: Apache-2.0
"""Figures of a tournament and of training, as PNG files or inside a page.

Figures are made without pyplot, so there is no global state and no display. Texts are
shown as they are: a dollar sign in a policy's name starts no formula.
"""

import base64
import dataclasses
import io
import os
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nlhf_jax.evaluation.tournament import WinRates

Curves = Mapping[str, tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]]

# Okabe and Ito's palette (2008): told apart with any colour vision; yellow left out.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LOSS_COLOUR = (0.85, 0.47, 0.20)
WIN_COLOUR = (0.16, 0.44, 0.70)
INK = "#1d2733"
GREY = "#8a94a0"

STYLE = {
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "nlhf_jax",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One learning-curve panel: a quantity in training, on held-out data, or both.

    Attributes:
      title: shown above.
      unit: shown beside the vertical axis.
      train: metric of the training batches, or "".
      held_out: metric on held-out data, or "".
    """

    title: str
    unit: str
    train: str
    held_out: str


PANELS = (
    Panel("Fine-tuning loss", "nats/token", "loss/token_nll", "eval/loss_token_nll"),
    Panel("ROUGE-L while fine-tuning", "F-measure", "", "eval/rouge_l"),
    Panel(
        "Preference model: accuracy",
        "share of comparisons",
        "preference/accuracy",
        "eval/preference_accuracy",
    ),
    Panel(
        "Reward model: accuracy",
        "share of comparisons",
        "reward/accuracy",
        "eval/reward_accuracy",
    ),
    Panel(
        "Win rate over the reference",
        "learned preference",
        "",
        "eval/win_rate_reference",
    ),
    Panel("KL to the reference", "nats per response", "policy/kl", "eval/kl"),
    Panel("Response length", "tokens", "response/length", "eval/length"),
)


def win_rate_colour(rate: float) -> str:
    """Returns `#rrggbb`: white at 1/2, blue towards 1, orange towards 0."""
    target = np.array(WIN_COLOUR if rate >= 0.5 else LOSS_COLOUR)
    # The square root separates 0.5 from 0.6, where most results lie.
    # The cap keeps dark text readable on every cell.
    weight = 0.72 * float(np.sqrt(min(1.0, abs(rate - 0.5) / 0.5)))
    return matplotlib.colors.to_hex(1 + weight * (target - 1))


def tournament_figure(tournaments: Mapping[str, WinRates]) -> Figure:
    """Returns one heat map of win rates per judge, with intervals in the cells."""
    with matplotlib.rc_context(STYLE):
        size = max(len(rates.names) for rates in tournaments.values())
        width = 1.6 + 0.95 * size
        figure = Figure(
            figsize=(width * len(tournaments), 1.3 + 0.6 * size), layout="constrained"
        )
        axes = np.atleast_1d(figure.subplots(1, len(tournaments)))
        for axis, (judge, rates) in zip(axes, tournaments.items(), strict=True):
            _draw_heat_map(axis, judge, rates)
        return figure


def _draw_heat_map(axis, title: str, rates: WinRates) -> None:
    size = len(rates.names)
    for i in range(size):
        for j in range(size):
            _draw_cell(axis, i, j, rates)
    axis.set(xlim=(0, size), ylim=(size, 0), title=title)
    axis.set_xticks(np.arange(size) + 0.5, rates.names, rotation=25, ha="left")
    axis.set_yticks(np.arange(size) + 0.5, rates.names)
    axis.set_xlabel("... over this policy", color=GREY)
    axis.set_ylabel("Win rate of this policy ...", color=GREY)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _draw_cell(axis, i: int, j: int, rates: WinRates) -> None:
    if i == j:
        return  # a policy ties with itself
    mean, low, high = (
        matrix[i, j] for matrix in (rates.mean_NN, rates.low_NN, rates.high_NN)
    )
    colour = win_rate_colour(float(mean))
    axis.fill_between([j + 0.02, j + 0.98], i + 0.03, i + 0.97, color=colour, lw=0)
    decided = low > 0.5 or high < 0.5
    style = {"ha": "center"}
    weight = "bold" if decided else "normal"
    axis.text(j + 0.5, i + 0.47, f"{mean:.2f}", fontsize=11, weight=weight, **style)
    axis.text(j + 0.5, i + 0.78, f"{low:.2f} to {high:.2f}", fontsize=7, **style)


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Returns one colour per policy, the same in every figure of a page."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def trade_off_figure(
    tournaments: Mapping[str, WinRates],
    baseline: str,
    divergences: Mapping[str, tuple[float, float]],
) -> Figure:
    """Returns win rate over `baseline` against KL to the reference.

    Args:
      tournaments: judge -> win rates; the first judge's points are filled and have
        error bars, the others' are hollow.
      baseline: the policy every other is compared with.
      divergences: policy -> (sequence-level KL in nats, its standard error).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.7), layout="constrained")
        axis = figure.subplots()
        axis.axhline(0.5, color=GREY, lw=0.8, ls="--")
        for index, (judge, rates) in enumerate(tournaments.items()):
            _draw_points(axis, rates, baseline, divergences, filled=index == 0)
            fill = INK if index == 0 else "white"
            axis.plot([], [], "o", color=INK, mfc=fill, ms=5, label=judge)
        axis.set(
            xlabel="KL to the reference (nats per response)",
            ylabel=f"Win rate over {baseline}",
        )
        figure.legend(fontsize=8, frameon=False, loc="outside right upper")
        return figure


def _draw_points(axis, rates, baseline, divergences, *, filled: bool) -> None:
    colours = colours_of(rates.names)
    for index, name in enumerate(rates.names):
        if name not in divergences or not np.isfinite(divergences[name][0]):
            continue
        kl, error = divergences[name]
        mean, low, high = rates.interval(name, baseline)
        style = {
            "fmt": MARKERS[index % len(MARKERS)],
            "color": colours[name],
            "mfc": colours[name] if filled else "white",
            "ms": 7 if filled else 5,
            "lw": 1.2,
        }
        if filled:
            style["label"] = name
            style["xerr"] = 1.96 * error if np.isfinite(error) else 0.0
            # Mean and percentiles can differ in the last digit where all prompts agree.
            style["yerr"] = [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]
        axis.errorbar([kl], [mean], **style)


def curve_figures(
    stages: Mapping[str, Curves], policies: Sequence[str] = ()
) -> dict[str, Figure]:
    """Returns panel title -> figure, one line per stage that measured the quantity.

    Training batches are a thin line, held-out data a line with points. Panels that
    nobody measured are left out. A stage that is named like one of `policies` has that
    policy's colour.
    """
    others = [stage for stage in stages if stage not in policies]
    colours = colours_of([*policies, *others])
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for panel in PANELS:
            shown = {
                stage: curves
                for stage, curves in stages.items()
                if panel.train in curves or panel.held_out in curves
            }
            if shown:
                drawn[panel.title] = _draw_panel(panel, shown, colours)
    return drawn


def _draw_panel(panel: Panel, stages: Mapping[str, Curves], colours) -> Figure:
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axis = figure.subplots()
    for stage, curves in stages.items():
        colour = colours[stage]
        if panel.train in curves:
            held_out_too = panel.held_out in curves
            axis.plot(
                *curves[panel.train],
                color=colour,
                lw=0.8,
                alpha=0.55,
                label=f"{stage}, training batch" if held_out_too else stage,
            )
        if panel.held_out in curves:
            axis.plot(
                *curves[panel.held_out], "o-", color=colour, lw=1.6, ms=3, label=stage
            )
    axis.set(title=panel.title, xlabel="updates", ylabel=panel.unit)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.25)
    return figure


def save_png(figure: Figure, path: str | os.PathLike, *, dpi: int = 160) -> None:
    """Writes the figure as a PNG file."""
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(os.fspath(path), format="png", dpi=dpi)


def svg_data_uri(figure: Figure) -> str:
    """Returns the figure as a `data:` address of an SVG image, the same every time."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"
