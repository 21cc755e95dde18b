"""`exactness`: every model of the zoo grown, and how far its outputs move.

All free sizes together, twofold and threefold in turn; with ``--full`` also each alone, and to a
size that is no multiple; in float64 and in float32. Parameters are random, all different from 0
and 1. What the two models themselves lose to float32 is the measure of the errors there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from benchmarks.zoo.registry import Model, models

TOGETHER, ROUNDING = "together", "rounding"
TOLERANCES = {"float64": 1e-12, "float32": 2e-6}
OWN = 4.0
"""In float32, how many times as far as the models' own rounding is right too."""
# ``jax.nn.dot_product_attention`` computes its softmax in float32 whatever comes in.
SINGLE = frozenset({"nnx transformer"})

Outputs = list[np.ndarray]


def ratio(model: Model, size: str) -> int:
    """Return 2 or 3, in turn."""
    return 2 + model.free.index(size) % 2


def growths(model: Model, full: bool) -> dict[str, dict[str, int]]:
    """Return the sizes of every big model, by what to call it."""
    whole = {name: model.sizes[name] * ratio(model, name) for name in model.free}
    if not full:
        return {TOGETHER: whole}
    alone = {f"{name} × {ratio(model, name)}": {name: n} for name, n in whole.items()}
    uneven = {
        f"{name} {n} → {n + (n + 1) // 2}": {name: n + (n + 1) // 2}
        for name, n in model.sizes.items()
        if name in model.free and n > 2
    }
    return alone | ({TOGETHER: whole} if len(whole) > 1 else {}) | uneven


def random_params(shapes: Any, dtype: Any) -> Any:
    """Return normal parameters; what is called a variance is positive."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, leaf.dtype)
        values = 0.3 * rng.standard_normal(leaf.shape) + 0.1
        if "var" in jax.tree_util.keystr(path):
            values = np.exp(values)
        wide = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else dtype
        return values.astype(wide)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def outputs(apply: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Outputs:
    """Return a model's outputs, compiled with little effort for it runs once."""
    compiled = jax.jit(apply).lower(params, *inputs)
    run = compiled.compile(compiler_options={"xla_backend_optimization_level": 0})
    return [np.asarray(leaf) for leaf in jax.tree.leaves(run(params, *inputs))]


def apart(small: Outputs, big: Outputs) -> float:
    """Return the largest difference, relative to the largest magnitude of the output."""
    pairs = zip(small, big, strict=True)
    errors = [np.max(np.abs(a - b), initial=0.0) / np.max(np.abs(a), initial=0.0) for a, b in pairs]
    return float(max(errors))


def _as(dtype: Any, tree: Any) -> Any:
    def cast(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        shaped = isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(leaf.shape, dtype) if shaped else np.asarray(leaf, dtype)

    return jax.tree.map(cast, tree)


def run_model(model: Model, options: Options, progress: Progress) -> Result:
    """Grow one model by every size, in both precisions."""
    wanted = growths(model, options.full)
    progress.start(2 * len(wanted), "growths")
    found: dict[str, Any] = {name: {} for name in wanted}
    for dtype in (np.float64, np.float32):
        with jax.enable_x64(dtype is np.float64), jax.numpy_dtype_promotion("standard"):
            grow = _Small(model, dtype)
            for name, sizes in wanted.items():
                found[name] |= grow.errors(sizes)
                progress.advance(note=name)
    return found


class _Small:
    """A small model in one precision, and what it computes."""

    def __init__(self, model: Model, dtype: Any) -> None:
        self.model, self.dtype = model, dtype
        built = model.build(model.sizes)
        self.apply, self.inputs = built.apply, _as(dtype, tuple(built.inputs))
        self.shapes = _as(dtype, built.params)
        self.params = random_params(self.shapes, dtype)
        self.outputs = outputs(self.apply, self.params, self.inputs)

    def errors(self, sizes: Mapping[str, int]) -> dict[str, float | str]:
        """Return how far the grown model is off, or why it is refused; in float32, rounding too."""
        big = self.model.build({**self.model.sizes, **sizes})
        shapes, name = _as(self.dtype, big.params), np.dtype(self.dtype).name
        try:
            plan = us.plan(self.apply, self.shapes, big.apply, shapes, *self.inputs)
        except ValueError as refusal:
            return {name: str(refusal).splitlines()[0]}
        params = us.grow(self.params, plan, verify=False)
        found = outputs(big.apply, params, self.inputs)
        errors: dict[str, float | str] = {name: apart(self.outputs, found)}
        if self.dtype is np.float32:
            small = rounding(self.apply, self.params, self.inputs, self.outputs)
            errors[ROUNDING] = max(small, rounding(big.apply, params, self.inputs, found))
        return errors


def rounding(apply: Callable[..., Any], params: Any, inputs: Any, found: Outputs) -> float:
    """Return how far outputs are from those in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = [_as(np.float64, jax.tree.map(np.asarray, tree)) for tree in (params, inputs)]
        return apart(outputs(apply, *wide), found)


def cases(options: Options) -> Sequence[Case]:
    """Return one case per model that has free sizes."""
    del options
    return [Case(name, partial(run_model, model)) for name, model in models().items() if model.free]


def report(results: dict[str, Result], options: Options) -> Report:
    """Return the errors per model, and what holds of all."""
    del options
    columns = ("model", "growth", "float64", "float32", "float32, each model itself")
    rows = [
        (name, growth, *(_text(errors.get(d, "")) for d in (*TOLERANCES, ROUNDING)))
        for name, result in results.items()
        for growth, errors in result.items()
    ]
    table = Table("Relative error of the outputs of grown models", columns, tuple(rows))
    return Report(tables=(table,), claims=tuple(_claim(results, dtype) for dtype in TOLERANCES))


def _text(error: float | str) -> str:
    return "refused" if isinstance(error, str) else f"{error:.1e}"


def _claim(results: Mapping[str, Result], dtype: str) -> Claim:
    every = {
        (name, growth): (errors[dtype], _allowed(errors, dtype))
        for name, result in results.items()
        if dtype == "float32" or name not in SINGLE
        for growth, errors in result.items()
    }
    exact = {key: pair for key, pair in every.items() if not isinstance(pair[0], str)}
    above = [key for key, (error, allowed) in exact.items() if not error <= allowed]
    plain = sum(error <= TOLERANCES[dtype] for error, _ in exact.values())
    worst = max(exact, key=lambda key: exact[key][0])
    own = f", or {OWN:g} times the models' own rounding" if dtype == "float32" else ""
    return Claim(
        f"{dtype}: every growth keeps the function to {TOLERANCES[dtype]:g}{own}",
        not above,
        f"{plain} of {len(exact)} growths within {TOLERANCES[dtype]:g}, worst "
        f"{exact[worst][0]:.1e} ({worst[0]}, {worst[1]}); {len(every) - len(exact)} refused; "
        f"above: {above[:5]}",
    )


def _allowed(errors: Mapping[str, Any], dtype: str) -> float:
    own = OWN * errors.get(ROUNDING, 0.0) if dtype == "float32" else 0.0
    return max(TOLERANCES[dtype], own)


BENCHMARK = Benchmark(
    name="exactness",
    summary="grow every model of the zoo by every size and compare its outputs",
    cases=cases,
    report=report,
)
