"""Primitives that cut and join arrays, and those that look places up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uscale_jax.trace.atoms import Dim, Size, fresh, sum_of
from uscale_jax.trace.description import (
    JOINED,
    LINEAR,
    UNSCALED,
    Block,
    Blocks,
    Description,
    Dims,
    Labelled,
    Scale,
)
from uscale_jax.trace.primitives import define, immovable, labels
from uscale_jax.trace.program import Equation

Parts = list[list[Dim]]


def _minus(a: Size, *others: Size) -> Size:
    return tuple(m - sum(rest) for m, *rest in zip(a, *others, strict=True))


def _cuts(sizes: Sequence[Size]) -> list[Dim] | None:
    """Parts of the given sizes; None where one is there in some programs only, or negative."""
    if any(n < 0 for size in sizes for n in size):
        return None
    if any(0 in size and any(size) for size in sizes):
        return None
    return [fresh(size) if any(size) else () for size in sizes]


def _box(
    eqn: Equation, whole: Sequence[Size], cuts: Sequence[Sequence[Size]], *, pasted: bool
) -> Description:
    """A box in a whole, given the sizes before, in and after it along every dimension."""
    parts: Parts = []
    place: list[int] = []
    for sizes in cuts:
        found = _cuts(sizes)
        if found is None:
            return immovable(eqn, f"`{eqn.name}` cuts", UNSCALED)
        present = [i for i, size in enumerate(sizes) if i == 1 or any(size)]
        parts.append([found[i] for i in present])
        place.append(present.index(1))
    dims = [sum_of(part, size) for part, size in zip(parts, whole, strict=True)]
    inside = [part[at] for part, at in zip(parts, place, strict=True)]
    return Blocks(dims, parts, [Block(inside, tuple(place))], pasted, filler=pasted)


def _slice(eqn: Equation) -> Description:
    """Steps larger than one are rewritten before (``uscale_jax.trace.rewrite``)."""
    whole = eqn.inputs[0].shape
    strides = eqn.param("strides")
    if strides is not None and any(stride != 1 for stride in strides):
        return _stepped(eqn)
    starts, stops = eqn.sizes("start_indices"), eqn.sizes("limit_indices")
    cuts = [
        (start, _minus(stop, start), _minus(size, stop))
        for size, start, stop in zip(whole, starts, stops, strict=True)
    ]
    return _box(eqn, whole, cuts, pasted=False)


def _pad(eqn: Equation) -> Description:
    configs = list(zip(*(p["padding_config"] for p in eqn.params), strict=True))
    if any(inner for config in configs for _, _, inner in config):
        return _spread(eqn, configs)
    cuts = [
        (tuple(c[0] for c in config), size, tuple(c[1] for c in config))
        for config, size in zip(configs, eqn.inputs[0].shape, strict=True)
    ]
    return _box(eqn, eqn.outputs[0].shape, cuts, pasted=True)


def _stepped(eqn: Equation) -> Labelled:
    """Steps that do not divide: dimensions that are cut stay, the others pass."""
    inner, size = labels(eqn.inputs[0]), eqn.outputs[0].shape
    whole = [a == b for a, b in zip(eqn.inputs[0].shape, size, strict=True)]
    outer = [d if same else fresh(n) for d, same, n in zip(inner, whole, size, strict=True)]
    cut = [dim for same, *both in zip(whole, inner, outer, strict=True) if not same for dim in both]
    return Labelled([inner], [outer], LINEAR, fixed=[(d, "a slice skips places") for d in cut])


def _spread(eqn: Equation, configs: Sequence[Sequence[Sequence[int]]]) -> Labelled:
    """Padding between elements: dimensions that are padded stay, the others pass."""
    whole = eqn.outputs[0].shape
    untouched = [not any(map(any, config)) for config in configs]
    inner = labels(eqn.inputs[0])
    outer = [
        dim if same else fresh(size)
        for dim, same, size in zip(inner, untouched, whole, strict=True)
    ]
    why = "`pad` spreads elements"
    pairs = zip(untouched, inner, outer, strict=True)
    held = [dim for same, *both in pairs if not same for dim in both]
    return Labelled([inner, []], [outer], JOINED, fixed=[(dim, why) for dim in held])


def _along_axis(eqn: Equation, axis: int, sizes: Sequence[Size], *, pasted: bool) -> Description:
    """Boxes one after the other along one axis."""
    whole = (eqn.outputs if pasted else eqn.inputs)[0]
    dims = labels(whole)
    cuts = _cuts(sizes)
    if cuts is None:
        return immovable(eqn, f"`{eqn.name}` cuts", UNSCALED)
    dims[axis] = sum_of(cuts, whole.shape[axis])
    parts = [[dim] for dim in dims]
    parts[axis] = cuts
    blocks = [
        Block(
            [*dims[:axis], cut, *dims[axis + 1 :]], (*[0] * axis, i, *[0] * (len(dims) - 1 - axis))
        )
        for i, cut in enumerate(cuts)
    ]
    return Blocks(dims, parts, blocks, pasted)


def _concatenate(eqn: Equation) -> Description:
    axis = eqn.param("dimension")
    return _along_axis(eqn, axis, [v.shape[axis] for v in eqn.inputs], pasted=True)


def _split(eqn: Equation) -> Description:
    return _along_axis(eqn, eqn.param("axis"), eqn.sizes("sizes"), pasted=False)


def _dynamic_slice(eqn: Equation) -> Labelled:
    """A start that is not known: whole dimensions pass, the others are looked up."""
    operand, result, fixed = _windowed(eqn, eqn.inputs[0].shape, eqn.outputs[0].shape)
    return Labelled([operand, *([] for _ in eqn.inputs[1:])], [result], LINEAR, fixed=fixed)


def _dynamic_update_slice(eqn: Equation) -> Labelled:
    operand, update, fixed = _windowed(eqn, eqn.inputs[0].shape, eqn.inputs[1].shape)
    starts: list[Dims] = [[] for _ in eqn.inputs[2:]]
    return Labelled([operand, update, *starts], [operand], JOINED, fixed=fixed)


def _windowed(
    eqn: Equation, whole: Sequence[Size], window: Sequence[Size]
) -> tuple[Dims, Dims, list[tuple[Dim, str]]]:
    outer = [fresh(size) for size in whole]
    inner = [
        dim if size == full else fresh(size)
        for dim, size, full in zip(outer, window, whole, strict=True)
    ]
    why = f"`{eqn.name}` looks places up"
    moved = [pair for pair in zip(outer, inner, strict=True) if pair[0] is not pair[1]]
    return outer, inner, [(dim, why) for pair in moved for dim in pair]


def _gather(eqn: Equation) -> Labelled:
    """Dimensions taken whole pass through; those that indices point into are looked up."""
    numbers = eqn.param("dimension_numbers")
    operand, indices = labels(eqn.inputs[0]), labels(eqn.inputs[1])
    out, sizes = eqn.outputs[0].shape, eqn.sizes("slice_sizes")
    _share(operand, numbers.operand_batching_dims, indices, numbers.start_indices_batching_dims)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [i for i in range(len(operand)) if i not in gone]
    result: list[Dim] = [()] * len(out)
    held = [operand[i] for i in numbers.collapsed_slice_dims]
    for place, i in zip(numbers.offset_dims, window, strict=True):
        whole = sizes[i] == eqn.inputs[0].shape[i] and i not in numbers.start_index_map
        result[place] = operand[i] if whole else fresh(out[place])
        held += [] if whole else [operand[i], result[place]]
    batch = [i for i in range(len(out)) if i not in numbers.offset_dims]
    for place, dim in zip(batch, indices[:-1], strict=True):
        result[place] = dim
    scale = UNSCALED if _fills(eqn) else LINEAR
    return _looked_up(eqn, [operand, indices], result, [*held, indices[-1]], scale)


def _share(left: Dims, left_axes: Sequence[int], right: Dims, right_axes: Sequence[int]) -> None:
    for i, j in zip(left_axes, right_axes, strict=True):
        right[j] = left[i]


def _looked_up(
    eqn: Equation, operands: list[Dims], result: Dims, held: Sequence[Dim], scale: Scale
) -> Labelled:
    why = f"`{eqn.name}` looks places up"
    return Labelled(operands, [result], scale, fixed=[(dim, why) for dim in held])


def _fills(eqn: Equation) -> bool:
    """Whether places beyond the end are a number that factors would change."""
    filler = eqn.param("fill_value")
    return filler is not None and bool(np.isfinite(filler)) and filler != 0


def _applies(eqn: Equation) -> bool:
    """Whether a ``scatter`` puts a function of what is there, as ``x.at[i].apply(f)`` does."""
    return eqn.name == "scatter" and eqn.param("update_jaxpr") is not None


def _scatter(eqn: Equation) -> Labelled:
    numbers = eqn.param("dimension_numbers")
    operand, indices = labels(eqn.inputs[0]), labels(eqn.inputs[1])
    sizes = eqn.inputs[2].shape
    _share(operand, numbers.operand_batching_dims, indices, numbers.scatter_indices_batching_dims)
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [i for i in range(len(operand)) if i not in gone]
    updates: list[Dim] = [()] * len(sizes)
    held = [operand[i] for i in numbers.inserted_window_dims]
    for place, i in zip(numbers.update_window_dims, window, strict=True):
        pointed = i in numbers.scatter_dims_to_operand_dims
        whole = sizes[place] == eqn.inputs[0].shape[i] and not pointed
        updates[place] = operand[i] if whole else fresh(sizes[place])
        held += [] if whole else [operand[i], updates[place]]
    batch = [i for i in range(len(sizes)) if i not in numbers.update_window_dims]
    for place, dim in zip(batch, indices[:-1], strict=True):
        updates[place] = dim
    # Replicas of an update would be added, or a function applied, once each.
    repeats = eqn.name in ("scatter-add", "scatter-sub") or _applies(eqn)
    held += indices[:-1] if repeats else []
    scale = UNSCALED if _applies(eqn) else JOINED
    return _looked_up(eqn, [operand, indices, updates], operand, [*held, indices[-1]], scale)


define("slice", _slice)
define("split", _split)
define("concatenate", _concatenate)
define("pad", _pad)
define("dynamic_slice", _dynamic_slice)
define("dynamic_update_slice", _dynamic_update_slice)
define("gather", _gather)
define("scatter scatter-add scatter-sub scatter-min scatter-max", _scatter)
