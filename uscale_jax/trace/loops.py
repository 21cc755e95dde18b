"""Equations of loops and of sharded calls, as ``inline`` makes them, and collectives in those."""

from __future__ import annotations

from uscale_jax.trace.atoms import Dim, Size, fresh
from uscale_jax.trace.description import CARRIED, JOINED, LINEAR, UNSCALED, Labelled
from uscale_jax.trace.primitives import define, immovable, labels
from uscale_jax.trace.program import Equation

_STEPS = "a loop steps through it"
_SHARDS = "a mesh shards"


def _enter(eqn: Equation) -> Labelled:
    dims = labels(eqn.outputs[0])
    return Labelled([dims], [dims], CARRIED)


def _close(eqn: Equation) -> Labelled:
    """What is carried and what follows it agree; the loop's predicate only needs to be there."""
    dims = labels(eqn.outputs[0])
    return Labelled([dims, dims, *map(labels, eqn.inputs[2:])], [dims], JOINED)


def _slice(eqn: Equation) -> Labelled:
    dims = labels(eqn.inputs[0])
    return Labelled([dims], [dims[1:]], LINEAR, fixed=[(dims[0], _STEPS)])


def _stack(eqn: Equation) -> Labelled:
    dims = labels(eqn.outputs[0])
    return Labelled([dims[1:]], [dims], LINEAR, fixed=[(dims[0], _STEPS)])


def _shard(eqn: Equation) -> Labelled:
    """Every dimension is shards of equal parts, of which the body sees one part."""
    shards = [fresh((n,) * len(eqn.params)) for n in eqn.param("shards")]
    inside = eqn.outputs[0] if eqn.name == "shard" else eqn.inputs[0]
    local = labels(inside)
    whole = [(*shard, *dim) for shard, dim in zip(shards, local, strict=True)]
    fixed = [(shard, _SHARDS) for shard in shards]
    if eqn.name == "shard":
        return Labelled([whole], [local], LINEAR, fixed=fixed)
    return Labelled([local], [whole], LINEAR, fixed=fixed)


def _shards(whole: Size, local: Size) -> Dim:
    return fresh(tuple(m // n for m, n in zip(whole, local, strict=True)))


def _all_gather(eqn: Equation) -> Labelled:
    """The gathered dimension is the shards' one after the other, or a new one of shards."""
    axis = eqn.param("all_gather_dimension")
    local, whole = eqn.inputs[0].shape, eqn.outputs[0].shape
    dims = labels(eqn.inputs[0])
    if eqn.param("tiled"):
        shards = _shards(whole[axis], local[axis])
        result = [*dims[:axis], (*shards, *dims[axis]), *dims[axis + 1 :]]
    else:
        shards = fresh(whole[axis])
        result = [*dims[:axis], shards, *dims[axis:]]
    return Labelled([dims], [result], LINEAR, fixed=[(shards, _SHARDS)])


def _reduce_scatter(eqn: Equation) -> Labelled:
    """Sums over the mesh, of which every shard keeps its part."""
    axis = eqn.param("scatter_dimension")
    whole, local = eqn.inputs[0].shape, eqn.outputs[0].shape
    if eqn.param("tiled"):
        result = labels(eqn.outputs[0])
        shards = _shards(whole[axis], local[axis])
        dims = [*result[:axis], (*shards, *result[axis]), *result[axis + 1 :]]
    else:
        dims = labels(eqn.inputs[0])
        shards, result = dims[axis], [*dims[:axis], *dims[axis + 1 :]]
    return Labelled([dims], [result], LINEAR, fixed=[(shards, _SHARDS)])


def _all_to_all(eqn: Equation) -> Labelled:
    """Parts of one dimension go to the shards, and come together along another."""
    split, joined = eqn.param("split_axis"), eqn.param("concat_axis")
    if not eqn.param("tiled") or split == joined:
        return immovable(eqn, "`all_to_all` exchanges shards", UNSCALED)
    shards = _shards(eqn.inputs[0].shape[split], eqn.outputs[0].shape[split])
    rest = labels(eqn.outputs[0])
    local = labels(eqn.inputs[0])[joined]
    operand = [local if i == joined else dim for i, dim in enumerate(rest)]
    result = list(rest)
    operand[split], result[joined] = (*shards, *rest[split]), (*shards, *local)
    return Labelled([operand], [result], LINEAR, fixed=[(shards, _SHARDS)])


define("loop_enter", _enter)
define("loop_close", _close)
define("loop_slice", _slice)
define("loop_stack", _stack)
define("shard unshard", _shard)
define("all_gather all_gather_invariant", _all_gather)
define("reduce_scatter", _reduce_scatter)
define("all_to_all", _all_to_all)
