"""Equations that say the same in simpler ones, before any analysis sees them.

A slice with a known start is no lookup, a slice with a step is a slice of a reshape, and a stack
is a concatenation: each has one description only, that of the simpler form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from uscale_jax.trace.program import Value
from uscale_jax.trace.source import Source

Avals = Sequence[Sequence[Any]]
Params = Sequence[Mapping[str, Any]]


class Emit(Protocol):
    """Appends one equation and returns its outputs."""

    def __call__(
        self, name: str, params: Params, args: Sequence[Value], avals: Avals, source: Source | None
    ) -> list[Value]:
        """Append one equation."""
        ...


def _like(avals: Sequence[Any], shapes: Sequence[Sequence[int]]) -> list[Any]:
    pairs = zip(avals, shapes, strict=True)
    return [jax.ShapeDtypeStruct(tuple(shape), aval.dtype) for aval, shape in pairs]


def _shapes(value: Value, count: int) -> list[list[int]]:
    return [[size[p] for size in value.shape] for p in range(count)]


def _reshape(
    emit: Emit, value: Value, shapes: Sequence[Sequence[int]], avals: Sequence[Any], source: Any
) -> Value:
    params = [{"new_sizes": tuple(shape), "dimensions": None} for shape in shapes]
    return emit("reshape", params, [value], [_like(avals, shapes)], source)[0]


def _stack(
    emit: Emit, params: Params, args: Sequence[Value], avals: Avals, source: Any
) -> list[Value]:
    axis = params[0]["axis"]
    pieces = []
    for arg in args:
        shapes = [[*s[:axis], 1, *s[axis:]] for s in _shapes(arg, len(params))]
        pieces.append(_reshape(emit, arg, shapes, avals[0], source))
    return emit("concatenate", [{"dimension": axis}] * len(params), pieces, avals, source)


def _dynamic_slice(
    emit: Emit, params: Params, args: Sequence[Value], avals: Avals, source: Any
) -> list[Value] | None:
    """Known starts are clamped as XLA clamps them."""
    value, *starts = args
    if any(start.uniform is None for start in starts):
        return None
    plain = []
    for p, shape in enumerate(_shapes(value, len(params))):
        sizes = params[p]["slice_sizes"]
        at = [
            min(max(int(s.uniform[p]), 0), full - size)  # type: ignore[index]
            for s, full, size in zip(starts, shape, sizes, strict=True)
        ]
        stops = tuple(a + n for a, n in zip(at, sizes, strict=True))
        plain.append({"start_indices": tuple(at), "limit_indices": stops, "strides": None})
    return emit("slice", plain, [value], avals, source)


def _strided_slice(
    emit: Emit, params: Params, args: Sequence[Value], avals: Avals, source: Any
) -> list[Value] | None:
    """``x[..., s::k]`` with k dividing the size: split it into (size/k, k), and take one of k."""
    strides = params[0]["strides"]
    if strides is None or all(k == 1 for k in strides):
        return None
    shapes = _shapes(args[0], len(params))
    if not all(_whole_steps(p, shape) for p, shape in zip(params, shapes, strict=True)):
        return None
    split = [[n for m, k in zip(s, strides, strict=True) for n in (m // k, k)] for s in shapes]
    value = _reshape(emit, args[0], split, avals[0], source)
    cut, kept = [], []
    for p, shape in zip(params, split, strict=True):
        starts, stops = _inside(p, shape, strides)
        cut.append({"start_indices": starts, "limit_indices": stops, "strides": None})
        kept.append([b - a for a, b in zip(starts, stops, strict=True)])
    box = emit("slice", cut, [value], [_like(avals[0], kept)], source)[0]
    return [_reshape(emit, box, [a.shape for a in avals[0]], avals[0], source)]


def _whole_steps(params: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether every stepped dimension is taken from end to end."""
    bounds = zip(
        shape, params["start_indices"], params["limit_indices"], params["strides"], strict=True
    )
    return all(k == 1 or (n % k == 0 and a < k and b > n - k + a) for n, a, b, k in bounds)


def _inside(
    params: Mapping[str, Any], split: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    starts, stops = [], []
    for i, k in enumerate(strides):
        start, stop = params["start_indices"][i], params["limit_indices"][i]
        stepped = k > 1
        starts += [0 if stepped else start, start if stepped else 0]
        stops += [split[2 * i] if stepped else stop, start + 1 if stepped else 1]
    return tuple(starts), tuple(stops)


Rewrite = Callable[..., "list[Value] | None"]

REWRITES: dict[str, Rewrite] = {
    "dynamic_slice": _dynamic_slice,
    "slice": _strided_slice,
    "stack": _stack,
}
