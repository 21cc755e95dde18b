"""The operations of ``uscale_jax.numerics`` beside those of PyTorch's ``unit-scaling``.

A part of a benchmark: cases, and what is shown of their results.  Without the packages there are
no cases, and a note says so.  A difference is explained where it is as large as its reason says.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.foreign import graphcore_compared as peer
from benchmarks.foreign.graphcore_pairs import REASONS
from benchmarks.registry import Case, Claim, Options, Progress, Result, Table

REQUIRES = ("torch", "unit_scaling")
SKIPPED = "skipped: needs torch and unit-scaling: pip install torch unit-scaling"
SAME = 1e-5
"""Two frameworks round differently, in float32."""
AT_ONE = 0.05
SURE = 2.0
"""Standard errors within which two scales are as near to one."""
HOW = (
    "the same float32 numbers, operands and cotangents normal, all sizes different; differences "
    "are the largest of any element, relative to it and the RMS of the tensor"
)
DEFAULTS = (
    "given equal here, different by default: gelu computes Φ by tanh here; ε of norms is 1e-6 "
    "here, 1e-5 there; labels that are no classes give NaN here, -100 is left out there"
)
JUDGED = (
    f"scales are of {peer.DRAWS} draws of all operands and cotangents; of outputs of activations "
    "about the mean, which is what both mean to be one"
)


def missing() -> list[str]:
    """Return the packages of the comparison that are not here."""
    return [name for name in REQUIRES if not importlib.util.find_spec(name)]


def cases(options: Options) -> Sequence[Case]:
    """Return a case for every function of unit-scaling; none without it."""
    del options
    return () if missing() else [Case(name, partial(_run, name)) for name in peer.pairs()]


def _run(of: str, options: Options, progress: Progress) -> Result:
    pairs = peer.pairs()[of]
    progress.start(len(pairs), "operations")
    compared, judged = [], []
    for pair in pairs:
        compared.append(peer.compared(pair, options.seed))
        if pair.judged:
            judged.append(peer.scales(pair, options.seed))
        progress.advance(note=pair.name)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "unit-scaling")}
    left_out = sorted(set(peer.public()) - set(peer.pairs()))
    return {"compared": compared, "scales": judged, "versions": versions, "left out": left_out}


# What is shown


def _compared(results: Mapping[str, Result]) -> list[Result]:
    return [pair for result in results.values() for pair in result["compared"]]


def _scales(results: Mapping[str, Result]) -> list[tuple[str, str, Result]]:
    return [
        (pair["name"], tensor, found)
        for result in results.values()
        for pair in result["scales"]
        for tensor, found in pair["tensors"].items()
    ]


def tables(results: Mapping[str, Result]) -> tuple[Table, ...]:
    """Return what is the same, what differs and by what factor, and which is nearer to one."""
    made = [_alike(results), _different(_compared(results)), _nearer(_scales(results))]
    return tuple(table for table in made if table.rows)


def _alike(results: Mapping[str, Result]) -> Table:
    rows = []
    for of, result in results.items():
        pairs = [pair for pair in result["compared"] if not pair["reason"]]
        if pairs:
            tensors = [found for pair in pairs for found in pair["tensors"].values()]
            worst = max(found["apart"] for found in tensors)
            rows.append((of, str(len(pairs)), str(len(tensors)), f"{worst:.1e}"))
    columns = ("function", "variants", "outputs and gradients", "at most apart")
    return Table("Operations that are the same in unit-scaling", columns, tuple(rows))


def _different(pairs: Sequence[Result]) -> Table:
    rows = tuple(_row(pair) for pair in pairs if pair["reason"])
    columns = ("operation", "here / there", "at most apart", "left once explained", "why")
    return Table("What differs", columns, rows)


def _row(pair: Result) -> tuple[str, ...]:
    tensors = pair["tensors"]
    larger = {t: f"{found['larger']:.4f}" for t, found in tensors.items() if found["apart"] > SAME}
    most = (f"{max(found[what] for found in tensors.values()):.1e}" for what in ("apart", "left"))
    return pair["name"], _listed(larger), *most, pair["reason"]


def _listed(words: Mapping[str, str]) -> str:
    """A word a tensor, those of the same one together."""
    by_word: dict[str, list[str]] = {}
    for tensor, word in words.items():
        by_word.setdefault(word, []).append(tensor)
    return "; ".join(f"{', '.join(names)} {word}" for word, names in by_word.items())


def _nearer(scales: Sequence[tuple[str, str, Result]]) -> Table:
    rows = [
        (
            f"{name}: {tensor}",
            f"{found['there']:.3f}",
            f"{found['here']:.3f}",
            f"{found['error']:.3f}",
            _which(found),
        )
        for name, tensor, found in scales
    ]
    columns = ("tensor", "scale there", "here", "standard error", "nearer to one")
    return Table("Where factors differ: scales of normal operands", columns, tuple(rows))


def _off(scale: float) -> float:
    return abs(math.log(scale))


def _which(found: Result) -> str:
    here, there = (_off(found[side]) for side in ("here", "there"))
    if abs(here - there) <= SURE * found["error"]:
        return "level"
    return "here" if here < there else "there"


def claims(results: Mapping[str, Result]) -> tuple[Claim, ...]:
    """Return that all is compared, and the same or different as explained, and what scales are."""
    if not results:
        return ()
    pairs = _compared(results)
    same = [pair for pair in pairs if not pair["reason"]]
    other = [pair for pair in pairs if pair["reason"]]
    left_out = sorted({name for result in results.values() for name in result["left out"]})
    return (
        Claim(
            "every function of unit_scaling.functional is compared",
            not left_out,
            f"{len(results)} functions" + f"; left out: {', '.join(left_out)}" * bool(left_out),
        ),
        _within("where formulas are the same, outputs and gradients agree", same, "apart"),
        _within("where they are not, they differ by what is said, alone", other, "left"),
        *_of_scales(_scales(results)),
    )


def _within(text: str, pairs: Sequence[Result], what: str) -> Claim:
    found = {
        f"{pair['name']}: {tensor}": each[what]
        for pair in pairs
        for tensor, each in pair["tensors"].items()
    }
    odd = [name for name, value in found.items() if not value <= SAME]
    detail = f"{len(found)} tensors, at most {max(found.values()):.1e}" if found else "no tensors"
    if odd:
        detail += f"; not: {', '.join(odd)}"
    return Claim(f"{text} to {SAME:g}", bool(found) and not odd, detail)


def _of_scales(scales: Sequence[tuple[str, str, Result]]) -> list[Claim]:
    counts = dict.fromkeys(("here", "there", "level"), 0)
    for *_, found in scales:
        counts[_which(found)] += 1
    names = [f"{name}: {tensor}" for name, tensor, found in scales if _which(found) == "there"]
    detail = f"{counts['here']} of {len(scales)}, {counts['level']} level"
    detail += f", there {counts['there']}" + f" ({', '.join(names)})" * bool(names)
    worst = {
        side: max(scales, key=lambda row, side=side: _off(row[2][side]), default=None)
        for side in ("here", "there")
    }
    if worst["here"] is None or worst["there"] is None:
        return []
    far = ", ".join(
        f"{side} {found[side]:.3f} ({name}: {tensor})"
        for side, (name, tensor, found) in worst.items()
    )
    within = all(_off(row["here"]) <= AT_ONE + SURE * row["error"] for *_, row in scales)
    return [
        Claim(f"where factors differ, scales are within {AT_ONE:.0%} of one here", within, far),
        Claim(
            "and nearer to one here more often than there", counts["here"] > counts["there"], detail
        ),
    ]


def notes(results: Mapping[str, Result]) -> tuple[str, ...]:
    """Return what was compared and how, the reasons, or that it was skipped."""
    if not results:
        return (SKIPPED,)
    versions = next(iter(results.values()))["versions"]
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    seen = dict.fromkeys(pair["reason"] for pair in _compared(results) if pair["reason"])
    reasons = [f"{reason}: {REASONS[reason]}" for reason in seen]
    return (f"compared with {made}: {HOW}", DEFAULTS, JUDGED, *reasons)
