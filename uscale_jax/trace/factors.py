"""What multiplies every value when parameters are multiplied or replicated: one walk.

Every value has an array of cells, one for every combination of the parts of its dimensions
(``q | k | v``), each with an affine expression in the unknown factors of parameter cells.  A
primitive's description says how the expressions of its operands give those of its results, and
which equations must hold for the function to be the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from uscale_jax.trace import shifts
from uscale_jax.trace.affine import ZERO, Expr, plus
from uscale_jax.trace.atoms import Atom, alternatives, is_opaque, monomials
from uscale_jax.trace.axes import Structure
from uscale_jax.trace.combine import LAYOUT, Labels
from uscale_jax.trace.description import Blocks, Labelled, Regrouped
from uscale_jax.trace.equations import (
    NEVER,
    Cell,
    Cells,
    System,
    constant_cell,
    log_ratio,
    one_cell,
    same_arrays,
    same_number,
)
from uscale_jax.trace.layout import cell_name
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.source import Source

# Expressions longer than this get a name of their own, so that depth costs linear time.
_LONG = 12

Sums: TypeAlias = Mapping[tuple[int, Atom], Sequence[Expr]]
"""By the id of an equation and an atom that it sums over, by how much each cell's sum grows."""


def build(
    structure: Structure,
    leaf_names: Sequence[str],
    *,
    shifting: bool = False,
    uneven: frozenset[Atom] = frozenset(),
    sums: Sums | None = None,
) -> System:
    """Returns the equations of a program whose first inputs are the parameters ``leaf_names``.

    With ``shifting``, factors of leaves that are only read as ``c + leaf`` are factors of the sum.
    Axes whose units are not repeated equally often are ``uneven``; ``sums`` are those that do not
    grow as their axis does.
    """
    none = shifts.Shifts({}, frozenset())
    shifted = shifts.find(structure.program, len(leaf_names)) if shifting else none
    walk = _Walk(structure, shifted, uneven, sums or {})
    for value, name in zip(structure.program.inputs, leaf_names, strict=False):
        walk.add_leaf(value, name)
    for value in structure.program.captured:
        walk.add_captured(value)
    for eqn, description in zip(structure.program.equations, structure.descriptions, strict=True):
        walk.step(eqn, description)
    walk.system.outputs = [walk.cells(value) for value in structure.program.outputs]
    return walk.system


class _Walk:
    """Carries cells through a program."""

    def __init__(
        self,
        structure: Structure,
        shifted: shifts.Shifts,
        uneven: frozenset[Atom],
        sums: Sums,
    ) -> None:
        self.structure = structure
        self.shifted = shifted
        self.uneven, self.sums = uneven, sums
        self.system = System(shifts=shifted.by_leaf)
        self.known: dict[int, Cells] = {}
        self.views: dict[int, bool] = {}

    # Where values come from.

    def add_leaf(self, value: Value, name: str) -> None:
        """Gives every cell of a parameter an unknown."""
        dims = self.structure.of(value)
        cells = np.empty([alternatives(dim) for dim in dims], object)
        for place in np.ndindex(cells.shape):
            part = cell_name(dims, place, cells.shape)
            cells[place] = self.system.unknown(name + part) if value.scales else ZERO
            self.system.leaf_of |= dict.fromkeys(cells[place], len(self.system.leaf_cells))
        self.system.leaf_cells.append(cells)
        self.known[id(value)] = cells
        self.views[id(value)] = value.scales

    def add_captured(self, value: Value) -> None:
        """An array of numbers must be the same in both programs, up to a factor."""
        if value.uniform is not None or value.captured is None:
            return
        nested = id(value) in self.structure.strided.nested
        if not nested and not same_arrays(value.captured[0], value.captured[-1]):
            self._clash("an array that the function closes over is another in the big model", None)
        self.known[id(value)] = one_cell(ZERO, value.ndim)

    def _clash(self, text: str, source: Source | None) -> Expr:
        self.system.require(NEVER, text, source)
        return ZERO

    def cells(self, value: Value, source: Source | None = None) -> Cells:
        """Returns the cells of a value."""
        if value.uniform is not None:
            return one_cell(self._constant(value, source), value.ndim)
        return self.known.get(id(value), one_cell(ZERO, value.ndim))

    def _constant(self, value: Value, source: Source | None) -> Cell:
        assert value.uniform is not None
        numbers = value.uniform
        if value.scales:
            try:
                return constant_cell(numbers, value.dtype)
            except ValueError as error:
                return self._clash(f"a constant is {error}", source)
        if not same_number(numbers[0], numbers[-1]):
            self._clash(f"an integer is {numbers[0]} (small), {numbers[-1]} (big)", source)
        return ZERO

    # What equations make of them.

    def step(self, eqn: Equation, what: Labelled | Regrouped | Blocks) -> None:
        """Works out the cells of an equation's outputs."""
        if isinstance(what, Labelled):
            found = Labels(self, eqn, what).results()
        elif isinstance(what, Regrouped):
            found = [self._regrouped(eqn, what)]
        else:
            found = self._blocks(eqn, what)
        for value, cells in zip(eqn.outputs, found, strict=True):
            if value.scales:
                self.known[id(value)] = self._short(cells)
            else:
                self._counts(eqn, cells)
                self.known[id(value)] = one_cell(ZERO, value.ndim)
        self._follow_views(eqn)

    def _counts(self, eqn: Equation, cells: Cells) -> None:
        """Integers that are added up count the replicas, and whoever reads them would notice."""
        if not any(value.scales for value in eqn.inputs):
            for cell in cells.flat:
                if cell:
                    self.system.require(cell, f"`{eqn.name}` counts in integers", eqn.source)

    def _follow_views(self, eqn: Equation) -> None:
        """A view of a parameter is the parameter laid out in another way."""
        if self.is_shift(eqn):  # c + leaf is what counts as the parameter from here on
            seen = True
        else:
            seen = eqn.name in LAYOUT and bool(eqn.inputs) and self.is_view(eqn.inputs[0])
        for value in eqn.outputs:
            self.views[id(value)] = seen

    def ratios(self, eqn: Equation, atom: Atom) -> Sequence[Expr]:
        """Returns by how much a sum over each cell of an atom grows."""
        known = self.sums.get((id(eqn), atom))
        return known or [log_ratio(cell, self.uneven) for cell in monomials((atom,))]

    def is_shift(self, eqn: Equation) -> bool:
        """Whether an equation adds the constant that a leaf is always read with."""
        return id(eqn) in self.shifted.equations

    def is_view(self, value: Value) -> bool:
        """Whether a value is a parameter, laid out in whatever way."""
        return self.views.get(id(value), False)

    def suggest(self, cell: Cell, wish: Expr, kernel: bool) -> None:
        """Notes what a use of a parameter cell would have it be, and whether as a kernel."""
        if cell is None or len(cell) != 1:
            return
        unknown = next(iter(cell))
        if isinstance(unknown, int) and self.system.names[unknown]:
            self.system.suggestions.setdefault(unknown, []).append(wish)
            if kernel:
                self.system.kernels.add(unknown)

    def _short(self, cells: Cells) -> Cells:
        """Names long expressions."""
        if all(cell is None or len(cell) <= _LONG for cell in cells.flat):
            return cells
        named = cells.copy()
        for place in np.ndindex(cells.shape):
            if cells[place] is not None and len(cells[place]) > _LONG:
                unknown = self.system.unknown()
                long: Any = cells[place]
                self.system.require(plus(long, unknown, -1), "is named", None)
                named[place] = unknown
        return named

    def join(self, cells: Iterable[Cell], text: str, source: Source | None) -> Cell:
        """Requires that expressions agree; returns the shortest."""
        present = [cell for cell in cells if cell is not None]
        if not present:
            return None
        chosen = min(present, key=len)
        for cell in present:
            if cell is not chosen and cell != chosen:
                self.system.require(plus(cell, chosen, -1), text, source)
        return chosen

    def collapse(
        self, cells: Cells, held: Sequence[bool], text: str, source: Source | None
    ) -> Cells:
        """Joins cells along the axes that are held; those have length 1 then."""
        if all(n == 1 for n, hold in zip(cells.shape, held, strict=True) if hold):
            return cells
        out = np.empty([1 if h else n for n, h in zip(cells.shape, held, strict=True)], object)
        for place in np.ndindex(out.shape):
            pairs = zip(place, held, strict=True)
            box = tuple(slice(None) if hold else slice(i, i + 1) for i, hold in pairs)
            out[place] = self.join(cells[box].flat, text, source)
        return out

    def _regrouped(self, eqn: Equation, what: Regrouped) -> Cells:
        """Cells go from group to group; those of a group that cannot be followed are joined."""
        held_in, held_out, full, counts = [], [], [], []
        for left, right in zip(what.operand, what.result, strict=True):
            before, after = list(map(alternatives, left)), list(map(alternatives, right))
            lost = any(map(is_opaque, (*left, *right))) or math.prod(before) != math.prod(after)
            held_in += [lost] * len(left)
            held_out += [lost] * len(right)
            full += before
            counts += after
        cells = self.cells(eqn.inputs[0], eqn.source)
        if cells.size == 1:
            return one_cell(cells.flat[0], len(counts))
        cells = self.collapse(cells, held_in, _mixes(eqn), eqn.source)
        spread = np.broadcast_to(cells, _unless(held_in, full))
        return spread.reshape(_unless(held_out, counts))

    def _blocks(self, eqn: Equation, what: Blocks) -> list[Cells]:
        held = [
            any(map(is_opaque, (dim, *parts))) or alternatives(dim) != sum(map(alternatives, parts))
            for dim, parts in zip(what.whole, what.parts, strict=True)
        ]
        spans = [list(itertools.accumulate(map(alternatives, p), initial=0)) for p in what.parts]
        boxes = [_box(block.part, spans, held) for block in what.blocks]
        full = _unless(held, [span[-1] for span in spans])
        if what.pasted:
            return [self._pasted(eqn, what, boxes, full, held)]
        cells = self.cells(eqn.inputs[0], eqn.source)
        whole = np.broadcast_to(self.collapse(cells, held, _mixes(eqn), eqn.source), full)
        return [whole[box] for box in boxes]

    def _pasted(
        self,
        eqn: Equation,
        what: Blocks,
        boxes: Sequence[tuple[slice, ...]],
        full: Sequence[int],
        held: Sequence[bool],
    ) -> Cells:
        """Cells of the operands side by side; those that come to lie on others are joined."""
        text, whole = _mixes(eqn), np.empty(full, object)
        taken = np.zeros(full, bool)
        if what.filler:
            whole[...] = self.cells(eqn.inputs[-1], eqn.source).flat[0]
            taken[...] = any(held)
        for box, value in zip(boxes, eqn.inputs, strict=False):
            cells = self.collapse(self.cells(value, eqn.source), held, text, eqn.source)
            spread = np.broadcast_to(cells, whole[box].shape)
            for place in np.ndindex(spread.shape):
                at = tuple(s.start + i for s, i in zip(box, place, strict=True))
                both: list[Any] = [whole[at], spread[place]] if taken[at] else [spread[place]]
                whole[at] = self.join(both, text, eqn.source)
            taken[box] = True
        return whole


def _mixes(eqn: Equation) -> str:
    return f"`{eqn.name}` mixes parts of a dimension, which must agree"


def _unless(held: Sequence[bool], counts: Sequence[int]) -> list[int]:
    return [1 if hold else n for hold, n in zip(held, counts, strict=True)]


def _box(
    part: Sequence[int], spans: Sequence[Sequence[int]], held: Sequence[bool]
) -> tuple[slice, ...]:
    columns = zip(part, spans, held, strict=True)
    return tuple(slice(0, 1) if hold else slice(span[i], span[i + 1]) for i, span, hold in columns)
