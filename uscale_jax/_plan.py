"""Plan: how a larger model is made from a smaller one, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from uscale_jax import _tree
from uscale_jax._table import places_words, shape_words, table
from uscale_jax._types import Apply, Key, Tree
from uscale_jax.trace.units import NEW_ZERO

Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Term: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class LeafPlan:
    """How one leaf of the big model is made from one of the small model.

    .. math:: W' = m\\,(c + W)[\\mathrm{maps}] - c
    """

    key: Key
    """Where the leaf stands in the big model's tree."""
    source: Key
    """Where the leaf it is made from stands in the small model's tree."""
    small: tuple[int, ...]
    big: tuple[int, ...]
    dtype: str
    maps: tuple[Indices | None, ...]
    """Per dimension, the place in the small leaf of every place in the big one; None where all
    are the same.  Places that copy none: -1 starts as zero, -2 as the mean over the first set in
    ``averages``, -3 over the second, and so on."""
    averages: tuple[tuple[Indices, ...], ...] = ()
    """Per dimension, sets of places in the small leaf."""
    factors: tuple[Term, ...] = ()
    """Arrays that broadcast against the big leaf; their product is m."""
    copies: tuple[Term, ...] = ()
    """Arrays whose product is n, the number of copies of every element."""
    shift: float = 0.0
    """The c of leaves that are only read as c + leaf, such as the gain 1 + w of a norm."""
    roles: tuple[str, ...] = ()
    """Per dimension, what decides how copies may be told apart: "reader" where the leaf is only
    summed over, "switch" where it is so and nothing else reads the units, "unit" where it makes
    such units, else "other"."""
    partners: tuple[Indices | None, ...] = ()
    """Per dimension that grows, -1 for the first copy of every unit, else the first place of the
    pair that copies make, or -2."""
    layer_dim: int | None = None
    """The dimension of layers, of a leaf that holds those of all layers, if layers are added."""
    layers: tuple[int, ...] = ()
    """Per layer along it, the small model's layer that it is a copy of."""
    zero: bool = False
    """Whether all of it starts as zero: what keeps a new layer silent."""
    new: bool = False
    """Whether it belongs to a new layer."""
    words: str = "1"
    """m in words."""
    rates: tuple[Term, ...] | None = None
    """Arrays whose product the learning rate takes, where that is not m: of units that are chosen
    and not copied (:func:`select`)."""

    @property
    def name(self) -> str:
        """Return the key as one string, ``'params/Dense_0/kernel'``."""
        return _tree.name(self.key)

    @property
    def factor(self) -> Any:
        """Return m: a float, or an array that broadcasts against the big leaf."""
        return _product(self.factors)

    @property
    def replicas(self) -> Any:
        """Return n: a float, or an array that broadcasts against the big leaf."""
        return _product(self.copies)

    @property
    def lr_factor(self) -> Any:
        """Return what the learning rate of Adam and its kin takes: m, unless units are chosen."""
        return self.factor if self.rates is None else _product(self.rates)

    @property
    def sgd_lr_factor(self) -> Any:
        """Return what the learning rate of SGD takes: m²·n, or m times that of Adam."""
        n = self.replicas if self.rates is None else 1.0
        return self.factor * self.lr_factor * n

    def maps_of(self, new_layers: bool) -> tuple[Indices | None, ...]:
        """Return the maps with new layers of a stacked leaf as copies, or as copies of nothing."""
        if self.layer_dim is None:
            return self.maps
        sources = np.asarray(self.layers, np.int64)
        first = np.zeros(len(sources), bool)
        first[np.unique(sources, return_index=True)[1]] = True
        maps = list(self.maps)
        maps[self.layer_dim] = np.where(first | new_layers, sources, NEW_ZERO)
        return tuple(maps)

    @property
    def floating(self) -> bool:
        """Return whether factors apply to it."""
        if self.dtype.startswith("key<"):  # of random keys, which is no NumPy dtype
            return False
        return bool(jax.numpy.issubdtype(jax.numpy.dtype(self.dtype), jax.numpy.inexact))


def _product(terms: tuple[Term, ...]) -> Any:
    total = np.asarray(1.0)
    for term in terms:
        total = total * term
    return float(total) if total.ndim == 0 else total


@dataclass(frozen=True)
class PlanAxis:
    """One axis of the two models."""

    name: str
    small: int
    big: int
    free: bool
    """Whether its size can change."""
    why: str
    """Why it cannot; or what to know about a free one."""
    places: tuple[tuple[str, int], ...]
    """Where it occurs: names of leaves, and which dimension."""


class Models(NamedTuple):
    """The two models a plan was made for, to verify with, and how it was made."""

    small: Apply
    big: Apply
    inputs: tuple[Any, ...]
    depth: Any = None
    new_layers: str = "identity"
    rotary: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """How a larger model is made from a smaller one; ``print`` shows it, ``to_json`` keeps it."""

    leaves: Mapping[str, LeafPlan]
    """Every leaf of the big model by name, in the order of its tree."""
    axes: tuple[PlanAxis, ...]
    """Every axis that parameters have."""
    notes: tuple[str, ...] = ()
    """What is not exact, or not covered, and why."""
    exact: bool = True
    """Whether the grown model is the same function."""
    precision: str = "float32"
    """The narrowest floating dtype that the models compute in."""
    treedef: Any = field(default=None, repr=False)
    """The structure of the big model's tree; None in a plan that was read from JSON."""
    small_treedef: Any = field(default=None, repr=False)
    """The same of the small model's."""
    small_keys: tuple[Key, ...] = ()
    """Where the small model's leaves stand, in the order of its tree."""
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By axis, the units of the big model that stay, where they are chosen (:func:`select`)."""
    models: Models | None = field(default=None, repr=False)
    """The models it was made for; None in a plan that was read from JSON."""

    @property
    def factors(self) -> Tree:
        """Return m per leaf as a tree like the big model's parameters."""
        return self.tree(lambda leaf: leaf.factor)

    @property
    def replicas(self) -> Tree:
        """Return n per leaf as a tree like the big model's parameters."""
        return self.tree(lambda leaf: leaf.replicas)

    @property
    def lr_factors(self) -> Tree:
        """Return what the learning rate of Adam and its kin takes per leaf: m.

        That is from the small model to the big one; the other way it is divided by it.
        """
        return self.tree(lambda leaf: leaf.lr_factor)

    @property
    def sgd_lr_factors(self) -> Tree:
        """Return what the learning rate of SGD takes per leaf: m²·n."""
        return self.tree(lambda leaf: leaf.sgd_lr_factor)

    def tree(self, of: Callable[[LeafPlan], Any]) -> Tree:
        """Return ``of(leaf)`` as a tree like the big model's parameters."""
        return self.unflatten([of(leaf) for leaf in self.leaves.values()])

    def unflatten(self, values: list[Any]) -> Tree:
        """Return values, one a leaf, as a tree like the big model's parameters."""
        if self.treedef is not None:
            return jax.tree.unflatten(self.treedef, values)
        return _nested([leaf.key for leaf in self.leaves.values()], values)

    def unflatten_small(self, values: Mapping[Key, Any]) -> Tree:
        """Return values by key as a tree like the small model's parameters."""
        ordered = [values[key] for key in self.small_keys]
        if self.small_treedef is not None:
            return jax.tree.unflatten(self.small_treedef, ordered)
        return _nested(list(self.small_keys), ordered)

    def __eq__(self, other: object) -> bool:
        """Return whether two plans say the same."""
        return isinstance(other, Plan) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data; see :meth:`to_json`."""
        from uscale_jax._plan_json import to_dict

        return to_dict(self)

    def to_json(self) -> str:
        """Return the plan as JSON text: leaves, axes, index maps, factors, notes."""
        import json

        return json.dumps(self.to_dict(), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Return the plan that ``to_json`` wrote.

        Raises:
          ValueError: it is no such text.
        """
        from uscale_jax._plan_json import from_json

        return from_json(text)

    def __str__(self) -> str:
        """Return a table of leaves, one of axes, and what is not exact or not covered."""
        parts = [_leaf_table(self), _axis_table(self)]
        return "\n\n".join([*parts, *(["\n".join(self.notes)] if self.notes else [])])


def _nested(keys: list[Key], values: list[Any]) -> Tree:
    """Plain dicts, for a plan that does not know of any other tree."""
    if keys == [()]:
        return values[0]
    root: dict[str, Any] = {}
    for key, value in zip(keys, values, strict=True):
        inner = root
        for part in key[:-1]:
            inner = inner.setdefault(part, {})
        inner[key[-1]] = value
    return root


def _leaf_table(plan: Plan) -> str:
    header = ("leaf", "small", "big", "factor", "copies", "lr (Adam)", "lr (SGD)")
    rows = [
        (
            leaf.name if not leaf.new else f"{leaf.name} (new, from {_tree.name(leaf.source)})",
            shape_words(leaf.small),
            shape_words(leaf.big),
            "0" if leaf.zero else leaf.words,
            number_words(leaf.replicas),
            *(
                (number_words(leaf.lr_factor), number_words(leaf.sgd_lr_factor))
                if leaf.floating
                else ("", "")
            ),
        )
        for leaf in plan.leaves.values()
    ]
    return table(header, rows)


def _axis_table(plan: Plan) -> str:
    rows = [
        (
            axis.name,
            str(axis.small),
            str(axis.big),
            "free" if axis.free else "fixed",
            places_words(axis.places),
            axis.why,
        )
        for axis in plan.axes
    ]
    return table(("axis", "small", "big", "", "places", "why"), rows)


def number_words(x: Any) -> str:
    """Returns a number as a fraction where it is a simple one; the range of several."""
    flat = np.unique(np.asarray(x, float))
    if flat.size == 1:
        return _one_number(float(flat[0]))
    return f"{_one_number(float(flat[0]))} … {_one_number(float(flat[-1]))}"


def _one_number(x: float) -> str:
    simple = Fraction(x).limit_denominator(512)
    return str(simple) if abs(float(simple) - x) < 1e-12 * abs(x) else f"{x:.4g}"
