"""trace_exponents: which powers of a factor parameters take, read off the model's program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, overload

import jax

from uscale_jax import _tree
from uscale_jax._table import shape_words, table
from uscale_jax._types import Apply, Tree
from uscale_jax.trace import affine, keep, layout, scaling
from uscale_jax.trace.equations import System
from uscale_jax.trace.growth import leaf_growths, product
from uscale_jax.trace.program import Value
from uscale_jax.trace.tracing import Model, Traced, output_names, trace


class Exponents(NamedTuple):
    """Which power of k each parameter takes, and which power the output then has."""

    params: Tree
    """Tree like the parameters, one float a leaf: leaf p is multiplied by k**params[p]."""
    output: Any
    """The output is multiplied by k**output (a float, or a tree prefix of the outputs)."""


@dataclass(frozen=True)
class Obstacle:
    """Why the output is not multiplied by a power of k when every parameter is."""

    reason: str
    """What the program does there, and the source line."""
    equation: str
    """What would have to be 1, as powers of leaves, and what it is."""

    def __str__(self) -> str:
        """Return the reason with its equation."""
        return f"{self.reason}: {self.equation}"


@dataclass(frozen=True)
class Symmetry:
    """A rescaling that keeps the function."""

    powers: Mapping[str, float]
    """The leaves, or parts of leaves such as ``'qkv[:, 0:7]'``, that are not left alone."""
    leaves: Mapping[int, Any] = field(repr=False)
    """The same by place in the flattened tree; arrays where parts of a leaf differ."""
    treedef: Any = field(repr=False)
    """The tree of the parameters."""

    @property
    def params(self) -> Tree:
        """Return a tree like the parameters: leaf p is multiplied by k**params[p].

        A float a leaf, or an array that broadcasts against the leaf where its parts differ.
        """
        places = range(self.treedef.num_leaves)
        return jax.tree.unflatten(self.treedef, [self.leaves.get(i, 0.0) for i in places])

    def __str__(self) -> str:
        """Return ``w1 · k, w2 · k^-1``."""
        return ", ".join(
            f"{name} · k" + ("" if e == 1 else f"^{_number(e)}") for name, e in self.powers.items()
        )


@dataclass(frozen=True)
class TracedExponents:
    """What multiplying parameters by powers of k does to a model; ``print`` shows it."""

    params: Tree
    """Exponents near 1, one float a leaf, under which every output scales by a power of k."""
    output: Any
    """Tree like the outputs: the powers of k they then have."""
    uniform: Exponents | None
    """Every exponent 1 and the outputs' exponents, if they are powers of k; else None."""
    obstacles: tuple[Obstacle, ...]
    """Why ``uniform`` is None: the equations that every exponent 1 violates."""
    symmetries: tuple[Symmetry, ...]
    """A basis of the rescalings that keep the function."""

    def __str__(self) -> str:
        """Return the exponents as a table, what is in the way, and the symmetries."""
        rows = [
            (_tree.name(key), _number(e), "" if e == 1 else "in the way of k on every leaf")
            for key, e in zip(*_tree.flatten_named(self.params)[:2], strict=True)
        ]
        rows += [
            (name, _number(e), "")
            for name, e in zip(output_names(self.output), jax.tree.leaves(self.output), strict=True)
        ]
        if self.uniform is not None:
            rows = [(name, e, "") for name, e, _ in rows]
        lines = [table(("", "power of k", ""), rows)]
        lines += [f"k on every leaf: {obstacle}" for obstacle in self.obstacles[:8]]
        lines += [f"and {len(self.obstacles) - 8} more"] if len(self.obstacles) > 8 else []
        lines += [f"keeps the function: {s}" for s in self.symmetries[:16]]
        lines += [f"and {len(self.symmetries) - 16} more"] if len(self.symmetries) > 16 else []
        return "\n".join(lines)


def _number(e: float) -> str:
    return f"{e:.4g}"


@dataclass(frozen=True)
class GrowthExponents:
    """By what each parameter is multiplied when a small model grows to a big one."""

    factors: Tree
    """Tree like the parameters: a float a leaf, or an array that broadcasts against the big leaf
    where parts of it take different factors."""
    shifts: Tree
    """Tree like the parameters of floats: leaf p becomes f·(c + p) − c.  c is 0 but for leaves
    that the program reads as c + p only, such as the gain 1 + p of some norms."""
    words: Tree
    """The factors as exact products of powers, such as ``'1/2'`` or ``'3^(-1/2)'``."""
    small: Tree
    """Tree of the small model's shapes, as ``jax.ShapeDtypeStruct``."""
    big: Tree
    """Tree of the big model's shapes."""

    def __str__(self) -> str:
        """Return a table of leaves, shapes and factors."""
        keys, words, _ = _tree.flatten_named(self.words)
        shifts, small, big = map(jax.tree.leaves, (self.shifts, self.small, self.big))
        rows = [
            (_tree.name(key), shape_words(a.shape), shape_words(b.shape), _on(factor, shift))
            for key, factor, shift, a, b in zip(keys, words, shifts, small, big, strict=True)
        ]
        return table(("leaf", "small", "big", "factor"), rows)


def _on(factor: str, shift: float) -> str:
    return factor if factor == "1" or not shift else f"{factor} on {shift:g} + leaf"


@overload
def trace_exponents(
    apply: Apply, params: Tree, *inputs: Any, big: None = None
) -> TracedExponents: ...


@overload
def trace_exponents(
    apply: Apply, params: Tree, *inputs: Any, big: tuple[Apply, Tree]
) -> GrowthExponents: ...


def trace_exponents(
    apply: Apply, params: Tree, *inputs: Any, big: tuple[Apply, Tree] | None = None
) -> TracedExponents | GrowthExponents:
    r"""Returns which powers of a factor parameters take, read off the model's program.

    Every value v of the program is given an exponent, linear in the unknown exponents of the
    parameters, and every primitive an equation: products add exponents, a sum over an axis that
    grows r-fold adds :math:`\log r`, what is added or compared must agree, and what is neither
    (``exp``, ``tanh``, a constant that is added) must have exponent 0.

    *Value scaling*, without ``big``: with leaf p multiplied by :math:`k^{e_p}`,

    .. math:: f(k^{e} p, x) = k^{e_f}\, f(p, x) .

    It says whether the output scales by a power of k when every leaf is multiplied by k (a
    bias-free ReLU net of depth L: :math:`k^L`) and what is in the way if not, the exponents
    nearest to 1 that do it (biases of layer l take :math:`k^l`; where nothing but 0 will do, 0),
    and which rescalings keep the function (:math:`W_1 k, b_1 k, W_2 / k` in a ReLU net;
    :math:`k` on queries and :math:`1/k` on keys).

    *Growth*, with ``big=(apply, params)`` of the same model at larger sizes: the factors under
    which the big model, each of whose units is a copy of one of the small model, is the same
    function.  Both programs are traced together, so constants that depend on sizes (the 1/n of a
    mean, the :math:`1/\sqrt{d}` of attention) count with what they differ by.  Of all solutions
    it is the one that departs least from what each use asks for: kernels take 1/r for a
    contracted axis that grows r-fold, anything else 1.  A leaf that is only read as c + leaf takes
    its factor with that sum.

    Args:
      apply: ``apply(params, *inputs)``, any pure function that JAX can trace.
      params: the parameter tree: arrays or ``jax.ShapeDtypeStruct``; nothing is computed.
      *inputs: inputs, likewise.
      big: the big model's ``apply`` and parameters, of the same tree.

    Returns:
      :class:`TracedExponents`, whose ``params`` and ``output`` fit ``scale_params(exponents=)``
      and :func:`compensate`; with ``big``, :class:`GrowthExponents`.

    Raises:
      ValueError: with ``big``: the two models are different programs or have different trees, an
        axis has another size that cannot change (and why, with its source line), a size is
        smaller, or the equations contradict each other (a smallest set that does, in words).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.maximum(x @ params["w1"] + params["b1"], 0) @ params["w2"] + params["b2"]
      >>> def shapes(n):
      ...     f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      ...     return {"w1": f32(5, n), "b1": f32(n), "w2": f32(n, 3), "b2": f32(3)}
      >>> x = jnp.ones((2, 5))
      >>> traced = us.trace_exponents(apply, shapes(7), x)
      >>> traced.params["b2"], traced.output, traced.uniform
      (2.0, 2.0, None)
      >>> for symmetry in traced.symmetries:
      ...     print(symmetry)
      b1 · k, w1 · k, w2 · k^-1
      >>> print(us.trace_exponents(apply, shapes(7), x, big=(apply, shapes(21))))
      leaf  small  big     factor
      b1    7      21      1
      b2    3      3       1
      w1    5 × 7  5 × 21  1
      w2    7 × 3  21 × 3  1/3

    References:
      Widening by replication: Chen et al., *Net2Net*, 2016 (arXiv:1511.05641), Eq. 3 and 4.
      Rescaling symmetries of ReLU nets: Neyshabur et al., *Path-SGD*, 2015 (arXiv:1506.02617).
    """
    if big is None:
        return _value_scaling(trace([Model(apply, params)], inputs))
    return _growth(trace([Model(apply, params), Model(*big)], inputs))


def _value_scaling(traced: Traced) -> TracedExponents:
    system = scaling.system_of(traced)
    names = output_names(traced.outputs)
    every, nearest = scaling.uniform(system, names), scaling.nearest(system, names)
    outputs = jax.tree.structure(traced.outputs)
    ones = jax.tree.unflatten(traced.treedef, [1.0] * len(traced.leaves))
    return TracedExponents(
        params=jax.tree.unflatten(traced.treedef, map(float, nearest.leaves)),
        output=jax.tree.unflatten(outputs, map(float, nearest.outputs)),
        uniform=None
        if every.violations
        else Exponents(ones, jax.tree.unflatten(outputs, map(float, every.outputs))),
        obstacles=tuple(map(_obstacle, every.violations)),
        symmetries=tuple(_symmetry(traced, system, v) for v in scaling.symmetries(system)),
    )


def _symmetry(traced: Traced, system: System, vector: Mapping[int, affine.Number]) -> Symmetry:
    powers = {system.names[u]: float(n) for u, n in vector.items()}
    values = traced.structure.program.inputs
    leaves = {
        i: layout.spread(cells, traced.structure.of(values[i]), 0)
        for i, cells in scaling.by_leaf(system, vector).items()
    }
    return Symmetry(powers, leaves, traced.treedef)


def _obstacle(violation: scaling.Violation) -> Obstacle:
    _, text, source = violation.requirement
    return Obstacle(text if source is None else f"{text} at {source}", violation.words)


def _growth(traced: Traced) -> GrowthExponents:
    growths = leaf_growths(keep.solve(traced))
    tree = partial(jax.tree.unflatten, traced.treedef)
    leaves = traced.structure.program.inputs[: len(traced.leaves)]
    return GrowthExponents(
        factors=tree([product(growth.factors) for growth in growths]),
        shifts=tree([growth.shift for growth in growths]),
        words=tree([growth.words for growth in growths]),
        small=tree([_shape(leaf, 0) for leaf in leaves]),
        big=tree([_shape(leaf, -1) for leaf in leaves]),
    )


def _shape(value: Value, program: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct([size[program] for size in value.shape], value.dtype)
