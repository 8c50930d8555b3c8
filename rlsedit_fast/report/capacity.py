"""The chart of a forecast."""

from __future__ import annotations

from pathlib import Path

from rlsedit_fast.editing.capacity.forecast import Forecast
from rlsedit_fast.errors import InputError

_SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Checks that a chart can be drawn, before the work begins.

    Raises:
        InputError: matplotlib is not installed, or the file has another type.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"--plot {path}: expected a file name that ends with {' or '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("the plot requires matplotlib; run `pip install matplotlib`") from error


def plot_forecast(forecast: Forecast, path: Path) -> None:
    """Draws the realized fraction and the drift by number of edits, a line per adherence.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    realized, drift = figure.subplots(1, 2)
    for at, setting in enumerate(forecast.settings):
        edits = [point.edits for point in setting.points]
        color, label = f"C{at}", f"adherence {setting.tradeoff.adherence:g}"
        realized.plot(edits, [point.realized_oldest for point in setting.points], "o-", color=color, label=label)
        realized.plot(edits, [point.realized_newest for point in setting.points], "o:", color=color)
        drift.plot(edits, [point.drift for point in setting.points], "o-", color=color, label=label)
    realized.axhline(forecast.min_realized, color="0.5", linewidth=0.8)
    realized.set(ylabel="realized: first batch (solid), last batch (dotted)", ylim=(0, 1.03))
    drift.axhline(forecast.max_drift, color="0.5", linewidth=0.8)
    drift.set(ylabel="relative change of outputs or weights", ylim=(0, None))
    dimension = max(point.edits / point.rows_per_dimension for point in forecast.settings[0].points)
    for axes in (realized, drift):
        axes.set(xlabel="edits", xscale="log")
        if axes.get_xlim()[1] > dimension:
            axes.axvline(dimension, color="0.5", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
    drift.legend(frameon=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"--plot {path}: cannot write the file ({error.strerror}); choose another path") from error
