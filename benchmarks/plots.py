"""Plots as PNG bytes, drawn with matplotlib's Agg canvas: no display, no global state."""

from __future__ import annotations

import io
from math import ceil

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from benchmarks.registry import Panel, Plot, Scale, Series

# Okabe and Ito's palette, distinguishable with any colour vision.
PALETTE = ("#000000", "#999999", "#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7")
DASHES = ("-", "-", "-", "--", "--", ":", "-.", "-")
PANEL_INCHES = (5.2, 4.4)
LEGEND_LINE_INCHES = 0.26
LEGEND_COLUMNS = 3
# Differences smaller than this are drawn to a linear scale, larger ones to a logarithmic one.
SYMLOG_LINEAR = 0.01


def draw(plot: Plot) -> bytes:
    """Return the plot as a PNG file's content."""
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(plot.panels), height + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    every_axes = figure.subplots(1, len(plot.panels), squeeze=False, sharey=_same_axis(plot))[0]
    for axes, panel in zip(every_axes, plot.panels, strict=True):
        _draw_panel(axes, panel)
    figure.suptitle(plot.title)
    _legend_below(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _same_axis(plot: Plot) -> bool:
    """Return whether panels share an axis: bars of the same names, and sizes over many octaves."""
    if all(panel.scale == "log-y" for panel in plot.panels):
        return True
    names = {(panel.kind, panel.series[0].x) for panel in plot.panels}
    return len(names) == 1 and plot.panels[0].kind == "bar"


def _draw_panel(axes: Axes, panel: Panel) -> None:
    bars = panel.kind == "bar"
    (_draw_bars if bars else _draw_lines)(axes, panel.series)
    labels = (panel.y_label, panel.x_label) if bars else (panel.x_label, panel.y_label)
    axes.set(title=panel.title, xlabel=labels[0], ylabel=labels[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if bars else "y", alpha=0.3)
    axes.set_axisbelow(True)
    for lines, line in (
        (panel.marks, axes.axhline if bars else axes.axvline),
        (panel.levels, axes.axvline if bars else axes.axhline),
    ):
        for value, label in lines:
            line(value, color="#444444", linewidth=1, linestyle=(0, (2, 2)), label=label, zorder=0)
    _set_scale(axes, bars, panel.scale)


def _set_scale(axes: Axes, bars: bool, scale: Scale) -> None:
    """Set the scale of the values' axis, with plain numbers on it."""
    axis, set_scale = (axes.xaxis, axes.set_xscale) if bars else (axes.yaxis, axes.set_yscale)
    if scale == "log-y":
        axes.set_yscale("log", base=2)
    elif scale == "log":
        set_scale("log")
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    elif scale == "symlog":
        set_scale("symlog", linthresh=SYMLOG_LINEAR)
        axis.set_major_formatter("{x:g}")


def _draw_lines(axes: Axes, series: tuple[Series, ...]) -> None:
    for one in series:
        y = [float("nan") if value is None else value for value in one.y]
        axes.plot(
            one.x,
            y,
            label=one.label,
            color=PALETTE[one.color % len(PALETTE)],
            linestyle=DASHES[one.dash % len(DASHES)],
            linewidth=5 if one.wide else 1.6,
            alpha=0.6 if one.wide else 1,
        )


def _draw_bars(axes: Axes, series: tuple[Series, ...]) -> None:
    """Draw horizontal bars, grouped by category, so that long category names stay readable."""
    thickness = 0.8 / len(series)
    for index, one in enumerate(series):
        offset = (index - (len(series) - 1) / 2) * thickness
        places = [place + offset for place in range(len(one.x))]
        values = [0.0 if value is None else value for value in one.y]
        color = PALETTE[one.color % len(PALETTE)]
        bars = axes.barh(places, values, thickness, label=one.label, color=color)
        texts = ["not finite" if value is None else f"{value:.2f}" for value in one.y]
        labels = axes.bar_label(bars, texts, padding=2, fontsize=8)
        for label in labels:
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_yticks(range(len(series[0].x)), [str(name) for name in series[0].x])
    axes.set_ylim(len(series[0].x) - 0.5, -0.5)
    axes.margins(x=0.15)


def _legend_below(figure: Figure) -> None:
    """Put one legend of all panels under them, where it covers no data."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(LEGEND_COLUMNS, len(entries))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
        rows = ceil(len(entries) / columns)
        figure.set_figheight(PANEL_INCHES[1] + 0.5 + rows * LEGEND_LINE_INCHES)
