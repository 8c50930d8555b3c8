"""Draws the charts of a report with matplotlib."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from report_data import OURS

from rlsedit_fast.baselines import RULES

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#888888")
"""Okabe and Ito's colors for color-blind readers, with gray instead of yellow; the first one is of `OURS` alone."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same data give the same file
    "font.sans-serif": ["DejaVu Sans"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(
    data: pd.DataFrame,
    x: str,
    y: str,
    *,
    front: Collection[str] = (),
    dashed: Collection[str] = (),
    log: str = "",
    from_zero: bool = False,
) -> str:
    """Draws one line per label, or one point where a label has a single row.

    Args:
        data: columns `label`, `x`, `y` and, for error bars, `x_std` and `y_std`.
        x: label of the x axis.
        y: label of the y axis.
        front: labels that the Pareto front connects.
        dashed: labels with dashed lines.
        log: names of the logarithmic axes, such as `x` or `xy`.
        from_zero: whether the y axis starts at 0.

    Returns:
        The chart as the data URI of an SVG image.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=y, **{f"{axis}scale": "log" for axis in log})
        for at, (label, line) in enumerate(data.groupby("label", sort=False)):
            look = _look(str(label), at) | {"linestyle": "--" if label in dashed else "-", "label": label}
            bars = {"xerr": line.get("x_std"), "yerr": line.get("y_std"), "elinewidth": 0.8, "capsize": 2}
            axes.errorbar(line["x"], line["y"], **look, **bars)
        best = data[data["label"].isin(front)].sort_values("x")
        if len(best) > 1:
            axes.plot(best["x"], best["y"], ":", color="0.5", zorder=1, label="Pareto front")
        if from_zero:
            axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(file := io.BytesIO(), format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _look(label: str, at: int) -> dict[str, str]:
    """Returns color and marker: of a rule the same in every chart, of other labels by position."""
    rule, _, variant = label.partition(" ")
    if rule not in RULES:
        return {"color": PALETTE[at], "marker": "os^Dv"[at]}
    cycle, place = divmod(RULES.index(rule) - 1, len(PALETTE) - 1)
    marker = "^vDPX*"[at % 6] if variant else "os"[cycle]  # cycle is -1 for OURS: a square
    return {"color": PALETTE[0 if rule == OURS else 1 + place], "marker": marker}
