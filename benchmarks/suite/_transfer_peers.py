"""Transfer compared with the PyTorch packages ``mup`` and ``unit-scaling``, leaf by leaf.

A part of a benchmark: cases, and what is shown of their results.  Without the packages there are
no cases, and a note says so.  A difference is explained where it is as large as its reason says.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.foreign import torch_mup, torch_unit_scaling, transfer_twin
from benchmarks.foreign.torch_unit_scaling import DEEP, WIDE
from benchmarks.foreign.transfer_twin import BASE, FORMS, PLAIN, STEPS, TARGET, Form, Ratios, Sizes
from benchmarks.registry import Case, Claim, Options, Progress, Result, Table

REQUIRES = ("torch", "mup", "unit_scaling")
SKIPPED = (
    "comparison with mup and unit-scaling skipped: needs torch, mup and unit-scaling: "
    "pip install torch mup unit-scaling"
)
SAME = 1e-5
"""Factors are probed in single precision, and two frameworks round differently."""
SAMPLED = 0.1
APART = ("outputs", "weights", "later")
OPTIMIZERS = ("adam", "sgd")
PAIRS = (*((form, "mup_multipliers") for form in FORMS), (PLAIN, "mup"))
REASONS = {**torch_mup.REASONS, **torch_unit_scaling.REASONS}
LEFT_OUT = (
    "of no leaf, and left out: unit-scaling's constants of activations, attention and sums; its "
    "decay, which does not take the learning rate, is λ/α there where it is λ here"
)
NOT = "not explained"
MOST = 5  # words of a list in a table


def missing() -> list[str]:
    """Return the packages of the comparison that are not here."""
    return [name for name in REQUIRES if not importlib.util.find_spec(name)]


def cases(options: Options) -> Sequence[Case]:
    """Return cases per package, way to write the model, and optimizer; none without packages."""
    del options
    if missing():
        return ()
    made = [
        Case(f"peers mup, {form.name}, {rule}, {each}", partial(_mup, form, rule, each))
        for form, rule in PAIRS
        for each in OPTIMIZERS
    ]
    made.append(Case("peers mup, steps", _steps))
    for of, sizes in (("target", DEEP), ("base", BASE)):
        made.append(Case(f"peers unit-scaling, {of}", partial(_unit_scaling, of, sizes)))
    for each in OPTIMIZERS:
        made.append(Case(f"peers unit-scaling, gradients, {each}", partial(_gradients, each)))
    return made


def own(results: Mapping[str, Result]) -> dict[str, Result]:
    """Return the results that are of this comparison."""
    return {name: r for name, r in results.items() if name.startswith("peers ")}


# Comparing


def compared(
    there: Mapping[str, Mapping[str, float]],
    mine: Mapping[str, Mapping[str, float]],
    reasons: Callable[[str], Ratios],
) -> dict[str, Result]:
    """Return the factors of both by leaf, and why they differ."""
    if set(there) != set(mine):
        raise ValueError(f"the models have other parameters: {set(there) ^ set(mine)}")
    found: dict[str, Result] = {}
    for name, values in there.items():
        given = reasons(name)
        row: Result = {"there": dict(values), "here": {}, "why": {}}
        for each, value in values.items():
            row["here"][each] = mine[name][each]
            larger = mine[name][each] / value
            if abs(larger - 1) > SAME:
                row["why"][each] = _explained(given, each, larger)
        found[name] = row
    return found


def _explained(given: Ratios, factor: str, larger: float) -> list[str]:
    """The reasons that together make this factor so much larger here; else that there are none."""
    made = {reason: ratios[factor] for reason, ratios in given if factor in ratios}
    if abs(larger / math.prod(made.values()) - 1) > SAME:
        return [NOT]
    return [reason for reason, ratio in made.items() if abs(ratio - 1) > SAME]


def _head(package: str, of: str, rule: str, optimizer: str, leaves: Result) -> Result:
    versions = {name: importlib.metadata.version(name) for name in ("torch", package)}
    how = {"package": package, "of": of, "rule": rule, "optimizer": optimizer}
    return {"kind": "factors", **how, "versions": versions, "leaves": leaves}


def _mup(form: Form, rule: str, optimizer: str, options: Options, progress: Progress) -> Result:
    del options
    progress.start(2, "libraries")
    there = torch_mup.factors(form, optimizer)
    sampled = max(torch_mup.sampled(form, sizes) for sizes in (BASE, TARGET))
    progress.advance(note="mup")
    mine = transfer_twin.here(form, BASE, TARGET, rule, optimizer)
    multipliers = {name: values["multiplier"] for name, values in mine.items()}
    why = partial(torch_mup.reasons, form, rule, optimizer, multipliers)
    progress.advance(note="here")
    head = _head("mup", form.name, rule, optimizer, compared(there, mine, why))
    return {**head, "sampled": sampled}


def _unit_scaling(of: str, target: Sizes, options: Options, progress: Progress) -> Result:
    del options
    progress.start(2, "libraries")
    there = torch_unit_scaling.factors(target)
    progress.advance(note="unit-scaling")
    mine = torch_unit_scaling.here(target, "adam")
    why = partial(torch_unit_scaling.reasons, target)
    progress.advance(note="here")
    head = _head("unit-scaling", of, "u_mup", "adam", compared(there, mine, why))
    shares = [torch_unit_scaling.branches(sizes.layers) for sizes in (BASE, target)]
    return {**head, "branches": shares, "last": mine["layers.0.down.bias"]["multiplier"]}


def _gradients(optimizer: str, options: Options, progress: Progress) -> Result:
    """ε and SGD's rates for true gradients, from the base to the target."""
    del options
    progress.start(2, "libraries")
    base, wide = (torch_unit_scaling.gradients(sizes, optimizer) for sizes in (BASE, WIDE))
    progress.advance(note="unit-scaling")
    mine = [torch_unit_scaling.here(sizes, optimizer) for sizes in (BASE, WIDE)]
    there, grown = (torch_unit_scaling.over(*each) for each in ((wide, base), mine[::-1]))
    progress.advance(note="here")
    leaves = compared(there, grown, torch_unit_scaling.reasons_of_gradients)
    return _head("unit-scaling", "gradients", "u_mup", optimizer, leaves)


# Steps


def _steps(options: Options, progress: Progress) -> Result:
    del options
    pairs = [(form, rule, each) for form, rule in PAIRS for each in OPTIMIZERS if not form.across]
    progress.start(len(pairs), "trainings in both")
    runs = []
    for form, rule, each in pairs:
        what = {"of": form.name, "rule": rule, "optimizer": each}
        plan = transfer_twin.planned(form, BASE, TARGET)
        runs.append(what | torch_mup.stepped(plan, form, rule, each))
        progress.advance(note=f"{form.name}, {rule}, {each}")
    return {"kind": "steps", "runs": runs}


# What is shown


def _factors(results: Mapping[str, Result]) -> list[Result]:
    return [r for r in own(results).values() if r["kind"] == "factors"]


def _one(results: Mapping[str, Result], *what: str) -> Result | None:
    """The result of a package, a model, a rule and an optimizer."""
    keys = ("package", "of", "rule", "optimizer")
    return next((r for r in _factors(results) if tuple(r[key] for key in keys) == what), None)


def tables(results: Mapping[str, Result]) -> tuple[Table, ...]:
    """Return factors of both per package, all that differs, and the steps."""
    adam, sgd = (_one(results, "mup", PLAIN.name, "mup_multipliers", x) for x in OPTIMIZERS)
    made = []
    if adam and sgd:
        of_adam = [(adam, x) for x in ("init", "start", "multiplier", "lr", "weight decay")]
        columns = [*of_adam, (sgd, "lr"), (sgd, "decay of a step")]
        made.append(_leaves("mup and us.transfer(plan, 'mup_multipliers')", columns))
    if deep := _one(results, "unit-scaling", "target", "u_mup", "adam"):
        columns = [(deep, x) for x in ("init", "multiplier", "lr", "weight decay")]
        made.append(_leaves("unit-scaling and us.transfer(plan, 'u_mup')", columns))
    grown = [_one(results, "unit-scaling", "gradients", "u_mup", x) for x in OPTIMIZERS]
    if grown[0] and grown[1]:
        title = "unit-scaling: ε and SGD's rate for true gradients, target over base"
        made.append(_leaves(title, [(grown[0], "ε"), (grown[1], "lr")]))
    made.append(_differences(_factors(results)))
    made += [_runs(r["runs"]) for r in own(results).values() if r["kind"] == "steps"]
    return tuple(table for table in made if table.rows)


def _leaves(title: str, columns: Sequence[tuple[Result, str]]) -> Table:
    """A row per parameter, and one for all layers where they are alike."""
    first = columns[0][0]["leaves"]
    rows: dict[tuple[str, ...], None] = {}
    for name in first:
        cells, why = [], []
        for result, factor in columns:
            leaf = result["leaves"][name]
            there, mine = (_word(leaf[side][factor]) for side in ("there", "here"))
            reasons = leaf["why"].get(factor, [])
            cells.append(f"{there}, here {mine}" if reasons else there)
            why += reasons
        same = ", ".join(dict.fromkeys(why)) or "yes"
        rows[(_starred(name), *cells, same)] = None
    heads = tuple(f"{factor}, {r['optimizer']}" for r, factor in columns)
    return Table(title, ("parameter", *heads, "same"), tuple(rows))


def _starred(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _word(x: float) -> str:
    for square in (False, True):
        value = x * x if square else x
        for up in (value, 1 / value):
            if abs(up - round(up)) < SAME * up:
                whole = f"√{up:.0f}" if square else f"{up:.0f}"
                return whole if up == value else f"1/{whole}"
    return f"{x:.4g}"


def _differences(factors: Sequence[Result]) -> Table:
    """What differs: by reason and factor, how much and where."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for result in factors:
        for name, leaf in result["leaves"].items():
            for factor, why in leaf["why"].items():
                row = found.setdefault((_label(result), ", ".join(why), factor), {})
                larger = _word(leaf["here"][factor] / leaf["there"][factor])
                row.setdefault("larger", []).append(larger)
                row.setdefault("names", []).append(_starred(name))
                row.setdefault("of", []).append(result["of"])
    rows = []
    for key, row in found.items():
        every = {r["of"] for r in factors if _label(r) == key[0]}
        where = "all" if every == set(row["of"]) else _listed(row["of"])
        rows.append((*key, _listed(row["larger"]), _listed(row["names"]), where))
    columns = ("of", "why", "factor", "here / there", "parameters", "models")
    return Table("Factors that differ from those of mup and unit-scaling", columns, tuple(rows))


def _label(result: Result) -> str:
    """The package, and of unit-scaling which comparison it is."""
    return "mup" if result["package"] == "mup" else f"unit-scaling, {result['of']}"


def _listed(words: Sequence[str]) -> str:
    each = list(dict.fromkeys(words))
    more = f" and {len(each) - MOST} more" if len(each) > MOST else ""
    return ", ".join(each[:MOST]) + more


def _runs(runs: Sequence[Result]) -> Table:
    columns = ("model, rule, optimizer", "outputs apart", "weights apart", "outputs apart then")
    rows = [
        (f"{r['of']}, {r['rule']}, {r['optimizer']}", *(f"{r[each]:.1e}" for each in APART))
        for r in runs
    ]
    return Table(f"mup's model and the one here, {STEPS} steps of each", columns, tuple(rows))


def claims(results: Mapping[str, Result]) -> tuple[Claim, ...]:
    """Return that all factors are the same or differ for a reason, and that trainings agree."""
    groups: dict[str, list[Result]] = {}
    for r in _factors(results):
        groups.setdefault(f"{_label(r)}, {r['optimizer']}", []).append(r)
    made = [_of_factors(of, group) for of, group in groups.items()]
    every = own(results).values()
    if sampled := [r["sampled"] for r in every if "sampled" in r]:
        made.append(
            Claim(
                "PyTorch's layers start as initial=(base, target) had it",
                max(sampled) <= SAMPLED,
                f"deviations over seeds at most {max(sampled):.1%} from those documented",
            )
        )
    made += [_of_branches(r) for r in every if r.get("of") == "target"]
    made += [_of_steps(r["runs"]) for r in every if r["kind"] == "steps"]
    return tuple(made)


def _of_factors(of: str, group: Sequence[Result]) -> Claim:
    leaves = [leaf for r in group for leaf in r["leaves"].values()]
    every, differ = (sum(len(leaf[what]) for leaf in leaves) for what in ("there", "why"))
    why = _whys(group)
    odd = [what for reason, what in why if reason == NOT]
    known = dict.fromkeys(reason for reason, _ in why if reason != NOT)
    detail = f"{every - differ} of {every} factors are the same"
    if known:
        detail += f"; as explained differ: {', '.join(known)}"
    if odd:
        detail += f"; {NOT}: {_listed(odd)}"
    return Claim(f"{of}: factors agree leaf by leaf, or differ as explained", not odd, detail)


def _whys(factors: Sequence[Result]) -> list[tuple[str, str]]:
    """Every reason, and what of which parameters it is for."""
    return [
        (reason, f"{factor} of {_starred(name)}")
        for r in factors
        for name, leaf in r["leaves"].items()
        for factor, why in leaf["why"].items()
        for reason in why
    ]


def _of_branches(result: Result) -> Claim:
    base, target = (max(shares) for shares in result["branches"])
    spread = base - min(result["branches"][0]) + target - min(result["branches"][1])
    alike = abs(target / base / result["last"] - 1) <= SAME and spread <= SAME
    detail = f"{base:.4g} → {target:.4g} of the embedding there, times {result['last']:.4g} here"
    return Claim("unit-scaling's residual branches shrink with depth as here", alike, detail)


def _of_steps(runs: Sequence[Result]) -> Claim:
    worst = max(r[each] for r in runs for each in APART)
    moved = min(r["moved"] for r in runs)
    return Claim(
        f"mup's optimizers and optax's under us.scale_optimizer train alike to {SAME:g}",
        worst <= SAME < moved,
        f"outputs and weights at most {worst:.1e} apart in {len(runs)} trainings of {STEPS} steps, "
        f"which changed outputs by {moved:.1%} at least",
    )


def notes(results: Mapping[str, Result]) -> tuple[str, ...]:
    """Return what was compared and how, the reasons, or that it was skipped."""
    if missing() and not own(results):
        return (SKIPPED,)
    factors = _factors(results)
    if not factors:
        return ()
    versions = dict(pair for r in factors for pair in r["versions"].items())
    made = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    how = (
        f"compared with {made}: rates and decay are read off the optimizers, multipliers probed "
        "layer by layer, initial values drawn twice from one seed; 'init' is σ'/σ (of unit-scaling "
        "σ'), 'start' what PyTorch's own initial values are multiplied by"
    )
    seen = dict.fromkeys(reason for reason, _ in _whys(factors) if reason in REASONS)
    return (how, LEFT_OUT, *(f"{reason}: {REASONS[reason]}" for reason in seen))
