"""Where in a checkpoint the parameters and the state of the optimizer are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from uscale_jax import _grow, _shrink, _tree
from uscale_jax._checkpoint_orbax import Stored, StoredArray
from uscale_jax._plan import Plan
from uscale_jax._types import Key

Where: TypeAlias = str | Sequence[str] | None
"""Paths in a checkpoint, or None for what is found there."""

_PARAMETERS = ("model", "param", "parameters", "params", "variables", "weights")
_STATES = (
    "opt",
    "opt_state",
    "opt_states",
    "optim",
    "optim_state",
    "optimizer",
    "optimizer_state",
    "tx_state",
)


class Found(NamedTuple):
    """What a checkpoint consists of."""

    tree: Any
    params: Sequence[Key]
    states: Sequence[Key]
    grows: bool | None
    """Whether parameters are the small model's; None where there are none."""


def located(tree: Any, plan: Plan, params: Where, opt_state: Where) -> Found:
    """Returns where parameters and states are, and the tree with leaves named as in the plan.

    Raises:
      ValueError: they are not there, or not those of the plan, or there are several.
    """
    bare = _unboxed(tree)  # flax's nnx keeps every array under "value"
    if not _candidates(leaves_of(tree), plan) and _candidates(leaves_of(bare), plan):
        tree = bare
    leaves = leaves_of(tree)
    given = None if params is None else [_node(leaves, name) for name in _listed(params)]
    found = [_detected(leaves, plan)] if given is None else given
    ways = [_grows(leaves, place, plan) for place in found]
    if len(set(ways)) > 1:
        raise ValueError(
            f"of {_shown(found)} some are of the plan's small model, some of its big one. Fix: "
            "name those of one."
        )
    rest = _outside(leaves, plan, found)
    if opt_state is None:
        states = _detected_states(rest)
    else:
        states = [_node(leaves, name) for name in _listed(opt_state)]
    if params is None or opt_state is None:
        _check_rest(rest, plan, found, states)
    return Found(tree, found, states, ways[0] if ways else None)


def node_at(tree: Any, place: Key) -> Any:
    """Returns the subtree at a place of a tree of dicts."""
    for name in place:
        tree = tree[name]
    return tree


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def leaves_of(tree: Any) -> dict[Key, Any]:
    """Returns the leaves of a tree by path."""
    keys, leaves, _ = _tree.flatten_named(tree)
    return dict(zip(keys, leaves, strict=True))


def _unboxed(tree: Any) -> Any:
    """The tree with {"value": leaf} as the leaf."""

    def is_box(node: Any) -> bool:
        return isinstance(node, dict) and [*node] == ["value"] and isinstance(node["value"], Stored)

    def bare(node: Any) -> Any:
        return node["value"].boxed("value") if is_box(node) else node

    return jax.tree.map(bare, tree, is_leaf=is_box)


def _sides(plan: Plan) -> tuple[dict[Key, tuple[int, ...]], dict[Key, tuple[int, ...]]]:
    """The shapes of leaves by name, in the small model and in the big one."""
    leaves = plan.leaves.values()
    return {leaf.source: leaf.small for leaf in leaves}, {leaf.key: leaf.big for leaf in leaves}


def covered(place: Key, names: Collection[Key]) -> set[Key]:
    """Returns the paths at which a model lies, with all that is in them."""
    return {(*place, *name[:1]) for name in names}


def _is_in(key: Key, paths: Collection[Key]) -> bool:
    return any(key[:i] in paths for i in range(len(key) + 1))


def _candidates(leaves: Mapping[Key, Any], plan: Plan) -> list[Key]:
    """Where leaves are named as in one of the models, and no others are."""
    found: dict[Key, None] = {}
    for side in _sides(plan):
        first = next(iter(side))
        size = len(first)
        for place in [key[: len(key) - size] for key in leaves if key[len(key) - size :] == first]:
            paths = covered(place, side)
            if {key for key in leaves if _is_in(key, paths)} == {(*place, *name) for name in side}:
                found[place] = None
    return list(found)


def _detected(leaves: Mapping[Key, Any], plan: Plan) -> Key:
    every = _candidates(leaves, plan)
    found = [place for place in every if not set(place) & set(_STATES)]
    if len(found) == 1 and (len(found[0]) == 0 or found[0][-1] in _PARAMETERS):
        return found[0]
    if not every and (near := _nearest(leaves, plan)) is not None:
        _grows(leaves, near, plan)  # says what is missing there
    if every:
        shown = ", ".join(repr(_name(place)) for place in every[:8])
        why = f"leaves are named as in the plan at {shown}"
    else:
        shown = ", ".join(repr(_tree.name(key)) for key in [*leaves][:5])
        why = f"nowhere are leaves named as in the plan; there are {shown}"
    wanted = ", ".join(repr(_tree.name(name)) for name in [*_sides(plan)[0]][:5])
    raise ValueError(
        f"where the parameters are in this checkpoint is not clear: {why}. Expected: one tree with "
        f"{wanted}, ..., called {_PARAMETERS[3]!r} or the whole of it. Fix: params='...', "
        "opt_state='...', the paths in it (several for averages of parameters; () for none)."
    )


def _name(place: Key) -> str:
    return _tree.name(place) if place else ""


def _nearest(leaves: Mapping[Key, Any], plan: Plan) -> Key | None:
    """Where parameters are meant to be, by their name or as the whole checkpoint."""
    nodes = {key[:i] for key in leaves for i in range(len(key))}
    named = [node for node in nodes if node and node[-1] in _PARAMETERS]
    places = [node for node in [*named, ()] if not set(node) & set(_STATES)]
    counts = {
        place: sum((*place, *name) in leaves for side in _sides(plan) for name in side)
        for place in places
    }
    best = max(places, key=lambda place: counts[place])
    return best if counts[best] else None


def _node(leaves: Mapping[Key, Any], name: str) -> Key:
    nodes = {key[:i] for key in leaves for i in range(len(key) + 1)}
    found = [node for node in nodes if _name(node) == name]
    if len(found) == 1:
        return found[0]
    shown = sorted(_name(node) for node in nodes if 0 < len(node) < 3)
    raise ValueError(
        f"the checkpoint has nothing at {name!r}. Expected: one of its paths, such as "
        f"{', '.join(map(repr, shown[:12]))}."
    )


def _grows(leaves: Mapping[Key, Any], place: Key, plan: Plan) -> bool:
    """Whether the parameters at a place are the small model's; raises if they are of neither."""
    small, big = (_below(leaves, place, side) for side in _sides(plan))
    fits = [
        {name: getattr(leaf, "shape", None) for name, leaf in inside.items()} == side
        for inside, side in zip((small, big), _sides(plan), strict=True)
    ]
    if fits == [False, True]:
        _shrink.fitting(plan, [*big], [*big.values()])
        return False
    _grow.matched(plan, [*small], [*small.values()])
    return True


def _below(leaves: Mapping[Key, Any], place: Key, names: Collection[Key]) -> dict[Key, Any]:
    """The leaves of a model at a place; all that are there, where none is the model's."""
    paths = covered(place, names)
    inside = {key[len(place) :]: leaf for key, leaf in leaves.items() if _is_in(key, paths)}
    if inside:
        return inside
    return {key[len(place) :]: leaf for key, leaf in leaves.items() if key[: len(place)] == place}


def _detected_states(leaves: Mapping[Key, Any]) -> list[Key]:
    found: dict[Key, None] = {}
    for key in leaves:
        ends = [i + 1 for i, part in enumerate(key) if part in _STATES]
        if ends:
            found[key[: ends[0]]] = None
    return list(found)


def _outside(leaves: Mapping[Key, Any], plan: Plan, params: Sequence[Key]) -> dict[Key, Any]:
    """The leaves that are no parameters."""
    names = {name for side in _sides(plan) for name in side}
    paths = {path for place in params for path in covered(place, names)}
    return {key: leaf for key, leaf in leaves.items() if not _is_in(key, paths)}


def _check_rest(
    rest: Mapping[Key, Any], plan: Plan, params: Sequence[Key], states: Sequence[Key]
) -> None:
    """Refuses arrays like the model's that would stay as they are."""
    changed = {
        (name, shape)
        for leaf in plan.leaves.values()
        if leaf.small != leaf.big or leaf.new
        for name, shape in ((leaf.source, leaf.small), (leaf.key, leaf.big))
        if name
    }
    alike = [
        key
        for key, leaf in rest.items()
        if isinstance(leaf, StoredArray)
        and not _is_in(key, states)
        and any((key[i:], leaf.shape) in changed for i in range(len(key)))
    ]
    if alike:
        shown = ", ".join(repr(_tree.name(key)) for key in alike[:5])
        raise ValueError(
            f"what {shown} is to the model is not clear: named and shaped like its leaves, and in "
            f"neither the parameters ({_shown(params)}) nor an optimizer's state "
            f"({_shown(states)}). Fix: say where both are, params=..., opt_state=...; lists of "
            "paths will do, and what is in none of them stays as it is."
        )


def _shown(places: Sequence[Key]) -> str:
    return ", ".join(repr(_tree.name(place)) for place in places) or "none"
