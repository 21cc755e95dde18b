"""What the rules of transfer need to know of every leaf, read off the two programs of a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uscale_jax import _tree
from uscale_jax._plan import LeafPlan, Plan
from uscale_jax._planning import Remade, remade
from uscale_jax._transfer_rules import (
    FIXED,
    HIDDEN,
    INPUT,
    OUTPUT,
    VECTOR,
    Factor,
    Facts,
    Fan,
)
from uscale_jax.trace import ratios
from uscale_jax.trace.atoms import alternatives, monomials
from uscale_jax.trace.description import Dims
from uscale_jax.trace.growth import leaf_growths, product
from uscale_jax.trace.layout import spread
from uscale_jax.trace.readings import readings
from uscale_jax.trace.tracing import Traced
from uscale_jax.trace.uses import FREE, SUMMED, Use, behind_norms, uses


class Known(NamedTuple):
    """A leaf of the target model."""

    leaf: LeafPlan
    facts: Facts
    why: str
    """How it is used, and where."""
    dims: tuple[str, ...] = ()
    """What products do along its dimensions."""


class Place(NamedTuple):
    """An equation of the model whose result must be multiplied: no leaf can carry that."""

    source: str
    """The line of the model."""
    factor: float
    visit: int
    """Which equation of the jaxpr it is; -1 where it cannot be told."""


class Model(NamedTuple):
    """All leaves, and what is to be known of the whole."""

    leaves: list[Known]
    places: tuple[Place, ...]
    notes: tuple[str, ...]
    grows_in_depth: bool
    branches: bool
    """Whether it is known what residual branches end with."""
    normed: tuple[str, ...] = ()
    """Leaves they end with that stand before a norm, and cannot scale them."""


def facts(plan: Plan) -> Model:
    """Returns what is known of the models of a plan.

    Raises:
      ValueError: the plan was read from JSON.
    """
    if plan.models is None:
        raise ValueError(
            "this plan was read from JSON, and does not know its models. Expected: the plan that "
            "us.plan returned, for roles are read off the programs. Fix: make it anew."
        )
    made = remade(plan, plan.models)
    own = _of_width(made.traced)
    layers = _Layers(plan, made)
    index = {key: i for i, key in enumerate(made.traced.keys)}
    leaves = []
    for leaf in plan.leaves.values():
        found, why, dims = own.leaves[index[leaf.source]]
        deep = found._replace(
            layers=layers.of(leaf),
            last=layers.ends(leaf),
            matrix=SUMMED in dims and FREE in dims,
        )
        leaves.append(Known(leaf, deep, why, dims))
    notes = [*own.notes, *_met(made.traced, [known.facts for known in leaves])]
    # With layers cut out, equations are not those of the user's program.
    places = [p if made.deepened is None else p._replace(visit=-1) for p in own.places]
    branches = any(known.facts.last for known in leaves)
    last = {index[known.leaf.source] for known in leaves if known.facts.last}
    normed = [_tree.name(made.traced.keys[i]) for i in behind_norms(made.traced, last)]
    return Model(leaves, tuple(places), tuple(notes), bool(layers.grown), branches, tuple(normed))


# Width


class _Width(NamedTuple):
    leaves: list[tuple[Facts, str, tuple[str, ...]]]
    places: list[Place]
    notes: list[str]


def _of_width(traced: Traced) -> _Width:
    """Facts of every leaf as if all layers were those of the small model."""
    found, places, notes = [], [], []
    try:
        solution = ratios.by_size(traced)
        factors: Sequence[Any] = [product(growth.factors) for growth in leaf_growths(solution)]
    except ValueError as error:
        factors = []
        notes.append(f"constants in the model are left as they are: {_why(error)}")
    values = traced.structure.program.inputs
    for i, each in enumerate(uses(traced)):
        m = factors[i] if factors else None
        found.append(_leaf(each, traced.structure.of(values[i]), m))
        places += [] if factors else _tied(each)
    return _Width(found, places, notes)


def _why(error: ValueError) -> str:
    return "\n  ".join(str(error).splitlines()[:-1])


def _tied(each: Sequence[Use]) -> list[Place]:
    """Where a table that is looked up is summed over, and nothing else can take the 1/r."""
    kinds = [_role(use) for use in each]
    if not {INPUT, OUTPUT} <= set(kinds):
        return []
    return [
        Place(str(use.source), 1 / Fan(*use.fan_in).ratio, use.visit)
        for use, kind in zip(each, kinds, strict=True)
        if kind == OUTPUT
    ]


def _leaf(each: Sequence[Use], leaf: Dims, m: Factor | None) -> tuple[Facts, str, tuple[str, ...]]:
    kinds = [_role(use) for use in each]
    role, tied = _common(kinds), {INPUT, OUTPUT} <= set(kinds)
    use = next((use for use, kind in zip(each, kinds, strict=True) if kind == role), None)
    dims = next((use.dims for use in each if use.dims), None) or ()
    n = _grown(leaf, range(len(leaf)))
    if use is None:
        return Facts(FIXED, Fan(1, 1), Fan(1, 1), n), "nothing reads it", dims
    fan_in, fan_out = Fan(*use.fan_in), Fan(*use.fan_out)
    by_growth = 1.0 if m is None or np.ndim(m) else float(m)
    if role in (VECTOR, INPUT) and use.may_sum and _grows_twice(leaf) and by_growth < 1:
        # Products are not the only sums: growth says by how much what is summed over grew.
        found = Facts(HIDDEN, Fan(1, 1 / by_growth), fan_out, n)
        return found, f"{_words(use, tied)}, by growth a kernel", dims
    if use.dims and SUMMED not in use.dims and role in (HIDDEN, OUTPUT) and by_growth >= 1:
        # A factor of a kernel: the kernel takes what sums ask for, unless a norm undoes that.
        role, fan_in = VECTOR, Fan(1, 1)
    parts = _grown(leaf, [i for i, kind in enumerate(use.dims or ()) if kind == SUMMED])
    found = Facts(role, fan_in, fan_out, n, lookup=use.is_lookup)
    if np.ndim(parts) and SUMMED in (use.dims or ()):
        found = found._replace(parts_in=parts)
    if m is not None:
        found = found._replace(gauge=_snapped(m * found.r_in))
    return found, _words(use, tied), dims


def _grows_twice(leaf: Dims) -> bool:
    each = (np.asarray(_grown(leaf, [i])) for i in range(len(leaf)))
    return sum(bool(np.any(ratio != 1)) for ratio in each) > 1


def _grown(leaf: Dims, dims: Collection[int]) -> Factor:
    """By how much a leaf grew along some dimensions: one number, or one for each of its parts."""
    cells = np.ones([alternatives(dim) for dim in leaf])
    for i in dims:
        ratios = [
            math.prod(atom.size[-1] / atom.size[0] for atom in cell if atom.size[0])
            for cell in monomials(leaf[i])
        ]
        cells = cells * np.reshape(ratios, [-1 if j == i else 1 for j in range(len(leaf))])
    return spread(cells, leaf, -1)


def _role(use: Use) -> str:
    grows_in, grows_out = use.fan_in[0] != use.fan_in[1], use.fan_out[0] != use.fan_out[1]
    if use.is_product or use.is_lookup:
        return role_of(grows_in, grows_out)
    return VECTOR if grows_out else FIXED


def role_of(grows_in: bool, grows_out: bool) -> str:
    """Returns the role of a kernel."""
    if grows_in:
        return HIDDEN if grows_out else OUTPUT
    return INPUT if grows_out else FIXED


def _common(kinds: Sequence[str]) -> str:
    """The role of a leaf with several uses: tied embeddings learn as what comes in."""
    if {INPUT, OUTPUT} <= set(kinds):
        return INPUT
    return next((role for role in (HIDDEN, OUTPUT, INPUT, VECTOR) if role in kinds), FIXED)


def _snapped(x: Factor) -> Factor:
    """1 where rounding is all that is apart."""
    values = np.where(np.abs(np.asarray(x) - 1) < 1e-9, 1.0, x)
    return float(values) if values.ndim == 0 else values


def _words(use: Use, tied: bool) -> str:
    how = "looked up" if use.is_lookup else "summed over" if use.is_product else f"`{use.name}`"
    if tied:
        how = "looked up and summed over"
    return how if use.source is None else f"{how} at {use.source}"


# Depth


class _Layers:
    """Families of layers that grow, and what their residual branches end with."""

    def __init__(self, plan: Plan, made: Remade) -> None:
        families = () if made.deepened is None else made.deepened.families
        self.grown: Mapping[str, Fan] = {f.name: Fan(f.small, f.big) for f in families}
        # What new layers are silenced by is what the branches of all layers of the family end with.
        zero = () if made.deepened is None else made.deepened.zero
        self._last = {self._place(_tree.name(key)) for key in zero}

    def of(self, leaf: LeafPlan) -> Fan:
        """Return how many layers the family of a leaf has; 1 of what is in none."""
        if leaf.layer_dim is not None:
            return Fan(leaf.small[leaf.layer_dim], leaf.big[leaf.layer_dim])
        return self.grown.get(self._place(leaf.name)[0], Fan(1, 1))

    def ends(self, leaf: LeafPlan) -> bool:
        """Return whether residual branches end with a leaf."""
        return self._place(leaf.name) in self._last

    def _place(self, name: str) -> tuple[str, str]:
        """The family that a leaf is of, and what it is called in its layer."""
        for family in self.grown:
            start, star, _ = family.partition("*")
            if star and (found := re.match(re.escape(start) + r"\d+", name)):
                return family, name[found.end() :]
        return "", name


# What two activations meet in


def _met(traced: Traced, known: Sequence[Facts]) -> list[str]:
    """Notes on products of two activations that sum over more: attention scores."""
    found: dict[str, None] = {}
    for reading in readings(traced):
        if not reading.mutual or reading.side:
            continue
        small, big = (
            math.prod(atom.size[i] for dim in reading.summed for atom in dim) for i in (0, -1)
        )
        if small != big:
            found[f"at {reading.eqn.source} activations meet over {small} → {big}"] = None
    carried = any(x.role == HIDDEN and np.any(np.asarray(x.gauge) != 1) for x in known)
    rest = (
        "what their scores need beyond the model's own constants (μP's 1/d) is in the factors"
        if carried
        else "their scores need nothing beyond the model's own constants"
    )
    return [f"{text}: {rest}" for text in found]
