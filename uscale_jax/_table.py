"""Plain text tables."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns rows under a header, in columns that are as wide as their longest cell."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def shape_words(shape: Iterable[Any]) -> str:
    """Returns ``5 × 7``."""
    return " × ".join(map(str, shape)) or "scalar"


def places_words(places: Sequence[tuple[str, int]], most: int = 3) -> str:
    """Returns where an axis occurs: ``kernel[0], bias[0] and 4 more``."""
    shown = ", ".join(f"{leaf}[{dim}]" for leaf, dim in places[:most])
    more = len(places) - most
    return shown + (f" and {more} more" if more > 0 else "")
