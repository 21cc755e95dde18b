"""The shrinking benchmark's saved results of the trained models, read for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from benchmarks.registry import Result
from benchmarks.suite._grow_saving import Line, reached
from benchmarks.suite._shrink_contest import LIBRARY, Row

DEFAULT = Row(LIBRARY, "distilled")
"""What is recommended; the claims about recovery are about this row."""


class Seen(NamedTuple):
    """One size of one model: everything that ran, a value for each seed."""

    share: str
    parameters: int
    big_parameters: int
    big: list[float]
    scratch: dict[str, list[Result]]
    rows: dict[str, list[Result]]

    def of(self, row: Row) -> list[Result] | None:
        """Return the curves of a row, if it ran."""
        return self.rows.get(_key(asdict(row)))

    def last(self, row: Row) -> list[float] | None:
        """Return what a row ends with."""
        curves = self.of(row)
        return None if curves is None else [losses(curve)[-1] for curve in curves]

    def first(self, method: str) -> list[float]:
        """Return what a method starts with."""
        curves = next(c for c in self.rows.values() if c[0]["row"]["method"] == method)
        return [losses(curve)[0] for curve in curves]

    def scratch_last(self, name: str) -> list[float]:
        """Return what training from scratch ends with."""
        return [losses(curve)[-1] for curve in self.scratch[name]]

    @property
    def methods(self) -> list[str]:
        """Return the methods in order."""
        return list(dict.fromkeys(c[0]["row"]["method"] for c in self.rows.values()))


def _key(row: Mapping[str, Any]) -> str:
    return " ".join(map(str, row.values()))


def losses(curve: Result) -> list[float]:
    """The losses; what is not finite is infinite, so that it beats nothing."""
    return [float("inf") if bit is None else bit for bit in curve["bits"]]


def seen(results: Sequence[Result]) -> list[Seen]:
    """Return the sizes of a model."""
    found = []
    for share, first in results[0]["targets"].items():
        targets = [result["targets"][share] for result in results]
        found.append(
            Seen(
                share=share,
                parameters=first["parameters"],
                big_parameters=results[0]["big"]["parameters"],
                big=[losses(result["big"])[-1] for result in results],
                scratch={name: [t["scratch"][name] for t in targets] for name in first["scratch"]},
                rows={
                    _key(row["row"]): [t["rows"][i] for t in targets]
                    for i, row in enumerate(first["rows"])
                },
            )
        )
    return found


def lengths(size: Seen) -> dict[str, list[Result]]:
    """The default row at all its lengths."""
    own = {key: value for key, value in asdict(DEFAULT).items() if key != "length"}
    return {
        key: curves
        for key, curves in size.rows.items()
        if own.items() <= {**curves[0]["row"]}.items()
    }


def needed(size: Seen, seed: int) -> float | None:
    """Return what share of the tokens from scratch comes to the loss from scratch; None if none.

    Between two lengths the line through both counts; the shortest is not extrapolated.
    """
    curves = [curves[seed] for curves in lengths(size).values()]
    curves.sort(key=lambda curve: curve["row"]["length"])
    scratch = size.scratch["whole"][seed]
    tokens = tuple(curve["tokens"][-1] for curve in curves)
    found = reached(Line(tokens, tuple(losses(c)[-1] for c in curves)), losses(scratch)[-1])
    return None if found is None else found / scratch["tokens"][-1]
