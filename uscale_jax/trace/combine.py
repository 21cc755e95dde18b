"""How factors go through an equation that passes, reduces and makes dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from uscale_jax.trace import affine
from uscale_jax.trace.affine import ZERO, Expr, plus, scaled
from uscale_jax.trace.atoms import alternatives, is_opaque, monomials
from uscale_jax.trace.description import Dims, Kind, Labelled, Scale
from uscale_jax.trace.equations import Cell, Cells, System, log_ratio, one_cell
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.source import Source

LAYOUT = frozenset(
    (
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "convert_element_type",
        "slice",
        "split",
        "copy",
        "copy_p",
        "stop_gradient",
        "sharding_constraint",
        "loop_slice",
        "shard",
        "optimization_barrier",
    )
)


class Walk(Protocol):
    """What an equation needs to know of the walk it is part of."""

    system: System

    def cells(self, value: Value, source: Source | None = None) -> Cells:
        """Return the cells of a value."""
        ...

    def join(self, cells: Iterable[Cell], text: str, source: Source | None) -> Cell:
        """Require that expressions agree; return one of them."""
        ...

    def collapse(self, cells: Cells, eqn: Equation) -> Cell:
        """Join all cells of a value."""
        ...

    def is_shift(self, eqn: Equation) -> bool:
        """Return whether an equation adds the constant that a leaf is always read with."""
        ...

    def is_view(self, value: Value) -> bool:
        """Return whether a value is a parameter, laid out in whatever way."""
        ...

    def suggest(self, cell: Cell, wish: Expr, kernel: bool) -> None:
        """Note what a use of a parameter cell would have it be."""
        ...


class Labels:
    """Works out one :class:`Labelled` equation, in the frame of all atoms of its templates."""

    def __init__(self, walk: Walk, eqn: Equation, what: Labelled) -> None:
        """Lay out the frame."""
        self.walk, self.eqn, self.what = walk, eqn, what
        templates = [*what.operands, *what.results]
        self.frame = list({id(a): a for dims in templates for dim in dims for a in dim}.values())
        self.place = {id(atom): i for i, atom in enumerate(self.frame)}
        self.counts = [alternatives((atom,)) for atom in self.frame]
        self.opaque = [is_opaque((atom,)) for atom in self.frame]

    def results(self) -> list[Cells]:
        """Returns the cells of every output."""
        kind = self.what.scale.kind
        operands = [
            self._framed(v, t) for v, t in zip(self.eqn.inputs, self.what.operands, strict=True)
        ]
        if kind is Kind.EACH:
            each = zip(operands, self.what.results, strict=True)
            return [self._reduced(cells, dims) for cells, dims in each]
        combined = self._combined(operands, _COMBINE[kind])
        self._suggest(operands)
        found = [self._reduced(combined, dims) for dims in self.what.results]
        if kind is Kind.COMPARED:  # joined along what is reduced too, and only then forgotten
            return [one_cell(ZERO, len(dims)) for dims in self.what.results]
        return found

    def _framed(self, value: Value, template: Dims) -> Cells:
        """The cells of an operand along the atoms of the frame."""
        cells = self.walk.cells(value, self.eqn.source)
        if value.uniform is not None and self.walk.is_shift(self.eqn):
            cells = one_cell(None, value.ndim)
        atoms = [self.place[id(atom)] for dim in template for atom in dim]
        if cells.size == 1 or any(self.opaque[i] for i in atoms):
            return one_cell(self.walk.collapse(cells, self.eqn), len(self.frame))
        expected = [alternatives(dim) for dim in template]
        spread = np.broadcast_to(cells, expected).reshape([self.counts[i] for i in atoms])
        return self._placed(spread, atoms)

    def _placed(self, cells: Cells, atoms: Sequence[int]) -> Cells:
        order = np.argsort(atoms, kind="stable")
        shape = [1] * len(self.frame)
        for i in atoms:
            shape[i] = self.counts[i]
        return cells.transpose(order).reshape(shape)

    def _combined(self, operands: list[Cells], combine: Callable[..., Cell]) -> Cells:
        shape = np.broadcast_shapes(*(cells.shape for cells in operands)) if operands else ()
        if not operands:
            return one_cell(ZERO, len(self.frame))
        out = np.empty(shape, object)
        spread = [np.broadcast_to(cells, shape) for cells in operands]
        scales = [value.scales for value in self.eqn.inputs]
        for place in np.ndindex(shape):
            cells = [c[place] for c in spread]
            out[place] = combine(self.walk, self.eqn, self.what.scale, cells, scales)
        return out

    def _reduced(self, cells: Cells, result: Dims) -> Cells:
        """Drops the atoms that a result does not have, and lays the others out as it does."""
        kept = [self.place[id(atom)] for dim in result for atom in dim]
        if any(self.opaque[i] for i in kept):
            cells = one_cell(self.walk.collapse(cells, self.eqn), len(self.frame))
        dropped = [i for i in range(len(self.frame)) if i not in kept]
        cells = self._joined(self._added(cells), dropped)
        cells = cells.transpose([*kept, *dropped]).reshape([cells.shape[i] for i in kept])
        return self._by_dimension(cells, kept, result)

    def _by_dimension(self, cells: Cells, kept: Sequence[int], result: Dims) -> Cells:
        if cells.size == 1:
            return one_cell(cells.flat[0], len(result))
        spread = np.broadcast_to(cells, [self.counts[i] for i in kept])
        return spread.reshape([alternatives(dim) for dim in result])

    def _added(self, cells: Cells) -> Cells:
        """Adding up over an axis that grows r-fold multiplies by r."""
        for atom in self.what.summed:
            ratios = [log_ratio(monomial) for monomial in monomials((atom,))]
            if not any(ratios):
                continue
            axis = self.place[id(atom)]
            shape = [*cells.shape]
            shape[axis] = len(ratios)
            spread = np.broadcast_to(cells, shape).copy()
            for place in np.ndindex(*shape):
                cell: Any = spread[place]
                if cell is not None:
                    spread[place] = plus(cell, ratios[place[axis]])
            cells = spread
        return cells

    def _joined(self, cells: Cells, dropped: Sequence[int]) -> Cells:
        if all(cells.shape[i] == 1 for i in dropped):
            return cells
        shape = [1 if i in dropped else n for i, n in enumerate(cells.shape)]
        out = np.empty(shape, object)
        text = f"`{self.eqn.name}` reduces over parts of a dimension, which must agree"
        for place in np.ndindex(*shape):
            box = tuple(
                slice(None) if i in dropped else slice(p, p + 1) for i, p in enumerate(place)
            )
            out[place] = self.walk.join(cells[box].flat, text, self.eqn.source)
        return out

    def _suggest(self, operands: list[Cells]) -> None:
        """Notes what a parameter used here would be, seen from here alone.

        A kernel contracted over an axis that grows r-fold takes 1/r; any other use, 1.
        """
        views = [i for i, value in enumerate(self.eqn.inputs) if self.walk.is_view(value)]
        if not views or self.eqn.name in LAYOUT or self.walk.is_shift(self.eqn):
            return
        contracts = bool(self.what.summed) and len(self.eqn.inputs) > 1
        for i in views:
            kernel = i == views[-1] and (contracts or self.eqn.name == "gather")
            wish = self._contraction() if kernel and contracts else ZERO
            for cell in operands[i].flat:
                self.walk.suggest(cell, wish, kernel)

    def _contraction(self) -> Expr:
        first = [next(iter(monomials((atom,)))) for atom in self.what.summed]
        return scaled(log_ratio(atom for monomial in first for atom in monomial), -1)


def _powers(walk: Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]) -> Cell:
    if len(scale.powers) == 1 and cells[0] is None:
        return None if scale.powers[0] else ZERO  # 0**0 is 1
    _unscaled(walk, eqn, scale, [cells[i] for i in scale.bare], scales)
    total = ZERO
    for cell, power in zip(cells, scale.powers, strict=False):
        if cell:
            total = plus(total, cell, affine.rational(power))
    return total


def _agree(walk: Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]) -> Cell:
    text = f"`{eqn.name}` takes values together, whose factors must agree"
    counted = [cell for cell, counts in zip(cells, scales, strict=True) if counts]
    return walk.join(counted, text, eqn.source)


def _carried(
    walk: Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]
) -> Cell:
    if not scales[0]:
        return ZERO
    unknown = walk.system.unknown()
    walk.join([unknown, *cells], "a loop carries on what it starts with", eqn.source)
    return unknown


def _unscaled(
    walk: Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]
) -> Cell:
    for cell in cells:
        if cell:
            walk.system.require(cell, f"`{eqn.name}` needs an operand without a factor", eqn.source)
    return ZERO


def _ignored(
    walk: Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]
) -> Cell:
    return ZERO


_COMBINE: dict[Kind, Callable[..., Cell]] = {
    Kind.CARRIED: _carried,
    Kind.COMPARED: _agree,
    Kind.IGNORED: _ignored,
    Kind.JOINED: _agree,
    Kind.POWERS: _powers,
    Kind.UNSCALED: _unscaled,
}
