"""`lr_overhead`: what `unit_scale_lr` costs in a compiled training step. It should be nothing.

The same step is compiled with `optax.adam(lr / k)`, and with `unit_scale_lr` behind Adam: one k,
a k per leaf, a schedule of k, and a k that is an argument of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
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
    Progress,
    Report,
    Result,
    Table,
)
from benchmarks.timing import compile_stats, measure

LR, K = 1e-3, 1.6
PLAIN = "optax.adam(lr / k)"

Tree = dict[str, Any]
Step = Callable[[Tree, Any, Any, jax.Array], Any]


def make_params(options: Options) -> Tree:
    """Return a residual MLP's parameters, all sizes different."""
    layers, width, hidden = (12, 1024, 2560) if options.full else (6, 192, 448)
    rng = np.random.default_rng(options.seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 30, jnp.float32)  # noqa: E731
    return {
        f"layer_{i}": {"up": draw(width, hidden), "bias": draw(hidden), "down": draw(hidden, width)}
        for i in range(layers)
    }


def make_batch(options: Options) -> tuple[jax.Array, jax.Array]:
    """Return inputs and targets."""
    width, batch = (1024, 512) if options.full else (192, 48)
    rng = np.random.default_rng(options.seed + 1)
    draw = lambda: jnp.asarray(rng.standard_normal((batch, width)), jnp.float32)  # noqa: E731
    return draw(), draw()


def loss(params: Tree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return the mean squared error of the residual MLP."""
    x, y = batch
    for layer in params.values():
        x = x + jax.nn.relu(x @ layer["up"] + layer["bias"][None]) @ layer["down"]
    return jnp.mean((x - y) ** 2)


def optimizers(params: Tree) -> dict[str, Callable[[jax.Array], optax.GradientTransformation]]:
    """Return the contestants, each a function of the k that is an argument of the step."""
    per_leaf = jax.tree.map(lambda leaf: K, params)
    behind = lambda factor: optax.chain(optax.adam(LR), us.unit_scale_lr(factor))  # noqa: E731
    return {
        PLAIN: lambda k: optax.adam(LR / K),
        "adam, unit_scale_lr(k)": lambda k: behind(K),
        "adam, unit_scale_lr(k per leaf)": lambda k: behind(per_leaf),
        "adam, unit_scale_lr(k argument)": lambda k: behind(k),
        "adam, unit_scale_lr(schedule)": lambda k: behind(lambda step: jnp.float32(K)),
    }


def make_step(make: Callable[[jax.Array], optax.GradientTransformation]) -> Step:
    """Return a jitted training step with the optimizer that ``make`` gives."""

    @jax.jit
    def step(params: Tree, state: Any, batch: Any, k: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = make(k).update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def run_steps(options: Options, progress: Progress) -> Result:
    """Compile all contestants, check that they agree, then time them against each other."""
    params, batch, k = make_params(options), make_batch(options), jnp.float32(K)
    makers = optimizers(params)
    progress.start(len(makers) + 1, "compiling")
    thunks, stats, outputs = {}, {}, {}
    for name, make in makers.items():
        step, args = make_step(make), (params, make(k).init(params), batch, k)
        stats[name] = asdict(compile_stats(step, *args))
        thunks[name] = partial(step, *args)
        outputs[name] = thunks[name]()[0]
        progress.advance(note=name)
    timings = measure(thunks, repeats=60, budget_s=45.0 if options.full else 20.0)
    progress.advance(note="timed")
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "stats": stats,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "largest_difference": {
            name: _largest_difference(outputs[name], outputs[PLAIN], params) for name in makers
        },
    }


def _largest_difference(got: Tree, expected: Tree, start: Tree) -> float:
    """The largest difference of two steps, relative to the largest change in the step."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    return float(
        np.max(np.abs(flat(got) - flat(expected))) / np.max(np.abs(flat(expected) - flat(start)))
    )


def cases(options: Options) -> Sequence[Case]:
    """Return the one case."""
    del options
    return [Case("adam", run_steps)]


def report(results: dict[str, Result], options: Options) -> Report:
    """Return the table and the claims."""
    del options
    result = results["adam"]
    names = list(result["timings"])
    columns = ("optimizer", "kernels", "bytes accessed", "time / plain", "best (ms)", "difference")
    rows = tuple(_row(name, result) for name in names)
    title = f"A training step, {result['parameters'] / 1e6:.1f} M parameters"
    return Report(
        tables=(Table(title, columns, rows),),
        claims=tuple(claim for name in names[1:] for claim in _claims(name, result)),
    )


def _row(name: str, result: Result) -> tuple[str, ...]:
    stats, timing = result["stats"][name], result["timings"][name]
    return (
        name,
        str(stats["kernels"]),
        f"{stats['bytes_accessed']:.0f}",
        f"{timing['ratio']:.3f}",
        f"{1e3 * timing['best_s']:.2f}",
        f"{result['largest_difference'][name]:.1e}",
    )


def _claims(name: str, result: Result) -> list[Claim]:
    """Scalar and schedule arguments themselves are a few bytes and at most a few scalar kernels."""
    plain, ours = result["stats"][PLAIN], result["stats"][name]
    argument = "argument" in name or "schedule" in name
    bytes_, kernels = (ours[key] - plain[key] for key in ("bytes_accessed", "kernels"))
    allowed = (1e-4 * plain["bytes_accessed"], 3) if argument else (0, 0)
    difference = result["largest_difference"][name]
    timing = result["timings"][name]
    noise = max(0.05, 2 * timing["iqr_s"] / timing["median_s"])
    return [
        Claim(f"{name}: same bytes accessed", bytes_ <= allowed[0], f"{bytes_:+.0f} bytes"),
        Claim(f"{name}: same number of kernels", kernels <= allowed[1], f"{kernels:+d}"),
        Claim(
            f"{name}: same time within noise",
            timing["ratio"] <= 1 + noise,
            f"{timing['ratio']:.3f} of plain, noise {noise:.2f}",
        ),
        Claim(f"{name}: same step", difference < 1e-3, f"relative difference {difference:.1e}"),
    ]


BENCHMARK = Benchmark(
    name="lr_overhead",
    summary="a compiled training step with unit_scale_lr against plain optax.adam(lr / k)",
    cases=cases,
    report=report,
)
