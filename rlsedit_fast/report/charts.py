"""Charts of a change report as inline SVG, in the colors of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlsedit_fast.editing.status import LayerStatus

if TYPE_CHECKING:
    from rlsedit_fast.report.collect import Age

_INK, _MUTED, _LINE, _ACCENT, _WARN = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _ACCENT: "--accent", _WARN: "--bad"}
"""Colors that stand for the variables of the page, which differ in dark mode."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same data give the same file
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.labelsize": 9,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "savefig.transparent": True,
}
_SIZE = (4.7, 2.5)  # inches


def retention_chart(ages: Sequence[Age]) -> str:
    """Draws the share of stated edits by age, oldest first; empty for fewer than two groups."""
    if len(ages) < 2:
        return ""
    shares = [age.stated / age.edits for age in ages]

    def draw(axes: Any) -> None:
        places = range(len(ages))
        axes.bar(places, shares, width=0.72, color=_ACCENT)
        step = max(1, math.ceil(len(ages) / 6))
        labels = [f"{age.first}–{age.last}" if age.first < age.last else str(age.first) for age in ages]
        axes.set_xticks(list(places)[::step], labels[::step])
        axes.set(xlabel="edits, oldest first", ylabel="share stated", ylim=(0, 1.05))
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])

    return _svg(draw)


def change_chart(changes: Sequence[tuple[int, float]], budget: float, edits_left: int | None) -> str:
    """Draws the relative change over the number of active edits, with the budget; empty for fewer than two values."""
    if len({edits for edits, _ in changes}) < 2:
        return ""

    def draw(axes: Any) -> None:
        edits, reached = zip(*changes, strict=True)
        axes.plot(edits, reached, color=_ACCENT, linewidth=1.8)
        axes.plot(edits[-1:], reached[-1:], "o", color=_ACCENT, markersize=4)
        axes.axhline(budget, color=_WARN, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(1, budget, f"budget {budget:g}", color=_WARN, ha="right", va="bottom", transform=_right_of(axes))
        if edits_left:
            axes.plot([edits[-1], edits[-1] + edits_left], [reached[-1], budget], ":", color=_MUTED, linewidth=1.2)
        top = max(budget, *reached) * 1.15
        axes.set(xlabel="active edits", ylabel="relative change", ylim=(0, top), xlim=(0, None))

    return _svg(draw)


def layer_chart(layers: Sequence[LayerStatus]) -> str:
    """Draws the measured relative weight change of each layer and its bound; empty if nothing was measured."""
    shown = [layer for layer in layers if layer.weight is not None and math.isfinite(layer.weight_bound)]
    if not shown:
        return ""

    def draw(axes: Any) -> None:
        places = list(range(len(shown)))
        axes.bar(places, [layer.weight or 0 for layer in shown], width=0.5, color=_ACCENT, label="measured")
        for at, layer in zip(places, shown, strict=True):
            axes.hlines(layer.weight_bound, at - 0.38, at + 0.38, color=_WARN, linewidth=1.8)
        axes.plot([], [], color=_WARN, linewidth=1.8, label="bound")
        axes.set_xticks(places, [f"layer {layer.layer}" for layer in shown])
        axes.set(xlim=(-0.9, len(shown) - 0.1), ylabel="‖W − W₀‖ / ‖W₀‖")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=2)

    return _svg(draw)


def _right_of(axes: Any) -> Any:
    """Returns a transform with x relative to the axes and y in data."""
    return axes.get_yaxis_transform()


def _svg(draw: Any) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.subplots())
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file := io.StringIO(), format="svg", metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids repeat between charts, and nothing refers to those of groups
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
