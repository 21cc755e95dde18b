"""Lanes added to axes whose units cannot be repeated unequally often: what they must be.

Under LayerNorm a stream of n units that grows to ``n' = k·n + r`` keeps its mean if the r new
lanes are the mean of the old ones; centred they are 0, and so is all that is read from them.
:mod:`uscale_jax.trace.lanes` says what a value may be there; this walk carries it through a
program, and decides of every parameter what its new lanes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from uscale_jax.trace import affine, lanes, sizes, uneven
from uscale_jax.trace import lane_rules as rules
from uscale_jax.trace.affine import Expr, plus
from uscale_jax.trace.atoms import Atom, Dim, is_opaque, monomials
from uscale_jax.trace.description import Blocks, Dims, Kind, Labelled, Regrouped
from uscale_jax.trace.equations import log_ratio
from uscale_jax.trace.keep import Facts
from uscale_jax.trace.lanes import CONSTANT, NOUGHT, Fact, Lanes, Undecidable
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.signs import sign_of, signs
from uscale_jax.trace.source import Source
from uscale_jax.trace.tracing import Traced
from uscale_jax.trace.two_pass import Means


class Unpaddable(Exception):
    """New lanes of ``atom`` would change the function; the text says where."""

    def __init__(self, text: str, atom: Atom, source: Source | None) -> None:
        """Keep what is in the way."""
        super().__init__(text if source is None else f"{text} at {source}")
        self.text, self.atom, self.source = text, atom, source


@dataclass(frozen=True)
class Padding:
    """What the new lanes of padded axes are."""

    atoms: frozenset[Atom]
    leaves: list[Facts]
    """Per leaf ``ZERO``, ``MEAN``, or ``ANY`` where it does not matter."""
    sums: Mapping[tuple[int, Atom], list[Expr]]
    """By the id of an equation and the atom it sums over, what each cell of it multiplies by."""


def pads(traced: Traced, atoms: frozenset[Atom]) -> Padding:
    """Returns what new lanes of ``atoms`` must be for the function to stay the same.

    Variances must be written in two passes (:func:`uscale_jax.trace.two_pass.padded_trace`).

    Raises:
      Unpaddable: there are none such.
    """
    for atom in atoms:
        if atom.fixed is not None:
            raise Unpaddable(atom.fixed.text, atom, atom.fixed.source)
    walk = _Walk(traced, atoms)
    leaves = walk.run()
    sums = walk.totals(sizes.uneven(traced) - atoms)
    facts = [[_each(dim, lambda own: lanes.settled(own).sure) for dim in leaf] for leaf in leaves]
    return Padding(atoms, facts, sums)


class _Sum(NamedTuple):
    """A sum over new lanes, which are 0 or the mean."""

    eqn: Equation
    atom: Atom
    cell: int
    inner: Atom
    lanes: Lanes


class _Walk(uneven._Walk):
    """Carries lanes in the place of powers."""

    def __init__(self, traced: Traced, padded: frozenset[Atom]) -> None:
        super().__init__(traced, padded)
        self.centred = Means(self.structure.program).centred
        self.signs = signs(self.structure.program)
        self.sums: list[_Sum] = []

    def _leaf(self, place: int, value: Value, name: str) -> list[Any]:
        allowed = Fact.MEAN | Fact.ZERO if value.scales else Fact.ZERO
        found = [
            [[lanes.undecided(allowed) if a in self.uneven else None for a in c] for c in cells]
            for cells in map(monomials, self.structure.of(value))
        ]
        self.known[id(value)] = found  # type: ignore[assignment]
        self.views.add(id(value))
        return found

    def _step(self, eqn: Equation, what: Labelled | Regrouped | Blocks) -> None:
        if isinstance(what, Labelled):
            _Labels(self, eqn, what).work()
        elif isinstance(what, Regrouped):
            self._regrouped(eqn, what)
        else:
            self._blocks(eqn, what)

    def nothing(self, dim: Dim) -> Any:
        """Returns what holds of a value that is the same along a dimension."""
        same = Lanes(CONSTANT)
        return [[same if a in self.uneven else None for a in cell] for cell in monomials(dim)]

    def along(self, value: Value, dims: Dims) -> Any:
        """Returns the lanes of a value along its dimensions, which ``dims`` are templates of."""
        if not rules.is_zero(value):
            return super().along(value, dims)
        return [_each(self.nothing(dim), lambda _: Lanes(NOUGHT)) for dim in dims]

    def join(self, each: Iterable[Any], eqn: Equation, atom: Atom) -> Any:
        """Returns what holds of all."""
        return self.added([one for one in each if one is not None], eqn, atom)

    def added(self, each: Sequence[Lanes], eqn: Equation, atom: Atom) -> Lanes:
        """Returns what holds of the sum."""
        try:
            return lanes.added(lanes.both, each)
        except Undecidable:
            raise self._refusal(eqn, atom, "adds the mean to 0 on {}") from None

    def need(self, each: Lanes, wanted: Fact, eqn: Equation, atom: Atom, text: str) -> None:
        """Sees to it that one of the facts that are wanted holds."""
        try:
            lanes.need(each, wanted)
        except Undecidable:
            raise self._refusal(eqn, atom, text) from None

    def _refusal(self, eqn: Equation, atom: Atom, text: str) -> Unpaddable:
        units = f"new units of {atom.size[0]} → {atom.size[-1]}"
        return Unpaddable(f"`{eqn.name}` {text.format(units)}", atom, eqn.source)

    def _lose(self, eqn: Equation, *sides: Sequence[Dim]) -> None:
        for dims in sides:
            for atom in (a for d in dims for cell in monomials(d) for a in cell):
                if atom in self.uneven:
                    raise self._refusal(eqn, atom, "regroups {}")

    def _blocks(self, eqn: Equation, what: Blocks) -> None:
        super()._blocks(eqn, what)
        constants = [v for v in eqn.inputs if v.uniform is not None and not rules.is_zero(v)]
        if what.pasted and constants and id(eqn.outputs[0]) in self.known:
            out, same = id(eqn.outputs[0]), Lanes(CONSTANT)
            self.known[out] = [
                _each(along, lambda own: lanes.combined(lanes.both, [own, same]))
                for along in self.known[out]
            ]

    def add_up(self, found: _Sum) -> None:
        """Notes a sum; what is summed must be 0 or the mean, and later is if it may be either."""
        if not lanes.is_open(found.lanes, Fact.ZERO | Fact.MEAN):
            self._check(found)
        self.sums.append(found)

    def _check(self, found: _Sum) -> None:
        text = "adds up over {}, which are neither 0 nor the mean of the others"
        self.need(found.lanes, Fact.ZERO | Fact.MEAN, found.eqn, found.inner, text)

    def totals(self, apart: frozenset[Atom]) -> dict[tuple[int, Atom], list[Expr]]:
        """Returns what every sum multiplies by; what is still open becomes the mean."""
        found: dict[tuple[int, Atom], list[Expr]] = {}
        for each in self.sums:
            self._check(each)
        for eqn, atom, cell, inner, of in self.sums:
            cells = monomials((atom,))
            even = [log_ratio((a for a in c if a not in self.uneven), apart) for c in cells]
            ratios = found.setdefault((id(eqn), atom), even)
            small, big = inner.size[0], inner.size[-1]
            mean = Fact.MEAN in lanes.settled(of).sure
            ratio = Fraction(big, small) if mean else Fraction(big // small)
            ratios[cell] = plus(ratios[cell], affine.log_of(ratio))
        return found


def _each(along: Sequence[Sequence[Any]], fun: Callable[[Any], Any]) -> Any:
    return [[None if each is None else fun(each) for each in cell] for cell in along]


class _Labels(uneven._Labels):
    """Works out one equation that passes, reduces and makes dimensions."""

    walk: _Walk

    def work(self) -> None:
        """Records the lanes of every output, and decides what must be."""
        walk, what = self.walk, self.what
        templates = [dim for dims in (*what.operands, *what.results) for dim in dims]
        if not walk.touches(templates):
            return
        walk._lose(self.eqn, [dim for dim in templates if is_opaque(dim)])
        pairs = zip(self.eqn.inputs, what.operands, strict=True)
        operands = [self._by_atom(value, dims) for value, dims in pairs]
        frame = list({id(a): a for dim in templates for a in dim}.values())
        for i, (value, dims) in enumerate(zip(self.eqn.outputs, what.results, strict=True)):
            found = {id(atom): self._lanes(atom, operands, i) for atom in frame}
            if i == 0:
                self._reduced(frame, found, dims)
            walk.known[id(value)] = [uneven._product([found[id(a)] for a in d]) for d in dims]

    def _lanes(self, atom: Atom, operands: Sequence[dict[int, Any]], output: int) -> Any:
        same = self.walk.nothing((atom,))
        each = [
            _each(same, lambda _: Lanes(NOUGHT))
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
        if scale.kind is Kind.EACH and eqn.name in rules.LINEAR:
            return each[output]
        if (x := self._centred(atom, inner)) is not None:
            return lanes.combined(rules.of_centred(x), each)
        if eqn.name in rules.ADDITIVE:
            return self._sum(each, inner)
        if rules.is_linear(eqn, scale):
            views = [i for i, v in enumerate(eqn.inputs) if id(v) in self.walk.views]
            return lanes.combined(rules.of_product(scale), each, first=(views or [0])[-1])
        rule = rules.of_quotient if eqn.name == "div" else rules.of_function(eqn)
        return lanes.combined(rule, each)

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
        if axis is None or atom not in (dim := self.what.results[0][axis]):
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
                        self._drop(_Sum(self.eqn, atom, i, inner, each))

    def _drop(self, found: _Sum) -> None:
        """Sums over an axis, or reduces over it in another way."""
        if any(found.atom is atom for atom in self.what.summed):
            self.walk.add_up(found)
        else:
            text = "reduces over {} too"
            self.walk.need(found.lanes, Fact.SAME, self.eqn, found.inner, text)
