"""What is known of every value along certain axes, place by place, carried through a program.

Per dimension, per cell of it, per atom of the cell: a kernel of a recurrent net has an axis twice.
Here that is the power of how often units are repeated (:mod:`uscale_jax.trace.uneven`); other
walks carry other things the same way (:mod:`uscale_jax.trace.padding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

from uscale_jax import _tree
from uscale_jax.trace import affine, shifts
from uscale_jax.trace.affine import COPIES, ZERO, Expr, plus
from uscale_jax.trace.atoms import Atom, Dim, alternatives, is_opaque, monomials
from uscale_jax.trace.combine import LAYOUT
from uscale_jax.trace.description import Blocks, Dims, Kind, Labelled, Regrouped
from uscale_jax.trace.equations import NEVER, System, is_absorbing
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.tracing import Traced

Along: TypeAlias = "list[list[Expr | None]]"
"""Per cell of a dimension, per atom of the cell, the power of copies; None along other axes."""


class Walk:
    """Carries powers of copies through a program."""

    def __init__(self, traced: Traced, uneven: frozenset[Atom]) -> None:
        """Start with nothing known, to follow the axes ``uneven``."""
        self.traced, self.uneven = traced, uneven
        self.structure = traced.structure
        self.system = System()
        self.known: dict[int, list[Along]] = {}
        self.views: set[int] = set()
        self.culprits: list[Atom] = []
        self.summed: set[Any] = set()
        self.unsummed: set[Any] = set()
        self.reductions: list[tuple[Atom, set[Any]]] = []
        self.shifted = shifts.find(traced.structure.program, len(traced.keys)).equations

    def run(self) -> list[list[Along]]:
        """Returns the powers of every leaf, in unknowns of the system."""
        program = self.structure.program
        leaves = [
            self._leaf(place, program.inputs[place], _tree.name(key))
            for place, key in enumerate(self.traced.keys)
        ]
        for eqn, what in zip(program.equations, self.structure.descriptions, strict=True):
            self._step(eqn, what)
            if id(eqn) in self.shifted or (
                eqn.name in LAYOUT and eqn.inputs and id(eqn.inputs[0]) in self.views
            ):
                self.views.update(map(id, eqn.outputs))
        return leaves

    def _leaf(self, place: int, value: Value, name: str) -> list[Along]:
        def unknown(atom: Atom, dim: int) -> Expr | None:
            if atom not in self.uneven or not value.scales:
                return ZERO if atom in self.uneven else None
            unknown = self.system.unknown(f"{name} along dimension {dim}")
            self.system.leaf_of |= dict.fromkeys(unknown, place)  # type: ignore[arg-type]
            return unknown

        found: list[Along] = [
            [[unknown(atom, i) for atom in cell] for cell in monomials(dim)]
            for i, dim in enumerate(self.structure.of(value))
        ]
        self.known[id(value)] = found
        self.views.add(id(value))
        return found

    def _step(self, eqn: Equation, what: Labelled | Regrouped | Blocks) -> None:
        if eqn.name not in LAYOUT and not isinstance(what, Labelled):
            views = [value for value in eqn.inputs if id(value) in self.views]
            for value in views:
                self.used(self.along(value, self.structure.of(value)), summed=False)
        if isinstance(what, Labelled):
            Labels(self, eqn, what).work()
        elif isinstance(what, Regrouped):
            self._regrouped(eqn, what)
        else:
            self._blocks(eqn, what)

    def nothing(self, dim: Dim) -> Along:
        """Returns no powers along a dimension."""
        return [[ZERO if a in self.uneven else None for a in cell] for cell in monomials(dim)]

    def along(self, value: Value, dims: Dims) -> list[Along]:
        """Returns the powers of a value along its dimensions, which ``dims`` are templates of."""
        found = self.known.get(id(value))
        if found is None or value.uniform is not None:
            return [self.nothing(dim) for dim in dims]
        return found

    def touches(self, dims: Iterable[Dim]) -> bool:
        """Returns whether dimensions have an uneven axis."""
        return any(atom in self.uneven for dim in dims for cell in monomials(dim) for atom in cell)

    def require(self, power: Expr | None, eqn: Equation, atom: Atom) -> None:
        """Requires a power to be 0."""
        if power:
            sizes = f"{atom.size[0]} → {atom.size[-1]}"
            text = f"`{eqn.name}` needs every unit repeated equally often, unlike {sizes}"
            self.system.require(power, text, eqn.source)
            self.culprits.append(atom)

    def used(self, along: Iterable[Along], *, summed: bool) -> None:
        """Notes how a parameter is used along some axes."""
        powers = [power for dim in along for cell in dim for power in cell if power]
        (self.summed if summed else self.unsummed).update(u for power in powers for u in power)

    def join(self, each: Iterable[Expr | None], eqn: Equation, atom: Atom) -> Expr:
        """Requires that powers agree; returns one of them."""
        present = [power for power in each if power is not None]
        for power in present[1:]:
            if power != present[0]:
                self.require(plus(power, present[0], -1), eqn, atom)
        return present[0] if present else ZERO

    def _regrouped(self, eqn: Equation, what: Regrouped) -> None:
        """Cells of a group of dimensions, row-major, are those of its counterpart."""
        dims = [dim for group in what.operand for dim in group]
        if not self.touches(dims) and not self.touches(d for g in what.result for d in g):
            return
        operand, result = iter(self.along(eqn.inputs[0], dims)), []
        for left, right in zip(what.operand, what.result, strict=True):
            cells = product([next(operand) for _ in left])
            if len(cells) != len(product([self.nothing(dim) for dim in right])):
                self.lose(eqn, left, right)
                result += [self.nothing(dim) for dim in right]
            else:
                result += self.unpacked(eqn, cells, right)
        self.known[id(eqn.outputs[0])] = result

    def lose(self, eqn: Equation, *sides: Sequence[Dim]) -> None:
        """Gives up on the axes of dimensions that cannot be followed."""
        for atom in {a for dims in sides for d in dims for cell in monomials(d) for a in cell}:
            if atom in self.uneven:
                self.require(NEVER, eqn, atom)

    def unpacked(self, eqn: Equation, cells: Along, dims: Sequence[Dim]) -> list[Along]:
        """Powers per dimension, from those of the product of all; other factors must agree."""
        found = []
        counts = [alternatives(dim) for dim in dims]
        lengths = [[len(cell) for cell in monomials(dim)] for dim in dims]
        for i, dim in enumerate(dims):
            each: list[list[list[Expr | None]]] = [[] for _ in range(counts[i])]
            for place, cell in enumerate(cells):
                digits = _digits(place, counts)
                start = sum(lengths[j][digits[j]] for j in range(i))
                each[digits[i]].append(cell[start : start + lengths[i][digits[i]]])
            found.append(self._agreed(eqn, each, dim))
        return found

    def _agreed(
        self, eqn: Equation, each: Sequence[Sequence[Sequence[Expr | None]]], dim: Dim
    ) -> Along:
        """Per cell of ``dim``, the powers that all that is known of the cell agree on."""
        return [
            [
                self.join((cell[k] for cell in cells), eqn, atom) if atom in self.uneven else None
                for k, atom in enumerate(atoms)
            ]
            for cells, atoms in zip(each, monomials(dim), strict=True)
        ]

    def _blocks(self, eqn: Equation, what: Blocks) -> None:
        """Cells of a whole are those of its parts, one after the other."""
        if not self.touches(what.whole) and not any(self.touches(b.dims) for b in what.blocks):
            return
        for dim, parts in zip(what.whole, what.parts, strict=True):
            if alternatives(dim) != sum(map(alternatives, parts)):
                self.lose(eqn, [dim], parts)
        values = eqn.inputs if what.pasted else eqn.outputs
        whole = None if what.pasted else self.along(eqn.inputs[0], what.whole)
        pasted: list[list[list[list[Expr | None]]]] = [
            [[] for _ in monomials(dim)] for dim in what.whole
        ]
        for value, block in zip(values, what.blocks, strict=False):
            spans = [self._span(parts, i) for parts, i in zip(what.parts, block.part, strict=True)]
            if whole is not None:
                pairs = zip(whole, spans, strict=True)
                self.known[id(value)] = [dim[a:b] for dim, (a, b) in pairs]
            elif value.uniform is None or not is_absorbing(value.uniform):
                for i, along in enumerate(self.along(value, block.dims)):
                    for k, cell in enumerate(along):
                        pasted[i][spans[i][0] + k].append(cell)
        if what.pasted:
            self.known[id(eqn.outputs[0])] = [
                self._agreed(eqn, each, dim) for each, dim in zip(pasted, what.whole, strict=True)
            ]

    def _span(self, parts: Sequence[Dim], i: int) -> tuple[int, int]:
        start = sum(map(alternatives, parts[:i]))
        return start, start + alternatives(parts[i])


def product(dims: Sequence[Along]) -> Along:
    """Cells of several dimensions taken as one, row-major."""
    cells: Along = [[]]
    for dim in dims:
        cells = [[*cell, *more] for cell in cells for more in dim]
    return cells


def _digits(place: int, counts: Sequence[int]) -> list[int]:
    digits = []
    for count in reversed(counts):
        digits.append(place % count)
        place //= count
    return digits[::-1]


class Labels:
    """Works out one equation that passes, reduces and makes dimensions."""

    def __init__(self, walk: Walk, eqn: Equation, what: Labelled) -> None:
        """Keep what is worked on."""
        self.walk, self.eqn, self.what = walk, eqn, what

    def work(self) -> None:
        """Records the powers of every output, and what must hold."""
        walk, what = self.walk, self.what
        templates = [dim for dims in (*what.operands, *what.results) for dim in dims]
        if not walk.touches(templates):
            return
        self._suggest()
        if any(is_opaque(dim) for dim in templates):
            walk.lose(self.eqn, [d for d in templates if is_opaque(d)])
        operands = [
            self._by_atom(v, d) for v, d in zip(self.eqn.inputs, what.operands, strict=True)
        ]
        frame = list({id(a): a for dim in templates for a in dim}.values())
        combined = {id(atom): self._combined(atom, operands) for atom in frame}
        for i, (value, dims) in enumerate(zip(self.eqn.outputs, what.results, strict=True)):
            found = combined
            if what.scale.kind is Kind.EACH:
                found = {id(a): operands[i].get(id(a), walk.nothing((a,))) for a in frame}
            self._reduced(frame, found, dims)
            if value.scales and what.scale.kind not in (Kind.COMPARED, Kind.IGNORED):
                walk.known[id(value)] = [product([found[id(a)] for a in dim]) for dim in dims]

    def _by_atom(self, value: Value, dims: Dims) -> dict[int, Along]:
        """Powers along every atom of an operand's template."""
        found: dict[int, Along] = {}
        for along, dim in zip(self.walk.along(value, dims), dims, strict=True):
            parts = self.walk.unpacked(self.eqn, along, [(atom,) for atom in dim])
            found |= {id(atom): part for atom, part in zip(dim, parts, strict=True)}
        return found

    def _combined(self, atom: Atom, operands: Sequence[dict[int, Along]]) -> Along:
        """The powers of the result along an atom, from those of the operands."""
        none = self.walk.nothing((atom,))
        each = [operand.get(id(atom), none) for operand in operands]
        combine = partial(_COMBINE[self.what.scale.kind], self)
        return [
            [
                combine([along[i][k] for along in each], inner)
                if inner in self.walk.uneven
                else None
                for k, inner in enumerate(cell)
            ]
            for i, cell in enumerate(monomials((atom,)))
        ]

    def agree(self, powers: Sequence[Expr | None], atom: Atom) -> Expr:
        """Returns what all operands agree on that could carry a factor."""
        pairs = zip(powers, self.eqn.inputs, strict=True)
        return self.walk.join((p for p, v in pairs if self._counts(v)), self.eqn, atom)

    def _counts(self, value: Value) -> bool:
        if not value.scales:
            return False
        return value.uniform is None or not (
            is_absorbing(value.uniform) or id(self.eqn) in self.walk.shifted
        )

    def powers_of(self, powers: Sequence[Expr | None], atom: Atom) -> Expr:
        """Returns the sum of the operands' powers times their exponents."""
        total = ZERO
        for i in self.what.scale.bare:
            self.walk.require(powers[i], self.eqn, atom)
        for power, exponent in zip(powers, self.what.scale.powers, strict=False):
            total = plus(total, power or ZERO, affine.rational(exponent))
        return total

    def unscaled(self, powers: Sequence[Expr | None], atom: Atom) -> Expr:
        """Requires that no operand carries a power."""
        for power in powers:
            self.walk.require(power, self.eqn, atom)
        return ZERO

    def carried(self, powers: Sequence[Expr | None], atom: Atom) -> Expr:
        """Returns an unknown that the operand agrees with."""
        if not self.eqn.inputs[0].scales:
            return ZERO
        unknown = self.walk.system.unknown()
        counted = [*powers] if self._counts(self.eqn.inputs[0]) else []
        return self.walk.join([unknown, *counted], self.eqn, atom)

    def _reduced(self, frame: Sequence[Atom], found: dict[int, Along], result: Dims) -> None:
        kept = {id(atom) for dim in result for atom in dim}
        summed = {id(atom) for atom in self.what.summed}
        for atom in frame:
            if id(atom) not in kept:
                extra: Expr = {COPIES: 1} if id(atom) in summed else ZERO
                for cell, atoms in zip(found[id(atom)], monomials((atom,)), strict=True):
                    for power, inner in zip(cell, atoms, strict=True):
                        if power is not None:
                            self.walk.require(plus(power, extra), self.eqn, inner)
                            self.walk.reductions.append((inner, self._by(atom)))

    def _by(self, atom: Atom) -> set[Any]:
        """The parameter along an axis that a sum over it is a product with; "" if there is none."""
        views = [i for i, value in enumerate(self.eqn.inputs) if id(value) in self.walk.views]
        if len(views) != 1 or len(self.eqn.inputs) < 2:
            return {""}
        along = self._by_atom(self.eqn.inputs[views[0]], self.what.operands[views[0]])
        return {u for c in along.get(id(atom), [[{"": 1}]]) for power in c for u in power or ()}

    def _suggest(self) -> None:
        """A kernel contracted over an axis takes 1/copies along it; anything else nothing."""
        views = [i for i, value in enumerate(self.eqn.inputs) if id(value) in self.walk.views]
        if not views or self.eqn.name in LAYOUT or id(self.eqn) in self.walk.shifted:
            return
        contracts = len(self.eqn.inputs) > 1 and self.what.scale.kind is Kind.POWERS
        summed = {id(atom) for atom in self.what.summed} if contracts else set()
        for i in views:
            found = self._by_atom(self.eqn.inputs[i], self.what.operands[i])
            for key, along in found.items():
                self.walk.used([along], summed=key in summed and len(views) == 1)
                wish: Expr = {COPIES: -1} if i == views[-1] and key in summed else ZERO
                for power in (power for cell in along for power in cell if power):
                    unknown = next(iter(power))
                    if len(power) == 1 and isinstance(unknown, int):
                        self.walk.system.suggestions.setdefault(unknown, []).append(wish)


_COMBINE: dict[Kind, Callable[[Labels, Sequence[Any], Atom], Expr]] = {
    Kind.CARRIED: Labels.carried,
    Kind.COMPARED: Labels.agree,
    Kind.EACH: lambda labels, powers, atom: ZERO,
    Kind.IGNORED: lambda labels, powers, atom: ZERO,
    Kind.JOINED: Labels.agree,
    Kind.POWERS: Labels.powers_of,
    Kind.UNSCALED: Labels.unscaled,
}
