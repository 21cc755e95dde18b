"""The shrinking benchmark's trained models as tables, plots and claims, from saved results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.registry import Claim, Panel, Plot, Result, Series, Table
from benchmarks.suite._grow_report import bits, percent, spread
from benchmarks.suite._shrink_contest import LIBRARY, SHORT, Row
from benchmarks.suite._shrink_seen import DEFAULT, Seen, lengths, losses, needed, seen

COLUMNS = ("small model", "right after pruning", "trained on the text", "distilled")
RANDOM, MAGNITUDE = "random", "magnitude"
LOSSES: tuple[Any, ...] = ("plain", "distilled")


def mean(values: Sequence[float]) -> float:
    """Return the mean over seeds or sizes."""
    return sum(values) / len(values)


# Tables


def tables(model: str, results: Sequence[Result]) -> Iterator[Table]:
    """Yield a table a size, and how many tokens it took."""
    sizes = seen(results)
    for size in sizes:
        yield _size_table(model, size)
    yield _tokens_table(model, sizes)


def _size_table(model: str, size: Seen) -> Table:
    share = size.parameters / size.big_parameters
    title = (
        f"{model}: {size.parameters:,} of {size.big_parameters:,} parameters ({share:.1%}); "
        f"held-out bits/byte\n"
        f"recovery on {_tokens(size, 'recovery')} tokens, the big model's training on "
        f"{_tokens(size, 'whole')}"
    )
    scratch = (
        ("from scratch, the recovery's tokens", "recovery"),
        ("from scratch, the big model's tokens", "whole"),
        ("from scratch, the tokens of both", "total"),
    )
    rows = [_row(method, size, Row(method)) for method in size.methods]
    rows += [
        _row(f"{LIBRARY}, {words}", size, row)
        for words, row in (
            ("unchanged learning rate", Row(LIBRARY, rates="unchanged")),
            ("fresh Adam state", Row(LIBRARY, state="fresh")),
        )
        if size.of(row)
    ]
    rows += [(name, "", spread(size.scratch_last(key), bits), "") for name, key in scratch]
    return Table(title, COLUMNS, (*rows, ("(big model)", "", spread(size.big, bits), "")))


def _tokens(size: Seen, name: str) -> str:
    return f"{size.scratch[name][0]['tokens'][-1]:,}"


def _row(name: str, size: Seen, row: Row) -> tuple[str, ...]:
    ends = [size.last(replace(row, loss="plain")), size.last(replace(row, loss="distilled"))]
    texts = ["" if end is None else spread(end, bits) for end in ends]
    return (name, spread(size.first(row.method), bits), *texts)


def _tokens_table(model: str, sizes: Sequence[Seen]) -> Table:
    known = sorted({c[0]["row"]["length"] for s in sizes for c in lengths(s).values()})
    title = (
        f"{model}: {LIBRARY}, {DEFAULT.loss}, by the length of the recovery, relative to "
        "training from scratch\nbits/byte above those of training from scratch; each length is a "
        "run with a schedule of its own"
    )
    rows = []
    for size in sizes:
        level = size.scratch_last("whole")
        differences = [
            [own - scratch for own, scratch in zip(size.last(row) or (), level, strict=True)]
            for row in (replace(DEFAULT, length=length) for length in known)
        ]
        shares = [needed(size, seed) for seed in range(len(level))]
        rows.append(
            (
                percent(float(size.share)),
                *(spread(each, lambda x: f"{x:+.3f}") for each in differences),
                ", ".join("never" if share is None else percent(share) for share in shares),
            )
        )
    columns = ("parameters", *map(percent, known), "reached at, by seed")
    return Table(title, columns, tuple(rows))


# Plots


def plots(model: str, results: Sequence[Result]) -> Iterator[Plot]:
    """Yield the loss against parameters, and against tokens."""
    sizes = seen(results)
    before = _by_size("right after pruning", sizes, None)
    after = [
        _by_size(f"after recovery: {words}", sizes, loss)
        for words, loss in (("on the text", "plain"), ("distilled", "distilled"))
    ]
    title = f"{model}: held-out loss of pruned models"
    yield Plot(f"{model}-parameters", title, (before, *after))
    panels = tuple(map(_against_tokens, sizes))
    yield Plot(f"{model}-tokens", f"{model}: recovery against training from scratch", panels)


# Of the palette and of the line styles.
SCRATCH, DASHED = 6, 3


def _by_size(title: str, sizes: Sequence[Seen], loss: Any) -> Panel:
    x = tuple(float(size.parameters) for size in sizes)

    def series(label: str, color: int, values: Any, dash: int = 0) -> Series:
        y = tuple(_finite(mean(values(size))) for size in sizes)
        return Series(label, x, y, color=color, dash=dash)

    curves = []
    for color, method in enumerate(sizes[0].methods):
        row = Row(method, loss or "plain")
        if loss is None:
            curves.append(series(method, color, lambda size, m=method: size.first(m)))
        elif sizes[0].of(row):
            curves.append(series(method, color, lambda size, r=row: size.last(r)))
    curves.append(series("from scratch", SCRATCH, lambda size: size.scratch_last("whole")))
    short = "from scratch, the recovery's tokens"
    curves.append(series(short, SCRATCH, lambda size: size.scratch_last("recovery"), DASHED))
    level = (mean(sizes[0].big), "big model")
    return Panel(title, "parameters", "held-out bits per byte", tuple(curves), levels=(level,))


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _against_tokens(size: Seen) -> Panel:
    """The first seed's curves, of the default row at all its lengths."""
    shown = [("from scratch", size.scratch["whole"][0], SCRATCH)]
    shown += [(f"{LIBRARY}, distilled", curves[0], 2) for curves in lengths(size).values()]
    for color, row in ((0, Row(RANDOM)), (4, Row(LIBRARY))):
        if curves_of := size.of(row):
            shown.append((f"{row.method}, on the text", curves_of[0], color))
    # The start from scratch, at 8 bits, would leave the rest no room.
    series = tuple(
        Series(
            label,
            tuple(map(float, curve["tokens"])),
            tuple(bit if bit < 5 else None for bit in losses(curve)),
            color=color,
        )
        for label, curve, color in shown
    )
    level = (losses(size.scratch["whole"][0])[-1], "from scratch")
    return Panel(
        f"{float(size.share):.0%} of the parameters",
        "tokens",
        "held-out bits per byte",
        series,
        levels=(level,),
    )


# Claims


def claims(model: str, results: Sequence[Result]) -> Iterator[Claim]:
    """Yield what is claimed of a model; every seed has to hold."""
    sizes = seen(results)
    yield _beats_random(model, sizes)
    for size in sizes:
        yield _few_tokens(model, size)
    for loss in LOSSES:
        yield _rates(model, sizes, loss)
    yield _initialisation(model, sizes)


def _beats_random(model: str, sizes: Sequence[Seen]) -> Claim:
    """The method that is best on average, against random choice."""
    others = [method for method in sizes[0].methods if method != RANDOM]
    best = min(others, key=lambda m: mean([mean(size.first(m)) for size in sizes]))
    gains = {
        size.share: [b - a for a, b in zip(size.first(best), size.first(RANDOM), strict=True)]
        for size in sizes
    }
    return Claim(
        f"{model}: the best method beats random choice at every size, before recovery",
        all(min(each) > 0 for each in gains.values()),
        f"{best}, lower by {_by_share(gains)} bits/byte",
    )


def _by_share(values: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{float(s):.0%}: {spread(v, bits)}" for s, v in values.items())


def _few_tokens(model: str, size: Seen) -> Claim:
    level, own = size.scratch_last("whole"), size.last(replace(DEFAULT, length=SHORT)) or []
    above = [a - b for a, b in zip(own, level, strict=True)]
    return Claim(
        f"{model}, {float(size.share):.0%} of the parameters: pruned and recovered on "
        f"{percent(SHORT)} of the tokens it is as good as from scratch",
        bool(above) and max(above) <= 0,
        f"{LIBRARY}, {DEFAULT.loss}: {spread(own, bits)} against {spread(level, bits)} bits/byte",
    )


def _rates(model: str, sizes: Sequence[Seen], loss: Any) -> Claim:
    """The default row with the plan's rates, against the big model's for all leaves."""
    gains = {}
    for size in sizes:
        row = replace(DEFAULT, loss=loss)
        plan, unchanged = size.last(row), size.last(replace(row, rates="unchanged"))
        gains[size.share] = [b - a for a, b in zip(plan or (), unchanged or (), strict=True)]
    words = "distillation" if loss == "distilled" else "recovery on the text"
    return Claim(
        f"{model}: the plan's learning rates beat the big model's unchanged, {words}",
        all(each and min(each) > 0 for each in gains.values()),
        f"lower by {_by_share(gains)} bits/byte",
    )


def _initialisation(model: str, sizes: Sequence[Seen]) -> Claim:
    """Magnitude: worse than a short training from scratch, but a better start for one."""
    small = [size for size in sizes if float(size.share) <= 0.5]
    before = {size.share: size.first(MAGNITUDE) for size in small}
    after = {size.share: size.last(Row(MAGNITUDE)) or [] for size in small}
    short = {size.share: size.scratch_last("recovery") for size in small}
    pairs = [
        (b, a, s)
        for key in before
        for b, a, s in zip(before[key], after[key], short[key], strict=True)
    ]
    detail = "; ".join(
        f"{float(key):.0%}: {spread(before[key], bits)} → {spread(after[key], bits)}, from scratch "
        f"{spread(short[key], bits)}"
        for key in before
    )
    return Claim(
        f"{model}: at half of the parameters or fewer, magnitude pruning leaves a start for "
        "training (better than scratch on the same tokens), and no model to use (worse untrained)",
        all(untrained > scratch > trained for untrained, trained, scratch in pairs),
        f"big model {spread(sizes[0].big, bits)} bits/byte; {detail}",
    )


# Notes


def notes(model: str, results: Sequence[Result]) -> Iterator[str]:
    """Yield what speaks against pruning, and what single choices are worth."""
    sizes = seen(results)
    yield (
        f"{model}: {LIBRARY}, {DEFAULT.loss}, against the small model trained from scratch on the "
        "tokens of the big model's training and the recovery together, bits/byte above that: "
        f"{_differences(sizes, lambda size: (size.last(DEFAULT), size.scratch_last('total')))}."
    )
    for words, changes in CHOICES:
        for loss in LOSSES:
            row = replace(DEFAULT, loss=loss)
            other = replace(row, **changes)
            found = _differences(sizes, lambda s, a=row, b=other: (s.last(b), s.last(a)))
            yield f"{model}: {words}, {loss}, bits/byte above the default: {found}."
    seconds = [
        (method, how["seconds"])
        for result in results
        for target in result["targets"].values()
        for method, how in target.get("pruning", {}).items()
    ]
    if seconds:
        each = (
            f"{method} {mean([t for name, t in seconds if name == method]):.1f} s"
            for method in dict.fromkeys(name for name, _ in seconds)
        )
        yield f"{model}: importance and shrinking, the first time compiled: {', '.join(each)}."


CHOICES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("the big model's learning rate unchanged", {"rates": "unchanged"}),
    ("a fresh Adam state", {"state": "fresh"}),
)


def _differences(sizes: Sequence[Seen], of: Any) -> str:
    """By how much one is above another, by size."""
    found = []
    for size in sizes:
        own, other = of(size)
        above = [a - b for a, b in zip(own or (), other or (), strict=True)]
        text = spread(above, lambda x: f"{x:+.3f}") if above else "not run"
        found.append(f"{float(size.share):.0%}: {text}")
    return "; ".join(found)
