"""What a coordinate check found: exponents of width, a verdict a module, a table and a plot."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from uscale_jax._table import table

Sizes: TypeAlias = "np.ndarray[Any, Any]"
"""(widths, steps + 1)."""

ACTIVATIONS = "activations"
ROUNDED = "is rounded away"
_ROUNDINGS = 2
"""A change of fewer roundings of what changes is taken for rounding."""
_FIXES = {
    "grows": "let its leaves learn more slowly with width, or multiply it by less",
    "vanishes": "let its leaves learn faster with width; of Adam, lower ε with the gradients",
    "starts larger": "start its leaves smaller with width, or multiply it by less",
    "starts smaller": "start its leaves larger with width, or multiply it by more",
    ROUNDED: "compute in float32, or raise the learning rate",
}


class Row(NamedTuple):
    """A module, or one layer of it, and what of its sizes is allowed."""

    kind: str
    """``"product"``, ``"lookup"``, ``"activations"`` (where two meet) or ``"output"``."""
    source: str
    """Where it is in the model's code."""
    rounding: float
    """Of its output, relative to it."""
    fades: bool
    """Whether it may start smaller with width: readouts and scores, which sum over more, and
    outputs of the model."""
    readers: tuple[str, ...] = ()
    """Rows that alone read it, and multiply it as it is; () if anything else does."""


class Slopes(NamedTuple):
    """Exponents of width, fitted to logarithms; NaN of what is 0 at every width."""

    size: float
    """Of the output before training."""
    change: float
    """Of how far the output has moved after the last step."""
    changes: tuple[float, ...]
    """After every step."""


class Fault(NamedTuple):
    """What is wrong with a module."""

    what: str
    """``"starts larger"``, ``"starts smaller"``, ``"grows"``, ``"vanishes"`` (its change, with
    width) or ``"is rounded away"`` (whatever its change is)."""
    since: int
    """The step that it begins with."""
    slope: float


@dataclass(frozen=True, eq=False)
class CoordinateCheck:
    """Sizes of activations and of their changes, by module and width; ``print`` shows them."""

    widths: tuple[int, ...]
    modules: Mapping[str, Row]
    """In the order of the program."""
    sizes: Mapping[str, Sizes]
    """By module, root mean squares of its output, (widths, steps + 1)."""
    changes: Mapping[str, Sizes]
    """By module, root mean squares of how far its output has moved since step 0."""
    tolerance: float
    """How far exponents may be from 0."""
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Return how many steps were trained."""
        return max((each.shape[1] - 1 for each in self.changes.values()), default=0)

    @cached_property
    def slopes(self) -> Mapping[str, Slopes]:
        """Return the exponents of every module."""
        found = {}
        for name, size in self.sizes.items():
            steps = [_slope(self.widths, each) for each in self.changes[name].T[1:]]
            found[name] = Slopes(_slope(self.widths, size[:, 0]), steps[-1], (*steps,))
        return found

    @cached_property
    def faults(self) -> Mapping[str, tuple[Fault, ...]]:
        """Return what is wrong with every module, in the order of the program."""
        found: dict[str, tuple[Fault, ...]] = {}
        for name in reversed([*self.modules]):  # what reads a module comes behind it
            own = _faults(self, name)
            told = not any(fault.what == ROUNDED for fault in own)
            found[name] = () if told and _of_own_units(self, name, found) else own
        return {name: found[name] for name in self.modules}

    @property
    def failures(self) -> Mapping[str, str]:
        """Return why modules fail: what was first to go wrong comes first, and may explain all."""
        wrong = {name: faults for name, faults in self.faults.items() if faults}
        first = sorted(wrong, key=lambda name: min(fault.since for fault in wrong[name]))
        return {name: _why(self, name, wrong[name]) for name in first}

    @property
    def ok(self) -> bool:
        """Return whether no module fails."""
        return not any(self.faults.values())

    def raise_if_failed(self) -> None:
        """Raise a ``ValueError`` that names the modules that fail, if any does.

        Raises:
          ValueError: with where they are in the model, their exponents and what to do.
        """
        if self.ok:
            return
        lines = [f"  {text}" for text in self.failures.values()]
        head = (
            f"{len(lines)} of {len(self.modules)} modules do not train alike at widths "
            f"{self.widths[0]} to {self.widths[-1]}."
        )
        advice = (
            f"Expected: changes of outputs that are the same at all widths, exponents of "
            f"±{self.tolerance:g}. Fix: the first one first, for it may explain the "
            "others; us.transfer has the factors, us.scale_optimizer applies them."
        )
        raise ValueError("\n".join([head, *lines, advice]))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw sizes before training, and changes after every step, against width.

        Modules that fail are thick; where there are many, the others are grey.

        Args:
          path: where to save it; the suffix says in which format.

        Raises:
          ImportError: matplotlib is not installed.
        """
        _plot(self, path)

    def __str__(self) -> str:
        """Return a table of modules with sizes, changes, exponents and verdicts, and notes."""
        head = (
            f"coordinate check over widths {', '.join(map(str, self.widths))}: sizes at step 0, "
            f"changes since after step {self.steps}, as root mean squares"
        )
        return "\n\n".join([head, _table(self), *(["\n".join(self.notes)] if self.notes else [])])


def _slope(widths: Sequence[int], values: Sizes) -> float:
    """The exponent; infinite where values are 0 at some widths only, NaN where they are at all."""
    if not np.any(values):
        return math.nan
    if not np.all(values):
        return math.inf if values[-1] else -math.inf
    return float(np.polyfit(np.log2(widths), np.log2(values), 1)[0])


# The verdict


def _faults(check: CoordinateCheck, name: str) -> tuple[Fault, ...]:
    row, slopes, most = check.modules[name], check.slopes[name], check.tolerance
    found = []
    if slopes.size > most:
        found.append(Fault("starts larger", 0, slopes.size))
    if slopes.size < -most and not row.fades:
        found.append(Fault("starts smaller", 0, slopes.size))
    larger = [step for step, slope in enumerate(slopes.changes, start=1) if slope > most]
    if larger:  # once training has saturated, the change of what is too fast grows no more
        found.append(Fault("grows", larger[0], slopes.changes[larger[0] - 1]))
    # Scores move by what queries and keys learn of each other, which is of one size at all widths,
    # and by what both pass on, which fades as scores at the start do; the latter is the larger
    # part behind the first layer, up to widths of hundreds.
    least = -most - (0.5 if row.kind == ACTIVATIONS and row.fades else 0.0)
    if not larger and slopes.change < least:
        others = [step for step, slope in enumerate(slopes.changes, 1) if not slope < least]
        found.append(Fault("vanishes", max(others, default=0) + 1, slopes.change))
    moved, size = check.changes[name][:, -1], check.sizes[name][:, -1]
    if np.any((moved > 0) & (moved < _ROUNDINGS * row.rounding * size)):
        found.append(Fault(ROUNDED, check.steps, slopes.change))
    return (*found,)


def _of_own_units(
    check: CoordinateCheck, name: str, faults: Mapping[str, tuple[Fault, ...]]
) -> bool:
    """Whether a module is large or small in its units only.

    A factor in a module that only products read, and its inverse in what these read besides, are
    the same model and the same training (queries and keys, say).  So what starts and moves alike
    is judged by what reads it.
    """
    slopes, readers = check.slopes[name], check.modules[name].readers
    return (
        bool(readers)
        and abs(slopes.change - slopes.size) <= check.tolerance
        and not any(faults[reader] or math.isnan(check.slopes[reader].change) for reader in readers)
    )


def _why(check: CoordinateCheck, name: str, faults: Sequence[Fault]) -> str:
    parts = [f"{_got(check, name, fault)}. Fix: {_FIXES[fault.what]}" for fault in faults]
    return f"{_place(name, check.modules[name])}: {'; '.join(parts)}"


def _place(name: str, row: Row) -> str:
    return f"{name!r} ({row.kind} at {row.source})" if row.source else repr(name)


def _got(check: CoordinateCheck, name: str, fault: Fault) -> str:
    if fault.since == 0:
        law = _law(check, fault.slope, check.sizes[name][:, 0])
        return f"its output {fault.what} with width, {law}"
    # What grows is shown when it begins, what vanishes when it still has not moved.
    step = fault.since if fault.what == "grows" else check.steps
    moved, change = check.changes[name][:, step], f"its change after step {step}"
    if fault.what == ROUNDED:
        return f"{change} {fault.what}, {moved.min():.1e} of {check.sizes[name][:, step].min():.1e}"
    return f"{change} {fault.what} with width, {_law(check, fault.slope, moved)}"


def _law(check: CoordinateCheck, slope: float, values: Sizes) -> str:
    law = f"as width^{slope:+.2f}: " if math.isfinite(slope) else ""
    return f"{law}{values[0]:.3g} at {check.widths[0]} to {values[-1]:.3g} at {check.widths[-1]}"


def _table(check: CoordinateCheck) -> str:
    header = (
        *("module", "at"),
        *(f"size {width}" for width in check.widths),
        "exponent",
        *(f"change {width}" for width in check.widths),
        *("exponent", "verdict"),
    )
    rows = []
    for name, row in check.modules.items():
        size, change = check.sizes[name][:, 0], check.changes[name][:, -1]
        numbers = [
            [*(f"{x:.3g}" for x in values), "-" if math.isnan(slope) else f"{slope:+.2f}"]
            for values, slope in zip((size, change), check.slopes[name][:2], strict=True)
        ]
        rows.append((name, row.source, *numbers[0], *numbers[1], _verdict(check, name)))
    return table(header, rows)


def _verdict(check: CoordinateCheck, name: str) -> str:
    if check.faults[name]:
        return ", ".join(fault.what for fault in check.faults[name])
    if _faults(check, name):
        return "ok, by what reads it"
    return "does not move" if math.isnan(check.slopes[name].change) else "ok"


# The plot

_COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#999999")
"""Okabe and Ito's, which can be told apart with any colour vision."""
_REST = "#cccccc"


def _plot(check: CoordinateCheck, path: str | os.PathLike[str]) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot draws with matplotlib, which is not installed. Fix: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    start, moved = figure.subplots(1, 2)
    shown = _shown(check)
    for name in (*(n for n in check.modules if n not in shown), *shown):
        _draw(start, check, name, check.sizes[name][:, :1], shown)
        _draw(moved, check, name, check.changes[name][:, 1:], shown)
    _label(start, check, "root mean square of outputs before training")
    _label(moved, check, f"of their changes after steps 1 to {check.steps} (the last is darkest)")
    handles, labels = moved.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


def _shown(check: CoordinateCheck) -> dict[str, str]:
    """The colours of modules that have one: all, or as many as there are, wrong ones first."""
    wrong = sorted(check.modules, key=lambda name: not check.faults[name])
    return dict(zip(wrong, _COLORS, strict=False))


def _draw(
    axes: Any, check: CoordinateCheck, name: str, values: Sizes, shown: Mapping[str, str]
) -> None:
    wide = 3.0 if check.faults[name] else 1.4
    for step, each in enumerate(values.T, start=1):
        last = step == values.shape[1]
        axes.plot(
            check.widths,
            np.where(each > 0, each, np.nan),
            color=shown.get(name, _REST),
            linewidth=wide if last else 0.8,
            alpha=1.0 if last else 0.15 + 0.4 * step / values.shape[1],
            label=f"{name} ({_verdict(check, name)})" if last and name in shown else None,
        )


def _label(axes: Any, check: CoordinateCheck, title: str) -> None:
    axes.set(title=title, xlabel="width", xscale="log", yscale="log")
    axes.set_xticks(check.widths, [str(width) for width in check.widths])
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    if high < 10 * low:  # what is the same at all widths should look so
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
