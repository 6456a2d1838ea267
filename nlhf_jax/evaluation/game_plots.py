# SPDX-License-Identifier: Apache-2.0
"""Figures of tabular algorithms: how far from equilibrium, and where on the simplex."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nlhf_jax.evaluation.plots import COLOURS, GREY, INK, STYLE

LINE_STYLES = ("-", "-.", (0, (5, 1)), ":")
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
SMALLEST = 1e-16  # below it a gap is rounding


def convergence_figure(
    gaps: Mapping[str, Float[np.ndarray, "T"]],
    divergences: Mapping[str, Float[np.ndarray, "T"]],
    bounds: Mapping[str, Float[np.ndarray, "T"]],
    *,
    paths: Mapping[str, Float[np.ndarray, "T N"]],
    names: Sequence[str],
    nash_N: Float[np.ndarray, "N"],
) -> Figure:
    """Returns gaps and KL to the equilibrium by step, both axes logarithmic.

    Args:
      gaps: method -> gap after steps 1 to T.
      divergences: method -> KL(equilibrium, policy), nats; empty leaves the panel out.
      bounds: name -> bound on Nash-MD's KL, drawn dashed in that panel.
      paths: method -> policies; with three actions they are drawn on the simplex.
      names: of the actions.
      nash_N: the equilibrium, marked on the simplex.
    """
    has_simplex = len(names) == 3
    num_panels = 1 + bool(divergences) + has_simplex
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * num_panels, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
        _draw_curves(panels.pop(0), "Gap", "win rate", gaps, {})
        if divergences:
            title = "KL(equilibrium, policy)"
            _draw_curves(panels.pop(0), title, "nats", divergences, bounds)
        if has_simplex:
            _draw_simplex(panels.pop(0), paths, names, nash_N)
        figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def _draw_curves(axis, title, unit, curves, bounds) -> None:
    for index, (name, value_T) in enumerate(curves.items()):
        step_T = np.arange(1, len(value_T) + 1)
        colour = COLOURS[index % len(COLOURS)]
        # Curves that lie on each other show through each other's gaps.
        axis.loglog(
            step_T,
            np.maximum(value_T, SMALLEST),
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            color=colour,
            label=name,
        )
    for name, value_T in bounds.items():
        step_T = np.arange(1, len(value_T) + 1)
        axis.loglog(step_T, value_T, "--", color=GREY, linewidth=1)
        axis.annotate(name, (step_T[0], value_T[0]), color=GREY, fontsize=7)
    # The style reads no formulas, in which logarithmic axes would write their powers.
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_title(title)
    axis.set_xlabel("steps")
    axis.set_ylabel(unit)


def _draw_simplex(axis, paths, names, nash_N) -> None:
    outline = CORNERS[[0, 1, 2, 0]]
    axis.plot(*outline.T, color=GREY, linewidth=1)
    for index, path_TN in enumerate(paths.values()):
        points = np.asarray(path_TN) @ CORNERS
        colour = COLOURS[index % len(COLOURS)]
        axis.plot(*points.T, color=colour, linewidth=0.9)
        axis.plot(*points[-1], "o", color=colour, markersize=4)
    axis.plot(*(np.asarray(nash_N) @ CORNERS), "*", color=INK, markersize=11)
    sides = (("right", "top"), ("left", "top"), ("center", "bottom"))
    for name, corner, (ha, va) in zip(names, CORNERS, sides, strict=True):
        axis.annotate(name, corner, ha=ha, va=va)
    axis.set_title("Policies (star: equilibrium)")
    axis.set_aspect("equal")
    axis.axis("off")
