"""Equations that say the same in simpler ones, before any analysis sees them.

A slice with a known start is no lookup, a slice with a step is a slice of a reshape, and a stack
is a concatenation: each has one description only, that of the simpler form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from uscale_jax.trace.program import Value, is_empty, nothing, value_of
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


def _unstack(
    emit: Emit, params: Params, args: Sequence[Value], avals: Avals, source: Any
) -> list[Value]:
    axis = params[0]["axis"]
    shapes = [[*s[:axis], 1, *s[axis + 1 :]] for s in _shapes(args[0], len(params))]
    cut = [{"sizes": (1,) * len(avals), "axis": axis}] * len(params)
    pieces = emit("split", cut, args, [_like(aval, shapes) for aval in avals], source)
    return [
        _reshape(emit, piece, [a.shape for a in aval], aval, source)
        for piece, aval in zip(pieces, avals, strict=True)
    ]


def _concatenate(
    emit: Emit, params: Params, args: Sequence[Value], avals: Avals, source: Any
) -> list[Value] | None:
    """Without operands that have no elements."""
    full = [arg for arg in args if not is_empty(arg)]
    if len(full) == len(args) or not full:
        return None
    return full if len(full) == 1 else emit("concatenate", params, full, avals, source)


def _split(
    emit: Emit, params: Params, args: Sequence[Value], avals: Avals, source: Any
) -> list[Value] | None:
    """Without results that have no elements."""
    results = [value_of(aval) for aval in avals]
    full = [i for i, result in enumerate(results) if not is_empty(result)]
    if len(full) == len(results) or not full:
        return None
    cut = [{**p, "sizes": tuple(p["sizes"][i] for i in full)} for p in params]
    pieces = emit("split", cut, args, [avals[i] for i in full], source) if full[1:] else [*args]
    for result in results:
        result.uniform = nothing(result, len(params))
    for i, piece in zip(full, pieces, strict=True):
        results[i] = piece
    return results


def _permuting_reshape(
    emit: Emit, params: Params, args: Sequence[Value], avals: Avals, source: Any
) -> list[Value] | None:
    """A reshape that first permutes dimensions: a transposition, and a reshape."""
    order = params[0]["dimensions"]
    if order is None:
        return None
    shapes = [[s[i] for i in order] for s in _shapes(args[0], len(params))]
    moved = [{"permutation": tuple(order)}] * len(params)
    value = emit("transpose", moved, args, [_like(avals[0], shapes)], source)[0]
    return [_reshape(emit, value, [a.shape for a in avals[0]], avals[0], source)]


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


def _known_gather(
    emit: Emit, params: Params, args: Sequence[Value], avals: Avals, source: Any
) -> list[Value] | None:
    """One box at a place that is known and inside is a slice (so JAX 0.8 takes ``x[..., 3:]``)."""
    value, indices = args
    numbers = params[0]["dimension_numbers"]
    if indices.ndim != 1 or indices.uniform is None or numbers.operand_batching_dims:
        return None
    plain = []
    for p, shape in enumerate(_shapes(value, len(params))):
        start, sizes = int(indices.uniform[p]), params[p]["slice_sizes"]
        at = [start if i in numbers.start_index_map else 0 for i in range(len(shape))]
        stops = tuple(a + n for a, n in zip(at, sizes, strict=True))
        if start < 0 or any(stop > n for stop, n in zip(stops, shape, strict=True)):
            return None
        plain.append({"start_indices": tuple(at), "limit_indices": stops, "strides": None})
    boxes = [_like(avals[0], [p["slice_sizes"] for p in params])]
    box = emit("slice", plain, [value], boxes, source)[0]
    return [_reshape(emit, box, [a.shape for a in avals[0]], avals[0], source)]


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
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "gather": _known_gather,
    "reshape": _permuting_reshape,
    "slice": _strided_slice,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
}
