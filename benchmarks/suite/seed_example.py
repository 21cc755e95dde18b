"""`seed_example`: 500 × 500 → 1000 × 1000 halves the learning rate, and when that is right.

The rule that unit scaling was first stated with, for fully connected nets and Adam. Here it is
what ``us.transfer`` says of the hidden kernel. It is looked at twice: a trained net that is grown
and trained on with its factors, and with others; and fresh nets, swept over learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import uscale_jax as us
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
from benchmarks.suite._transfer_sweep import STEP, Searched, losses, optimum, rate

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Setting:
    """The nets, and how they train."""

    small: int = 500
    big: int = 1000
    inputs: int = 24
    outputs: int = 10
    batch: int = 64
    steps: int = 120
    rate: float = 1e-3
    seeds: int = 3
    """Of sweeps."""
    start: int = -18
    """Where sweeps begin: at 2^(start/2)."""


SETTING = Setting()
HALVED, UNCHANGED, DOUBLED = "the plan's (α/2)", "unchanged", "doubled"
RULES = ("standard", "mup")


def apply(params: Params, x: jax.Array) -> jax.Array:
    """Return the outputs of a net with one hidden kernel."""
    h = jax.nn.relu(x @ params["in"] + params["in_bias"][None])
    h = jax.nn.relu(h @ params["hidden"] + params["hidden_bias"][None])
    return h @ params["out"]


def init(width: int, seed: int) -> Params:
    """Return He-initialised parameters."""
    keys = iter(jax.random.split(jax.random.key(seed), 3))
    he = jax.nn.initializers.he_normal()
    return {
        "in": he(next(keys), (SETTING.inputs, width)),
        "in_bias": jnp.zeros(width),
        "hidden": he(next(keys), (width, width)),
        "hidden_bias": jnp.zeros(width),
        "out": he(next(keys), (width, SETTING.outputs)),
    }


@cache
def batches(steps: int) -> tuple[jax.Array, jax.Array]:
    """Return inputs and what a narrow random net makes of them, a batch a step."""
    teacher = init(37, 7)
    x = jax.random.normal(jax.random.key(8), (steps, SETTING.batch, SETTING.inputs))
    return x, jax.vmap(partial(apply, teacher))(x)


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean squared error."""
    return jnp.mean(jnp.square(apply(params, x) - y))


@partial(jax.jit, static_argnums=0)
def _train(
    wrap: Callable[..., Any], rate: jax.Array, state: Any, data: tuple[jax.Array, jax.Array]
) -> tuple[Any, jax.Array]:
    """Take a step per batch; return the state and the loss before each step."""
    tx = wrap(optax.adam(rate))

    def step(state: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return jax.lax.scan(step, state, data)


# A trained net


@cache
def plan() -> us.Plan:
    """Return the plan from the small net to the big one."""
    small, big = (jax.eval_shape(partial(init, n, 0)) for n in (SETTING.small, SETTING.big))
    x = jax.ShapeDtypeStruct((3, SETTING.inputs), jnp.float32)
    return us.plan(apply, small, apply, big, x)


def _unchanged(tx: Any) -> Any:
    return tx


def _halved(tx: Any) -> Any:
    return us.scale_optimizer(tx, plan())


WRAPS = {HALVED: (_halved, 1), UNCHANGED: (_unchanged, 1), DOUBLED: (_unchanged, 2)}
"""What wraps the optimizer, and what the learning rate is multiplied by."""


def run_grown(options: Options, progress: Progress) -> Result:
    """Train the small net, grow it, and train both on, the big one at several learning rates."""
    setting = SETTING
    progress.start(len(WRAPS) + 2, "runs")
    x, y = batches(2 * setting.steps)
    first, second = (
        (x[: setting.steps], y[: setting.steps]),
        (x[setting.steps :], y[setting.steps :]),
    )
    params = init(setting.small, options.seed)
    rate = jnp.float32(setting.rate)
    state = (params, optax.adam(rate).init(params))
    state, _ = _train(_unchanged, rate, state, first)
    progress.advance(note="the small net")
    curves = {f"{setting.small}": _train(_unchanged, rate, state, second)[1]}
    progress.advance(note="the small net, on")
    grown = us.grow(state[0], plan())
    for name, (wrap, times) in WRAPS.items():
        # Under the plan's rates the optimizer runs in the small net's frame, its state too.
        moments = us.resize_state(state[1], plan(), optimizer=None if name == HALVED else _adam())
        curves[name] = _train(wrap, times * rate, (grown, moments), second)[1]
        progress.advance(note=name)
    rule = us.transfer(plan())
    return {
        "factors": {k: float(v.learning_rate) for k, v in rule.leaves.items()},
        "curves": {name: [float(v) for v in curve] for name, curve in curves.items()},
    }


def _adam() -> optax.GradientTransformation:
    return optax.adam(SETTING.rate)


# Fresh nets


@cache
def _ruled(rule: str, width: int) -> tuple[Any, Any]:
    """Return a rule for a width, and what wraps an optimizer by it."""
    shapes = [jax.eval_shape(partial(init, n, 0)) for n in (SETTING.small, width)]
    x = jax.ShapeDtypeStruct((3, SETTING.inputs), jnp.float32)
    found = us.transfer(us.plan(apply, shapes[0], apply, shapes[1], x), rule)
    return found, lambda tx: us.scale_optimizer(tx, found)


def run_fresh(rule: str, width: int, options: Options, progress: Progress) -> Result:
    """Sweep fresh nets of a width over learning rates under a rule."""
    progress.start(7, "learning rates, about")
    found, wrap = _ruled(rule, width)
    seeds = range(options.seed, options.seed + SETTING.seeds)
    starts = [found.start(init(width, seed)) for seed in seeds]
    data = batches(SETTING.steps)

    def ending(params: Params, index: int) -> float:
        state = (params, wrap(optax.adam(1.0)).init(params))
        values = _train(wrap, jnp.float32(rate(index)), state, data)[1]
        return float(jnp.log2(jnp.mean(values[-SETTING.steps // 4 :])))

    def mean(index: int) -> float:
        progress.advance(note=f"{rate(index):.5f}")
        return float(np.mean([ending(params, index) for params in starts]))

    curve = Searched(mean, SETTING.start, 2).found
    finite = {str(k): curve[k] if np.isfinite(curve[k]) else None for k in sorted(curve)}
    return {"rule": rule, "size": width, "bits": finite}


def cases(options: Options) -> Sequence[Case]:
    """Return the grown net's case, and one per rule and width."""
    del options
    fresh = [
        Case(f"fresh: {rule}, {width}", partial(run_fresh, rule, width))
        for rule in RULES
        for width in (SETTING.small, SETTING.big)
    ]
    return [Case("grown", run_grown), *fresh]


# Report


def _moved(results: Mapping[str, Result], rule: str) -> float:
    small, big = (
        optimum(losses(results[f"fresh: {rule}, {width}"]))
        for width in (SETTING.small, SETTING.big)
    )
    return big - small


def _apart(result: Result, name: str) -> float:
    own, other = (np.asarray(result["curves"][k]) for k in (f"{SETTING.small}", name))
    return float(np.max(np.abs(other - own) / own))


def report(results: dict[str, Result], options: Options) -> Report:
    """Return the factors, how far the curves are apart, and where the best learning rates are."""
    del options
    tables, plots, claims = [], [], []
    if "grown" in results:
        grown = results["grown"]
        rows = tuple((name, f"{factor:g}") for name, factor in grown["factors"].items())
        title = f"{SETTING.small} → {SETTING.big}: the transfer rule's learning rates under Adam"
        tables.append(Table(title, ("leaf", "factor"), rows))
        tables.append(
            Table(
                "A trained net, grown and trained on: its loss against the small net's",
                ("learning rate of the hidden kernel", "apart by, at most"),
                tuple((name, f"{_apart(grown, name):.1e}") for name in WRAPS),
            )
        )
        plots.append(_plot(grown))
        claims += _grown_claims(grown)
    if len(results) > len(RULES) * 2 - 1:
        moved = {rule: _moved(results, rule) for rule in RULES}
        title = "Fresh nets: log₂ of the best learning rate, large against small"
        rows = tuple((rule, f"{by:+.2f}") for rule, by in moved.items())
        tables.append(Table(title, ("rule", "moves by"), rows))
        claims.append(
            Claim(
                "fresh nets: under the rule the best learning rate moves by less than a step (√2)",
                abs(moved["mup"]) < STEP < abs(moved["standard"]),
                f"{moved['mup']:+.2f}; standard: {moved['standard']:+.2f} powers of two",
            )
        )
    return Report(tuple(tables), tuple(plots), tuple(claims))


def _grown_claims(grown: Result) -> list[Claim]:
    factor = grown["factors"]["hidden"]
    ratio = SETTING.small / SETTING.big
    follows, others = _apart(grown, HALVED), [_apart(grown, n) for n in (UNCHANGED, DOUBLED)]
    return [
        Claim(
            f"{SETTING.small} → {SETTING.big} halves the hidden kernel's learning rate",
            factor == ratio,
            f"factor {factor:g}",
        ),
        Claim(
            "the grown net follows the small one at that rate alone",
            follows < 1e-3 < min(others),
            f"apart by {follows:.1e}; unchanged or doubled by {min(others):.1e} and more",
        ),
    ]


def _plot(grown: Result) -> Plot:
    series = []
    for color, (name, curve) in enumerate(grown["curves"].items()):
        x = tuple(float(step) for step in range(len(curve)))
        wide = color == 0
        label = f"width {name}" if wide else f"width {SETTING.big}, {name}"
        series.append(Series(label, x, tuple(curve), color=2 * color, wide=wide))
    panel = Panel("after growing", "step", "loss", tuple(series), scale="log")
    return Plot("seed-example", "A trained net, grown and trained on", (panel,))


BENCHMARK = Benchmark(
    name="seed_example",
    summary="500 → 1000 halves the learning rate: the transfer rule, measured",
    cases=cases,
    report=report,
    config=lambda options: {**asdict(SETTING), "step": STEP},
)
