"""`coord_check`: do activations move alike at all widths, under right rules and under wrong ones?

A Transformer on real text, traced and not touched: every product with a parameter is a module.
Rules of ``us.transfer`` should pass; the standard parametrization, and μP with one thing wrong,
should be caught.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

import uscale_jax as us
from benchmarks import data
from benchmarks.models.functional import TransformerConfig
from benchmarks.registry import (
    Benchmark,
    Case,
    Claim,
    Options,
    Panel,
    Plot,
    Progress,
    Report,
    Result,
    Series,
    Table,
)
from benchmarks.suite import _grow_train as training
from benchmarks.suite._transfer_sweep import Sweep, transferred
from benchmarks.training import cross_entropy_bits

BASE = TransformerConfig(data.VOCAB, 32, 2, 2, 1, 16, 96)
EPSILON = 1e-3
"""Of the check in which ε matters: larger than gradients at all widths."""


@dataclass(frozen=True)
class Check:
    """A rule, an optimizer, and what is wrong with the rule."""

    rule: str = "mup"
    optimizer: str = "adam"
    rate: float = 0.01
    eps: float = 1e-8
    planted: str = ""
    right: bool | None = True
    """Whether it should pass; None where nothing is claimed."""


def _swapped(leaf: us.LeafTransfer) -> us.LeafTransfer:
    """A leaf that learns by its outputs, not by its inputs."""
    grown = leaf.facts.fan_out.ratio if leaf.role == "hidden" else 1.0
    return replace(leaf, learning_rate=1 / grown) if leaf.role != "output" else leaf


def _plain_readout(leaf: us.LeafTransfer) -> us.LeafTransfer:
    return replace(leaf, learning_rate=1.0, init=1.0) if leaf.role == "output" else leaf


def _plain_epsilon(leaf: us.LeafTransfer) -> us.LeafTransfer:
    return replace(leaf, factors=replace(leaf.factors, eps=1.0))


PLANTED: Mapping[str, Callable[[us.LeafTransfer], us.LeafTransfer]] = {
    "hidden kernels by fan-out": _swapped,
    "readout left as it is": _plain_readout,
    "ε left as it is": _plain_epsilon,
    "SGD's factors under Adam": lambda leaf: leaf,
}
CHECKS = {
    "μP, Adam": Check(),
    "μP in multipliers, Adam": Check("mup_multipliers"),
    # Under SGD what fades at first (queries and keys) is near the tolerance for tens of steps.
    "μP, SGD": Check(optimizer="sgd", rate=0.3, right=None),
    "μP, Adam, ε = 0.001": Check(eps=EPSILON, rate=0.02),
    "standard, Adam": Check("standard", right=False),
    "hidden kernels by fan-out": Check(planted="hidden kernels by fan-out", right=False),
    "readout left as it is": Check(planted="readout left as it is", right=False),
    "ε left as it is": Check(eps=EPSILON, rate=0.02, planted="ε left as it is", right=False),
    "SGD's factors under Adam": Check(planted="SGD's factors under Adam", right=False),
}
WIDTHS = {"quick": (1, 2, 4, 8), "full": (1, 2, 4, 8, 16, 32)}


def _target(factor: int, check: Check) -> TransformerConfig:
    sweep = Sweep("width", BASE, (), (), 0, 0, 0, 0, 0, 0)
    target = sweep.target(factor)
    # Where fan-in and fan-out grow alike, nobody can tell one from the other.
    uneven = check.planted == "hidden kernels by fan-out"
    return replace(target, mlp=BASE.mlp) if uneven else target


def _rule(check: Check, target: TransformerConfig) -> us.Transfer:
    found = transferred(BASE, target, check.rule)
    if check.optimizer == "sgd" or check.planted == "SGD's factors under Adam":
        found = us.transfer(found.plan, check.rule, optimizer="sgd")
    if check.planted == "SGD's factors under Adam":
        found = replace(found, optimizer="adam")
    if not check.planted:
        return found
    wrong = PLANTED[check.planted]
    return replace(found, leaves={name: wrong(leaf) for name, leaf in found.leaves.items()})


def _width(check: Check, target: TransformerConfig) -> us.Width:
    model, rule = training.language_model(target), _rule(check, target)
    tx = (
        optax.sgd(check.rate) if check.optimizer == "sgd" else optax.adam(check.rate, eps=check.eps)
    )
    return us.Width(
        rule.apply(model.apply),
        lambda key: rule.start(model.init(key)),
        us.scale_optimizer(tx, rule),
    )


def _loss(logits: Any, tokens: Any, targets: Any) -> Any:
    del tokens
    return cross_entropy_bits(logits, targets)


def run_check(check: Check, options: Options, progress: Progress) -> Result:
    """Train a few steps at every width, and return what moved by how much."""
    factors = WIDTHS[options.mode]
    progress.start(1, "checks")
    text = training.read_text(options.data, options.seed, 4, 4, 32, 1)
    windows = text.windows(0).astype("int32")
    batches = [(jnp.asarray(w[:, :-1]), jnp.asarray(w[:, 1:])) for w in windows]
    models = {}
    for factor in factors:
        target = _target(factor, check)
        models[target.hidden] = _width(check, target)
    steps = 30 if check.optimizer == "sgd" else 4
    found = us.coordinate_check(models, batches, _loss, steps=steps)
    progress.advance(note=f"{len(found.failures)} of {len(found.modules)} modules fail")
    return {
        "check": asdict(check),
        "widths": list(found.widths),
        "changes": {name: each[:, -1].tolist() for name, each in found.changes.items()},
        "slopes": {name: _finite(slopes.change) for name, slopes in found.slopes.items()},
        "failures": dict(found.failures),
        "modules": len(found.modules),
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def cases(options: Options) -> Sequence[Case]:
    """Return one case per rule."""
    del options
    return [Case(name, partial(run_check, check)) for name, check in CHECKS.items()]


def report(results: dict[str, Result], options: Options) -> Report:
    """Return exponents and verdicts, and a panel a rule."""
    del options
    rows = []
    for name, result in results.items():
        slopes = [s for s in result["slopes"].values() if s is not None]
        first = next(iter(result["failures"]), "")
        rows.append(
            (
                name,
                f"{min(slopes):+.2f} … {max(slopes):+.2f}",
                f"{len(result['failures'])} of {result['modules']}",
                first,
            )
        )
    columns = ("rule", "exponents of changes", "modules that fail", "the first")
    widths = next(iter(results.values()))["widths"]
    title = f"Coordinate checks over widths {', '.join(map(str, widths))}"
    panels = tuple(_panel(name, r) for name, r in results.items() if name in SHOWN)
    plots = (Plot("coord-check", "How far outputs move, by width", panels),) if panels else ()
    return Report((Table(title, columns, tuple(rows)),), plots, tuple(_claims(results)))


SHOWN = ("μP, Adam", "standard, Adam")


def _panel(name: str, result: Result) -> Panel:
    series = tuple(
        Series(module, tuple(map(float, result["widths"])), tuple(changes), color=i)
        for i, (module, changes) in enumerate(result["changes"].items())
    )
    return Panel(name, "width", "root mean square of the change", series, scale="log")


def _claims(results: Mapping[str, Result]) -> list[Claim]:
    right, wrong = (
        {name: r for name, r in results.items() if r["check"]["right"] is each}
        for each in (True, False)
    )
    passed = [name for name, r in right.items() if not r["failures"]]
    caught = [name for name, r in wrong.items() if r["failures"]]
    return [
        Claim("right rules pass", len(passed) == len(right), ", ".join(passed)),
        Claim("wrong rules are caught", len(caught) == len(wrong), ", ".join(caught)),
    ]


BENCHMARK = Benchmark(
    name="coord_check",
    summary="activations and their changes against width, right rules and wrong ones",
    cases=cases,
    report=report,
    needs_data=True,
    config=lambda options: {name: asdict(check) for name, check in CHECKS.items()},
)
