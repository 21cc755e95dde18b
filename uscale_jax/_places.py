"""What arrays belong to, in parameters and in the state of an optimizer, by name and shape."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from uscale_jax import _factors, _tree
from uscale_jax._plan import LeafPlan, Plan
from uscale_jax._types import Key

FACTORED = {"v_row": -1, "v_col": -2}
"""Fields of optax's factored second moments, and which dimension each is a mean over, in the order
of size."""


def is_absent(node: Any) -> bool:
    """Returns whether a node stands where a tree has no leaf."""
    return node is None or isinstance(node, optax.MaskedNode)


def prefixes(keys: Iterable[Key]) -> list[Key]:
    """Returns what keys of a part of a model may lack: nothing, or the name of the part."""
    parts = {key[:1] for key in keys if len(key) > 1}
    return [(), *sorted(parts, key=lambda part: (part != ("params",), part))]


def fitting(plan: Plan, keys: Sequence[Key], leaves: Sequence[Any]) -> list[LeafPlan | None]:
    """Returns the plan's leaf for each of the big model's, or of a part of it; None for no leaf.

    Raises:
      ValueError: a leaf is not in the plan, or has another shape.
    """
    table = {leaf.key: leaf for leaf in plan.leaves.values()}
    present = [key for key, leaf in zip(keys, leaves, strict=True) if not is_absent(leaf)]
    fits = [p for p in prefixes(table) if all((*p, *key) in table for key in present)]
    prefix = fits[0] if fits else ()
    rows = [
        (key, leaf, None if is_absent(leaf) else table.get((*prefix, *key)))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    lines = [line for key, leaf, owner in rows if (line := _leaf_misfit(key, leaf, owner))]
    if lines:
        raise ValueError("\n".join(["this tree does not fit the plan.", *lines[:12], _TREE_ADVICE]))
    return [owner for _, _, owner in rows]


_TREE_ADVICE = (
    "Expected: parameters, or gradients, of the plan's big model. Fix: pass those, or make a plan "
    "for these."
)


def _leaf_misfit(key: Key, leaf: Any, owner: LeafPlan | None) -> str | None:
    if owner is None:
        return None if is_absent(leaf) else f"  {_tree.name(key)!r} is not in the plan"
    if hasattr(leaf, "shape") and tuple(leaf.shape) != owner.big:
        return f"  {_tree.name(key)!r} is {_tree.describe(leaf)}, the plan makes {owner.big}"
    return None


class Form(NamedTuple):
    """How an array lies over a leaf."""

    lead: int = 0
    """How many dimensions stand before those of the leaf, such as those of a history."""
    missing: int | None = None
    """The dimension of the leaf that it is a mean over."""
    mark: bool = False
    """Whether it only marks that nothing is kept: shape (1,)."""


class Place(NamedTuple):
    """What an array belongs to, seen from one of the two models."""

    leaf: LeafPlan
    name: Key
    """The end of the array's key that names the leaf."""
    form: Form

    def field(self, key: Key) -> str:
        """Returns the name of the field of the state that the array's tree is."""
        return key[-len(self.name) - 1] if len(key) > len(self.name) else ""


class Places(NamedTuple):
    """The same, from both models; None where the shape is not that of the leaf in this model."""

    small: Place | None
    big: Place | None


def places(arrays: Mapping[Key, Any], plan: Plan) -> dict[Key, Places]:
    """Returns what arrays belong to; those that are of no leaf, such as counts, are left out.

    Raises:
      ValueError: an array is of another model.
    """
    tables = [_table(plan, big) for big in (False, True)]
    every = {key: [_owner(key, table) for table in tables] for key in arrays}
    found = {key: _both(key, arrays[key], owners) for key, owners in every.items()}
    fitting = {key: both for key, both in found.items() if both != (None, None)}
    holders = {_holder(key, both) for key, both in fitting.items()}
    lines = [
        f"  {_tree.name(key)!r} {why}"
        for key, x in arrays.items()
        if key not in fitting and (why := _misfit(key, x, every[key], holders))
    ]
    if lines:
        raise ValueError("\n".join(["this state does not fit the plan.", *lines[:12], ADVICE]))
    return fitting


ADVICE = (
    "Expected: what an optimizer's init or update returned for the parameters of the plan's small "
    "model (or of its big one, to shrink it). Fix: pass that state, or make a plan for this model."
)


def _table(plan: Plan, big: bool) -> dict[Key, LeafPlan]:
    """Leaves by key; by the key less the name of a part of the model too, of "params" first."""
    whole: dict[Key, LeafPlan] = {}
    for leaf in sorted(plan.leaves.values(), key=lambda leaf: leaf.new):
        whole.setdefault(leaf.key if big else leaf.source, leaf)
    table = dict(whole)
    for prefix in prefixes(whole)[1:]:
        for key, leaf in whole.items():
            if key[:1] == prefix:
                table.setdefault(key[1:], leaf)
    return table


def _owner(key: Key, table: Mapping[Key, LeafPlan]) -> tuple[Key, LeafPlan] | None:
    """The leaf whose key is the longest end of the array's."""
    ends = (key[start:] for start in range(len(key) + 1))
    return next(((end, table[end]) for end in ends if end in table), None)


def _both(key: Key, x: Any, owners: list[tuple[Key, LeafPlan] | None]) -> Places:
    return Places(*(_place(key, x, owner, big) for owner, big in zip(owners, (0, 1), strict=True)))


def _place(key: Key, x: Any, owner: tuple[Key, LeafPlan] | None, big: int) -> Place | None:
    if owner is None:
        return None
    name, leaf = owner
    place = Place(leaf, name, Form())
    form = _form(tuple(x.shape), leaf, big, place.field(key))
    return None if form is None else place._replace(form=form)


def _form(shape: tuple[int, ...], leaf: LeafPlan, big: int, field: str) -> Form | None:
    of = leaf.big if big else leaf.small
    lead = len(shape) - len(of)
    if lead >= 0 and shape[lead:] == of:
        return Form(lead)
    if shape == (1,):
        return Form(mark=True)
    if field in FACTORED and len(of) > 1:
        dim = reduced(of, field)
        return Form(missing=dim) if shape == without(of, dim) else None
    dims = [dim for dim in range(len(of)) if shape == without(of, dim)]
    # Equal sizes: which of them it is does not matter where the others grow alike.
    alike = {_described(leaf, dim) for dim in dims}
    return Form(missing=dims[0]) if len(alike) == 1 else None


def without(values: tuple[Any, ...], dim: int | None) -> tuple[Any, ...]:
    """Returns the values per dimension less those of one."""
    return values if dim is None else (*values[:dim], *values[dim + 1 :])


def reduced(shape: tuple[int, ...], field: str) -> int:
    """Returns which dimension a field of optax's factored second moments is a mean over."""
    return int(np.argsort(shape)[FACTORED[field]])  # as in optax: 0.2.6 to 0.2.8


def _described(leaf: LeafPlan, dim: int) -> tuple[Any, ...]:
    maps = tuple(None if old is None else old.tobytes() for old in leaf.maps)
    return without(leaf.small, dim), without(leaf.big, dim), without(maps, dim)


def _holder(key: Key, both: Places) -> Key:
    """Where the named tuple stands whose field is the tree that the array is of."""
    place = both.small or both.big
    return key[: -len(place.name) - 1] if place is not None else key


def _misfit(
    key: Key, x: Any, owners: list[tuple[Key, LeafPlan] | None], holders: Collection[Key]
) -> str | None:
    """Why an array is of no use; None where it is of no tree, as a count or a coefficient."""
    if not x.shape or not _factors.is_scaled(x) or key[:-1] in holders or "hyperparams" in key:
        return None
    owner = owners[0] or owners[1]
    if owner is None or not owner[0]:
        return f"is {_tree.describe(x)}, and not named like a leaf of the plan"
    return f"is {_tree.describe(x)}, the plan is for {owner[1].small} and {owner[1].big}"


def part_of(found: Mapping[Key, Places]) -> Key:
    """Returns which part of the model the optimizer is for: () for all of it."""
    parts = set()
    for both in found.values():
        place = both.small or both.big
        if place is not None:
            parts.add(place.leaf.source[: len(place.leaf.source) - len(place.name)])
    return parts.pop() if len(parts) == 1 else ()


def numbers(arrays: Mapping[Key, Any], plan: Plan) -> list[Key]:
    """Returns the keys of single numbers that are kept for a leaf that is copied."""
    table = _table(plan, big=True)
    owners = {key: _owner(key, table) for key, x in arrays.items() if not x.shape}
    return [
        key
        for key, owner in owners.items()
        if owner is not None and owner[1].small and owner[1].small != owner[1].big
    ]


def grows(found: Mapping[Key, Places]) -> bool:
    """Returns whether arrays are of the small model.

    Raises:
      ValueError: some are, and others are of the big one.
    """
    small = [key for key, both in found.items() if both.big is None]
    big = [key for key, both in found.items() if both.small is None]
    if small and big:
        raise ValueError(
            f"this state does not fit the plan: {_tree.name(small[0])!r} is of the small model and "
            f"{_tree.name(big[0])!r} of the big one.\n{ADVICE}"
        )
    return not big


def kept_otherwise(small: Any, big: Any, plan: Plan) -> list[str]:
    """Returns the names of arrays in the state for the big model that copies are no good for.

    Args:
      small: the shapes of a state for the small model.
      big: the same for the big model, by the same names.
      plan: the plan of the two.
    """
    states = [dict(zip(*_tree.flatten_named(state)[:2], strict=True)) for state in (small, big)]
    of_small, of_big = (places(state, plan) for state in states)
    both = {key: (of_small[key].small, of_big[key].big) for key in of_small if key in of_big}
    both = {key: (old, new) for key, (old, new) in both.items() if new is None or not new.leaf.new}
    return [_tree.name(key) for key, (old, new) in both.items() if _differ(key, old, new)]


def _differ(key: Key, small: Place | None, big: Place | None) -> bool:
    """Whether an array is a mean over other dimensions, or over unequal numbers of copies."""
    if small is None or big is None:
        return True
    of, to, missing = small.leaf.small, small.leaf.big, small.form.missing
    if missing is None or big.form.missing is None:
        return small.form != big.form
    if small.field(key) not in FACTORED:
        same = missing == big.form.missing
    else:  # rows may be columns
        same = {reduced(of, field) for field in FACTORED} == {reduced(to, f) for f in FACTORED}
    uneven = any(
        np.ptp(np.bincount(old[old >= 0]))
        for old in small.leaf.maps_of(new_layers=False)
        if old is not None
    )
    return uneven or not same
