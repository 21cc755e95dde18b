"""`scales`: how large every tensor of a Transformer is, at first and after some training.

Three models on real text: the standard one, the same through ``us.unit_scale``, and one that is
built unit-scaled. What float8 flushes to zero or clips, by tensor, and what it costs to look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import uscale_jax as us
from benchmarks import data
from benchmarks.models import transformer_linen, transformer_unit
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
from benchmarks.timing import measure
from uscale_jax import numerics as un

STANDARD, UNIT, BUILT = "standard", "us.unit_scale", "built unit-scaled"
MODELS = (STANDARD, UNIT, BUILT)
E4M3, E5M2 = un.number_format("float8_e4m3fn"), un.number_format("float8_e5m2")
LOST = 0.1
"""A tensor does not fit a format that flushes this part of it to zero, or clips it."""


@dataclass(frozen=True)
class Setting:
    """Sizes, and how long to train."""

    sizes: TransformerConfig
    batch: int
    seq: int
    steps: int


QUICK = Setting(TransformerConfig(data.VOCAB, 96, 3, 3, 1, 32, 256), 8, 64, 60)
FULL = Setting(TransformerConfig(data.VOCAB, 512, 8, 8, 2, 64, 1408), 16, 256, 300)
RATE = {STANDARD: 2e-3, UNIT: 2e-3, BUILT: 2.0**-3}


def _setting(options: Options) -> Setting:
    return FULL if options.full else QUICK


@dataclass(frozen=True)
class Model:
    """A loss of parameters, tokens and targets, its parameters, and how it is trained."""

    loss: Callable[..., Any]
    params: Any
    tx: optax.GradientTransformation


@cache
def _text(options: Options) -> Any:
    setting = _setting(options)
    text = training.read_text(
        options.data, options.seed, setting.steps, setting.batch, setting.seq, 1
    )
    windows = text.windows(0).astype("int32")
    return jnp.asarray(windows[..., :-1]), jnp.asarray(windows[..., 1:])


def build(name: str, options: Options) -> Model:
    """Return one of the three."""
    sizes, key = _setting(options).sizes, jax.random.key(options.seed)
    tokens, targets = (jnp.asarray(each[0]) for each in _text(options))
    if name == BUILT:
        config = transformer_unit.UnitConfig(sizes)
        unit = transformer_unit.UnitTransformer(config)
        params = unit.init(key, tokens)["params"]
        factors = transformer_unit.rate_divisors(config, params)
        tx = optax.chain(optax.adam(RATE[name]), us.unit_scale_lr(factors))

        def built(params: Any, x: Any, y: Any) -> Any:
            return transformer_unit.loss(config, jnp.asarray(unit.apply({"params": params}, x)), y)

        return Model(built, params, tx)
    module = transformer_linen.Transformer(sizes)
    plain = module.init(key, tokens)["params"]

    def standard(params: Any, x: Any, y: Any) -> Any:
        logits = module.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    if name == STANDARD:
        return Model(standard, plain, optax.adam(RATE[name]))
    scaled = us.unit_scale(standard, plain, tokens, targets)
    return Model(scaled.apply, scaled.params, us.scale_optimizer(optax.adam(RATE[name]), scaled))


def run_model(name: str, options: Options, progress: Progress) -> Result:
    """Look at a model, train it, and look again."""
    model, (tokens, targets) = build(name, options), _text(options)
    progress.start(3, name)
    look = jax.jit(us.track_scales(model.loss).value_and_grad())
    before = look(model.params, tokens[0], targets[0])
    progress.advance(note="looked")

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(model.loss)(params, *batch)
        updates, state = model.tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, (tokens, targets)))
    (params, _), losses = run((model.params, model.tx.init(model.params)))
    progress.advance(note="trained")
    after = look(params, tokens[0], targets[0])
    progress.advance(note="looked again")
    return {
        "losses": np.asarray(losses, float).tolist(),
        "before": _listed(before[2]),
        "after": _listed(after[2]),
    }


def _listed(scales: us.Scales) -> list[dict[str, Any]]:
    values, gradients = jax.device_get((scales.values, scales.gradients))
    return [
        {
            "name": row.name,
            "kind": row.kind,
            "value": _rounded(values[row.name]),
            "gradient": _rounded(gradients[row.name]) if row.name in gradients else None,
        }
        for row in scales.tracked
    ]


def _rounded(sizes: us.Sizes) -> list[float]:
    return [float(f"{float(number):.4g}") for number in sizes]


def run_cost(options: Options, progress: Progress) -> Result:
    """Time a gradient, tracked and not, and that of the unit-scaled model."""
    progress.start(2, "compiling")
    batch = tuple(each[0] for each in _text(options))
    models = {name: build(name, options) for name in MODELS}
    products = us.track_scales(models[STANDARD].loss, where=lambda value: value.kind == "product")
    every = us.track_scales(models[STANDARD].loss)
    runs = {
        "gradient": jax.value_and_grad(models[STANDARD].loss),
        "products tracked": products.value_and_grad(),
        "every value tracked": every.value_and_grad(),
        UNIT: jax.value_and_grad(models[UNIT].loss),
    }
    compiled = {name: jax.jit(run) for name, run in runs.items()}
    progress.advance(note="timing")
    args = {name: models[UNIT if name == UNIT else STANDARD].params for name in runs}
    thunks = {name: partial(run, args[name], *batch) for name, run in compiled.items()}
    timings = measure(thunks, repeats=15, budget_s=60.0)
    same = _difference(thunks["gradient"]()[1], thunks["every value tracked"]()[1])
    progress.advance(note="timed")
    return {"timings": {n: asdict(t) for n, t in timings.items()}, "difference": same}


def _difference(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs)


def cases(options: Options) -> Sequence[Case]:
    """Return one case a model, and one of what it costs."""
    del options
    return [*(Case(name, partial(run_model, name)) for name in MODELS), Case("cost", run_cost)]


COLUMNS = ("model", "when", "loss", "values, rms", "gradients, rms", "unfit for E4M3", "for E5M2")


def report(results: dict[str, Result], options: Options) -> Report:
    """Return ranges of sizes, a panel a model, and the cost."""
    setting = _setting(options)
    found = {name: results[name] for name in MODELS if name in results}
    rows = [
        (name, when, f"{result['losses'][end]:.3f}", *_row(result[key]))
        for name, result in found.items()
        for when, key, end in (("at first", "before", 0), ("trained", "after", -1))
    ]
    title = f"Sizes of all tensors of a Transformer of width {setting.sizes.hidden}"
    tables = [Table(f"{title}, before and after {setting.steps} steps", COLUMNS, tuple(rows))]
    panels = tuple(_panel(name, result["before"]) for name, result in found.items())
    plots = (Plot("scales", "Root mean squares at first, by place in the program", panels),)
    claims = [claim for name in found for claim in _claims(name, found[name])]
    if "cost" in results:
        tables.append(_cost_table(results["cost"]))
        claims.append(_cost_claim(results["cost"]))
    if STANDARD in found and UNIT in found:
        claims.append(_same_claim(found[STANDARD]["losses"], found[UNIT]["losses"]))
    return Report(tuple(tables), plots if panels else (), tuple(claims))


def _sizes(rows: list[dict[str, Any]], what: str, kinds: Sequence[str]) -> list[list[float]]:
    chosen = [row[what] for row in rows if row["kind"] in kinds and row[what] is not None]
    return [sizes for sizes in chosen if sizes[0] and math.isfinite(sizes[0])]


def _row(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    cells = []
    for what in ("value", "gradient"):
        rms = [sizes[0] for sizes in _sizes(rows, what, ("parameter", "product", "value"))]
        cells.append(f"{min(rms):.1e} … {max(rms):.1e}")
    for what in ("value", "gradient"):
        lost, every = _unfit(rows, what)
        cells.append(f"{lost} of {every}")
    return (*cells,)


def _unfit(rows: list[dict[str, Any]], what: str) -> tuple[int, int]:
    """Parameters and results of products that a format flushes or clips a good part of."""
    every = _sizes(rows, what, ("parameter", "product"))
    return sum(sizes[2] > LOST or sizes[3] > LOST for sizes in every), len(every)


def _panel(name: str, rows: list[dict[str, Any]]) -> Panel:
    series = []
    for what, color in (("value", 4), ("gradient", 2)):
        at = [
            (float(i), row[what][0] or None)
            for i, row in enumerate(rows)
            if row[what] is not None and row["kind"] != "input"
        ]
        kept = [(x, y) for x, y in at if y is not None and math.isfinite(y)]
        xs, ys = (tuple(each) for each in zip(*kept, strict=True))
        series.append(Series(f"{what}s", xs, ys, color=color))
    levels = (
        (E4M3.smallest_normal, "smallest normal number of E4M3"),
        (E5M2.smallest_normal, "of E5M2"),
    )
    label = "tensors in the order of the program"
    return Panel(name, label, "root mean square", tuple(series), scale="log-y", levels=levels)


def _claims(name: str, result: Result) -> list[Claim]:
    (lost, every), (flushed, slopes) = (_unfit(result["before"], w) for w in ("value", "gradient"))
    fits = lost + flushed == 0
    text = f"{name}: parameters and products, and their gradients, fit float8 at first"
    detail = f"{lost} of {every} values and {flushed} of {slopes} gradients do not"
    if name == STANDARD:
        return [Claim(f"{name}: some tensors do not fit float8", not fits, detail)]
    return [Claim(text, fits, detail)]


def _same_claim(losses: Sequence[float], others: Sequence[float]) -> Claim:
    far = max(abs(a - b) / a for a, b in zip(losses, others, strict=True))
    text = "the model through us.unit_scale trains as the standard one, loss by loss"
    return Claim(text, far < 1e-3, f"largest relative difference {far:.1e}")


def _cost_table(result: Result) -> Table:
    rows = tuple(
        (name, f"{timing['best_s'] * 1e3:.1f} ms", f"{timing['ratio']:.2f}")
        for name, timing in result["timings"].items()
    )
    return Table("What it costs", ("gradient of a batch", "best", "ratio"), rows)


def _cost_claim(result: Result) -> Claim:
    text = "gradients of the tracked function are those of the untracked one, to rounding"
    return Claim(
        text, result["difference"] < 1e-5, f"largest difference {result['difference']:.1e}"
    )


BENCHMARK = Benchmark(
    name="scales",
    summary="sizes of all tensors, standard and unit-scaled, and the cost of looking",
    cases=cases,
    report=report,
    needs_data=True,
    config=lambda options: asdict(_setting(options)),
)
