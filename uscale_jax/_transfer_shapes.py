"""Roles from two trees of shapes alone, by the layout that JAX libraries share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from uscale_jax import _tree
from uscale_jax._plan import LeafPlan, Plan
from uscale_jax._table import shape_words
from uscale_jax._transfer_facts import Known, Model, role_of
from uscale_jax._transfer_rules import FIXED, VECTOR, Facts, Fan
from uscale_jax._types import Key, Tree
from uscale_jax.trace.uses import FREE, SUMMED

_NOTE = (
    "roles by convention, for nothing was traced: kernels are (..., inputs, outputs). What shapes "
    "do not tell is left out: tied embeddings, the 1/d of attention scores, residual branches."
)


class Read(NamedTuple):
    """What two trees of shapes tell."""

    plan: Plan
    """Leaves and shapes, without maps: nothing can be grown by it."""
    model: Model


def facts(base: Tree, target: Tree) -> Read:
    """Returns what is known of the leaves of two trees.

    Raises:
      ValueError: names or ranks differ; a leaf grows along dimensions of which the layout does not
        say whether products sum over them.
    """
    pairs, treedefs = _paired(base, target)
    leaves = [_leaf(key, a, b) for key, a, b in pairs]
    plan = Plan(
        leaves={known.leaf.name: known.leaf for known in leaves},
        axes=(),
        notes=(_NOTE,),
        exact=False,
        treedef=treedefs[1],
        small_treedef=treedefs[0],
        small_keys=tuple(key for key, _, _ in pairs),
    )
    return Read(plan, Model(leaves, (), (_NOTE,), grows_in_depth=False, branches=False))


def _paired(base: Tree, target: Tree) -> tuple[list[tuple[Key, Any, Any]], tuple[Any, Any]]:
    (keys, small, one), (others, big, two) = map(_tree.flatten_named, (base, target))
    if keys != others:
        odd = sorted(map(_tree.name, set(keys) ^ set(others)))[:8]
        raise ValueError(
            f"the two trees have different leaves: {', '.join(odd)}. Expected: the same model at "
            "two sizes. Fix: build both from one definition; us.plan(..., depth=) for more layers."
        )
    return list(zip(keys, small, big, strict=True)), (one, two)


def _leaf(key: Key, small: Any, big: Any) -> Known:
    a, b = tuple(small.shape), tuple(big.shape)
    if len(a) != len(b) or small.dtype != big.dtype:
        raise ValueError(
            f"leaf {_tree.name(key)!r} is {_tree.describe(small)} in the base and "
            f"{_tree.describe(big)} in the target. Expected: the same rank and dtype. Fix: build "
            "both from one definition."
        )
    grows = tuple(i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n)
    n = math.prod(y / x for x, y in zip(a, b, strict=True) if x)
    dims = _dims(key, a, b, grows)
    fan_in, fan_out = (
        Fan(*(_product(shape, dims, kind) for shape in (a, b))) for kind in (SUMMED, FREE)
    )
    role = role_of(fan_in.ratio != 1, fan_out.ratio != 1)
    role = VECTOR if len(a) < 2 and role != FIXED else role
    found = Facts(role, fan_in, fan_out, n)
    plan = LeafPlan(
        key=key, source=key, small=a, big=b, dtype=str(small.dtype), maps=(None,) * len(a)
    )
    return Known(plan, found, "by its shape", dims)


def _product(shape: tuple[int, ...], dims: tuple[str, ...], kind: str) -> int:
    return math.prod(size for size, each in zip(shape, dims, strict=True) if each == kind)


def _dims(
    key: Key, a: tuple[int, ...], b: tuple[int, ...], grows: Sequence[int]
) -> tuple[str, ...]:
    """All but the last dimension are summed over, where nothing else would make a difference."""
    last = len(a) - 1
    if any(i < last - 1 for i in grows):
        raise ValueError(
            f"leaf {_tree.name(key)!r} grows from {shape_words(a)} to {shape_words(b)}: whether "
            "products sum over its first dimensions is not to be told from shapes. Expected: "
            "kernels that grow along their last two. Fix: us.transfer(us.plan(base_apply, base, "
            "target_apply, target, *inputs)), which looks."
        )
    if last < 1:
        return (FREE,) * len(a)
    return (SUMMED,) * last + (FREE,)
