"""Layers whose leaves are stacked, and which a ``scan`` goes through.

The scans that make more steps in the big program than in the small one are cut to the number of
steps of the small one.  On the way from a leaf to its scan, equations may work on all layers at
once only if they treat each alike, so that a layer's slice depends on its slice of the leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, JaxprEqn, Literal
from uscale_jax.trace import flat
from uscale_jax.trace.flat import aval, line, variables
from uscale_jax.trace.silent import Step

# What treats every element of equal place alike.
_ELEMENTWISE_NAMES = """
    abs add convert_element_type copy copy_p cos div erf exp exp2 expm1 integer_pow log log1p
    logistic max min mul neg pow reduce_precision rsqrt sharding_constraint
    sign sin sqrt square stop_gradient sub tanh
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())

_ADVICE = (
    "Expected: a scan over parameters whose layers are stacked on one axis, and over nothing else "
    "that has a layer axis. Fix: pass what layers differ in as parameters, or in the carry."
)


@dataclass
class Stack:
    """Scans over the same leaves, with one step a layer."""

    scans: list[JaxprEqn]
    small: int
    big: int
    dims: dict[Any, int]
    """The layer axis of every value between leaves and scans, leaves included."""

    def step(self, scan: JaxprEqn, eqns: Sequence[JaxprEqn]) -> Step:
        """Return what one of the scans computes in a step, from its carry to its carry."""
        body = flat.flattened(scan.params["jaxpr"]).jaxpr
        n, c = _jax.scan_counts(scan.params)
        pairs = zip(body.invars[n + c :], scan.invars[n + c :], strict=True)
        slices = {inner: outer for inner, outer in pairs if outer in self.dims}
        before = [eqn for eqn in eqns if not self.dims.keys().isdisjoint(eqn.outvars)]
        return Step([*before, *body.eqns], body.invars[n : n + c], body.outvars[:c], slices=slices)


def stacks(small: ClosedJaxpr, big: ClosedJaxpr, leaves: Sequence[Any]) -> list[Stack]:
    """Returns the scans with more steps in the big program, by the leaves they go through.

    Raises:
      ValueError: they go through something else too, or have fewer steps.
    """
    found: list[Stack] = []
    pairs = [[eqn for eqn in c.jaxpr.eqns if _is_scan(eqn)] for c in (small, big)]
    for a, b in zip(*pairs, strict=False):
        lengths = a.params["length"], b.params["length"]
        if lengths[0] > lengths[1]:
            raise ValueError(
                f"{line(b)} makes {lengths[1]} steps in the big model and {lengths[0]} in the "
                "small one. Expected: at least as many. Fix: swap the models."
            )
        if lengths[0] < lengths[1]:
            _add(found, Stack([b], *lengths, _Way(big, leaves, b).dims), leaves)
    return found


def shortened(
    closed: ClosedJaxpr, stacks: Sequence[Stack], kept: Sequence[Sequence[int]]
) -> ClosedJaxpr:
    """Returns the program in which every stack has only the ``kept`` layers.

    Raises:
      ValueError: something else depends on how many layers there are.
    """
    new = {
        v: _jax.new_variable(v.aval, {dim: stack.small})
        for stack in stacks
        for v, dim in stack.dims.items()
    }
    lengths = {id(scan): stack.small for stack in stacks for scan in stack.scans}
    read = flat.used(closed)
    eqns = [_shorter(eqn, new, lengths, read) for eqn in closed.jaxpr.eqns]
    if any(v in new for v in variables(closed.jaxpr.outvars)):
        raise _depends("an output of the model")
    consts = dict(flat.constants(closed))
    for stack, layers in zip(stacks, kept, strict=True):
        for v in stack.dims.keys() & consts.keys():
            consts[v] = consts[v][(slice(None),) * stack.dims[v] + ([*layers],)]
    consts = {new.get(v, v): array for v, array in consts.items()}
    invars = [new.get(v, v) for v in closed.jaxpr.invars]
    return _jax.with_equations(closed, eqns, consts, invars=invars)


def _is_scan(eqn: JaxprEqn) -> bool:
    return _jax.primitive_name(eqn) == "scan"


def _add(found: list[Stack], stack: Stack, leaves: Sequence[Any]) -> None:
    """Adds a stack, to that with some of the same leaves if there is one."""
    for other in found:
        if other.dims.keys() & stack.dims.keys() & {*leaves}:
            other.scans += stack.scans
            other.dims |= stack.dims
            return
    found.append(stack)


def _shorter(
    eqn: JaxprEqn, new: dict[Any, Any], lengths: Mapping[int, int], read: set[Any]
) -> JaxprEqn:
    """Returns an equation on shortened values."""
    reads = [v if isinstance(v, Literal) else new.get(v, v) for v in eqn.invars]
    if id(eqn) in lengths:
        return _shorter_scan(eqn, reads, lengths[id(eqn)], read)
    if not any(v in new for v in eqn.outvars):
        if any(v in new for v in variables(eqn.invars)):
            raise _depends(line(eqn))
        return eqn
    outs = [new.get(v, v) for v in eqn.outvars]
    params = {**eqn.params, **_sizes(eqn, outs[0].aval.shape)}
    return _jax.rebuilt(eqn, invars=reads, outvars=outs, params=params)


def _shorter_scan(eqn: JaxprEqn, reads: list[Any], length: int, read: set[Any]) -> JaxprEqn:
    carried = _jax.scan_counts(eqn.params)[1]
    kept, stacked = eqn.outvars[:carried], eqn.outvars[carried:]
    if not read.isdisjoint(stacked):
        raise _depends(f"what every step of {line(eqn)} gives out")
    outs = [*kept, *(_jax.new_variable(v.aval, {0: length}) for v in stacked)]
    return _jax.rebuilt(eqn, invars=reads, outvars=outs, params={**eqn.params, "length": length})


def _sizes(eqn: JaxprEqn, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the parameters that say the shape of a result."""
    named = {"broadcast_in_dim": "shape", "reshape": "new_sizes", "slice": "limit_indices"}
    return {key: shape for name, key in named.items() if name == _jax.primitive_name(eqn)}


def _depends(what: str) -> ValueError:
    return ValueError(
        f"{what} depends on how many layers there are, and the layers are more in the big model. "
        f"{_ADVICE}"
    )


class _Way:
    """The way from leaves to a scan, walked backwards."""

    def __init__(self, closed: ClosedJaxpr, leaves: Sequence[Any], scan: JaxprEqn) -> None:
        self.producers = {v: eqn for eqn in closed.jaxpr.eqns for v in eqn.outvars}
        self.leaves, self.consts, self.scan = {*leaves}, {*closed.jaxpr.constvars}, scan
        self.dims: dict[Any, int] = {}
        for v in scan.invars[sum(_jax.scan_counts(scan.params)) :]:
            self._follow(v, 0)
        if self.leaves.isdisjoint(self.dims):
            raise self._refusal("no parameters")

    def _follow(self, v: Any, dim: int) -> None:
        if self.dims.setdefault(v, dim) != dim:
            raise self._refusal(f"an array by two of its axes, {v.aval.str_short()}")
        if v in self.leaves or v in self.consts:
            return
        if v not in self.producers:
            raise self._refusal(f"an input, {v.aval.str_short()}")
        for operand, axis in self._operands(self.producers[v], dim):
            self._follow(operand, axis)

    def _operands(self, eqn: JaxprEqn, dim: int) -> list[tuple[Any, int]]:
        """Return the operands that have the layer axis too, and which of theirs it is."""
        name, reads = _jax.primitive_name(eqn), variables(eqn.invars)
        out = aval(eqn.outvars[0]).shape
        if name in _ELEMENTWISE and all(v.aval.shape in ((), out) for v in reads):
            return [(v, dim) for v in reads if v.aval.shape]
        if name in _AXES and (found := _AXES[name](eqn, dim)) is not None:
            return [(eqn.invars[0], found)] if found >= 0 else []
        raise self._refusal(f"what {line(eqn)} computes")

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"{line(self.scan)} makes {self.scan.params['length']} steps in the big model and "
            f"fewer in the small one, and goes through {what}. {_ADVICE}"
        )


def _transposed(eqn: JaxprEqn, dim: int) -> int | None:
    return int(eqn.params["permutation"][dim])


def _reshaped(eqn: JaxprEqn, dim: int) -> int | None:
    """Returns the axis of equal size with as many elements before it; None if there is none."""
    old, new = aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape
    before = math.prod(new[:dim])
    alike = (i for i, n in enumerate(old) if (math.prod(old[:i]), n) == (before, new[dim]))
    return next(alike, None)


def _broadcast(eqn: JaxprEqn, dim: int) -> int | None:
    """Returns the axis that becomes ``dim``, -1 where all layers get the same."""
    dims = eqn.params["broadcast_dimensions"]
    if dim not in dims or len(eqn.invars) > 1:
        return -1 if len(eqn.invars) == 1 else None
    axis = dims.index(dim)
    same = aval(eqn.invars[0]).shape[axis] == aval(eqn.outvars[0]).shape[dim]
    return int(axis) if same else -1


def _sliced(eqn: JaxprEqn, dim: int) -> int | None:
    whole = aval(eqn.invars[0]).shape[dim] == aval(eqn.outvars[0]).shape[dim]
    return dim if whole else None


_AXES: dict[str, Callable[[JaxprEqn, int], int | None]] = {
    "broadcast_in_dim": _broadcast,
    "expand_dims": _reshaped,
    "reshape": _reshaped,
    "slice": _sliced,
    "squeeze": _reshaped,
    "transpose": _transposed,
}
"""The axis of the operand that an axis of the result comes from."""
