"""Lanes added to axes whose units cannot be repeated unequally often: what they must be.

Under LayerNorm a stream of n units that grows to ``n' = k·n + r`` keeps its mean if the r new
lanes are the mean of the old ones; centred they are 0, and so is all that is read from them.
:mod:`uscale_jax.trace.lanes` says what a value may be there; this walk carries it through a
program, and decides of every parameter what its new lanes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from uscale_jax.trace import affine, along, lanes, sizes
from uscale_jax.trace import lane_rules as rules
from uscale_jax.trace.affine import Expr, plus
from uscale_jax.trace.atoms import Atom, Dim, monomials
from uscale_jax.trace.description import Blocks, Dims, Labelled, Regrouped
from uscale_jax.trace.equations import log_ratio
from uscale_jax.trace.keep import Facts
from uscale_jax.trace.lanes import CONSTANT, NOUGHT, Fact, Lanes, Undecidable
from uscale_jax.trace.padding_labels import Labels, Sum, each_lane
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.signs import signs
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
    facts = [
        [each_lane(dim, lambda own: lanes.settled(own).sure) for dim in leaf] for leaf in leaves
    ]
    return Padding(atoms, facts, sums)


class _Walk(along.Walk):
    """Carries lanes in the place of powers."""

    def __init__(self, traced: Traced, padded: frozenset[Atom]) -> None:
        super().__init__(traced, padded)
        self.centred = Means(self.structure.program).centred
        self.signs = signs(self.structure.program)
        self.strided = self.structure.strided
        self.sums: list[Sum] = []

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
            Labels(self, eqn, what).work()
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
        if rules.is_zero(value):
            return [each_lane(self.nothing(dim), lambda _: Lanes(NOUGHT)) for dim in dims]
        if value.captured is not None:
            return [self._table(value, dim) for dim in dims]
        return super().along(value, dims)

    def _table(self, value: Value, dim: Dim) -> Any:
        """Numbers of a table: on new lanes any others, or the same along an axis."""
        lane = lambda a: Lanes(Fact.ANY if (id(value), a) in self.strided.varying else CONSTANT)  # noqa: E731
        return [[lane(a) if a in self.uneven else None for a in cell] for cell in monomials(dim)]

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

    def lose(self, eqn: Equation, *sides: Sequence[Dim]) -> None:
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
                each_lane(along, lambda own: lanes.combined(lanes.both, [own, same]))
                for along in self.known[out]
            ]

    def add_up(self, found: Sum) -> None:
        """Notes a sum; what is summed must be 0 or the mean, and later is if it may be either."""
        if not lanes.is_open(found.lanes, Fact.ZERO | Fact.MEAN):
            self._check(found)
        self.sums.append(found)

    def _check(self, found: Sum) -> None:
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
            copies = 1 if inner in self.strided.atoms else big // small
            ratio = Fraction(big, small) if mean else Fraction(copies)
            ratios[cell] = plus(ratios[cell], affine.log_of(ratio))
        return found
