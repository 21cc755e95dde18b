"""The tour's tables, plots and claims, made from the saved results alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.registry import Claim, Options, Panel, Plot, Report, Result, Series, Table

SMOOTHING = 8
# Powers of two scale exactly; what may remain is the reordering of a sum of float32 products.
LOGIT_TOLERANCE = 64 * float(np.finfo(np.float32).eps)
BITS_TOLERANCE = 1e-3
FACTOR_TOLERANCE = 0.01
# Equal in exact arithmetic; float32 rounding is amplified from step to step.
GROWN_TOLERANCE = 1e-2
EXPECTED_FACTORS = {"wrong order": 1.0, "right order": 0.5}
COLUMNS = ("branch", "lr factor", "max logit change", "just after", "at the end", "vs unchanged")

NOTES = (
    (
        "W' = kW, α/k: scaling the values alone changes what such a model computes; the table "
        "shows by how much, just after the change and after the model has learned to live with it."
    ),
    (
        "W' = kW, read W'/k, αk: weights stored k times as large and divided when read. Gradients "
        "become g/k, so Adam's moments and ε are rescaled, and nothing else changes, for any model."
    ),
    (
        "α/k before Adam: Adam divides by the size of its gradients, so the factor cancels and the "
        "run equals the unchanged one. After Adam the learning rate really is α/k; that a smaller "
        "one can end lower here is what any decay does at the end of so short a run."
    ),
)


def report(results: dict[str, Result], options: Options) -> Report:
    """Return one table, one panel per plot and the claims of each model."""
    warned = [
        f"the library on the wrong order: {text}"
        for result in results.values()
        for text in result["warnings"]
    ]
    return Report(
        tables=tuple(
            table
            for name, result in results.items()
            for table in (
                _table(name, result),
                _growth_table(name, result["growth"]),
                _shrink_table(name, result["shrinking"]),
            )
        ),
        plots=(_loss_plot(results), _difference_plot(results), _held_out_plot(results)),
        claims=tuple(
            claim
            for name, one in results.items()
            for claim in (
                *_claims(name, one),
                *_growth_claims(name, one["growth"]),
                *_shrink_claims(name, one["shrinking"]),
            )
        ),
        notes=(*NOTES, *warned[:1], _plan_note(results)),
    )


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _table(name: str, result: Result) -> Table:
    """Return a row per branch."""
    size = result["size"]
    unchanged = result["branches"][0]
    rows = [
        (
            branch["name"],
            _number(branch["lr_factor"], ".3f"),
            _number(branch["max_logit_change"], ".3g"),
            _number(branch["bits_just_after"], ".4f"),
            _number(branch["bits_after"], ".4f"),
            _number(_difference(branch["bits_after"], unchanged["bits_after"]), "+.4f"),
        )
        for branch in result["branches"]
    ]
    title = (
        f"{name}: {result['parameters']:,} parameters, {size['steps']} steps from scratch, "
        f"{size['branch_steps']} more per branch\n"
        f"held-out bits per byte: {_number(result['bits_untrained'], '.2f')} untrained, "
        f"{_number(result['bits_trained'], '.2f')} trained, {result['unigram_bits']:.2f} unigram"
    )
    return Table(title, COLUMNS, tuple(rows))


def _growth_table(name: str, growth: Result) -> Table:
    """Return the grown model beside the small one, trained on the same batches."""
    small, big = growth["parameters"]
    runs = {"small, trained on": growth["small"], **growth["ways"]}
    rows = [
        (
            label if label.startswith("small") else f"grown, {label}",
            _number(
                growth["bits_before" if label.startswith("small") else "bits_just_after"], ".4f"
            ),
            _number(run["bits_after"], ".4f"),
            _number(_largest_difference(run, growth["small"]), ".1e"),
        )
        for label, run in runs.items()
    ]
    title = (
        f"{name}: grown from {small:,} to {big:,} parameters by us.plan and us.grow, verified: "
        f"relative error {growth['error']:.1e}"
    )
    columns = ("run", "just after", "at the end", "largest difference of training losses")
    return Table(title, columns, tuple(rows))


def _largest_difference(run: Result, other: Result) -> float | None:
    pairs = zip(run["losses"], other["losses"], strict=True)
    apart = [_difference(a, b) for a, b in pairs]
    return max((abs(d) for d in apart if d is not None), default=None)


def _growth_claims(name: str, growth: Result) -> Iterator[Claim]:
    """Yield that growth changes nothing, and that its learning rates are what keeps it so."""
    step = _difference(growth["bits_just_after"], growth["bits_before"])
    yield Claim(
        f"{name}: the grown model starts with the loss of the small one",
        step is not None and abs(step) <= BITS_TOLERANCE,
        f"{_number(step, '+.1e')} bits/byte, at most ±{BITS_TOLERANCE:g}",
    )
    planned, single = (_largest_difference(run, growth["small"]) for run in growth["ways"].values())
    yield Claim(
        f"{name}: with the plan's learning rates it trains as the small one does",
        planned is not None and planned <= GROWN_TOLERANCE,
        f"training losses differ by {_number(planned, '.1e')}, at most {GROWN_TOLERANCE:g}",
    )
    yield Claim(
        f"{name}: with one learning rate for all it does not",
        single is not None and planned is not None and single > 4 * planned,
        f"training losses differ by {_number(single, '.1e')}",
    )


def _shrink_table(name: str, shrinking: Result) -> Table:
    """Return what is left of the model by each way of choosing units."""
    big, small = shrinking["parameters"]
    rows = [
        (method, _number(row["bits_just_after"], ".4f"), _number(row["bits_after"], ".4f"))
        for method, row in shrinking["rows"].items()
    ]
    title = (
        f"{name}: cut from {big:,} to {small:,} parameters by us.importance and us.shrink; "
        f"{_number(shrinking['bits_before'], '.4f')} before"
    )
    return Table(title, ("units by", "just after", "at the end"), tuple(rows))


def _shrink_claims(name: str, shrinking: Result) -> Iterator[Claim]:
    """Yield that measuring is worth it."""
    rows = shrinking["rows"]
    random, best = (rows[m]["bits_just_after"] for m in ("random", "reconstruction"))
    gain = _difference(random, best)
    yield Claim(
        f"{name}: units chosen by reconstruction lose less than units chosen at random",
        gain is not None and gain > 0,
        f"{_number(best, '.4f')} against {_number(random, '.4f')} bits/byte",
    )


def _plan_note(results: dict[str, Result]) -> str:
    name, result = next(iter(results.items()))
    return "\n".join([f"part of the plan of {name}:", *result["growth"]["plan"]])


def _claims(name: str, result: Result) -> Iterator[Claim]:
    """Yield what the tour promises about one model."""
    unchanged = result["branches"][0]
    bits, unigram = result["bits_trained"], result["unigram_bits"]
    yield Claim(
        f"{name}: the trained model beats the unigram entropy of the held-out text",
        bits is not None and bits < unigram,
        f"{_number(bits, '.3f')} < {unigram:.3f} bits/byte",
    )
    for branch in result["branches"]:
        title = f"{name}: {branch['name']}"
        if branch["kind"] == "exact":
            yield from _exactness(title, branch, unchanged, result["max_logit"])
        elif branch["kind"] in EXPECTED_FACTORS:
            yield _factor_claim(title, EXPECTED_FACTORS[branch["kind"]], branch["lr_factor"])


def _factor_claim(name: str, expected: float, measured: float) -> Claim:
    return Claim(
        f"{name}: the learning rate is multiplied by {expected:g}",
        abs(measured - expected) < FACTOR_TOLERANCE,
        f"measured {measured:.4f}",
    )


def _exactness(name: str, branch: Result, unchanged: Result, max_logit: float) -> Iterator[Claim]:
    """Yield the claims that storing kW and reading W'/k changes nothing."""
    change, bound = branch["max_logit_change"], LOGIT_TOLERANCE * max_logit
    yield Claim(
        f"{name}: logits are the unscaled model's within float32 rounding",
        change is not None and change <= bound,
        f"{_number(change, '.2g')} ≤ {bound:.2g}",
    )
    difference = _difference(branch["bits_after"], unchanged["bits_after"])
    yield Claim(
        f"{name}: training on ends where the unchanged model does",
        difference is not None and abs(difference) <= BITS_TOLERANCE,
        f"{_number(difference, '+.1e')} bits/byte, at most ±{BITS_TOLERANCE:g}",
    )


def _smooth(values: list[float | None]) -> tuple[float | None, ...]:
    """Return the mean over each run of steps; batches differ more than branches do."""
    array = np.array(values, dtype=float)
    means = array[: len(array) // SMOOTHING * SMOOTHING].reshape(-1, SMOOTHING).mean(axis=1)
    return tuple(float(value) if np.isfinite(value) else None for value in means)


def _curve(
    label: str, losses: list[float | None], first_step: int, color: int, wide: bool = False
) -> Series:
    y = _smooth(losses)
    x = tuple(first_step + SMOOTHING * (i + 0.5) for i in range(len(y)))
    # Equal curves lie on each other: one broad and pale, the others thin and dashed over it.
    return Series(label, x, y, color=color, dash=color, wide=wide)


def _branch_curves(result: Result, relative: bool) -> list[Series]:
    """Return a curve per branch; ``relative`` ones show the difference to "unchanged"."""
    first_step = result["size"]["steps"]
    unchanged = result["branches"][0]["losses"]
    curves = []
    for color, branch in enumerate(result["branches"], start=1):
        losses = branch["losses"]
        if relative:
            losses = [_difference(a, b) for a, b in zip(losses, unchanged, strict=True)]
        wide = branch["kind"] == "unchanged"
        curves.append(_curve(branch["name"], losses, first_step, color, wide))
    return curves


def _loss_plot(results: dict[str, Result]) -> Plot:
    """Return the training curves, the branches after the line that marks the change."""
    panels = []
    for name, result in results.items():
        curves = [_curve("from scratch", result["losses"], 0, 0), *_branch_curves(result, False)]
        y_label = "training bits per byte"
        marks = ((result["size"]["steps"], "change"),)
        panels.append(
            Panel(name, "training step", y_label, tuple(curves), scale="log", marks=marks)
        )
    return Plot(
        "loss-curves",
        f"Training before and after the change (means of {SMOOTHING} steps)",
        tuple(panels),
    )


def _difference_plot(results: dict[str, Result]) -> Plot:
    """Return each branch minus "unchanged", on the same batches, so that their noise cancels."""
    y_label = "training bits per byte minus unchanged's"
    panels = [
        Panel(name, "training step", y_label, tuple(_branch_curves(result, True)), scale="symlog")
        for name, result in results.items()
    ]
    title = f"Training after the change, against unchanged (means of {SMOOTHING} steps)"
    return Plot("difference", title, tuple(panels))


def _held_out_plot(results: dict[str, Result]) -> Plot:
    """Return held-out bits per byte of each branch, just after the change and at the end."""
    panels = []
    for name, result in results.items():
        names = tuple(branch["name"] for branch in result["branches"])
        just_after = tuple(branch["bits_just_after"] for branch in result["branches"])
        after = tuple(branch["bits_after"] for branch in result["branches"])
        series = (
            Series("just after the change", names, just_after, color=2),
            Series(f"after {result['size']['branch_steps']} steps more", names, after, color=4),
        )
        level = (result["unigram_bits"], "unigram entropy of the held-out text")
        panels.append(
            Panel(name, "", "held-out bits per byte", series, kind="bar", levels=(level,))
        )
    return Plot("held-out", "Held-out cost of each way to continue", tuple(panels))
