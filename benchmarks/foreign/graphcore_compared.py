"""Both operations of a pair on the same numbers: how far apart they are, and at what scale.

PyTorch is imported where it is used, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.foreign.graphcore_functions import functions
from benchmarks.foreign.graphcore_layers import layers
from benchmarks.foreign.graphcore_pairs import Call, Pair, Shapes
from benchmarks.foreign.graphcore_products import products
from benchmarks.registry import Result

Array: TypeAlias = "np.ndarray[Any, Any]"
Arrays: TypeAlias = "dict[str, Array]"

DRAWS = 512
"""Of all operands and cotangents, for scales: a million numbers of the smaller tensors."""


@cache
def pairs() -> dict[str, list[Pair]]:
    """Return the pairs of every function of ``unit_scaling.functional``."""
    found: dict[str, list[Pair]] = {}
    for pair in (*products(), *functions(), *layers()):
        found.setdefault(pair.of, []).append(pair)
    return found


def public() -> list[str]:
    """Return the names of all that ``unit_scaling.functional`` has."""
    import unit_scaling.functional as functional

    return list(functional.__all__)


def compared(pair: Pair, seed: int) -> Result:
    """Return how far the two are apart, as they are and by the reason that the pair gives.

    Of every tensor, "apart" is the largest difference relative to their RMS and element, "left"
    what remains once theirs is given what the pair says and multiplied by its ratio, and "larger"
    the ratio that fits best.
    """
    arrays = drawn(pair.shapes, seed)
    cotangents = _cotangents(pair, seed)
    mine = _here(pair.here, arrays, cotangents)
    theirs = _there(pair.there, arrays, cotangents)
    given = {name: x * np.float32(pair.given.get(name, 1)) for name, x in arrays.items()}
    changed = pair.given or pair.adapted
    after = _there(pair.adapted or pair.there, given, cotangents) if changed else theirs
    tensors = {}
    for name in mine:
        a, b, c = _kept(pair, mine[name], theirs[name], after[name])
        ratio = pair.ratios.get(name, 1.0)
        tensors[name] = {
            "apart": apart(a, b),
            "left": apart(a / ratio, c),
            "larger": float(np.vdot(a, b) / np.vdot(b, b)),
        }
    return {"name": pair.name, "reason": pair.reason, "tensors": tensors}


def scales(pair: Pair, seed: int, draws: int = DRAWS) -> Result:
    """Return the scale of every judged tensor in both, and the standard error of sampling it."""
    many: Shapes = {name: (draws, *shape) for name, shape in pair.shapes.items()}
    arrays = drawn(many, seed + 1)
    outputs = jax.tree.leaves(_outputs(pair))
    cotangents = _normals([(draws, *y.shape) for y in outputs], seed + 1)
    mine = _here(jax.vmap(pair.here), arrays, cotangents)
    runs = [
        _there(pair.there, {name: x[i] for name, x in arrays.items()}, [g[i] for g in cotangents])
        for i in range(draws)
    ]
    found = {}
    for name in pair.judged:
        centred = pair.centred and name == "output"
        here, error = scale(mine[name], centred)
        there, _ = scale(np.stack([run[name] for run in runs]), centred)
        found[name] = {"here": here, "there": there, "error": error}
    return {"name": pair.name, "tensors": found}


def scale(x: Array, centred: bool) -> tuple[float, float]:
    """Return the RMS, of all or about the mean, and its standard error; draws come first."""
    wide = x.astype(np.float64)
    squares = np.square(wide - wide.mean() if centred else wide).reshape(len(x), -1).mean(1)
    root = float(np.sqrt(squares.mean()))
    return root, float(squares.std(ddof=1)) / len(x) ** 0.5 / (2 * root)


def apart(a: Array, b: Array) -> float:
    """Return the largest difference, relative to the RMS of ``b`` and the element of it."""
    size = np.sqrt(np.mean(np.square(b))) + np.abs(b)
    return float(np.max(np.abs(a - b) / size))


def drawn(shapes: Shapes, seed: int) -> Arrays:
    """Return normal numbers for every operand."""
    return dict(zip(shapes, _normals(list(shapes.values()), seed, start=100), strict=True))


def _normals(shapes: Sequence[tuple[int, ...]], seed: int, start: int = 0) -> list[Array]:
    return [
        np.random.default_rng((seed, start + i)).standard_normal(shape).astype(np.float32)
        for i, shape in enumerate(shapes)
    ]


def _outputs(pair: Pair) -> Any:
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in pair.shapes.values()]
    return jax.eval_shape(pair.here, *operands)


def _cotangents(pair: Pair, seed: int) -> list[Array]:
    return _normals([y.shape for y in jax.tree.leaves(_outputs(pair))], seed)


def _kept(pair: Pair, *tensors: Array) -> list[Array]:
    wide = [x.astype(np.float64) for x in tensors]
    if not pair.masked:
        return wide
    kept = np.all([x != 0 for x in wide], axis=0)
    return [x[kept] for x in wide]


def _named(outputs: Sequence[Array], operands: Arrays, gradients: Sequence[Array]) -> Arrays:
    more = {f"output {i + 1}": y for i, y in enumerate(outputs) if i}
    return {"output": outputs[0], **more, **dict(zip(operands, gradients, strict=True))}


def _here(f: Call, operands: Mapping[str, Array], cotangents: Sequence[Array]) -> Arrays:
    """Outputs and gradients."""
    out, pull = jax.vjp(jax.jit(f), *map(jnp.asarray, operands.values()))
    tree = jax.tree.structure(out)
    gradients = pull(jax.tree.unflatten(tree, list(map(jnp.asarray, cotangents))))
    outputs = [np.asarray(y) for y in jax.tree.leaves(out)]
    return _named(outputs, dict(operands), [np.asarray(g) for g in gradients])


def _there(f: Call, operands: Mapping[str, Array], cotangents: Sequence[Array]) -> Arrays:
    """The same of a function of PyTorch's tensors."""
    import torch

    leaves = [torch.tensor(x, requires_grad=True) for x in operands.values()]
    out = f(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    gradients = torch.autograd.grad(outputs, leaves, [torch.tensor(g) for g in cotangents])
    return _named(
        [y.detach().numpy() for y in outputs], dict(operands), [g.numpy() for g in gradients]
    )
