"""Grows models numerically, element by element, with the axes and factors that the tracer found.

Written for the tests alone and apart from the library's own resizing: maps are made by recursion
over the structure of a dimension, factors are looked up per element.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.zoo.registry import Built, Sizes
from benchmarks.zoo.registry import Model as ZooModel
from uscale_jax.trace import affine, keep
from uscale_jax.trace.atoms import Dim, alternatives, resolve
from uscale_jax.trace.tracing import Model, trace


def old_places(dim: Dim, size: tuple[int, int]) -> np.ndarray:
    """For every place along a dimension of the big model, the place in the small one."""
    places = np.zeros(1, int)
    for atom in resolve(dim):
        n, m = atom.size
        if atom.parts is None:
            inner = np.arange(m) * n // m  # every place m/n times in a row
        else:
            inner = sum_places([old_places(p, part_size(p)) for p in atom.parts], atom.parts)
        places = (places[:, None] * n + inner).reshape(-1)
    assert places.shape == (size[1],)
    return places


def part_size(dim: Dim) -> tuple[int, int]:
    sizes = [atom.size for atom in resolve(dim)]
    return tuple(int(np.prod([s[p] for s in sizes], dtype=int)) for p in (0, 1))


def sum_places(maps: Sequence[np.ndarray], parts: Sequence[Dim]) -> np.ndarray:
    starts = np.cumsum([0, *(part_size(part)[0] for part in parts)])
    return np.concatenate([start + m for start, m in zip(starts, maps, strict=False)])


def cell_numbers(dim: Dim) -> np.ndarray:
    """For every place along a dimension of the big model, which cell of its sums it lies in."""
    cells = np.zeros(1, int)
    for atom in resolve(dim):
        count = alternatives((atom,))
        if atom.parts is None:
            inner = np.zeros(atom.size[1], int)
        else:
            starts = np.cumsum([0, *map(alternatives, atom.parts)])
            inner = np.concatenate(
                [s + cell_numbers(p) for s, p in zip(starts, atom.parts, strict=False)]
            )
        cells = (cells[:, None] * count + inner).reshape(-1)
    return cells


def copy_weights(dim: Dim, powers: Sequence[Sequence[Any]]) -> np.ndarray:
    """For every place along a dimension of the big model, its copies to their powers."""
    cells = cell_numbers(dim)
    counts = unequal_counts(dim)
    weights = np.ones(len(cells))
    for place, (cell, each) in enumerate(zip(cells, counts, strict=True)):
        for count, power in zip(each, powers[cell], strict=True):
            weights[place] *= float(count) ** float(power)
    return weights


def unequal_counts(dim: Dim) -> list[list[int]]:
    """For every place, per atom on the way to it, how many copies of the unit there are."""
    found: list[list[int]] = [[]]
    for atom in resolve(dim):
        n, m = atom.size
        if atom.parts is not None:
            inner = [counts for part in atom.parts for counts in unequal_counts(part)]
        else:
            units = [place * n // m for place in range(m)]
            inner = [[units.count(unit)] for unit in units]
        found = [[*before, *counts] for before in found for counts in inner]
    return found


def grown(solution: keep.Solution, params: Any) -> Any:
    """The parameters of the big model, in the dtype of the small ones."""
    structure = solution.traced.structure
    out = []
    values = structure.program.inputs
    for place, leaf in enumerate(jax.tree.leaves(params)):
        big, cells = np.asarray(leaf), solution.cells[place]
        dims, shape = structure.of(values[place]), values[place].shape
        if leaf.ndim:
            big = big[np.ix_(*(old_places(d, s) for d, s in zip(dims, shape, strict=True)))]
        if values[place].scales:
            table = np.vectorize(affine.factor, otypes=[float])(cells)
            factors = table[np.ix_(*map(cell_numbers, dims))] if leaf.ndim else table
            for i, (dim, powers) in enumerate(zip(dims, solution.copies[place], strict=True)):
                weights = copy_weights(dim, powers)
                factors = factors * weights.reshape([-1 if j == i else 1 for j in range(len(dims))])
            shift = solution.system.shifts.get(place, 0.0)
            big = ((big + shift) * factors - shift).astype(leaf.dtype)
        out.append(big)
    return jax.tree.unflatten(jax.tree.structure(params), out)


def random_params(shapes: Any, seed: int = 0, dtype: Any = np.float64) -> Any:
    """Normal parameters; what is named a variance is positive; integers as zeros."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, leaf.dtype)
        values = 0.3 * rng.standard_normal(leaf.shape) + 0.1
        if "var" in jax.tree_util.keystr(path):
            values = np.exp(values)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return values + 0.3j * rng.standard_normal(leaf.shape)
        return np.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def as_double(tree: Any) -> Any:
    """Floating arrays and shapes as float64."""

    def widen(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, np.float64)
        return np.asarray(leaf, np.float64)

    return jax.tree.map(widen, tree)


def solve(small: Model, big: Model, inputs: Sequence[Any]) -> keep.Solution:
    """Factors that keep the function; ValueError where there are none."""
    return keep.solve(trace([small, big], inputs))


class Prepared:
    """A small model with random float64 parameters and their outputs, compiled once."""

    def __init__(self, model: Model, inputs: Sequence[Any], seed: int = 0) -> None:
        self.given = (*model, *inputs)
        with jax.enable_x64(True):
            self.inputs = as_double(tuple(inputs))
            self.model = Model(model.apply, as_double(model.params))
            self.params = random_params(self.model.params, seed)
            self.run = compiled(model.apply, self.params, self.inputs)
            self.outputs = self.run(self.params)
        assert all(np.all(np.isfinite(out)) for out in self.outputs)


def compiled(apply: Callable[..., Any], params: Any, inputs: Any) -> Callable[[Any], list[Any]]:
    """A model's outputs as a function of parameters, compiled with little effort."""
    program = jax.jit(apply).lower(params, *inputs)
    run = program.compile(compiler_options={"xla_backend_optimization_level": 0})

    def outputs(params: Any) -> list[Any]:
        with jax.enable_x64(True):
            return [np.asarray(leaf) for leaf in jax.tree.leaves(run(params, *inputs))]

    return outputs


def growth_error(small: Prepared, big: Model) -> float:
    """The largest difference of the grown model's outputs, relative to them.

    ValueError where the library refuses.
    """
    with jax.enable_x64(True):
        big = Model(big.apply, as_double(big.params))
        larger = grown(solve(small.model, big, small.inputs), small.params)
        shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (larger, big.params)]
        assert shapes[0] == shapes[1]
        return difference(small.outputs, compiled(big.apply, larger, small.inputs)(larger))


def error(small: Model, big: Model, inputs: Sequence[Any], *, seed: int = 0) -> float:
    """The same for two models that are used once."""
    return growth_error(Prepared(small, inputs, seed), big)


def difference(old: Sequence[np.ndarray], new: Sequence[np.ndarray]) -> float:
    """The largest difference of outputs relative to their size."""
    worst = 0.0
    for a, b in zip(old, new, strict=True):
        assert a.shape == b.shape
        size = float(np.max(np.abs(a))) if a.size else 0.0
        worst = max(worst, float(np.max(np.abs(a - b))) / (size or 1.0))
    return worst


def resized(sizes: Sizes, factors: dict[str, int]) -> dict[str, int]:
    return {name: size * factors.get(name, 1) for name, size in sizes.items()}


def models(model: ZooModel, factors: dict[str, int]) -> tuple[Model, Model, tuple[Any, ...]]:
    """A zoo model at its sizes and at multiplied ones, and its inputs."""
    small: Built = model.build(model.sizes)
    big: Built = model.build(resized(model.sizes, factors))
    return Model(small.apply, small.params), Model(big.apply, big.params), small.inputs


def zoo_error(model: ZooModel, factors: dict[str, int]) -> float:
    """The error of a zoo model grown by ``factors``; ValueError where it is refused."""
    return error(*models(model, factors))
