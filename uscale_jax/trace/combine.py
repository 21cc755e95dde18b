"""How factors go through an equation that passes, reduces and makes dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from uscale_jax.trace import affine
from uscale_jax.trace.affine import ZERO, Expr, plus
from uscale_jax.trace.atoms import Atom, alternatives, is_opaque
from uscale_jax.trace.description import Dims, Kind, Labelled, Scale
from uscale_jax.trace.equations import Cell, Cells, System, one_cell
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

    def ratios(self, eqn: Equation, atom: Atom) -> Sequence[Expr]:
        """Return by how much a sum over each cell of an atom grows."""
        ...

    def cells(self, value: Value, source: Source | None = None) -> Cells:
        """Return the cells of a value."""
        ...

    def join(self, cells: Iterable[Cell], text: str, source: Source | None) -> Cell:
        """Require that expressions agree; return one of them."""
        ...

    def collapse(
        self, cells: Cells, held: Sequence[bool], text: str, source: Source | None
    ) -> Cells:
        """Join cells along the axes that are held."""
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
        if cells.size == 1:
            return one_cell(cells.flat[0], len(self.frame))
        held = [is_opaque(dim) for dim in template]
        cells = self.walk.collapse(cells, held, self._mixes(), self.eqn.source)
        expected = [
            1 if hold else alternatives(dim) for dim, hold in zip(template, held, strict=True)
        ]
        atoms = [self.place[id(atom)] for dim in template for atom in dim]
        spread = np.broadcast_to(cells, expected).reshape(self._counts(template, held))
        return self._placed(spread, atoms)

    def _counts(self, dims: Dims, held: Sequence[bool]) -> list[int]:
        """Cells along every atom of some dimensions, 1 for those of a held one."""
        return [
            1 if hold else self.counts[self.place[id(atom)]]
            for dim, hold in zip(dims, held, strict=True)
            for atom in dim
        ]

    def _mixes(self) -> str:
        return f"`{self.eqn.name}` mixes parts of a dimension, which must agree"

    def _placed(self, cells: Cells, atoms: Sequence[int]) -> Cells:
        shape = [1] * len(self.frame)
        for i, n in zip(atoms, cells.shape, strict=True):
            shape[i] = n
        return cells.transpose(np.argsort(atoms, kind="stable")).reshape(shape)

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
        held = [is_opaque(dim) for dim in result]
        kept = [self.place[id(atom)] for dim in result for atom in dim]
        lost = {self.place[id(a)] for d, hold in zip(result, held, strict=True) if hold for a in d}
        dropped = [i for i in range(len(self.frame)) if i not in kept]
        cells = self._joined(self._added(cells), dropped)
        mixed = [i in lost for i in range(len(self.frame))]
        cells = self.walk.collapse(cells, mixed, self._mixes(), self.eqn.source)
        cells = cells.transpose([*kept, *dropped]).reshape([cells.shape[i] for i in kept])
        if cells.size == 1:
            return one_cell(cells.flat[0], len(result))
        spread = np.broadcast_to(cells, self._counts(result, held))
        return spread.reshape(
            [1 if h else alternatives(d) for d, h in zip(result, held, strict=True)]
        )

    def _added(self, cells: Cells) -> Cells:
        """Adding up over an axis that grows r-fold multiplies by r."""
        for atom in self.what.summed:
            ratios = self.walk.ratios(self.eqn, atom)
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
        held = [i in dropped for i in range(cells.ndim)]
        text = f"`{self.eqn.name}` reduces over parts of a dimension, which must agree"
        return self.walk.collapse(cells, held, text, self.eqn.source)

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
        total = ZERO
        for atom in self.what.summed:
            total = plus(total, self.walk.ratios(self.eqn, atom)[0], -1)
        return total


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
