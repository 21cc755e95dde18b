"""The modules of a model: where parameters or two activations make a new activation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uscale_jax import _tree
from uscale_jax._jax import ClosedJaxpr
from uscale_jax._types import Key, Tree
from uscale_jax.trace import readings, tapped, uses
from uscale_jax.trace.inline import program
from uscale_jax.trace.program import Equation, Program, Value
from uscale_jax.trace.views import is_layout

PRODUCT, LOOKUP, ACTIVATIONS, OUTPUT = "product", "lookup", "activations", "output"
_PRODUCTS = (*readings.PRODUCTS, "ragged_dot_general")


class Module(NamedTuple):
    """A module in the program of one model."""

    name: str
    """Of the leaves that it reads; where activations meet, of the line."""
    kind: str
    source: str
    visit: int
    """The equation that gives its output; of an output of the model, its number."""
    dtype: Any
    size: int
    """How many numbers its output is, in one turn of the loops around."""
    sums: int = 1
    """Of how many products each of them is the sum."""
    around: tuple[int, ...] = ()
    """The scans it is in, by visits, outermost first."""
    layers: tuple[int, ...] = ()
    """Those of them that go through layers."""
    readers: tuple[int, ...] = ()
    """Modules that alone read it, and multiply it as it is; () if anything else does."""

    @property
    def role(self) -> Any:
        """Return what is the same in models of one structure."""
        return self.name, self.kind, len(self.around), len(self.layers)

    @property
    def rounding(self) -> float:
        """Return the rounding of its output, relative to it."""
        return float(jnp.finfo(self.dtype).eps)

    def __str__(self) -> str:
        """Return what it is and where, for messages."""
        return f"{self.name!r} ({self.kind} at {self.source})" if self.source else repr(self.name)


class Found(NamedTuple):
    """The modules in the order of the program, outputs last."""

    modules: list[Module]
    notes: tuple[str, ...]
    """On those that cannot be measured."""


def find(closed: ClosedJaxpr, keys: Sequence[Key], outputs: Sequence[str]) -> Found:
    """Returns the modules of a program whose first inputs are the leaves ``keys``."""
    flow = _Flow(program([closed]), len(keys))
    around = tapped.scans(closed)
    every = [(eqn, *flow.kind(eqn)) for eqn in flow.flat.equations if eqn.outputs[0].scales]
    seen = [each for each in every if each[1] and each[0].visit in around]
    notes = tuple(
        f"not measured, for it is in a `while` loop or a part that is run as it is: {kind} at "
        f"{eqn.source}"
        for eqn, kind, _ in every
        if kind and eqn.visit not in around
    )
    # A loop over what a product reads goes through layers; others go through time.
    through = frozenset[int]().union(*(owner.scans for _, _, owner in seen))
    readers = flow.readers([id(eqn) for eqn, _, _ in seen])
    modules = []
    for (eqn, kind, owner), read in zip(seen, readers, strict=True):
        names = [_tree.name(keys[i]) for i in sorted(owner.leaves)]
        modules.append(
            Module(
                name=_listed(names) if names else f"activations at {eqn.source}",
                kind=kind,
                source=str(eqn.source or ""),
                visit=flow.end(eqn).visit,
                dtype=eqn.outputs[0].dtype,
                size=_count(eqn.outputs[0].shape),
                sums=_summed(eqn),
                around=around[eqn.visit],
                layers=tuple(scan for scan in around[eqn.visit] if scan in through),
                readers=read,
            )
        )
    return Found(_with_names([*modules, *_outputs(flow.flat, outputs)]), notes)


def _outputs(flat: Program, names: Sequence[str]) -> Iterator[Module]:
    for i, (name, value) in enumerate(zip(names, flat.outputs, strict=True)):
        if value.scales:
            yield Module(name, OUTPUT, "", i, value.dtype, _count(value.shape))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _with_names(modules: Sequence[Module]) -> list[Module]:
    """Modules with names of their own: what reads the same leaf again is numbered."""
    seen: Counter[str] = Counter()
    found = []
    for module in modules:
        seen[module.name] += 1
        more = f" #{seen[module.name]}" if seen[module.name] > 1 else ""
        found.append(module._replace(name=module.name + more))
    return found


def _count(shape: Iterable[Any]) -> int:
    return math.prod(size[0] for size in shape)


def _summed(eqn: Equation) -> int:
    """Of how many products one number of a result is the sum; 1 of what is looked up."""
    if eqn.name == "conv_general_dilated":
        return _count(eqn.inputs[1].shape[i] for i in eqn.param("dimension_numbers").rhs_spec[1:])
    if eqn.name == "dot_general":
        return _count(eqn.inputs[0].shape[i] for i in eqn.param("dimension_numbers")[0][0])
    if eqn.name == "ragged_dot_general":
        numbers = eqn.param("ragged_dot_dimension_numbers").dot_dimension_numbers
        return _count(eqn.inputs[0].shape[i] for i in numbers[0][0])
    return 1


class _Owner(NamedTuple):
    """What a value that is no activation is made of."""

    leaves: frozenset[int] = frozenset()
    scans: frozenset[int] = frozenset()
    """What goes through them."""
    plain: bool = False
    """Whether it is one leaf, only laid out anew."""


_NOTHING = _Owner()
_FACTORS = ("mul", *_PRODUCTS)
_SUMS = ("add", "add_any", "concatenate", "sub")
_LINEAR = ("cumsum", "div", "dynamic_slice", "gather", "neg", "reduce_sum", "rev")
"""In their first operand."""


class _Flow:
    """A flat program, which of its values are activations, and what the others are made of."""

    def __init__(self, flat: Program, leaves: int) -> None:
        self.flat = flat
        self.active = readings.activations(flat, leaves)
        self.owners = self._owners(leaves)
        self.users: dict[int, list[Equation]] = {}
        for eqn in flat.equations:
            for value in eqn.inputs:
                self.users.setdefault(id(value), []).append(eqn)

    def _owners(self, leaves: int) -> dict[int, _Owner]:
        first = enumerate(self.flat.inputs[:leaves])
        owners = {id(value): _Owner(frozenset([i]), plain=True) for i, value in first}
        for eqn in self.flat.equations:
            known = [owners[id(v)] for v in eqn.inputs if id(v) in owners]
            if known and not self.is_active(*eqn.inputs):
                sliced = eqn.name == "loop_slice"
                through = frozenset([eqn.visit] if sliced else [])
                owner = _Owner(
                    frozenset[int]().union(*(each.leaves for each in known)),
                    through.union(*(each.scans for each in known)),
                    (sliced or is_layout(eqn.name)) and known[0].plain,
                )
                owners.update({id(value): owner for value in eqn.outputs})
        return owners

    def of(self, value: Value) -> _Owner:
        """Return what a value is made of; nothing is known of activations and constants."""
        return self.owners.get(id(value), _NOTHING)

    def is_active(self, *values: Value) -> bool:
        """Return whether any of them depends on inputs."""
        return any(id(value) in self.active for value in values)

    def kind(self, eqn: Equation) -> tuple[str, _Owner]:
        """Return what kind of module an equation is, "" for none, and what it reads."""
        if eqn.name in uses.LOOKUPS:
            table = self.of(eqn.inputs[0])
            return LOOKUP if table.leaves and self.is_active(*eqn.inputs[1:]) else "", table
        if eqn.name not in _PRODUCTS:
            return "", _NOTHING
        fixed = [value for value in eqn.inputs[:2] if not self.is_active(value)]
        if not fixed:
            return ACTIVATIONS, _NOTHING
        return PRODUCT if len(fixed) == 1 and self.of(fixed[0]).leaves else "", self.of(fixed[0])

    def end(self, eqn: Equation) -> Equation:
        """Return the last equation of what constants, gains and biases alone make of a result.

        A score that is divided by d is as large as it is then.
        """
        last = eqn
        while True:
            value = eqn.outputs[0]
            following = self.users.get(id(value), [])
            if len(following) != 1 or following[0].region != last.region:
                return last
            eqn = following[0]
            if eqn.name in ("add", "div", "mul", "sub"):
                others = [v for v in eqn.inputs if v is not value]
                if len(others) != 1 or not self._is_fixed(others[0], eqn.name in ("div", "mul")):
                    return last
                last = eqn
            elif not is_layout(eqn.name) or len(eqn.outputs) > 1:
                return last

    def _is_fixed(self, value: Value, factor: bool) -> bool:
        """A gain, a bias or a constant factor; a constant that is added may be a mask."""
        return self.of(value).plain or (factor and value.uniform is not None)

    def readers(self, modules: Sequence[int]) -> list[tuple[int, ...]]:
        """Return which modules, by ids of equations, alone read each, up to factors.

        () where anything else does.
        """
        numbers = {eqn: i for i, eqn in enumerate(modules)}
        carried: dict[int, int] = {}
        readers: list[set[int]] = [set() for _ in modules]
        bound: set[int] = set()
        for eqn in self.flat.equations:
            mine = [id(value) in carried for value in eqn.inputs]
            met = {carried[id(value)] for value in eqn.inputs if id(value) in carried}
            number = numbers.get(id(eqn))
            if number is not None:
                for each in met:
                    readers[each].add(number)
            elif len(met) == 1 and self._is_linear(eqn, mine):
                number = min(met)
            else:
                bound |= met
            if number is not None:
                carried.update({id(value): number for value in eqn.outputs})
        bound |= {carried[id(v)] for v in self.flat.outputs if id(v) in carried}
        return [() if i in bound else tuple(sorted(each)) for i, each in enumerate(readers)]

    def _is_linear(self, eqn: Equation, mine: Sequence[bool]) -> bool:
        """Whether a factor of one module's output is one of the result: gains and biases give in.

        ``mine`` are the operands that are that output.
        """
        if eqn.name in _FACTORS:
            return sum(mine) == 1
        if eqn.name in _SUMS:
            pairs = zip(eqn.inputs, mine, strict=True)
            return all(own or self.of(value).plain for value, own in pairs)
        return (eqn.name in _LINEAR or is_layout(eqn.name)) and [*mine].index(True) == 0


# Measuring


def taking(closed: ClosedJaxpr, modules: Sequence[Module]) -> Callable[..., Any]:
    """Returns a function of parameters and inputs that returns the outputs of all modules."""
    taps = {m.visit: _taken for m in modules if m.kind != OUTPUT}
    stacked = {(m.visit, scan) for m in modules for scan in m.around}

    def take(params: Tree, inputs: Sequence[Any]) -> list[Any]:
        args = [*jax.tree.leaves(params), *jax.tree.leaves(tuple(inputs))]
        outs, taken = tapped.run(closed, {}, args, stacked, taps)
        return [_taken([outs[m.visit]]) if m.kind == OUTPUT else taken[m.visit] for m in modules]

    return take


def _taken(results: Sequence[Any]) -> dict[str, jax.Array]:
    """What an equation gives, and how often it was run: not at all in a branch not taken."""
    return {"y": results[0], "runs": jnp.ones((), jnp.float32)}


def comparing(modules: Sequence[Module]) -> Callable[..., Any]:
    """Returns a function of what ``taking`` returns now and at first: mean squares a module."""

    def compare(now: Sequence[Any], first: Sequence[Any]) -> list[jax.Array]:
        return [_squares(m, a, b) for m, a, b in zip(modules, now, first, strict=True)]

    return compare


def _squares(module: Module, now: Mapping[str, Any], first: Mapping[str, Any]) -> jax.Array:
    """Mean squares of an output and of its change, by layers, in float32 or what is wider.

    Logits of −inf that stay so, of what is ruled out, do not count.
    """
    dtype = jnp.promote_types(now["y"].dtype, jnp.float32)
    y, start = now["y"].astype(dtype), first["y"].astype(dtype)
    ruled_out = (jnp.real(y) == -jnp.inf) & (y == start)
    runs = now["runs"].reshape(now["runs"].shape + (1,) * (y.ndim - now["runs"].ndim))
    turns = [i for i, scan in enumerate(module.around) if scan not in module.layers]
    dims = (*turns, *range(len(module.around), y.ndim))
    count = jnp.sum(jnp.where(ruled_out, jnp.zeros_like(runs), runs), dims)
    total = lambda x: jnp.sum(jnp.square(jnp.where(ruled_out, 0, jnp.abs(x))), dims)  # noqa: E731
    sums = jnp.stack([total(y), total(y - start)])
    return sums / jnp.maximum(count, 1)[None].astype(sums.dtype)
