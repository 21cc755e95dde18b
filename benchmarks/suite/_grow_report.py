"""The growth benchmark's tables, plots and claims, made from the saved results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.registry import Claim, Panel, Plot, Report, Result, Series, Table
from benchmarks.suite._grow_contest import (
    CONTROL,
    COPIES,
    CORNER,
    LIBRARY,
    MAIN,
    ONE_RATE,
    SCRATCH,
)
from benchmarks.suite._grow_saving import SMOOTHING, Line, line, saved

EXACT_BITS = 1e-5
CONTROL_BITS = 1e-2
WANTED = 0.5
HEADLINE = ("transformer", "both")
SMALL = "small model, trained on"
COLUMNS = ("contestant", "jump at growth", "held-out bits/byte", "FLOPs saved", "reached")
FIRST_COLUMNS = ("contestant", "jump", "held-out bits/byte", "against the library", "FLOPs saved")


class Seen(NamedTuple):
    """One row of one target on one seed."""

    raw: Result
    line: Line
    saved: float | None


Rows = Mapping[str, Sequence[Seen]]
"""By name, one for each seed that a row was run on, the first seed first."""


def rows_of(results: Sequence[Result], target: str) -> Rows:
    """Return the rows of a target with their savings, and the small model as one of them."""
    found: dict[str, list[Seen]] = {}
    for result in results:
        raws = {raw["row"]["name"]: raw for raw in result["targets"][target]}
        scratch = _line(raws[SCRATCH.name])
        small = {**result["small"], "small_bits": None, "row": {"name": SMALL, "control": False}}
        for name, raw in {**raws, SMALL: _within(small, scratch.flops[-1])}.items():
            own = _line(raw)
            found.setdefault(name, []).append(Seen(raw, own, saved(scratch, own)))
    return found


def _line(raw: Result) -> Line:
    return line(raw["flops"], raw["bits"])


def _within(raw: Result, budget: float) -> Result:
    """Return a curve up to a budget."""
    count = sum(flops <= budget * (1 + 1e-9) for flops in raw["flops"])
    return {**raw, "flops": raw["flops"][:count], "bits": raw["bits"][:count]}


def report(grouped: Mapping[str, Sequence[Result]]) -> Report:
    """Return a table and a panel per target, and the claims."""
    every = {
        (model, target): rows_of(results, target)
        for model, results in grouped.items()
        for target in results[0]["targets"]
    }
    return Report(
        tables=tuple(table for where, rows in every.items() for table in _tables(where, rows)),
        plots=_plots(every),
        claims=tuple(_claims(every, grouped)),
        notes=_notes(every),
    )


# Tables


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Return the mean, and the range where there are several."""
    mean = form(_mean(values))
    return f"{mean} ({form(min(values))} … {form(max(values))})" if len(values) > 1 else mean


def percent(x: float) -> str:
    """Return a share as text."""
    return f"{100 * x:.0f} %"


def bits(x: float) -> str:
    """Return a loss as text."""
    return f"{x:.3f}"


def jump(seen: Seen) -> float | None:
    """Return the loss right after growth minus the small model's; None where nothing grew."""
    small, first = seen.raw["small_bits"], seen.raw["bits"][0]
    if small is None:
        return None
    return float("inf") if first is None else first - small


def _tables(where: tuple[str, str], rows: Rows) -> Iterator[Table]:
    """Yield the rows that ran on every seed, and all rows on the first, where there are more."""
    shown = {name: seen for name, seen in rows.items() if not seen[0].raw["row"]["control"]}
    seeds = len(rows[SCRATCH.name])
    flops = _mean([one.line.flops[-1] for one in rows[SCRATCH.name]])
    symmetry = rows[LIBRARY.name][0].raw["row"]["symmetry"]
    title = (
        f"{', '.join(where)}: {flops:.2g} FLOPs for everyone, the small model's included\n"
        f"loss: mean of the last {SMOOTHING} evaluations; the library's symmetry: {symmetry}"
    )
    always = {name: seen for name, seen in shown.items() if len(seen) == seeds}
    yield Table(title, COLUMNS, tuple(_table_row(*item) for item in always.items()))
    if len(always) < len(shown):
        first = tuple(_first_row(name, seen[0], rows) for name, seen in shown.items())
        yield Table(f"{', '.join(where)}: first seed", FIRST_COLUMNS, first)


def _table_row(name: str, seen: Sequence[Seen]) -> tuple[str, ...]:
    savings = [one.saved for one in seen if one.saved is not None]
    return (
        name,
        _largest([value for one in seen if (value := jump(one)) is not None]),
        spread([one.line.final for one in seen], bits),
        spread(savings, percent) if savings else "not reached",
        f"{len(savings)} of {len(seen)}",
    )


def _largest(jumps: Sequence[float]) -> str:
    return f"{max(jumps, key=abs):+.1g}" if jumps else ""


def _first_row(name: str, seen: Seen, rows: Rows) -> tuple[str, ...]:
    left = jump(seen)
    return (
        name,
        _largest([] if left is None else [left]),
        bits(seen.line.final),
        f"{seen.line.final - rows[LIBRARY.name][0].line.final:+.3f}",
        "not reached" if seen.saved is None else percent(seen.saved),
    )


# Plots


def _plots(every: Mapping[tuple[str, str], Rows]) -> tuple[Plot, ...]:
    names = (SMALL, *(row.name for row in MAIN), COPIES.name)
    panels = tuple(_panel(where, rows, names) for where, rows in every.items())
    loss = Plot("loss", "Held-out loss against FLOPs (first seed)", panels)
    return (loss, *_bars(every))


def _panel(where: tuple[str, str], rows: Rows, names: Sequence[str]) -> Panel:
    colors = (1, 0, 2, 5, 4, 6)
    curves = [
        _series(name, rows[name][0], color, name == SMALL)
        for name, color in zip(names, colors, strict=True)
        if name in rows
    ]
    level = (rows[SCRATCH.name][0].line.final, "where training from scratch ends")
    title = f"{where[0]}, {where[1]}"
    return Panel(
        title, "FLOPs", "held-out bits per byte", tuple(curves), scale="log", levels=(level,)
    )


def _series(name: str, seen: Seen, color: int, wide: bool) -> Series:
    y = tuple(value if value < float("inf") else None for value in seen.line.bits)
    # What stands above the curves at the left would leave them no room.
    first = next((i for i, value in enumerate(y) if value is not None and value < 4), 0)
    return Series(name, seen.line.flops[first:], y[first:], color=color, wide=wide)


def _bars(every: Mapping[tuple[str, str], Rows]) -> Iterator[Plot]:
    """Yield how far below training from scratch all rows of the headline end, first seed."""
    rows = every.get(HEADLINE)
    if rows is None:
        return
    scratch = rows[SCRATCH.name][0].line.final
    names = tuple(
        n for n, s in rows.items() if n != SCRATCH.name and not s[0].raw["row"]["control"]
    )
    gains = tuple(scratch - rows[name][0].line.final for name in names)
    series = Series("bits per byte below training from scratch", names, gains, color=4)
    panel = Panel(", ".join(HEADLINE), "", "bits per byte", (series,), kind="bar")
    yield Plot("contestants", "All contestants at equal FLOPs (first seed)", (panel,))


# Claims


def _claims(
    every: Mapping[tuple[str, str], Rows], grouped: Mapping[str, Sequence[Result]]
) -> Iterator[Claim]:
    """Yield the claims, the most certain one first."""
    yield _exact(every)
    yield from _control(every, grouped)
    rows = every.get(HEADLINE)
    if rows is not None:
        where = ", ".join(HEADLINE)
        yield _lower(where, rows, "growing beats training from scratch", SCRATCH.name)
        yield _lower(
            where, rows, "per-leaf learning rates beat the small model's for all", ONE_RATE.name
        )
        yield _lower(where, rows, "growing beats random new parts", CORNER.name)
        yield _lower(where, rows, "growing beats training the small model on", SMALL)
        yield _half(where, rows)


def _exact(every: Mapping[tuple[str, str], Rows]) -> Claim:
    jumps = [
        abs(jump(one) or 0.0)
        for rows in every.values()
        for seen in rows.values()
        for one in seen
        if one.raw.get("exact")
    ]
    return Claim(
        "exact growth starts at the small model's loss",
        max(jumps) < EXACT_BITS,
        f"{len(jumps)} growths, at most {max(jumps):.1g} bits off, allowed {EXACT_BITS:g}",
    )


def _control(
    every: Mapping[tuple[str, str], Rows], grouped: Mapping[str, Sequence[Result]]
) -> Iterator[Claim]:
    """Yield that growth without noise trains as the small model does on the same batches."""
    for (model, target), rows in every.items():
        if CONTROL.name not in rows:
            continue
        raw = rows[CONTROL.name][0].raw
        small = grouped[model][0]["small"]["bits"][raw["small_chunks"] :]
        pairs = list(zip(raw["bits"], small, strict=False))
        apart = max(abs(a - b) for a, b in pairs)
        yield Claim(
            f"{model}, {target}: grown without noise, the large model trains as the small one",
            apart < CONTROL_BITS,
            f"{len(pairs) - 1} evaluations, at most {apart:.1g} bits apart",
        )


def _lower(where: str, rows: Rows, text: str, other: str) -> Claim:
    """Return the claim that the library ends lower on every seed."""
    gains = [
        b.line.final - a.line.final for a, b in zip(rows[LIBRARY.name], rows[other], strict=True)
    ]
    detail = f"lower by {spread(gains, bits)} bits/byte at equal FLOPs"
    return Claim(f"{where}: {text}", min(gains) > 0, detail)


def _half(where: str, rows: Rows) -> Claim:
    savings = [one.saved for one in rows[LIBRARY.name] if one.saved is not None]
    every = len(savings) == len(rows[LIBRARY.name])
    detail = spread(savings, percent) if savings else "not reached"
    return Claim(
        f"{where}: growing saves at least half the FLOPs at equal loss",
        every and _mean(savings) >= WANTED,
        detail if every else f"{detail}; reached on {len(savings)} of {len(rows[LIBRARY.name])}",
    )


# Notes


def _notes(every: Mapping[tuple[str, str], Rows]) -> tuple[str, ...]:
    counted = (
        "FLOPs: 2·m·n·k of every matrix product in the gradient's jaxpr, times steps; the small "
        "model's training counts in full. Learning rates are constant after a warm-up, so that "
        "losses can be compared at any time; everyone sees the same batches at the same step."
    )
    rows: Any = every.get(HEADLINE)
    return (counted, *(_disputes(rows) if rows else ()))


DISPUTES = (
    ("copies of layers against exact identity layers", COPIES.name, LIBRARY.name),
    ("new layers between the old against on top", "new layers between the old", LIBRARY.name),
    ("mapped state of new layers against zero", "new layers' state mapped", LIBRARY.name),
    ("a fresh optimizer state against the mapped one", "fresh optimizer state", LIBRARY.name),
    ("re-warm-up against none", "re-warm-up", LIBRARY.name),
    (
        "one learning rate tuned for the large model against per-leaf ones",
        "one learning rate, the large one's",
        LIBRARY.name,
    ),
    ("no noise against noise", "no noise", LIBRARY.name),
    ("noise 0.1 against 1", "noise 0.1", LIBRARY.name),
    ("zero fan-out against noise", "zero fan-out", LIBRARY.name),
    ("uneven copies against noise", "uneven copies", LIBRARY.name),
    (
        "a cosine that goes on against a new one",
        "library, cosine continued",
        "library, new cosine",
    ),
    ("growth against scratch, both with a cosine", "library, new cosine", "from scratch, cosine"),
)


def _disputes(rows: Rows) -> Iterator[str]:
    """Yield in words what came out where the literature disagrees."""
    found = [
        f"{text} {_word(rows[a][0].line.final - rows[b][0].line.final)}"
        for text, a, b in DISPUTES
        if a in rows and b in rows
    ]
    if found:
        yield f"On the first seed, at equal FLOPs, in bits/byte: {'; '.join(found)}."
        yield (
            "Rows with a cosine keep the rates tuned for a constant one, from scratch too: they do "
            "not show what growth saves under a tuned cosine. One seed is no measure of spread."
        )


def _word(difference: float) -> str:
    word = "lower" if difference < 0 else "higher"
    return f"{abs(difference):.3f} {word}"
