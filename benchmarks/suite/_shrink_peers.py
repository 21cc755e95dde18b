"""Shrinking compared with Torch-Pruning: the same weights, importance and share of units.

A part of a benchmark: cases, and what is shown of their results.  Without PyTorch and
Torch-Pruning there are no cases, and a note says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from benchmarks.foreign.torch_peers import run_program, run_twin
from benchmarks.foreign.torch_programs import NORM, PROGRAMS
from benchmarks.foreign.torch_twins import TWINS
from benchmarks.registry import Case, Claim, Options, Result, Table

SHARES = (0.5, 0.75)
REQUIRES = ("torch", "torch_pruning")
SKIPPED = (
    "Torch-Pruning comparison skipped: needs torch and torch-pruning: "
    "pip install torch torch-pruning"
)
OUTPUTS = 1e-5
"""Two frameworks round differently."""
ZEROED = 1e-6
STEPS = ("groups", "importance", "pruning")


def missing() -> list[str]:
    """Return the packages of the comparison that are not here."""
    return [name for name in REQUIRES if not importlib.util.find_spec(name)]


def cases(options: Options) -> Sequence[Case]:
    """Return a case per model and share, and one per program; none without Torch-Pruning."""
    del options
    if missing():
        return ()
    models = [
        Case(f"peers {twin.name} {share:.0%}", partial(run_twin, twin, share))
        for share in SHARES
        for twin in TWINS
    ]
    # The wide norm needs more units to go for Torch-Pruning to mix up the others.
    shares = [(twin, 0.75 if twin is NORM else 0.5) for twin in PROGRAMS]
    tiny = [Case(f"peers {t.name} {s:.0%}", partial(run_program, t, s)) for t, s in shares]
    return [*models, *tiny]


def own(results: Mapping[str, Result]) -> dict[str, Result]:
    """Return the results that are of this comparison."""
    return {name: r for name, r in results.items() if name.startswith("peers ")}


def _of(results: Mapping[str, Result], kind: str) -> list[Result]:
    return [r for r in own(results).values() if r["kind"] == kind]


def tables(results: Mapping[str, Result]) -> tuple[Table, ...]:
    """Return what was found alike, which groups differ, the tiny programs, and the times."""
    models, programs = _of(results, "model"), _of(results, "program")
    made = []
    if models:
        made += [_agreement(models), _differences(models), _times(models)]
    if programs:
        made.append(_programs(programs))
    return tuple(table for table in made if table.rows)


def _agreement(models: list[Result]) -> Table:
    columns = (
        "model, units taken away",
        "groups there",
        "the same here",
        "units alike",
        "outputs apart",
        "own formula: units alike",
        "outputs apart",
    )
    rows = [
        (
            f"{r['model']}, {r['share']:.0%}",
            str(len(r["groups"])),
            str(sum(group["same"] for group in r["groups"])),
            "{} of {}".format(*_alike(r)),
            f"{r['error']:.1e}",
            f"{r['own formula']['common']} of {r['own formula']['kept']}",
            f"{r['own formula']['error']:.1e}",
        )
        for r in models
    ]
    return Table("Torch-Pruning: the same weights, importance and share", columns, tuple(rows))


def _alike(result: Result, same: bool = True) -> tuple[int, int]:
    """How many units both keep, and how many there are, in groups that both have."""
    units = [u for g in result["groups"] if g["same"] == same for u in g["units"]]
    return sum(u["common"] for u in units), sum(u["kept"] for u in units)


def _differences(models: list[Result]) -> Table:
    rows = []
    for result, group in _differing(models):
        here = "; ".join(group["axes"].values()) or "nothing"
        more = [f"{words}: {group[words]}" for words in ("only there", "only here") if group[words]]
        rows.append((f"{result['model']}, {group['root']}", "; ".join([here, *more])))
    return Table(
        "Groups that differ",
        ("a group of Torch-Pruning's", "axes here"),
        tuple(dict.fromkeys(rows)),
    )


def _differing(models: list[Result]) -> Iterator[tuple[Result, Result]]:
    for result in models:
        for group in result["groups"]:
            if not group["same"]:
                yield result, group


def _times(models: list[Result]) -> Table:
    columns = ("model, units taken away", *(f"{s}, {w}" for s in STEPS for w in ("there", "here")))
    rows = []
    for r in models:
        there, here = r["seconds"]["there"], r["seconds"]["here"]
        cells = []
        for step in STEPS:
            again = f"{1e3 * here[step]:.1f} ms (first {1e3 * here[f'first {step}']:.0f})"
            cells += [f"{1e3 * there[step]:.1f} ms", again]
        rows.append((f"{r['model']}, {r['share']:.0%}", *cells))
    return Table("Times of Torch-Pruning and here", columns, tuple(rows))


def _programs(programs: list[Result]) -> Table:
    columns = ("program, units taken away", "Torch-Pruning", "here")
    rows = [
        (f"{r['model']}, {r['share']:.0%}", _outcome(r["there"], "fails"), _outcome(r["here"]))
        for r in programs
    ]
    title = "Tiny programs: how far pruned outputs are from those without the same units"
    return Table(title, columns, tuple(rows))


def _outcome(found: Result, otherwise: str = "refused") -> str:
    return f"{found['error']:.1e}" if not found["why"] else f"{otherwise}: {found['why']}"


def claims(results: Mapping[str, Result]) -> tuple[Claim, ...]:
    """Return what has to hold here, whatever Torch-Pruning does."""
    models, programs = _of(results, "model"), _of(results, "program")
    return (*(_of_models(models) if models else ()), *(_of_programs(programs) if programs else ()))


def _of_models(models: list[Result]) -> tuple[Claim, ...]:
    groups = [g for r in models for g in r["groups"]]
    same, joined = sum(g["same"] for g in groups), sum(g["joined"] for g in groups)
    alone = sorted({name for r in models for name in r["alone"]})
    common, kept = (sum(each) for each in zip(*map(_alike, models), strict=True))
    unpruned = max(r["unpruned"] for r in models)
    error = max(r["error"] for r in models)
    return (
        Claim(
            "the models in PyTorch and in JAX are the same functions",
            unpruned <= OUTPUTS,
            f"outputs at most {unpruned:.1e} apart",
        ),
        Claim(
            "Torch-Pruning's groups are the axes here, or several of them together",
            same + joined == len(groups) and not alone,
            f"{same} of {len(groups)} groups are one axis, {joined} several axes",
        ),
        Claim(
            "with the same importance the same units stay",
            common == kept,
            f"{common} of {kept} units",
        ),
        Claim(
            f"pruned models of both agree to {OUTPUTS:g}",
            error <= OUTPUTS,
            f"at most {error:.1e} apart; with Torch-Pruning's own formula handed over "
            f"{max(r['own formula']['error'] for r in models):.1e}",
        ),
    )


def _of_programs(programs: list[Result]) -> tuple[Claim, ...]:
    errors = [r["here"]["error"] for r in programs if not r["here"]["why"]]
    refused = [r["model"] for r in programs if r["here"]["why"]]
    worst = max(errors, default=0.0)
    details = [f"{r['model']} {_outcome(r['there'], 'fails')}" for r in programs]
    return (
        Claim(
            "what is pruned here is the model without these units, or is refused",
            worst <= ZEROED,
            f"at most {worst:.1e} apart, refused: {', '.join(refused) or 'none'}; "
            f"Torch-Pruning: {'; '.join(details)}",
        ),
    )


def notes(results: Mapping[str, Result]) -> tuple[str, ...]:
    """Return what was compared and how, or that it was skipped."""
    if missing() and not own(results):
        return (SKIPPED,)
    models = _of(results, "model")
    if not models:
        return ()
    versions = ", ".join(f"{name} {v}" for name, v in sorted(models[0]["versions"].items()))
    how = (
        f"compared with {versions}: there an importance that sums the squares of all leaves, as "
        "'magnitude' does here. Its own formula leaves out running statistics, depthwise kernels "
        "and parameters of no layer; its scores were handed over to us.select"
    )
    times = "times there: best of three; here: best of three and the first, which compiles"
    joined = dict.fromkeys(r["model"] for r, group in _differing(models) if group["joined"])
    if not joined:
        return how, times
    common, kept = (sum(n) for n in zip(*(_alike(r, False) for r in models), strict=True))
    apart = (
        f"where Torch-Pruning joins axes ({', '.join(joined)}), outputs are compared with its "
        "scores for each of them; scored apart, as here, "
        f"{common} of {kept} units are the same"
    )
    return how, times, apart
