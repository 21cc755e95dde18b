"""select: a plan with those units and layers of the big model that are to stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from uscale_jax import _choice, _layer_scores
from uscale_jax._duplicates import Duplicates
from uscale_jax._importance import Importance
from uscale_jax._plan import LeafPlan, Models, Plan
from uscale_jax._planning import Remade, leaf_plans, remade
from uscale_jax.trace import ratios
from uscale_jax.trace.growth import leaf_growths
from uscale_jax.trace.ratios import Merged
from uscale_jax.trace.units import Units, of_classes

Array: TypeAlias = "np.ndarray[Any, Any]"


def select(plan: Plan, importance: Importance | Mapping[str, Any]) -> Plan:
    r"""Returns a plan by which the most important units of the big model become the small one.

    .. math:: W_j = \frac{c + W'_{\mathrm{kept}(j)}}{m} - c

    Units that the parameters prove equal count as one, and are merged: what reads them is added
    up.  Units that nothing reads go first.  So whatever :func:`grow` made, with any ``symmetry``,
    is removed before anything else is, with no change of the function.

    A unit goes everywhere at once: the axes of a plan are what prunes together, whatever the
    architecture.  What stays is not divided by the number of copies, for there are none: m is 1
    but where the model has constants that follow its sizes (the 1/√d of attention).  Learning
    rates go by sizes, as in growing: α·k for what sums over an axis that became k times smaller.

    :func:`shrink`, :func:`resize_state` and :func:`scale_optimizer` take the plan as any other.
    ``shrink(params, plan, importance=...)`` does this by itself; the plan is what the optimizer
    needs.

    Args:
      plan: what :func:`plan` returned.
      importance: what :func:`importance` returned for it, or numbers per unit of your own by axis
        (and per layer by family, where layers go): the highest stay.

    Returns:
      A :class:`Plan`, not ``exact``, with ``kept``: by axis the units of the big model that stay,
      in order, by family of layers the layers.

    Raises:
      ValueError: the plan was read from JSON; the importance is of another plan, lacks an axis,
        has another number of units, or NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> shapes = lambda n: {"down": f32(n, 3), "up": f32(5, n)}
      >>> plan = us.plan(apply, shapes(4), apply, shapes(6), f32(2, 5))
      >>> chosen = us.select(plan, {"a": [0.3, 0.1, 0.9, 0.4, 0.2, 0.5]})
      >>> chosen.kept
      {'a': (0, 2, 3, 5)}

    References:
      That units prune in groups, through all layers that share an axis: Fang et al., *DepGraph*,
      2023 (arXiv:2301.12900).
    """
    return chosen(plan, importance).plan


class Selected(NamedTuple):
    """A plan with chosen units, and what becomes of every unit."""

    plan: Plan
    units: Mapping[str, Array]
    """By axis, the unit of the small model that every unit of the big one becomes, -1 for none."""


def chosen(plan: Plan, importance: Importance | Mapping[str, Any]) -> Selected:
    """Returns what :func:`select` does, and which units go.

    Raises:
      ValueError: as :func:`select`.
    """
    if plan.models is None:
        raise ValueError(
            "this plan was read from JSON, and does not know its models. Expected: the plan that "
            "us.plan returned. Fix: make it anew, or keep the selected plan as JSON."
        )
    models = plan.models
    layers: Mapping[str, tuple[int, ...]] = {}
    scores = importance.scores if isinstance(importance, Importance) else importance
    if isinstance(importance, Importance):
        _check_plan(plan, importance.plan)
        assert importance.plan.models is not None
        models = importance.plan.models._replace(big=models.big)
    elif models.depth is not None:
        models = models._replace(depth=_depth(plan, models, scores))
    made = remade(plan, models)
    if made.deepened is not None:
        layers = {family.name: family.kept for family in made.deepened.families}
    equal = importance.duplicates if isinstance(importance, Importance) else None
    units = {
        name: _units(name, scores, equal, atom.size[-1], atom.size[0])
        for name, atom in made.atoms.items()
        if atom not in made.traced.structure.strided.atoms
    }
    return Selected(_selected(plan, models, made, units, layers), units)


def _depth(plan: Plan, models: Models, scores: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    deepened = remade(plan, models).deepened
    assert deepened is not None
    small = {family.name: family.small for family in deepened.families}
    for family in deepened.families:
        _checked(family.name, scores, family.big, family.small)
    return _layer_scores.chosen(small, scores)


def _units(
    name: str, scores: Mapping[str, Any], equal: Duplicates | None, size: int, count: int
) -> Array:
    """Which unit of the small model every unit of the big one becomes, -1 for none."""
    own = _checked(name, scores, size, count)
    classes = np.arange(size) if equal is None else equal.classes[name]
    dead = np.zeros(size, bool) if equal is None else equal.dead[name]
    return _choice.chosen(own, classes, dead, count)


def _checked(name: str, scores: Mapping[str, Any], size: int, count: int) -> Array:
    """The scores of an axis, one a unit."""
    if name not in scores:
        raise ValueError(
            f"nothing says which of the {size} units of {name!r} are to stay, {count} of them; "
            f"there are scores of {sorted(scores)}. Expected: a number for every unit. Fix: print "
            "the plan to see its axes, and add this one."
        )
    own = np.asarray(scores[name], np.float64)
    if own.shape != (size,):
        raise ValueError(
            f"scores of {name!r} have shape {own.shape}, and the big model has {size} units of it. "
            "Expected: one number a unit of the big model. Fix: measure them with this plan."
        )
    if np.isnan(own).any():
        raise ValueError(
            f"the score of unit {int(np.flatnonzero(np.isnan(own))[0])} of {name!r} is NaN. "
            "Expected: numbers. Fix: look for NaN in parameters and batches."
        )
    return own


def _check_plan(plan: Plan, other: Plan) -> None:
    """Raises ValueError unless two plans are of leaves of the same sizes."""
    sizes = lambda p: {k: (leaf.small, leaf.big) for k, leaf in p.leaves.items()}  # noqa: E731
    here, there = sizes(plan), sizes(other)
    odd = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if odd:
        raise ValueError(
            f"this importance was measured for another plan: {odd[0]!r} is "
            f"{there.get(odd[0], 'missing')} there and {here.get(odd[0], 'missing')} here (small, "
            "big). Expected: the importance of this plan. Fix: measure it with this plan."
        )


def _selected(
    plan: Plan,
    models: Models,
    made: Remade,
    units: Mapping[str, Array],
    layers: Mapping[str, tuple[int, ...]],
) -> Plan:
    leaves, by_size = _leaves(made, units)
    kept = {name: tuple(_choice.first_members(each).tolist()) for name, each in units.items()}
    notes = [_words(name, each) for name, each in units.items()]
    for name, each in layers.items():
        notes.append(f"layers chosen of {name}: {', '.join(map(str, each))}")
    if not by_size:
        notes.append("learning rates as they are: no factors by size solve the model's equations")
    return replace(
        plan,
        leaves={leaf.name: leaf for leaf in leaves},
        exact=False,
        notes=tuple(notes),
        kept={**kept, **{name: tuple(each) for name, each in layers.items()}},
        models=models,
    )


def _words(name: str, units: Array) -> str:
    """How many units stay, and what becomes of the others."""
    there = np.flatnonzero(units >= 0)
    count, merged = len(np.unique(units[there])), len(there) - len(np.unique(units[there]))
    more = f", {merged} others equal to one of them and merged with it" if merged else ""
    return f"units chosen along {name}: {count} of {len(units)}{more}"


def _leaves(made: Remade, units: Mapping[str, Array]) -> tuple[list[LeafPlan], bool]:
    """The leaves, and whether learning rates go by sizes."""
    places = {
        made.atoms[name]: of_classes(each, int(each.max()) + 1) for name, each in units.items()
    }
    merged = {atom: _merged(each) for atom, each in places.items() if (each.copies > 1).any()}
    leaves = leaf_plans(made, leaf_growths(ratios.of_kept(made.traced, merged), places))
    try:
        rates = leaf_growths(ratios.by_size(made.traced))
    except ValueError:
        return [replace(leaf, rates=()) for leaf in leaves], False
    by_key = {key: each.factors for key, each in zip(made.traced.keys, rates, strict=True)}
    return [replace(leaf, rates=by_key[leaf.source]) for leaf in leaves], True


def _merged(places: Units) -> Merged:
    if places.new.any():
        return Merged.IN_PART
    return Merged.EVENLY if np.ptp(places.copies) == 0 else Merged.UNEVENLY
