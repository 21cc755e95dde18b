"""The work of :mod:`uscale_jax.trace.depth`: families of layers cut one after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from uscale_jax import _jax, _tree
from uscale_jax._jax import ClosedJaxpr, JaxprEqn
from uscale_jax._types import Key, Tree
from uscale_jax.trace import layers
from uscale_jax.trace.cut import Chain, chain, without
from uscale_jax.trace.flat import used, variables
from uscale_jax.trace.layers import Depth, Family, Named
from uscale_jax.trace.silent import Step, silence
from uscale_jax.trace.stacked import Stack, shortened, stacks
from uscale_jax.trace.zeros import ZERO, state

Zeros: TypeAlias = Literal[True] | frozenset[int]
"""The whole leaf, or the steps of a stacked leaf."""


class Steps(NamedTuple):
    """Which layer each slice of a stacked leaf is a copy of."""

    dim: int
    """The axis of layers."""
    sources: tuple[int, ...]


class Side(NamedTuple):
    """One of the two models."""

    leaves: dict[Key, Any]
    """Shapes by name."""
    closed: ClosedJaxpr
    """The program without calls; its first inputs are the leaves."""
    outputs: Tree

    @property
    def variables(self) -> dict[Key, Any]:
        """Return the inputs of the program that are leaves, by name."""
        return dict(zip(self.leaves, self.closed.jaxpr.invars, strict=False))


@dataclass
class Deepening:
    """The big program while its families are cut, one after the other."""

    small: Side
    big: Side
    depth: Depth
    identity: bool
    closed: ClosedJaxpr = field(init=False)
    families: list[Family] = field(default_factory=list)
    sources: dict[Key, Key] = field(default_factory=dict)
    kept: dict[Key, Key] = field(default_factory=dict)
    steps: dict[Key, Steps] = field(default_factory=dict)
    zero: dict[Key, Zeros] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.closed = self.big.closed
        self.variables = self.big.variables
        self.names = {v: key for key, v in self.variables.items()}

    def cut_numbered(self) -> None:
        """Cut the new layers of families that are told by the numbers in their names."""
        names = layers.correspondence([*self.small.leaves], [*self.big.leaves])
        self.sources |= names.shared
        grown = [(named, self._family(named)) for named in names.families]
        self.kept |= {source: key for key, source in names.shared.items()}
        layers.check_leaves(self.sources, self.kept, self.small.leaves, self.big.leaves)
        for named, family in sorted(grown, key=lambda pair: self._first_use(pair[0])):
            self._cut(named, family)

    def _family(self, named: Named) -> Family:
        family = layers.sources(self.depth, named.name, len(named.small), len(named.big))
        layers.check_layers(named, family)
        self.families.append(family)
        for layer, source in enumerate(family.sources):
            for rest, key in named.big[layer].items():
                self.sources[key] = named.small[source][rest]
        for source, layer in enumerate(family.kept):
            for rest, key in named.small[source].items():
                self.kept[key] = named.big[layer][rest]
        return family

    def _first_use(self, named: Named) -> int:
        leaves = {self.variables[key] for layer in named.big for key in layer.values()}
        eqns = self.closed.jaxpr.eqns
        uses = (i for i, eqn in enumerate(eqns) if not leaves.isdisjoint(variables(eqn.invars)))
        return next(uses, len(eqns))

    def _cut(self, named: Named, family: Family) -> None:
        """Cut the new layers of a family, unless they went with a family before.

        Layers can be spread over several lists, of blocks and of norms, say.
        """
        read = used(self.closed)
        layer_of = {
            self.variables[key]: i for i, layer in enumerate(named.big) for key in layer.values()
        }
        new = {v for v, layer in layer_of.items() if layer in family.new}
        if new.isdisjoint(read):
            return
        found = chain(self.closed, layer_of, family.big, family.name)
        cut = without(self.closed, found, family.new)
        self._check_cut(family, new & used(cut), read - used(cut))
        if self.identity:
            for layer in family.new:
                self._silence_layer(found, layer, read - used(cut))
        self.closed = cut

    def _check_cut(self, family: Family, left: set[Any], gone: set[Any]) -> None:
        kept = {self.variables[key] for key in self.kept.values()}
        for what, odd in (("still reads", left), ("no longer reads", gone & kept)):
            if odd:
                found = ", ".join(sorted(repr(_tree.name(self.names[v])) for v in odd)[:8])
                raise ValueError(
                    f"without the new layers {[*family.new]} of {family.name}, the big model "
                    f"{what} {found}. Expected: layers in a chain, whose leaves nothing else "
                    "reads. Fix: number alike what belongs to one layer, or grow in width only."
                )

    def _silence_layer(self, found: Chain, layer: int, gone: set[Any]) -> None:
        enter, leave = found.streams[layer], found.streams[layer + 1]
        rectified = [v for v in enter if _is_relu(found.producer(v))]
        step = Step(found.between(layer), enter, leave, rectified)
        what = f"layer {layer} of {found.family}"
        self.zero |= dict.fromkeys(self._silence(what, [step], gone), True)

    def _silence(self, what: str, steps: Sequence[Step], leaves: Collection[Any]) -> list[Key]:
        """Return which of the leaves are zero in a new layer."""
        floating = [
            v for v in self.names if v in leaves and jnp.issubdtype(v.aval.dtype, jnp.inexact)
        ]
        zero, lost = silence(steps, floating)
        if lost:
            raise ValueError(
                f"{what} cannot add nothing: with all its leaves zero, what it takes in is lost at "
                f"{lost}. Expected: residual layers, `x + f(x)`, and nothing behind the sum (a "
                "norm there changes the stream). Fix: `new_layers='copy'`, which keeps no "
                "function, or grow in width only."
            )
        return [self.names[v] for v in zero]

    def cut_stacked(self) -> None:
        """Cut the scans over stacked layers to as many steps as the small model makes."""
        found = stacks(self.small.closed, self.closed, [*self.names])
        families = [self._stacked_family(stack) for stack in found]
        kept = [family.kept for family in families]
        self.closed = shortened(self.closed, found, kept)

    def _stacked_family(self, stack: Stack) -> Family:
        dims = {self.names[v]: dim for v, dim in stack.dims.items() if v in self.names}
        name = _tree.name(common(*dims)) if common(*dims) else "the stacked leaves"
        family = layers.sources(self.depth, name, stack.small, stack.big)
        self.families.append(family)
        self.steps |= {key: Steps(dim, family.sources) for key, dim in dims.items()}
        if self.identity and family.new:
            steps = [stack.step(scan, self.closed.jaxpr.eqns) for scan in stack.scans]
            zero = self._silence(f"a step of {name}", steps, stack.dims)
            self.zero |= dict.fromkeys(zero, frozenset(family.new))
        return family


def _is_relu(eqn: JaxprEqn | None) -> bool:
    """Returns whether an equation is a maximum with zero."""
    return (
        eqn is not None
        and _jax.primitive_name(eqn) == "max"
        and any(state({}, v) == ZERO for v in eqn.invars)
    )


def common(first: Key, *others: Key) -> Key:
    """Returns what keys begin with alike."""
    lengths = (n for n in range(len(first), 0, -1) if all(k[:n] == first[:n] for k in others))
    return first[: next(lengths, 0)]
