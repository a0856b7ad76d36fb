"""Curves as inline SVG, whose colours follow the page that shows them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

Series = dict[float, float]  # value by step
Interval = tuple[float, float, float]  # low end, value, high end
Point = tuple[str, Interval, Interval]  # name, x, y
# The smoothed training loss averages this many steps on each side, but at most a twentieth of the run.
MAX_SMOOTHING_RADIUS = 10
# Placeholder colours, which are replaced by CSS colours that depend on light or dark mode.
INK, BEFORE, AFTER = "#010203", "#010204", "#010205"
CSS_COLOURS = {INK: "currentColor", BEFORE: "var(--base)", AFTER: "var(--tuned)"}
TITLE_STYLE: dict[str, Any] = {"color": INK, "loc": "left", "fontsize": 10, "fontweight": "bold", "y": 1}
PLOT_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "strop", "font.size": 9.0, "path.simplify": True}


def plot_loss(train: Series, evaluated: Series, width: float, height: float = 3.0) -> Markup | None:
    """Plot losses of training and evaluation as SVG, with the given size in inches; None for less than two values."""
    if len(train) + len(evaluated) < 2:
        return None
    figure, axes = _make_figure(width, height, "Loss")
    if train:
        smoothed = _smooth(train)
        style = {"alpha": 0.45, "linewidth": 0.8} if smoothed else {"linewidth": 1.5}
        marker = "o" if len(train) == 1 else None  # a line needs two values
        axes.plot(*_xy(train), color=BEFORE, label="train, each step", marker=marker, markersize=4.5, **style)
        if smoothed:
            axes.plot(*_xy(smoothed), color=BEFORE, linewidth=1.8, label="train, smoothed")
    if evaluated:
        axes.plot(*_xy(evaluated), color=AFTER, linewidth=1.8, marker="o", markersize=4.5, label="evaluation")
    axes.set_ylim(bottom=min(0, *train.values(), *evaluated.values()))  # the policy loss of RL may be negative
    axes.set_xlabel("step")
    axes.legend(frameon=False, labelcolor=INK, loc="upper right")
    return _to_svg(figure, "Loss by step")


def plot_metric(series: Series, title: str) -> Markup:
    """Plot a small curve as SVG."""
    figure, axes = _make_figure(4.0, 2.1, title)
    axes.plot(*_xy(series), color=BEFORE, linewidth=1.3)
    if min(series.values()) >= 0:
        axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_color(INK)
    return _to_svg(figure, f"{title} by step")


def plot_frontier(points: Sequence[Point], task: str) -> Markup:
    """Plot scores (percent, with intervals) on the task over those on the general set, with an arrow between them."""
    figure, axes = _make_figure(4.2, 2.8, f"{task}, over the general set (%)")
    for (name, x, y), colour in zip(points, (BEFORE, AFTER), strict=True):
        (left, x_value, right), (low, y_value, high) = x, y
        errors = [[x_value - left], [right - x_value]], [[y_value - low], [high - y_value]]
        axes.errorbar(x_value, y_value, errors[1], errors[0], fmt="o", color=colour, linewidth=1.5)
        axes.annotate(name, (x_value, y_value), (5, 5), textcoords="offset points", color=INK)
    ends = [(x[1], y[1]) for _, x, y in points]
    arrow = {"arrowstyle": "->", "color": INK, "alpha": 0.5, "shrinkA": 6, "shrinkB": 6}
    axes.annotate("", ends[1], ends[0], arrowprops=arrow)
    axes.set(xlim=(0, 100), ylim=(-3, 103), xlabel="general set")
    return _to_svg(figure, f"{task} over the general set, before and after")


def _smooth(series: Series) -> Series:
    """Return a centred moving average, empty for a short series. At the ends, the window is smaller and symmetric."""
    values, max_radius = list(series.values()), min(MAX_SMOOTHING_RADIUS, len(series) // 20)
    means: list[float] = []
    if not max_radius:
        return {}
    for i in range(len(values)):
        radius = min(max_radius, i, len(values) - 1 - i)
        window = values[i - radius : i + radius + 1]
        means.append(sum(window) / len(window))
    return dict(zip(series, means, strict=True))


def _xy(series: Series) -> tuple[list[float], list[float]]:
    return list(series), list(series.values())


def _make_figure(width: float, height: float, title: str) -> tuple[Any, Any]:
    """Create a figure with the given size in inches, without pyplot, which would keep it in global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_title(title, **TITLE_STYLE)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.label.set_color(INK)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=INK, alpha=0.4)
    axes.margins(x=0.01)
    axes.locator_params(nbins=5)
    axes.locator_params("x", integer=True)
    return figure, axes


def _set_margins(figure: Any) -> None:
    """Leave room for the texts around the axes, whose sizes depend on the fonts of the page anyway.

    matplotlib's layout engines measure all texts, which takes twice as long as the drawing.
    """
    axes, (width, height) = figure.axes[0], figure.get_size_inches()
    x_length, y_length = (
        max(map(len, axis.get_major_formatter().format_ticks(axis.get_ticklocs()))) for axis in (axes.xaxis, axes.yaxis)
    )
    above = 0.27
    if axes.yaxis.get_major_formatter().get_offset():  # a power of ten above the axis, below the title
        above += 0.17
        axes.set_title(axes.get_title("left"), pad=18, **TITLE_STYLE)
    below = 0.42 if axes.get_xlabel() else 0.24
    left, right = 0.06 + 0.085 * y_length, 0.05 * x_length  # half of the last number on the x axis is beyond its end
    figure.subplots_adjust(left / width, below / height, 1 - right / width, 1 - above / height)


def _to_svg(figure: Any, label: str) -> Markup:
    """Return the figure as an inline SVG element without metadata, whose text stays text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with rc_context(PLOT_STYLE):
        _set_margins(figure)
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, colour in CSS_COLOURS.items():
        text = text.replace(placeholder, colour)
    # Not escaped: the SVG has only numbers and labels from this file, and no text of the user.
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
