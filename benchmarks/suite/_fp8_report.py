"""The FP8 benchmark's tables, plots and claims, made from the saved results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from benchmarks.registry import Claim, Panel, Plot, Report, Result, Series, Table
from benchmarks.suite._fp8_products import FORMATS, PRODUCTS
from benchmarks.suite._fp8_train import (
    BY_ASTYPE,
    BY_HAND,
    DOTS,
    OWN_RATE,
    Parametrization,
    Variant,
)

UNIT: Parametrization = "unit-scaled"
STANDARD: Parametrization = "standard"
WITHIN = 0.005
"""How far from bfloat16 the mean loss of float8 may be."""
BREAKS = 0.05
"""How far above bfloat16 a loss is called broken."""
FLUSHED = 0.02
"""The largest share of a tensor that unit scaling may lose."""
COLORS = {"float32": 0, "bfloat16": 2, "float8": 4, OWN_RATE: 5, BY_ASTYPE: 6, BY_HAND: 7}
WHEN = {"first": "before", "last": "after"}

Runs = Mapping[Variant, Sequence[Result]]


def runs_of(results: Mapping[str, Result]) -> Runs:
    """Return the runs of every variant, one for each seed."""
    found: dict[Variant, list[Result]] = {variant: [] for variant in DOTS}
    for result in results.values():
        if "bits" in result:
            found[Variant(result["model"], result["products"])].append(result)
    return {variant: runs for variant, runs in found.items() if runs}


def report(results: Mapping[str, Result]) -> Report:
    """Return losses, FLOPs, what is flushed, and what is claimed of them."""
    runs, flops = runs_of(results), results["products"]
    lost = {variant: each[0]["census"] for variant, each in runs.items() if "census" in each[0]}
    return Report(
        tables=(_losses(runs), _shares(flops), _flushed(lost)),
        plots=(_curves(runs), _bars(lost)),
        claims=(*_loss_claims(runs), *_product_claims(flops), *_flushed_claims(lost)),
        notes=(_noise(runs), _largest(lost)),
    )


# Losses


def final(run: Result) -> float:
    """Return the last loss; what is not finite is infinite."""
    bits = run["bits"][-1]
    return math.inf if bits is None else float(bits)


def against(runs: Runs, own: Variant, other: Variant) -> tuple[float, list[float]]:
    """Return by which share losses exceed others, in the mean of seeds and seed by seed."""
    losses = [{run["seed"]: final(run) for run in runs[variant]} for variant in (own, other)]
    pairs = [(losses[0][seed], losses[1][seed]) for seed in losses[0] if seed in losses[1]]
    means = np.mean(pairs, axis=0)
    return float(means[0] / means[1]) - 1, [a / b - 1 for a, b in pairs]


def excess(runs: Runs, model: Parametrization, products: str) -> float:
    """Return by which share the mean loss exceeds that of bfloat16."""
    return against(runs, Variant(model, products), Variant(model, "bfloat16"))[0]


def _losses(runs: Runs) -> Table:
    seeds = sorted({run["seed"] for each in runs.values() for run in each})
    rows = [
        (
            variant.name,
            *(_cell(each, seed) for seed in seeds),
            f"{excess(runs, variant.model, variant.products):+.2%}",
        )
        for variant, each in runs.items()
    ]
    columns = ("products", *(f"seed {seed}" for seed in seeds), "against own bfloat16")
    return Table("Held-out bits/byte after training", columns, tuple(rows))


def _cell(each: Sequence[Result], seed: int) -> str:
    found = [f"{final(run):.3f}" for run in each if run["seed"] == seed]
    return found[0] if found else ""


def _curves(runs: Runs) -> Plot:
    panels = []
    for model in (UNIT, STANDARD):
        series = [
            Series(
                variant.products,
                tuple(each[0]["steps"][1:]),
                _mean_curve(each),
                color=COLORS[variant.products],
                wide=variant.products == "bfloat16",
            )
            for variant, each in runs.items()
            if variant.model == model
        ]
        panels.append(Panel(model, "step", "held-out bits/byte", tuple(series)))
    return Plot("fp8-loss", "Transformers whose linear layers multiply float8", tuple(panels))


def _mean_curve(each: Sequence[Result]) -> tuple[float | None, ...]:
    columns = zip(*(run["bits"][1:] for run in each), strict=True)
    return tuple(None if None in bits else float(np.mean(bits)) for bits in columns)


def _loss_claims(runs: Runs) -> Iterator[Claim]:
    above, each = against(runs, Variant(UNIT, "float8"), Variant(UNIT, "bfloat16"))
    yield Claim(
        "unit-scaled: float8 ends within 0.5 % of bfloat16",
        abs(above) <= WITHIN,
        f"{above:+.2%} in the mean of seeds: {_percents(each)}",
    )
    for products, text in (
        ("float8", "standard: the same float8 products end at least 5 % above bfloat16"),
        (OWN_RATE, "standard: also at the best learning rate for them"),
        (BY_ASTYPE, "standard: so do operands cast by astype, differentiated by JAX"),
    ):
        above = excess(runs, STANDARD, products)
        yield Claim(text, above >= BREAKS, f"{above:+.1%}")
    by_hand = excess(runs, STANDARD, BY_HAND)
    yield Claim(
        "standard: what is missing is scales; found by hand, they bring it within 1 %",
        abs(by_hand) <= 2 * WITHIN,
        f"{by_hand:+.2%}",
    )


def _percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:+.2%}" for share in shares)


def _noise(runs: Runs) -> str:
    _, each = against(runs, Variant(UNIT, "bfloat16"), Variant(UNIT, "float32"))
    return f"how far rounding of any kind moves a run: bfloat16 from float32, {_percents(each)}"


# FLOPs


def share(counted: Result, *roles: str) -> float:
    """Return the share of the FLOPs of these roles whose operands are both float8."""
    narrow, all_ = (sum(counted[key][role] for role in roles) for key in ("float8", "flops"))
    return float(narrow / all_)


def _shares(flops: Mapping[str, Result]) -> Table:
    groups = (("hidden",), ("hidden", "readout"), ("hidden", "readout", "attention"))
    rows = [
        (name, *(f"{share(counted, *roles):.1%}" for roles in groups))
        for name, counted in flops.items()
        if any(counted["float8"].values())
    ]
    columns = ("products", "linear layers in blocks", "with the readout", "and attention")
    title = "Share of FLOPs in float8, counted in the traced program of a gradient"
    return Table(title, columns, tuple(rows))


def _product_claims(flops: Mapping[str, Result]) -> Iterator[Claim]:
    counted = flops[Variant(UNIT, "float8").name]
    hidden, linear = share(counted, "hidden"), share(counted, "hidden", "readout")
    yield Claim(
        "unit-scaled: all FLOPs of linear layers in blocks are float8, forward and backward",
        hidden == 1,
        f"{hidden:.0%}; {linear:.1%} with the readout, which stays bfloat16",
    )
    wrong = [name for name, each in flops.items() if each["flops"] != each["formula"]]
    yield Claim(
        "FLOPs counted in programs are those of the formula",
        not wrong,
        f"differ: {', '.join(wrong)}" if wrong else f"{len(flops)} programs",
    )


# What is flushed

Lost = Mapping[Variant, Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]]
"""By variant, when, product and kind of tensor."""


def of_each(lost: Lost, variant: Variant, when: str, kind: str, of: str = "flushed") -> list[float]:
    """Return a number of every product."""
    return [kinds[kind][of] for kinds in lost[variant][when].values()]


def _flushed(lost: Lost) -> Table:
    rows = [
        (f"{variant.name}: {kind}", fmt.removeprefix("float8_"), *_cells(lost, variant, kind))
        for variant in lost
        for kind, fmt in FORMATS.items()
    ]
    columns = [f"{what} {when}" for when in WHEN.values() for what in ("RMS", "flushed", "zero")]
    title = "What products read, and gradients of results: flushed to zero (worst), and zero in all"
    return Table(title, ("tensors", "format", *columns), tuple(rows))


def _cells(lost: Lost, variant: Variant, kind: str) -> Iterator[str]:
    for when in WHEN:
        rms = of_each(lost, variant, when, kind, "rms")
        flushed = of_each(lost, variant, when, kind)
        yield f"{min(rms):.1g}–{max(rms):.1g}"
        yield f"{np.mean(flushed):.1%} ({max(flushed):.0%})"
        yield f"{np.mean(of_each(lost, variant, when, kind, 'zero')):.1%}"


def _largest(lost: Lost) -> str:
    found = {
        f"{variant.name}: {kind} of {name}, {WHEN[when]} training": kinds[kind]["largest"]
        for variant, ends in lost.items()
        for when, census in ends.items()
        for name, kinds in census.items()
        for kind in kinds
    }
    most = max(found, key=lambda name: found[name])
    return f"the largest number is {found[most]:.0%} of what its format holds ({most})"


def _bars(lost: Lost) -> Plot:
    panels = []
    for when, text in WHEN.items():
        series = [
            Series(variant.name, PRODUCTS, _by_product(lost[variant][when]), color=4 - 2 * index)
            for index, variant in enumerate(lost)
        ]
        title = f"{text} training"
        panels.append(Panel(title, "linear layer", "% zero in E5M2", tuple(series), kind="bar"))
    return Plot("fp8-flushed", "Gradients of results of linear layers", tuple(panels))


def _by_product(census: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[float, ...]:
    """The mean over layers, in percent."""
    at: Callable[[str], list[float]] = lambda name: [  # noqa: E731
        100 * kinds["cotangents"]["zero"]
        for where, kinds in census.items()
        if where.split("/")[1] == name
    ]
    return tuple(float(np.mean(at(name))) for name in PRODUCTS)


def _flushed_claims(lost: Lost) -> Iterator[Claim]:
    unit, standard = Variant(UNIT, "float8"), Variant(STANDARD, "float8")
    worst = {
        f"{kind} {WHEN[when]} it": max(of_each(lost, unit, when, kind))
        for kind in FORMATS
        for when in WHEN
    }
    most = max(worst, key=lambda name: worst[name])
    cotangents = of_each(lost, standard, "first", "cotangents")
    yield Claim(
        "unit-scaled: float8 flushes at most 2 % of any tensor, before training and after it",
        worst[most] <= FLUSHED,
        f"{worst[most]:.1%} of {most}; standard: {max(cotangents):.0%} of a gradient before it",
    )
