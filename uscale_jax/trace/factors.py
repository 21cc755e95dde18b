"""What multiplies every value when parameters are multiplied or replicated: one walk.

Every value has an array of cells, one for every combination of the parts of its dimensions
(``q | k | v``), each with an affine expression in the unknown factors of parameter cells.  A
primitive's description says how the expressions of its operands give those of its results, and
which equations must hold for the function to be the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from uscale_jax.trace import affine
from uscale_jax.trace.affine import ZERO, Expr, plus, scaled
from uscale_jax.trace.atoms import Atom, alternatives, is_opaque, monomials
from uscale_jax.trace.axes import Structure
from uscale_jax.trace.description import Blocks, Dims, Kind, Labelled, Regrouped, Scale
from uscale_jax.trace.layout import cell_name
from uscale_jax.trace.program import Equation, Value, numbers, same_numbers, without_repeats
from uscale_jax.trace.source import Source

Cell: TypeAlias = "Expr | None"
"""An expression, or None for what no factor changes: zero, infinity, NaN."""

Cells: TypeAlias = "np.ndarray[Any, Any]"
"""Cells of a value, by dimension; length 1 along a dimension stands for all its cells."""

# Expressions longer than this get a name of their own, so that depth costs linear time.
_LONG = 12


class Requirement(NamedTuple):
    """An equation ``expr = 0`` that keeps the function, and what asks for it."""

    expr: Expr
    text: str
    source: Source | None


@dataclass
class System:
    """The equations of a program."""

    names: list[str] = field(default_factory=list)
    """Of every unknown; empty for auxiliary ones."""
    requirements: list[Requirement] = field(default_factory=list)
    leaf_cells: list[Cells] = field(default_factory=list)
    """Of every parameter leaf, the unknowns of its cells."""
    leaf_of: dict[int, int] = field(default_factory=dict)
    """The place among the leaves of every unknown that is a parameter cell."""
    suggestions: dict[int, list[Expr]] = field(default_factory=dict)
    """What every use of a parameter cell would have it be."""
    kernels: set[int] = field(default_factory=set)
    """Unknowns of what is summed over, or looked up."""
    outputs: list[Cells] = field(default_factory=list)

    def unknown(self, name: str = "") -> Expr:
        """Return a new unknown."""
        self.names.append(name)
        return {len(self.names) - 1: 1}

    def require(self, expr: Expr, text: str, source: Source | None) -> None:
        """Add an equation, unless it holds anyway."""
        if expr:
            self.requirements.append(Requirement(expr, text, source))


def one_cell(cell: Cell, ndim: int) -> Cells:
    """Returns the cells of a value that is one cell."""
    cells = np.empty((1,) * ndim, object)
    cells[(0,) * ndim] = cell
    return cells


def each_cell(cells: Cells, fun: Callable[[Any], Any]) -> Cells:
    """Returns ``fun`` of every cell."""
    out = np.empty_like(cells)
    for place in np.ndindex(cells.shape):
        out[place] = fun(cells[place])
    return out


def build(structure: Structure, leaf_names: Sequence[str]) -> System:
    """Returns the equations of a program whose first inputs are the parameters ``leaf_names``."""
    walk = _Walk(structure)
    for value, name in zip(structure.program.inputs, leaf_names, strict=False):
        walk.add_leaf(value, name)
    for value in structure.program.captured:
        walk.add_captured(value)
    for eqn, description in zip(structure.program.equations, structure.descriptions, strict=True):
        walk.step(eqn, description)
    walk.system.outputs = [walk.cells(value) for value in structure.program.outputs]
    return walk.system


def log_ratio(atoms: Iterable[Atom]) -> Expr:
    """Returns by how much a product of atoms grows from the small program to the big one."""
    total = ZERO
    for atom in atoms:
        if atom.size[0] != atom.size[-1]:
            total = plus(total, affine.log_of(Fraction(atom.size[-1], atom.size[0])))
    return total


def constant_cell(numbers: Sequence[Any], dtype: Any) -> Cell:
    """Returns by what factor a constant differs between the programs.

    Raises:
      ValueError: it is no factor (the sign changes, or only one is zero).
    """
    small, big = numbers[0], numbers[-1]
    if _same_number(small, big):
        return None if not np.isfinite(small) or small == 0 else ZERO
    ratio = complex(big) / complex(small) if small != 0 else 0.0
    if ratio.imag or not np.isfinite(ratio.real) or ratio.real <= 0:
        raise ValueError(f"{small} (small), {big} (big)")
    return affine.log_of_constants(abs(small), abs(big), float(jnp.finfo(dtype).eps))


def _same_number(a: Any, b: Any) -> bool:
    return bool(a == b) or bool(np.isnan(a) and np.isnan(b))


def _same_arrays(small: Any, big: Any) -> bool:
    """Whether captured arrays are the same but for axes along which they do not vary."""
    if small is big:
        return True
    arrays = [numbers(small), numbers(big)]
    a, b = (None if x is None else without_repeats(x) for x in arrays)
    return a is not None and b is not None and same_numbers(a, b)


class _Walk:
    """Carries cells through a program."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.system = System()
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
        if not _same_arrays(value.captured[0], value.captured[-1]):
            self._clash("an array that the function closes over is another in the big model", None)
        self.known[id(value)] = one_cell(ZERO, value.ndim)

    def _clash(self, text: str, source: Source | None) -> Expr:
        self.system.require({"~1": 1}, text, source)
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
        if not _same_number(numbers[0], numbers[-1]):
            self._clash(f"an integer is {numbers[0]} (small), {numbers[-1]} (big)", source)
        return ZERO

    # What equations make of them.

    def step(self, eqn: Equation, what: Labelled | Regrouped | Blocks) -> None:
        """Works out the cells of an equation's outputs."""
        if isinstance(what, Labelled):
            found = _Labels(self, eqn, what).results()
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
        moved = isinstance(eqn.name, str) and eqn.name in _LAYOUT
        seen = moved and bool(eqn.inputs) and self.is_view(eqn.inputs[0])
        for value in eqn.outputs:
            self.views[id(value)] = seen

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

    def collapse(self, cells: Cells, eqn: Equation) -> Cell:
        """Joins all cells of a value whose structure an equation cannot follow."""
        text = f"`{eqn.name}` mixes parts of a dimension, which must agree"
        return self.join(cells.flat, text, eqn.source)

    def _regrouped(self, eqn: Equation, what: Regrouped) -> Cells:
        operand = [dim for group in what.operand for dim in group]
        result = [dim for group in what.result for dim in group]
        cells = self.cells(eqn.inputs[0], eqn.source)
        counts = [alternatives(dim) for dim in result]
        full = [alternatives(dim) for dim in operand]
        if cells.size == 1:
            return one_cell(cells.flat[0], len(result))
        if any(map(is_opaque, (*operand, *result))) or np.prod(full) != np.prod(counts):
            return one_cell(self.collapse(cells, eqn), len(result))
        return np.broadcast_to(cells, full).reshape(counts)

    def _blocks(self, eqn: Equation, what: Blocks) -> list[Cells]:
        if any(map(is_opaque, what.whole)):
            return self._mixed(eqn, what)
        spans = [list(itertools.accumulate(map(alternatives, p), initial=0)) for p in what.parts]
        boxes = [
            tuple(slice(span[i], span[i + 1]) for span, i in zip(spans, block.part, strict=True))
            for block in what.blocks
        ]
        full = [span[-1] for span in spans]
        if not what.pasted:
            whole = np.broadcast_to(self.cells(eqn.inputs[0], eqn.source), full)
            return [whole[box] for box in boxes]
        whole = np.empty(full, object)
        if what.filler:
            whole[...] = self.cells(eqn.inputs[-1], eqn.source).flat[0]
        for box, value in zip(boxes, eqn.inputs, strict=False):
            whole[box] = self.cells(value, eqn.source)
        return [whole]

    def _mixed(self, eqn: Equation, what: Blocks) -> list[Cells]:
        """All operands' cells joined, for a whole whose structure is not to be trusted."""
        cells = [cell for value in eqn.inputs for cell in self.cells(value, eqn.source).flat]
        text = f"`{eqn.name}` mixes parts of a dimension, which must agree"
        joined = self.join(cells, text, eqn.source)
        return [one_cell(joined, value.ndim) for value in eqn.outputs]


_LAYOUT = frozenset(
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


class _Labels:
    """Works out one :class:`Labelled` equation, in the frame of all atoms of its templates."""

    def __init__(self, walk: _Walk, eqn: Equation, what: Labelled) -> None:
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
        if not views or self.eqn.name in _LAYOUT:
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


def _powers(
    walk: _Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]
) -> Cell:
    if len(scale.powers) == 1 and cells[0] is None:
        return None if scale.powers[0] else ZERO  # 0**0 is 1
    total = ZERO
    for cell, power in zip(cells, scale.powers, strict=False):
        if cell:
            total = plus(total, cell, affine.rational(power))
    return total


def _agree(walk: _Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]) -> Cell:
    text = f"`{eqn.name}` takes values together, whose factors must agree"
    counted = [cell for cell, counts in zip(cells, scales, strict=True) if counts]
    return walk.join(counted, text, eqn.source)


def _carried(
    walk: _Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]
) -> Cell:
    if not scales[0]:
        return ZERO
    unknown = walk.system.unknown()
    walk.join([unknown, *cells], "a loop carries on what it starts with", eqn.source)
    return unknown


def _unscaled(
    walk: _Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]
) -> Cell:
    for cell in cells:
        if cell:
            walk.system.require(cell, f"`{eqn.name}` needs an operand without a factor", eqn.source)
    return ZERO


def _ignored(
    walk: _Walk, eqn: Equation, scale: Scale, cells: list[Cell], scales: list[bool]
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
