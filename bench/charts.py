"""Charts as inline SVG without scripts or external files, in colors of the light or dark page style."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 14, 50


@dataclass(frozen=True)
class Series:
    """Points `(x, y, standard deviation of y)` of one contender; `color` is a CSS class of the page."""

    name: str
    points: Sequence[tuple[float, float, float]]
    color: str
    dashed: bool = False
    x_deviations: Sequence[float] = field(default_factory=tuple)


def lines(series: Sequence[Series], *, x: str, y: str, log_x: bool = False, least: float | None = None) -> str:
    """Draws one line per contender, labeled at its end."""
    frame = _Frame([p for one in series for p in one.points], log_x=log_x, least=least, margin=_label_width(series))
    parts = [frame.axes(x, y)]
    labels = []
    for one in series:
        path = " ".join(
            f"{'M' if not at else 'L'}{frame.x(px):.1f},{frame.y(py):.1f}" for at, (px, py, _) in enumerate(one.points)
        )
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(f'<path class="line {one.color}" d="{path}"{dash}/>')
        for px, py, deviation in one.points:
            parts.append(frame.bar(px, py, deviation, one.color))
            parts.append(frame.dot(px, py, one, 3))
        px, py, _ = one.points[-1]
        labels.append((frame.y(py), frame.x(px) + 8, one))
    return frame.whole(parts + _apart(labels))


def scatter(series: Sequence[Series], *, x: str, y: str, front: Sequence[tuple[float, float]] = ()) -> str:
    """Draws one point per contender with error bars, and the Pareto front."""
    frame = _Frame([p for one in series for p in one.points], margin=_label_width(series))
    parts = [frame.axes(x, y)]
    if len(front) > 1:
        steps = sorted(front)
        path = f"M{frame.x(steps[0][0]):.1f},{frame.y(steps[0][1]):.1f}"
        for px, py in steps[1:]:
            path += f" L{frame.x(px):.1f},{frame.y(py):.1f}"
        parts.append(f'<path class="front" d="{path}"/>')
    labels = []
    for one in series:
        px, py, deviation = one.points[0]
        parts.append(frame.bar(px, py, deviation, one.color))
        for wide in one.x_deviations:
            if math.isfinite(wide) and wide > 0:
                low, high = frame.x(px - wide), frame.x(px + wide)
                level = frame.y(py)
                parts.append(f'<path class="bar {one.color}" d="M{low:.1f},{level:.1f}H{high:.1f}"/>')
        parts.append(frame.dot(px, py, one, 5))
        labels.append((frame.y(py), frame.x(px) + 9, one))
    return frame.whole(parts + _apart(labels))


class _Frame:
    def __init__(
        self,
        points: Sequence[tuple[float, float, float]],
        *,
        log_x: bool = False,
        least: float | None = None,
        margin: int = 0,
    ) -> None:
        self._log = math.log10 if log_x else float
        self._log_x, self._right = log_x, WIDTH - RIGHT - margin
        xs = [self._log(x) for x, _, _ in points]
        ys = [y for _, y, _ in points]
        self._x0, self._x1 = _padded(min(xs), max(xs), 0.03)
        low, high = _padded(min(ys) if least is None else min(least, *ys), max(ys), 0.06)
        self._y0, self._y1 = low, high

    def x(self, value: float) -> float:
        return LEFT + (self._log(value) - self._x0) / (self._x1 - self._x0) * (self._right - LEFT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self._y0) / (self._y1 - self._y0) * (HEIGHT - BOTTOM - TOP)

    def axes(self, x: str, y: str) -> str:
        parts = []
        for tick in _ticks(self._y0, self._y1):
            level = self.y(tick)
            parts.append(f'<path class="grid" d="M{LEFT},{level:.1f}H{self._right}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
            )
        for tick in _ticks(self._x0, self._x1):
            place = LEFT + (tick - self._x0) / (self._x1 - self._x0) * (self._right - LEFT)
            shown = _short(10**tick) if self._log_x else _short(tick)
            parts.append(
                f'<text class="tick" x="{place:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{shown}</text>'
            )
        middle = (LEFT + self._right) / 2
        parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x)}</text>')
        parts.append(
            f'<text class="name" transform="translate(14,{(HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(y)}</text>"
        )
        return "".join(parts)

    def bar(self, x: float, y: float, deviation: float, color: str) -> str:
        if not (math.isfinite(deviation) and deviation > 0):
            return ""
        return (
            f'<path class="bar {color}" d="M{self.x(x):.1f},{self.y(y - deviation):.1f}V{self.y(y + deviation):.1f}"/>'
        )

    def dot(self, x: float, y: float, one: Series, radius: int) -> str:
        title = html.escape(f"{one.name}: {x:.4g}, {y:.4g}")
        return (
            f'<circle class="dot {one.color}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}">'
            f"<title>{title}</title></circle>"
        )

    def whole(self, parts: Sequence[str]) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _label_width(series: Sequence[Series]) -> int:
    """Returns the space for the longest label, with a margin for larger fonts on phones."""
    return 24 + 9 * max(len(one.name) for one in series)


def _apart(labels: Sequence[tuple[float, float, Series]]) -> list[str]:
    """Places labels beside their points, moved down where they would overlap."""
    placed: list[tuple[float, float]] = []
    parts = []
    for level, place, one in sorted(labels, key=lambda label: label[0]):
        at = level + 4
        while any(abs(at - other) < 13 and abs(place - there) < 90 for other, there in placed):
            at += 2
        placed.append((at, place))
        parts.append(f'<text class="label {one.color}" x="{place:.1f}" y="{at:.1f}">{html.escape(one.name)}</text>')
    return parts


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    margin = (high - low) * share or max(abs(high) * 0.05, 1e-6)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [at * step for at in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    text = f"{value:.4g}"
    return "0" if text == "-0" else text
