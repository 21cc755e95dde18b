"""What an equation that passes, reduces and makes dimensions does to new lanes.

See :mod:`uscale_jax.trace.padding`, whose walk this is a step of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from uscale_jax.trace import along, lanes
from uscale_jax.trace import lane_rules as rules
from uscale_jax.trace.atoms import Atom, is_opaque, monomials
from uscale_jax.trace.description import Dims, Kind
from uscale_jax.trace.lanes import NOUGHT, Combine, Fact, Lanes
from uscale_jax.trace.program import Equation
from uscale_jax.trace.signs import sign_of

if TYPE_CHECKING:
    from uscale_jax.trace.padding import _Walk


class Sum(NamedTuple):
    """A sum over new lanes, which are 0 or the mean."""

    eqn: Equation
    atom: Atom
    cell: int
    inner: Atom
    lanes: Lanes


def each_lane(along: Sequence[Sequence[Any]], fun: Callable[[Any], Any]) -> Any:
    """Returns ``fun`` of the lanes along a dimension."""
    return [[None if each is None else fun(each) for each in cell] for cell in along]


class Labels(along.Labels):
    """Works out one equation that passes, reduces and makes dimensions."""

    walk: _Walk

    def work(self) -> None:
        """Records the lanes of every output, and decides what must be."""
        walk, what = self.walk, self.what
        templates = [dim for dims in (*what.operands, *what.results) for dim in dims]
        if not walk.touches(templates):
            return
        walk.lose(self.eqn, [dim for dim in templates if is_opaque(dim)])
        pairs = zip(self.eqn.inputs, what.operands, strict=True)
        operands = [self._by_atom(value, dims) for value, dims in pairs]
        frame = list({id(a): a for dim in templates for a in dim}.values())
        for i, (value, dims) in enumerate(zip(self.eqn.outputs, what.results, strict=True)):
            found = {id(atom): self._lanes(atom, operands, i) for atom in frame}
            if i == 0:
                self._reduced(frame, found, dims)
            walk.known[id(value)] = [along.product([found[id(a)] for a in d]) for d in dims]

    def _lanes(self, atom: Atom, operands: Sequence[dict[int, Any]], output: int) -> Any:
        same = self.walk.nothing((atom,))
        each = [
            each_lane(same, lambda _: Lanes(NOUGHT))
            if rules.is_zero(value)
            else operand.get(id(atom), same)
            for value, operand in zip(self.eqn.inputs, operands, strict=True)
        ]
        return [
            [
                self._along_one([o[i][k] for o in each], atom, inner, output)
                if inner in self.walk.uneven
                else None
                for k, inner in enumerate(cell)
            ]
            for i, cell in enumerate(monomials((atom,)))
        ]

    def _along_one(self, each: Sequence[Lanes], atom: Atom, inner: Atom, output: int) -> Lanes:
        """The lanes of an output along one axis, from those of the operands."""
        eqn, scale = self.eqn, self.what.scale
        self._defined(each, inner)
        if scale.kind is Kind.CARRIED:
            return lanes.undecided(lanes.could(each[0]), each)
        if eqn.name == "loop_close":
            return self._closed(each, inner)
        if id(eqn) in self.walk.shifted:  # new lanes of c + leaf are what the leaf's are said to be
            return next(e for e, v in zip(each, eqn.inputs, strict=True) if v.uniform is None)
        if scale.kind is Kind.EACH and eqn.name in rules.LINEAR:
            return each[output]
        if (x := self._centred(atom, inner)) is not None:
            return lanes.combined(rules.of_centred(x), each)
        if eqn.name in rules.ADDITIVE:
            return self._sum(each, inner)
        if rules.is_linear(eqn, scale):
            views = [i for i, v in enumerate(eqn.inputs) if id(v) in self.walk.views]
            rule = self._rule(rules.of_product(scale), inner)
            return lanes.combined(rule, each, first=(views or [0])[-1])
        rule = rules.of_quotient if eqn.name == "div" else rules.of_function(eqn)
        return lanes.combined(self._rule(rule, inner), each)

    def _rule(self, rule: Combine, inner: Atom) -> Combine:
        return rules.of_copies(rule) if inner in self.walk.strided.atoms else rule

    def _defined(self, each: Sequence[Lanes], inner: Atom) -> None:
        """Where a function is not defined everywhere, it must be on the new lanes."""
        domain = rules.domain(self.eqn)
        if domain is None:
            return
        sign = sign_of(self.eqn.inputs[domain.operand], self.walk.signs)
        if domain.sign is None or sign < domain.sign:
            text = "may not be defined on {}"
            self.walk.need(each[domain.operand], domain.facts, self.eqn, inner, text)

    def _closed(self, each: Sequence[Lanes], inner: Atom) -> Lanes:
        """What follows what a loop carries is of the same kind."""
        carried, following = map(lanes.settled, each[:2])
        if carried.group is not None:
            lanes.tie(carried.group, following)
            return lanes.settled(carried)
        if wanted := carried.sure & (Fact.MEAN | Fact.ZERO):
            text = "makes {} neither 0 nor the mean of the others, as they begin"
            self.walk.need(following, wanted, self.eqn, inner, text)
        return carried

    def _centred(self, atom: Atom, inner: Atom) -> int | None:
        """The operand whose mean over this axis, all there is of the dimension, is subtracted."""
        operand, axis = self.walk.centred.get(id(self.eqn), (0, None))
        if (
            axis is None
            or inner in self.walk.strided.atoms
            or atom not in (dim := self.what.results[0][axis])
        ):
            return None
        return operand if monomials(dim) == [(inner,)] else None

    def _sum(self, each: Sequence[Lanes], inner: Atom) -> Lanes:
        """A sum, a choice, an update; what chooses or points must be the same on all lanes."""
        out = self.eqn.outputs[0]
        counts = [v.scales if out.scales else v.dtype == out.dtype for v in self.eqn.inputs]
        terms = [one for one, counted in zip(each, counts, strict=True) if counted]
        others = [one for one, counted in zip(each, counts, strict=True) if not counted]
        if all(Fact.SAME in lanes.settled(other).sure for other in others):
            return self.walk.added(terms, self.eqn, inner)
        return lanes.combined(lambda facts: lanes.both(facts) & Fact.ZERO, terms)

    def _reduced(self, frame: Sequence[Atom], found: dict[int, Any], result: Dims) -> None:
        kept = {id(atom) for dim in result for atom in dim}
        for atom in (atom for atom in frame if id(atom) not in kept):
            cells = zip(found[id(atom)], monomials((atom,)), strict=True)
            for i, (cell, atoms) in enumerate(cells):
                for each, inner in zip(cell, atoms, strict=True):
                    if each is not None:
                        self._drop(Sum(self.eqn, atom, i, inner, each))

    def _drop(self, found: Sum) -> None:
        """Sums over an axis, or reduces over it in another way."""
        if any(found.atom is atom for atom in self.what.summed):
            self.walk.add_up(found)
        else:
            text = "reduces over {} too"
            wanted = Fact.SAME | Fact.MEAN if found.inner in self.walk.strided.atoms else Fact.SAME
            self.walk.need(found.lanes, wanted, self.eqn, found.inner, text)
