"""What a rule of transfer gives every leaf, and how it is applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

from uscale_jax import _jax, _transfer_rules, _tree
from uscale_jax._places import fitting
from uscale_jax._plan import Plan, number_words
from uscale_jax._powers import Scale, is_scaled, times
from uscale_jax._table import table
from uscale_jax._transfer_facts import Place
from uscale_jax._transfer_rules import HIDDEN, Factor, Factors, Facts, Schedule
from uscale_jax._types import Apply, Key, Tree
from uscale_jax.trace import multiplied
from uscale_jax.trace.uses import FREE, SUMMED


@dataclass(frozen=True, eq=False)
class LeafTransfer:
    """What one leaf of the target model takes, relative to the base model."""

    name: str
    key: Key
    facts: Facts
    """Its role, its fans, and what growth by copies says of it."""
    factors: Factors
    """Of the rule: multiplier, initial standard deviation, learning rate of Adam, ε, decay."""
    learning_rate: Factor
    """Of the optimizer that was named."""
    weight_decay: Factor
    """Of decay per unit of it: what decays in a step is the same for all optimizers."""
    init: Factor
    """What the target's own initial values are multiplied by."""
    why: str
    """How the leaf is used, and the line of the model where it is."""
    dims: tuple[str, ...] = ()
    """What products do along its dimensions: "summed", "free", or "shared" by both operands."""

    @property
    def role(self) -> str:
        """Return ``"hidden"``, ``"output"``, ``"input"``, ``"vector"``, or ``"fixed"``."""
        return self.facts.role


@dataclass(frozen=True, eq=False)
class Transfer:
    """A rule of hyper-parameter transfer, worked out for every leaf; ``print`` shows it."""

    rule: str
    optimizer: str
    plan: Plan
    leaves: Mapping[str, LeafTransfer]
    """By name, in the order of the target model's tree."""
    places: tuple[Place, ...] = ()
    """Lines of the model whose results must be multiplied, which ``apply`` does: no leaf can carry
    that, as where an embedding is tied to a readout with no norm in between."""
    notes: tuple[str, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def init(self) -> Tree:
        """Return what to multiply the target's own initial values by, leaf by leaf."""
        return self._tree(lambda leaf: leaf.init)

    @property
    def learning_rate(self) -> Tree:
        """Return the factors of the named optimizer's learning rate."""
        return self._tree(lambda leaf: leaf.learning_rate)

    @property
    def epsilon(self) -> Tree:
        """Return the factors of ε."""
        return self._tree(lambda leaf: leaf.factors.eps)

    @property
    def weight_decay(self) -> Tree:
        """Return the factors of decay per unit of the named optimizer's learning rate."""
        return self._tree(lambda leaf: leaf.weight_decay)

    @property
    def multipliers(self) -> Tree:
        """Return by what the model is to multiply every leaf before it reads it."""
        return self._tree(lambda leaf: leaf.factors.multiplier)

    @property
    def muon_dimension_numbers(self) -> Tree:
        """Return what ``optax.contrib.muon`` orthogonalises: hidden kernels, dimensions named.

        Elsewhere None, which leaves a leaf to Adam.
        """
        return self._tree(_muon_dimensions)

    def start(self, params: Tree) -> Tree:
        """Return the target's own initial values as the rule has them start.

        That is ``us.scale_params(params, rule.init)``, but for leaves that the model reads as
        c + leaf, which become B·(c + leaf) − c.
        """
        return self._times(params, lambda leaf: leaf.init)

    def _times(self, params: Tree, of: Callable[[LeafTransfer], Factor]) -> Tree:
        """The tree with factors on what the model reads: f·(c + leaf) − c."""
        keys, leaves, treedef = _tree.flatten_named(params)
        own = {leaf.key: _terms(of(leaf)) for leaf in self.leaves.values()}
        owners = fitting(self.plan, keys, leaves)
        found = [
            times(jax.numpy.asarray(x), own[owner.key], owner.shift)
            if owner is not None and is_scaled(x)
            else x
            for x, owner in zip(leaves, owners, strict=True)
        ]
        return jax.tree.unflatten(treedef, found)

    def apply(self, apply: Apply) -> Apply:
        """Return the model with the multipliers of the rule, of leaves and of ``places``.

        It is ``apply(A·params, *inputs)``, to be used wherever ``apply`` is.

        Raises:
          ValueError: results must be multiplied, and the plan adds layers; at its first use, where
            the program is another one than that of the plan.
        """
        if any(place.visit < 0 for place in self.places):
            raise ValueError(
                f"the results at {self.places[0].source} must be multiplied by "
                f"{self.places[0].factor:g}, which cannot be done from outside where layers are "
                "added. Expected: a plan of width alone. Fix: multiply there in the model."
            )
        factors = {place.visit: place.factor for place in self.places}

        def own(params: Tree, *inputs: Any) -> Any:
            scaled = self._times(params, lambda leaf: leaf.factors.multiplier)
            return _placed(apply, factors, scaled, inputs) if factors else apply(scaled, *inputs)

        return own

    def beta(self, beta: float) -> float:
        """Return Adam's β₁ or β₂ for the batch and the duration: 1 − (1 − β)·batch/tokens."""
        return self.schedule.beta(beta)

    def scales(self) -> Mapping[Key, Scale]:
        """Return the frame that the optimizer runs in (:func:`scale_optimizer`)."""
        return {leaf.key: self._scale(leaf) for leaf in self.leaves.values()}

    def _scale(self, leaf: LeafTransfer) -> Scale:
        family = _transfer_rules.OPTIMIZERS[self.optimizer]
        gradients = 1 / leaf.factors.eps
        out = leaf.learning_rate / gradients if family.p else leaf.learning_rate
        decay = 1.0 if family.q else leaf.learning_rate * leaf.weight_decay / out
        shift = self.plan.leaves[leaf.name].shift
        return Scale(_terms(decay), _terms(gradients), _terms(out), shift)

    def _tree(self, of: Callable[[LeafTransfer], Any]) -> Tree:
        return self.plan.unflatten([of(leaf) for leaf in self.leaves.values()])

    def __str__(self) -> str:
        """Return a table of leaves with their factors and why, the rule's source, and notes."""
        rule = _transfer_rules.RULES[self.rule]
        head = f"{self.rule}: {rule.says} ({rule.source}), {self.optimizer}"
        return "\n\n".join([head, _table(self), *(["\n".join(self.notes)] if self.notes else [])])


def _placed(
    apply: Apply, factors: Mapping[int, float], params: Tree, inputs: tuple[Any, ...]
) -> Any:
    """Runs a model with the results of some of its equations multiplied."""
    closed, outputs = _jax.closed_jaxpr(apply, params, *inputs)
    found = multiplied.run(closed, factors, jax.tree.leaves((params, *inputs)))
    return jax.tree.unflatten(jax.tree.structure(outputs), found)


def _terms(x: Factor) -> tuple[Any, ...]:
    if np.ndim(x) == 0:
        return () if x == 1 else (float(x),)
    return (np.asarray(x),)


def _muon_dimensions(leaf: LeafTransfer) -> Any:
    if leaf.role != HIDDEN:
        return None
    summed, free = (
        tuple(i for i, kind in enumerate(leaf.dims) if kind == each) for each in (SUMMED, FREE)
    )
    return optax.contrib.MuonDimensionNumbers(summed, free) if summed and free else None


def _table(rule: Transfer) -> str:
    header = ("leaf", "role", "fan_in", "fan_out", "init", "lr", "ε", "decay")
    apart = any(np.any(np.asarray(x.factors.multiplier) != 1) for x in rule.leaves.values())
    rows = []
    for leaf in rule.leaves.values():
        each = (leaf.init, leaf.learning_rate, leaf.factors.eps, leaf.weight_decay)
        more = (leaf.factors.multiplier,) if apart else ()
        fans = (leaf.facts.fan_in, leaf.facts.fan_out)
        rows.append(
            (
                leaf.name,
                leaf.role,
                *(f"{a:g}" if a == b else f"{a:g} → {b:g}" for a, b in fans),
                *map(number_words, (*each, *more)),
                leaf.why,
            )
        )
    return table((*header, *(("multiplier",) if apart else ()), "why"), rows)
