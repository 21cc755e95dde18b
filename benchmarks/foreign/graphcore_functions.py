"""Activations, softmax and attention here and in ``unit-scaling``."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.foreign.graphcore_pairs import (
    MULTS,
    Call,
    Pair,
    Shapes,
    blend,
    graphcore,
    judged,
)
from uscale_jax import numerics as un

RELU = math.sqrt(2 / (1 - 1 / math.pi))
"""The factor of the output of ReLU, which activations become at large mult."""
ACTIVATIONS = {
    "gelu": (partial(jax.nn.gelu, approximate=False), {"approximate": False}, 0.25),
    "silu": (jax.nn.silu, {}, 1.0),
}
"""The function, options that make ours the one theirs is by default, a number of the blend."""
CLASSES = ((7, 1.0), (64, 1.0), (64, 3.0), (1024, 0.25), (1024, 1.0), (1024, 4.0))
ATTENTION = "scaled_dot_product_attention"


def functions() -> list[Pair]:
    """Return the pairs of operations whose factors are constants of a function."""
    return [
        *(
            _activation(of, mult, c)
            for of in ACTIVATIONS
            for mult in MULTS
            for c in (None, "to_output_scale", "gmean")
        ),
        *(_silu_glu(mult, c) for mult in MULTS for c in (None, "to_output_scale")),
        *(_softmax(n, mult, c) for n, mult in CLASSES for c in (None, "to_output_scale")),
        *(_attention(causal, mult) for causal in (False, True) for mult in (1.0, 4.0, 12.0)),
        _attention_of_values(10, 4.0),
    ]


def _activation(of: str, mult: float, constraint: Any) -> Pair:
    f, options, number = ACTIVATIONS[of]
    scales = un.activation_scales(f, mult)
    output = blend(1 / (1 + 0.25 / mult**2), 2, RELU)
    grad = blend(1 / (1 + number / mult**2), 2, math.sqrt(2))
    mine = un.constrained(constraint, scales.output, scales.grad)
    theirs = un.constrained(constraint, output, grad)
    return Pair(
        of,
        f"{of}, mult {mult:g}, {constraint}",
        {"x": (37, 53)},
        partial(getattr(un, of), mult=mult, constraint=constraint, **options),
        graphcore(of, mult=mult, constraint=constraint),
        "activation",
        {"output": mine[0] / theirs[0], "x": mine[1] / theirs[1]},
        judged=judged(constraint, "x"),
        centred=True,
    )


def _silu_glu(mult: float, constraint: Any) -> Pair:
    """Theirs has one factor for all three, whatever the constraint here."""
    scales = un.activation_scales(jax.nn.silu, mult)
    one = blend(1 / (1 + 1 / mult**2), 2, math.sqrt(2))
    factors = un.constrained(constraint, scales.gate, scales.gate, scales.grad)
    tensors = ("output", "x", "gate")
    return Pair(
        "silu_glu",
        f"silu_glu, mult {mult:g}, {constraint}",
        {"x": (37, 53), "gate": (37, 53)},
        partial(un.silu_glu, mult=mult, constraint=constraint),
        graphcore("silu_glu", mult=mult),
        "activation",
        {tensor: s / one for tensor, s in zip(tensors, factors, strict=True)},
        judged=judged(constraint, "x", "gate"),
    )


def _softmax(n: int, mult: float, constraint: Any) -> Pair:
    weight = 1 / (1 + 4 / mult**2)
    output = blend(weight, n, n**0.5)
    # Their gradient is multiplied by mult, by which their factor of it is divided.
    grad = mult * blend(weight, n / mult, (n / mult) ** 0.5)
    s, b = _softmax_factors(n, mult)
    return Pair(
        "softmax",
        f"softmax, {n} classes, mult {mult:g}, {constraint}",
        {"x": (9, n)},
        partial(un.softmax, mult=mult, constraint=constraint),
        graphcore("softmax", dim=-1, mult=mult, constraint=constraint),
        "softmax",
        # With one factor, both gradients are those of the function.
        {"output": s / output, "x": b / grad if constraint is None else s / output},
        judged=judged(constraint, "x"),
    )


def _softmax_factors(n: int, mult: float) -> tuple[float, float]:
    """Of the output and the gradient here: of equal logits, from what they are multiplied by."""
    same, first = jnp.zeros(n), jnp.zeros(n).at[0].set(1.0)
    y, pull = jax.vjp(partial(un.softmax, mult=mult, constraint=None), same)
    return float(jnp.sum(y)), float(-pull(first)[0][1]) * n**2


_LENGTH, _SIZE = 48, 16
_SHAPE = (2, _LENGTH, 3, _SIZE)
"""Batch, positions, heads and the size of a head, in the order here."""
_SHAPES: Shapes = {"query": _SHAPE, "key": _SHAPE, "value": _SHAPE}


def _attention(causal: bool, mult: float) -> Pair:
    options = {"is_causal": causal, "mult": mult}
    name = f"attention, {'causal, ' if causal else ''}mult {mult:g}"
    here, there = partial(un.attention, **options), _heads_first(**options)
    ratios = dict.fromkeys(("output", *_SHAPES), _attention_ratio(_SIZE, causal, mult))
    tensors = ("output", "value")  # gradients of queries and keys are not at one in either
    return Pair(ATTENTION, name, _SHAPES, here, there, "attention", ratios, judged=tensors)


def _attention_of_values(values: int, mult: float) -> Pair:
    return Pair(
        ATTENTION,
        f"attention, values of size {values}, mult {mult:g}",
        {**_SHAPES, "value": (*_SHAPE[:-1], values)},
        partial(un.attention, mult=mult),
        _heads_first(mult=mult),
        "values",
        dict.fromkeys(("output", *_SHAPES), _attention_ratio(values, False, mult)),
        adapted=_heads_first(mult=mult * values / _SIZE),
        judged=("output", "value"),
    )


def _attention_ratio(values: int, causal: bool, mult: float) -> float:
    given = mult * values / _SIZE
    flat = math.sqrt((math.log(_LENGTH) if causal else 1) / _LENGTH)
    theirs = 1 / blend(1 / (1 + 4 * values / given**2), flat, 1.0)
    return un.attention_scale(_LENGTH, _SIZE, is_causal=causal, mult=mult) / theirs


def _heads_first(**options: Any) -> Call:
    """Attention of PyTorch, where heads come before positions."""
    f = graphcore(ATTENTION, **options)
    return lambda *operands: f(*(x.swapaxes(1, 2) for x in operands)).swapaxes(1, 2)
