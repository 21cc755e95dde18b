"""Every primitive described once; families take one line each.

A rule takes an equation and returns its :class:`~uscale_jax.trace.description.Description`.
A primitive without a rule keeps all its sizes and takes no factors: pessimistic, never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from uscale_jax.trace.affine import rational
from uscale_jax.trace.atoms import Size, fresh, times
from uscale_jax.trace.description import (
    COMPARED,
    EACH,
    IGNORED,
    JOINED,
    LINEAR,
    PRODUCT,
    UNSCALED,
    Description,
    Dims,
    Kind,
    Labelled,
    Regrouped,
    Scale,
)
from uscale_jax.trace.program import Equation, Value

Rule: TypeAlias = Callable[[Equation], Description]
Elementwise: TypeAlias = Callable[[Equation], Labelled]

RULES: dict[str, Rule] = {}


def define(names: str, rule: Rule) -> None:
    """Gives every primitive in ``names`` (separated by blanks) its rule; each has one only."""
    for name in names.split():
        if name in RULES:
            raise ValueError(f"primitive {name!r} has a rule already")
        RULES[name] = rule


def rule_for(name: str) -> Rule:
    """Returns the rule of a primitive, the pessimistic one if it has none."""
    return RULES.get(name, opaque)


def labels(value: Value) -> Dims:
    """Returns a fresh template for every dimension of a value."""
    return [fresh(size) for size in value.shape]


def opaque(eqn: Equation) -> Labelled:
    """Returns the description of a primitive that nothing is known about."""
    return immovable(eqn, f"`{eqn.name}`, for which there is no rule, is applied", UNSCALED)


def immovable(eqn: Equation, why: str, scale: Scale) -> Labelled:
    """Returns the description of a primitive all of whose dimensions keep their sizes."""
    operands = [labels(value) for value in eqn.inputs]
    results = [labels(value) for value in eqn.outputs]
    fixed = [(dim, why) for dims in (*operands, *results) for dim in dims]
    return Labelled(operands, results, scale, fixed=fixed)


def _against(dims: Dims, value: Value, shape: tuple[Size, ...]) -> Dims:
    """Template of an operand that is spread over ``dims``: no rank, or size 1 where repeated."""
    if value.ndim == 0:
        return []
    pairs = zip(dims, value.shape, shape, strict=True)
    return [dim if size == full else fresh(size) for dim, size, full in pairs]


def elementwise(scale: Scale) -> Elementwise:
    """Returns the rule of an operation on corresponding elements; size 1 is repeated."""

    def rule(eqn: Equation) -> Labelled:
        shape = eqn.outputs[0].shape
        dims = labels(eqn.outputs[0])
        operands = [_against(dims, value, shape) for value in eqn.inputs]
        return Labelled(operands, [dims for _ in eqn.outputs], scale)

    return rule


def each(eqn: Equation) -> Labelled:
    """Describes a primitive whose every result has the dimensions and factor of its operand."""
    if [v.shape for v in eqn.inputs] != [v.shape for v in eqn.outputs]:
        return opaque(eqn)
    dims = [labels(value) for value in eqn.inputs]
    return Labelled(dims, dims, EACH)


def _power(eqn: Equation) -> Labelled:
    """``x**c`` with a known c scales by the c-th power; otherwise neither may carry a factor."""
    exponent = eqn.inputs[1].uniform
    known = exponent is not None and len(set(exponent)) == 1 and _is_simple(exponent[0])
    scale = Scale(Kind.POWERS, (float(exponent[0]), 0)) if known and exponent else UNSCALED
    return elementwise(scale)(eqn)


def _is_simple(exponent: Any) -> bool:
    """Whether an exponent is, up to rounding, a fraction that exact arithmetic can do with."""
    if isinstance(exponent, complex | np.complexfloating) or not np.isfinite(exponent):
        return False
    if jnp.issubdtype(np.asarray(exponent).dtype, np.integer):
        return True
    tolerance = float(jnp.finfo(exponent.dtype).eps)
    return math.isclose(rational(float(exponent)), float(exponent), rel_tol=tolerance)


def _integer_power(eqn: Equation) -> Labelled:
    return elementwise(Scale(Kind.POWERS, (eqn.param("y"),)))(eqn)


def _convert(eqn: Equation) -> Labelled:
    """To a floating dtype factors pass; to integers the number itself counts; to bool its zeros."""
    if eqn.outputs[0].scales:
        return elementwise(LINEAR)(eqn)
    return elementwise(IGNORED if eqn.outputs[0].dtype == bool else UNSCALED)(eqn)


def _bitcast(eqn: Equation) -> Labelled:
    if eqn.inputs[0].shape == eqn.outputs[0].shape:
        return elementwise(UNSCALED)(eqn)
    return immovable(eqn, "`bitcast_convert_type` reads the bits", UNSCALED)


def _broadcast(eqn: Equation) -> Labelled:
    dims = labels(eqn.outputs[0])
    at = eqn.param("broadcast_dimensions")
    value, out = eqn.inputs[0], eqn.outputs[0].shape
    operand = [
        dims[axis] if size == out[axis] else fresh(size)
        for axis, size in zip(at, value.shape, strict=True)
    ]
    return Labelled([operand, *([] for _ in eqn.inputs[1:])], [dims], LINEAR)


def _transpose(eqn: Equation) -> Labelled:
    dims = labels(eqn.inputs[0])
    return Labelled([dims], [[dims[axis] for axis in eqn.param("permutation")]], LINEAR)


def _squeeze(eqn: Equation) -> Labelled:
    dims = labels(eqn.inputs[0])
    dropped = set(eqn.param("dimensions"))
    return Labelled([dims], [[d for i, d in enumerate(dims) if i not in dropped]], LINEAR)


def _expand(eqn: Equation) -> Labelled:
    dims = iter(labels(eqn.inputs[0]))
    new = set(eqn.param("dimensions"))
    result = [() if i in new else next(dims) for i in range(eqn.outputs[0].ndim)]
    return Labelled([[d for i, d in enumerate(result) if i not in new]], [result], LINEAR)


def _tile(eqn: Equation) -> Labelled:
    """Copies one after the other: the copies are a factor of the result in front of the operand."""
    dims = labels(eqn.inputs[0])
    copies = [fresh(size) for size in eqn.sizes("reps")]
    return Labelled([dims], [[(*c, *d) for c, d in zip(copies, dims, strict=True)]], LINEAR)


def _reshape(eqn: Equation) -> Regrouped:
    """Reshapes that permute are rewritten before (``uscale_jax.trace.rewrite``)."""
    operand, result = eqn.inputs[0].shape, eqn.outputs[0].shape
    groups = _groups(operand, result, len(eqn.params))
    return Regrouped(
        [[fresh(operand[i]) for i in left] for left, _ in groups],
        [[fresh(result[i]) for i in right] for _, right in groups],
    )


def _groups(
    left: tuple[Size, ...], right: tuple[Size, ...], count: int
) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of neighbouring dimensions with the same number of elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) or j < len(right):
        a, b = ([i] if i < len(left) else []), ([j] if j < len(right) else [])
        size_a, size_b = times((left[k] for k in a), count), times((right[k] for k in b), count)
        while size_a != size_b:
            short_left = _shorter(size_a, size_b) and i + len(a) < len(left)
            if short_left or j + len(b) >= len(right):
                a.append(i + len(a))
            else:
                b.append(j + len(b))
            size_a = times((left[k] for k in a), count)
            size_b = times((right[k] for k in b), count)
        groups.append((a, b))
        i, j = i + len(a), j + len(b)
    return groups


def _shorter(a: Size, b: Size) -> bool:
    """Whether a is the smaller one, in the first program where they differ."""
    return next((m < n for m, n in zip(a, b, strict=True) if m != n), False)


def _reduce(scale: Scale, *, adds: bool = False) -> Rule:
    """Returns the rule of a reduction that does not mind how often an element occurs, or adds."""

    def rule(eqn: Equation) -> Labelled:
        axes = set(eqn.param("axes"))
        operands = [labels(eqn.inputs[0])] * len(eqn.inputs)
        kept = [dim for i, dim in enumerate(operands[0]) if i not in axes]
        summed = [atom for i in axes for atom in operands[0][i]] if adds else []
        return Labelled(operands, [kept for _ in eqn.outputs], scale, summed=summed)

    return rule


def _collective(*, adds: bool) -> Rule:
    """Over a mesh each result is like its operand; over axes that ``vmap`` numbers, a reduction."""
    reduction = _reduce(LINEAR, adds=adds)

    def rule(eqn: Equation) -> Description:
        numbered = all(isinstance(axis, int | np.integer) for axis in eqn.param("axes"))
        alone = len(eqn.inputs) == 1 and eqn.param("axis_index_groups") is None
        return reduction(eqn) if numbered and alone else each(eqn)

    return rule


def along(why: str, scale: Scale, axes: Callable[[Equation], Iterable[int]]) -> Rule:
    """Returns the rule of an operation that minds the order of elements along some axes only.

    The result has the operand's rank; the other dimensions pass through.
    """

    def rule(eqn: Equation) -> Labelled:
        held = {axis % eqn.inputs[0].ndim for axis in axes(eqn)}
        dims = labels(eqn.inputs[0])
        operands = [_against(dims, v, eqn.inputs[0].shape) for v in eqn.inputs]
        results = [
            [fresh(size) if i in held else dims[i] for i, size in enumerate(value.shape)]
            for value in eqn.outputs
        ]
        fixed = [(d, why) for side in (dims, *results) for i, d in enumerate(side) if i in held]
        return Labelled(operands, results, scale, fixed=fixed)

    return rule


def _arg_reduce(eqn: Equation) -> Labelled:
    """The place of the largest element counts; the rest passes."""
    axes = set(eqn.param("axes"))
    dims = labels(eqn.inputs[0])
    why = f"`{eqn.name}` counts places"
    kept = [dim for i, dim in enumerate(dims) if i not in axes]
    return Labelled([dims], [kept], COMPARED, fixed=[(dims[i], why) for i in axes])


def _product(eqn: Equation) -> Labelled:
    axes = set(eqn.param("axes"))
    dims = labels(eqn.inputs[0])
    kept = [dim for i, dim in enumerate(dims) if i not in axes]
    why = "`reduce_prod` multiplies"
    return Labelled([dims], [kept], UNSCALED, fixed=[(dims[i], why) for i in axes])


def _iota(eqn: Equation) -> Labelled:
    dims = labels(eqn.outputs[0])
    held = dims[eqn.param("dimension")]
    why = "`iota` counts it, so values depend on the place"
    return Labelled([[] for _ in eqn.inputs], [dims], IGNORED, fixed=[(held, why)])


def _random(scale: Scale) -> Rule:
    """Returns the rule of drawing numbers: each place draws another."""
    return lambda eqn: immovable(eqn, "random numbers are drawn", scale)


def _axis(eqn: Equation) -> list[int]:
    return [eqn.param("axis")]


def _transformed(eqn: Equation) -> range:
    return range(-len(eqn.params[0]["fft_lengths"]), 0)


def _last(eqn: Equation) -> list[int]:
    """The axis of ``top_k``, or of ``approx_top_k``; by default the last."""
    return [eqn.param("axis", eqn.param("reduction_dimension", -1))]


define("mul", elementwise(PRODUCT))
define("div", elementwise(Scale(Kind.POWERS, (1, -1))))
define("square", elementwise(Scale(Kind.POWERS, (2,))))
define("sqrt", elementwise(Scale(Kind.POWERS, (0.5,))))
define("rsqrt", elementwise(Scale(Kind.POWERS, (-0.5,))))
define("cbrt", elementwise(Scale(Kind.POWERS, (1 / 3,))))
define("integer_pow", _integer_power)
define("pow", _power)
define("convert_element_type", _convert)
define("bitcast_convert_type", _bitcast)
define(
    "abs neg real imag conj copy copy_p stop_gradient reduce_precision sharding_constraint "
    "mesh_cast reshard layout_constraint name pvary pbroadcast stage",
    elementwise(LINEAR),
)
define("optimization_barrier device_put", each)
define("psum psum2 psum_invariant", _collective(adds=True))
define("pmax pmin", _collective(adds=False))
define("ppermute", each)
define("add sub max min add_any rem complex clamp select_n", elementwise(JOINED))
define("eq ne lt le gt ge eq_to lt_to le_to atan2", elementwise(COMPARED))
define("sign is_finite not and or xor", elementwise(IGNORED))
define("shift_left shift_right_logical shift_right_arithmetic clz", elementwise(IGNORED))
define("population_count mulhi axis_index zeros_like", elementwise(IGNORED))
define(
    "exp exp2 expm1 log log1p logistic tanh tan sin cos asin acos atan sinh cosh asinh acosh "
    "atanh erf erfc erf_inv lgamma digamma floor ceil round nextafter igamma igammac "
    "igamma_grad_a bessel_i0e bessel_i1e polygamma zeta regularized_incomplete_beta",
    elementwise(UNSCALED),
)
define("broadcast_in_dim", _broadcast)
define("tile", _tile)
define("transpose", _transpose)
define("squeeze", _squeeze)
define("expand_dims", _expand)
define("reshape", _reshape)
define("reduce_sum", _reduce(LINEAR, adds=True))
define("reduce_max reduce_min", _reduce(LINEAR))
define("reduce_and reduce_or", _reduce(IGNORED))
define("reduce_prod", _product)
define("argmax argmin", _arg_reduce)
define("cumsum", along("`cumsum` mixes places", LINEAR, _axis))
define("cummax", along("`cummax` mixes places", LINEAR, _axis))
define("cummin", along("`cummin` mixes places", LINEAR, _axis))
define("cumprod", along("`cumprod` mixes places", UNSCALED, _axis))
define("cumlogsumexp", along("`cumlogsumexp` mixes places", UNSCALED, _axis))
define("rev", along("`rev` reverses", LINEAR, lambda eqn: eqn.param("dimensions")))
define("fft", along("`fft` transforms", LINEAR, _transformed))
define("sort", along("`sort` orders", EACH, lambda eqn: [eqn.param("dimension")]))
define("top_k approx_top_k", along("`top_k` ranks", LINEAR, _last))
define("iota", _iota)
define("random_bits rng_bit_generator threefry2x32", _random(IGNORED))
define("random_seed random_wrap random_unwrap random_fold_in random_split", _random(IGNORED))
define("random_clone", _random(IGNORED))
define("rng_uniform random_gamma", _random(UNSCALED))  # of distributions with parameters
