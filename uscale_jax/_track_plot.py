"""The picture of what track_scales found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from uscale_jax._track_rows import PARAMETER, PRODUCT
from uscale_jax.numerics._formats import Format

if TYPE_CHECKING:
    from uscale_jax._track_report import Scales

_VALUES, _GRADIENTS = "#0072b2", "#d55e00"
"""Okabe and Ito's, which can be told apart with any colour vision."""
_MARKS = {PARAMETER: "s", PRODUCT: "o"}


def plot(models: Mapping[str, Scales], path: str | os.PathLike[str]) -> None:
    """Draws a panel a model: sizes of values and gradients in the order of the program."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot draws with matplotlib, which is not installed. Fix: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(1.5 + 5.5 * len(models), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (title, scales) in zip(panels, models.items(), strict=True):
        _panel(axes, title, scales)
    panels[0].set_ylabel("root mean square")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, title: str, scales: Scales) -> None:
    axes.set(title=title, xlabel="in the order of the program", yscale="log")
    axes.set_yscale("log", base=2)
    for fmt, color, what in (
        (scales.forward, _VALUES, "values"),
        (scales.backward, _GRADIENTS, "gradients"),
    ):
        _range(axes, fmt, color, f"{what} in {fmt.name} at full precision")
    sizes = jax.device_get((scales.values, scales.gradients))
    for found, color, what in zip(
        sizes, (_VALUES, _GRADIENTS), ("values", "gradients"), strict=True
    ):
        _points(axes, scales, found, color, what)
    axes.axhline(1, color="#000000", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _range(axes: Any, fmt: Format, color: str, label: str) -> None:
    """The numbers of full precision; a normal tensor fits if it lies well inside."""
    low, high = max(fmt.smallest_normal, 2.0**-60), min(fmt.max, 2.0**60)
    axes.axhspan(low, high, color=color, alpha=0.08, linewidth=0, label=label)


def _points(axes: Any, scales: Scales, found: Mapping[str, Any], color: str, what: str) -> None:
    for kind in dict.fromkeys(row.kind for row in scales.tracked):
        at = [
            (i, float(found[row.name].rms))
            for i, row in enumerate(scales.tracked)
            if row.kind == kind and row.name in found
        ]
        shown = [(i, rms) for i, rms in at if np.isfinite(rms) and rms > 0]
        if shown:
            axes.plot(
                *zip(*shown, strict=True),
                linestyle="",
                marker=_MARKS.get(kind, "."),
                markersize=5 if kind in _MARKS else 3,
                alpha=0.9 if kind in _MARKS else 0.35,
                color=color,
                label=f"{what}: {kind}s",
            )
