"""The equations that :mod:`uscale_jax.trace.inline` makes of loops and of sharded calls."""

from __future__ import annotations

from uscale_jax.trace.atoms import fresh
from uscale_jax.trace.description import CARRIED, JOINED, LINEAR, Labelled
from uscale_jax.trace.primitives import define, labels
from uscale_jax.trace.program import Equation

_STEPS = "a loop steps through it"


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
    fixed = [(shard, "a mesh shards") for shard in shards]
    if eqn.name == "shard":
        return Labelled([whole], [local], LINEAR, fixed=fixed)
    return Labelled([local], [whole], LINEAR, fixed=fixed)


define("loop_enter", _enter)
define("loop_close", _close)
define("loop_slice", _slice)
define("loop_stack", _stack)
define("shard unshard", _shard)
