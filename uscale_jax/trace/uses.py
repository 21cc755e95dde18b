"""How every parameter leaf is used: what sums over it, and over how many inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from uscale_jax.trace.atoms import Size
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.source import Source
from uscale_jax.trace.tracing import Traced
from uscale_jax.trace.views import View, is_layout

SUMMED, FREE, SHARED = "summed", "free", "shared"
"""What a product does along a dimension of a leaf: sums over it, makes it, or has one each."""
LOOKUPS = ("gather", "dynamic_slice")
_SUMS = ("reduce_sum", "psum", "psum_invariant")


class Use(NamedTuple):
    """One equation that reads a leaf."""

    name: str
    """The primitive."""
    source: Source | None
    visit: int
    fan_in: Size
    """How many elements of the leaf one output sums over, in both programs."""
    fan_out: Size
    """How many outputs one input takes part in; of what is no product, the leaf's elements."""
    dims: tuple[str, ...] | None = ()
    """What a product does along every dimension of the leaf; None where that is not known."""
    may_sum: bool = False
    """Of what is no product, whether outputs may sum over it: a product in two equations, or what
    is not looked into."""

    @property
    def is_product(self) -> bool:
        """Return whether it is a matrix product or a convolution."""
        return self.dims != ()

    @property
    def is_lookup(self) -> bool:
        """Return whether rows of the leaf are picked by numbers."""
        return self.name in LOOKUPS


class _Followed(NamedTuple):
    """A leaf, in a value that is made of leaves alone or picked out of one."""

    leaf: int
    view: View | None
    """How it is laid out; None where that is not known."""
    pick: int = -1
    """The visit where numbers pick it: rows of a table, or one of several kernels."""

    @property
    def picked(self) -> bool:
        """Return whether numbers pick it."""
        return self.pick >= 0


_Seen: TypeAlias = "dict[int, list[_Followed]]"


def uses(traced: Traced) -> list[list[Use]]:
    """Returns the uses of every leaf in the order of the program.

    A leaf that is cast, normalised, laid out anew, put together with others or picked by numbers
    is followed to where it meets an activation.
    """
    program, count = traced.structure.program, len(traced.keys)
    seen = _followed(traced)
    found: list[list[Use]] = [[] for _ in range(count)]
    kernels: set[int] = set()
    summed = {id(v) for eqn in program.equations if eqn.name in _SUMS for v in eqn.inputs}
    for eqn in program.equations:
        if eqn.name.startswith("loop_"):
            continue
        further = {f.leaf for out in eqn.outputs for f in seen.get(id(out), ()) if not f.picked}
        for side, value in enumerate(eqn.inputs):
            for followed in seen.get(id(value), ()):
                if followed.leaf in further:
                    continue
                if _is_kernel(eqn, side, followed, seen):
                    use = _use(traced, eqn, side, followed)
                    if use.fan_in[0] != use.fan_in[1]:  # rows that are weighed are rows
                        kernels.add(followed.pick)
                    found[followed.leaf].append(use)
                elif not followed.picked:
                    met = _met(traced, eqn, side, followed)
                    added = any(id(out) in summed for out in eqn.outputs)
                    sums = added or eqn.name not in (*_ADDS, "mul", "div")
                    found[followed.leaf].append(met._replace(may_sum=sums))
    # What picks a kernel looks nothing up.
    return [[u for u in each if not (u.is_lookup and u.visit in kernels)] for each in found]


def _is_kernel(eqn: Equation, side: int, followed: _Followed, seen: _Seen) -> bool:
    """Whether a product is with a leaf.

    Of two that are made of leaves alone the last is the kernel; what is picked is one for
    activations alone.
    """
    if eqn.name not in _PRODUCTS or side > 1:
        return False
    other = seen.get(id(eqn.inputs[1 - side]), ())
    if followed.picked:
        return not other
    return side == 1 or all(each.picked for each in other)


def _followed(traced: Traced) -> _Seen:
    program, count = traced.structure.program, len(traced.keys)
    seen: _Seen = {id(v): [_Followed(i, View(i))] for i, v in enumerate(program.inputs[:count])}
    own = {id(value) for value in (*program.inputs[:count], *program.captured)}
    for eqn in program.equations:
        if all(id(v) in own or v.uniform is not None for v in eqn.inputs):
            own.update(map(id, eqn.outputs))
        for place, out in enumerate(eqn.outputs):
            found = _passed(eqn, place, out, seen, own)
            if found:
                seen[id(out)] = found
    return seen


def _passed(
    eqn: Equation, place: int, out: Value, seen: _Seen, own: Collection[int]
) -> list[_Followed]:
    """What an output still is of the leaves that go in."""
    first = seen.get(id(eqn.inputs[0]), []) if eqn.inputs else []
    if is_layout(eqn.name) or eqn.name == "loop_slice":
        step = (eqn, place)
        return [f._replace(view=f.view and View(f.leaf, (*f.view.steps, step))) for f in first]
    if eqn.name in LOOKUPS:
        return [f._replace(view=None, pick=eqn.visit) for f in first]
    chosen = eqn.inputs[1:] if eqn.name == "select_n" else eqn.inputs
    alone = all(_is_own(v, own) or any(f.picked for f in seen.get(id(v), ())) for v in chosen)
    if not alone or eqn.name in _PRODUCTS or eqn.name.startswith("loop_"):
        return []
    return [
        f
        for v in chosen
        for f in seen.get(id(v), ())
        if eqn.name == "concatenate" or _broadcasts(v, out)
    ]


def _broadcasts(value: Value, out: Value) -> bool:
    """Whether a value has the dimensions of an output, or one element where that has more."""
    pairs = zip(value.shape, out.shape, strict=False)
    return value.ndim == out.ndim and all(n in (m, (1,) * len(n)) for n, m in pairs)


def _met(traced: Traced, eqn: Equation, side: int, followed: _Followed) -> Use:
    """The use of a leaf by what is no product with it."""
    shape = traced.structure.program.inputs[followed.leaf].shape
    fan_out = _product(_picked(eqn, side, shape))
    return Use(eqn.name, eqn.source, eqn.visit, (1, 1), fan_out)


def _use(traced: Traced, eqn: Equation, side: int, followed: _Followed) -> Use:
    shape = traced.structure.program.inputs[followed.leaf].shape
    summed, shared = _PRODUCTS[eqn.name](eqn, side)
    value = eqn.inputs[side]
    free = [i for i in range(value.ndim) if i not in (*summed, *shared)]
    kinds = {**dict.fromkeys(summed, SUMMED), **dict.fromkeys(shared, SHARED)}
    dims = None if followed.view is None else _dims(followed.view, shape, value, kinds)
    fan_in = _product([value.shape[i] for i in summed])
    if SUMMED in (dims or ()):  # of several that are put together, a kernel has its own inputs
        fan_in = _product([n for n, kind in zip(shape, dims or (), strict=True) if kind == SUMMED])
    return Use(
        name=eqn.name,
        source=eqn.source,
        visit=eqn.visit,
        fan_in=fan_in,
        fan_out=_product([value.shape[i] for i in free]),
        dims=dims,
    )


def _picked(eqn: Equation, side: int, shape: Sequence[Size]) -> Sequence[Size]:
    """The dimensions of what one row is: of a table that is looked up, without its rows."""
    if eqn.name not in LOOKUPS or side:
        return shape
    pairs = zip(eqn.inputs[0].shape, eqn.sizes("slice_sizes"), strict=True)
    return [size for size, taken in pairs if size == taken]


def _product(sizes: Sequence[Size]) -> Size:
    return math.prod(size[0] for size in sizes), math.prod(size[-1] for size in sizes)


def _dims(
    view: View, shape: Sequence[Size], value: Value, kinds: Mapping[int, str]
) -> tuple[str, ...] | None:
    """What happens along each dimension of the leaf: where one goes, its index changes."""
    lead = len(view.scans)
    # A dimension of one element goes nowhere; the program in which fewer have one tells more.
    program = 0 if sum(n[0] == 1 for n in shape) <= sum(n[-1] == 1 for n in shape) else -1
    sizes = [size[program] for size in shape]
    found = []
    for dim, size in enumerate(sizes):
        line = np.arange(size).reshape([-1 if i == dim else 1 for i in range(len(sizes))])
        places = view.follow(np.broadcast_to(line, sizes), program)
        if places is None:
            return None
        each = {SHARED if i < lead else kinds.get(i - lead, FREE) for i in _varying(places)}
        found.append(next((kind for kind in (SUMMED, SHARED, FREE) if kind in each), FREE))
    return tuple(found)


def _varying(places: np.ndarray[Any, Any]) -> Iterator[int]:
    """The dimensions along which an array varies, seen from its first element."""
    for i in range(places.ndim):
        line = places[tuple(slice(None) if j == i else 0 for j in range(places.ndim))]
        if line.size > 1 and np.ptp(line):
            yield i


def _of_dot(eqn: Equation, side: int) -> tuple[list[int], list[int]]:
    summed, batch = eqn.param("dimension_numbers")
    return [*summed[side]], [*batch[side]]


def _of_ragged(eqn: Equation, side: int) -> tuple[list[int], list[int]]:
    numbers = eqn.param("ragged_dot_dimension_numbers")
    summed, batch = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions if side else numbers.lhs_ragged_dimensions
    return [*summed[side]], [*batch[side], *groups]


def _of_convolution(eqn: Equation, side: int) -> tuple[list[int], list[int]]:
    numbers = eqn.param("dimension_numbers")
    if side == 0:  # what slides is the leaf: it is read as an image
        return [numbers.lhs_spec[1]], []
    return [*numbers.rhs_spec[1:]], []


_PRODUCTS = {
    "conv_general_dilated": _of_convolution,
    "dot_general": _of_dot,
    "ragged_dot_general": _of_ragged,
}


def behind_norms(traced: Traced, leaves: Collection[int]) -> list[int]:
    """Returns the leaves that are not as they are any more where they join an activation.

    A norm behind the last kernel of a residual branch takes off again what that is multiplied by.
    """
    seen = _followed(traced)
    return [
        leaf
        for leaf in leaves
        if not _ends_linearly(
            traced, {key for key, each in seen.items() if any(f.leaf == leaf for f in each)}
        )
    ]


def _ends_linearly(traced: Traced, grown: set[int]) -> bool:
    """Whether values, and what is made of them, are only added up until they meet the stream."""
    program = traced.structure.program
    own = {id(v) for v in (*program.inputs[: len(traced.keys)], *program.captured)}
    for eqn in program.equations:
        if all(_is_own(v, own) for v in eqn.inputs):
            own.update(map(id, eqn.outputs))
        reads = [id(v) in grown for v in eqn.inputs]
        if not any(reads) or all(id(out) in grown for out in eqn.outputs):
            continue
        others = [v for v, read in zip(eqn.inputs, reads, strict=True) if not read]
        if eqn.name in _ADDS and not all(_is_own(v, own) for v in others):
            continue  # the stream
        if not _is_linear(eqn, reads):
            return False
        grown.update(map(id, eqn.outputs))
    return True


def _is_linear(eqn: Equation, reads: Sequence[bool]) -> bool:
    if eqn.name in (*_PRODUCTS, "mul"):
        return sum(reads) == 1
    if eqn.name == "div":
        return reads == [True, False]
    return eqn.name in (*_ADDS, *_LINEAR) or is_layout(eqn.name)


def _is_own(value: Value, own: Collection[int]) -> bool:
    return id(value) in own or value.uniform is not None


_ADDS = ("add", "add_any", "sub")
_LINEAR = (
    *("neg", "reduce_sum", "select_n", "concatenate", "pad", "rev", "optimization_barrier"),
    *("psum", "psum_invariant", "pvary", "reduce_precision"),
    *("loop_enter", "loop_slice", "loop_stack", "loop_close"),
)
