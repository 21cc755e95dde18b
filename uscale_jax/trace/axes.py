"""Which dimensions are the same axis, and which cannot change: one walk over a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uscale_jax.trace import contractions, indexing, linear_algebra, loops, primitives, rotary
from uscale_jax.trace.atoms import Reason, fix, fresh, mark_read, unify
from uscale_jax.trace.description import Blocks, Description, Dims, Labelled, Regrouped
from uscale_jax.trace.program import Equation, Program, Value, numbers, same_numbers
from uscale_jax.trace.source import Source

# Imported for the rules they define.
_RULES = (contractions, indexing, linear_algebra, loops)


class Structure:
    """The dimensions of every value of a program, and the description of every equation."""

    def __init__(self, program: Program) -> None:
        """Start with nothing known."""
        self.program = program
        self.dims: dict[int, Dims] = {}
        self.descriptions: list[Description] = []
        self.strided = rotary.Strided()

    def of(self, value: Value) -> Dims:
        """Return the dimensions of a value, fresh ones when it is first seen."""
        if id(value) not in self.dims:
            self.dims[id(value)] = [fresh(size) for size in value.shape]
        return self.dims[id(value)]

    def match(
        self, value: Value, template: Dims, source: Source | None, *, reads: bool = True
    ) -> None:
        """Make a value's dimensions those of a template; uniform constants fit any."""
        if value.uniform is not None:
            return
        for dim, wanted in zip(self.of(value), template, strict=True):
            unify(dim, wanted, source)
            if reads:
                mark_read(dim)


def analyse(program: Program, names: Sequence[str], outputs: Sequence[str]) -> Structure:
    """Returns the structure of a program whose inputs (after the parameters) are ``names``."""
    structure = Structure(program)
    _fix_inputs(structure, names)
    for value in program.captured:
        _fix_captured(structure, value)
    for eqn in program.equations:
        description = primitives.rule_for(eqn.name)(eqn)
        structure.descriptions.append(description)
        _apply(structure, eqn, description)
    for value, name in zip(program.outputs, outputs, strict=True):
        _fix_all(structure, value, f"is an axis of {name}")
    if program.tables is not None:
        structure.strided = rotary.find(structure)
    return structure


def _fix_inputs(structure: Structure, names: Sequence[str]) -> None:
    inputs = structure.program.inputs
    for value, name in zip(inputs[len(inputs) - len(names) :], names, strict=True):
        _fix_all(structure, value, f"is an axis of {name}")


def _fix_all(structure: Structure, value: Value, text: str) -> None:
    if value.uniform is None:
        for dim in structure.of(value):
            fix(dim, Reason(text, None))
            mark_read(dim)


def _fix_captured(structure: Structure, value: Value) -> None:
    """A captured array holds still the axes along which it varies."""
    if value.captured is None:
        return
    reason = Reason(rotary.CAPTURED, None)
    arrays = [numbers(array) for array in value.captured]
    for axis, dim in enumerate(structure.of(value)):
        if rotary.is_postponed(structure.program, value, axis):
            continue
        if any(_varies(array, axis) for array in arrays):
            fix(dim, reason)


def _varies(array: np.ndarray[Any, Any] | None, axis: int) -> bool:
    if array is None or not array.shape[axis]:  # nothing is known of a traced one
        return True
    return not same_numbers(array, np.broadcast_to(array.take([0], axis), array.shape))


def _apply(structure: Structure, eqn: Equation, description: Description) -> None:
    if isinstance(description, Labelled):
        _labelled(structure, eqn, description)
    elif isinstance(description, Regrouped):
        _regrouped(structure, eqn, description)
    else:
        _blocks(structure, eqn, description)


def _labelled(structure: Structure, eqn: Equation, what: Labelled) -> None:
    for dim, why in what.fixed:
        fix(dim, Reason(f"{why} along it", eqn.source))
    for value, template in zip(eqn.inputs, what.operands, strict=True):
        structure.match(value, template, eqn.source)
    for value, template in zip(eqn.outputs, what.results, strict=True):
        structure.dims[id(value)] = template


def _regrouped(structure: Structure, eqn: Equation, what: Regrouped) -> None:
    operand = [dim for group in what.operand for dim in group]
    structure.match(eqn.inputs[0], operand, eqn.source)
    for left, right in zip(what.operand, what.result, strict=True):
        flat_left = tuple(atom for dim in left for atom in dim)
        flat_right = tuple(atom for dim in right for atom in dim)
        unify(flat_left, flat_right, eqn.source)
    structure.dims[id(eqn.outputs[0])] = [dim for group in what.result for dim in group]


def _blocks(structure: Structure, eqn: Equation, what: Blocks) -> None:
    boxes = [block.dims for block in what.blocks]
    if what.pasted:
        for value, template in zip(eqn.inputs, boxes, strict=False):
            structure.match(value, template, eqn.source)
        structure.dims[id(eqn.outputs[0])] = what.whole
        return
    structure.match(eqn.inputs[0], what.whole, eqn.source, reads=False)
    for value, template in zip(eqn.outputs, boxes, strict=True):
        structure.dims[id(value)] = template
        for dim in template:
            mark_read(dim)
