"""What a primitive does to dimensions and to factors, said once for every analysis.

A description speaks in *template* dimensions, made of fresh atoms.  An operand's or a result's
real dimensions are then made the same as its template, which is all there is to say about axes;
and how the atoms of the operands appear in the results is all there is to say about factors:

* an atom of operands and results is passed through,
* one of operands alone is reduced: added up (``summed``) or merged otherwise,
* one of results alone is made by repeating.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from uscale_jax.trace.atoms import Atom, Dim

Dims: TypeAlias = "list[Dim]"


class Kind(enum.Enum):
    """How the factor of a result follows from those of the operands."""

    POWERS = enum.auto()
    """A product of powers of the operands: ``mul``, ``div``, ``sqrt``, ``dot_general``."""
    JOINED = enum.auto()
    """Operands must agree, and the result agrees with them: ``add``, ``max``, ``select_n``.

    Integer and boolean operands (a predicate, indices) carry no factor and do not count."""
    EACH = enum.auto()
    """Result i takes the factor of operand i: ``copy``, ``sort``, ``psum``."""
    CARRIED = enum.auto()
    """The result's factor is an unknown that the operand agrees with: what a loop carries."""
    COMPARED = enum.auto()
    """Operands must agree, the result carries no factor: ``lt``, ``atan2``, ``argmax``."""
    UNSCALED = enum.auto()
    """Operands must carry no factor, nor does the result: ``exp``, an unknown primitive."""
    IGNORED = enum.auto()
    """Whatever the operands carry, the result carries no factor: ``sign``, ``iota``."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How factors go through a primitive."""

    kind: Kind
    powers: tuple[float, ...] = ()
    """For ``POWERS``: one a operand, 0 for operands beyond."""
    bare: tuple[int, ...] = ()
    """For ``POWERS``: the operands that must carry no factor."""


LINEAR = Scale(Kind.POWERS, (1,))
PRODUCT = Scale(Kind.POWERS, (1, 1))
JOINED = Scale(Kind.JOINED)
CARRIED = Scale(Kind.CARRIED)
EACH = Scale(Kind.EACH)
COMPARED = Scale(Kind.COMPARED)
UNSCALED = Scale(Kind.UNSCALED)
IGNORED = Scale(Kind.IGNORED)


@dataclass(slots=True)
class Labelled:
    """Dimensions pass through, are reduced, or are made: an einsum over any operation."""

    operands: list[Dims]
    results: list[Dims]
    scale: Scale
    summed: Sequence[Atom] = ()
    fixed: Sequence[tuple[Dim, str]] = ()
    """Dimensions that cannot change, and why, as the end of "... along it"."""


@dataclass(slots=True)
class Regrouped:
    """One operand whose elements, row-major, are the result's: groups of dimensions correspond."""

    operand: list[Dims]
    """Per group, the operand's dimensions, as templates; they are the operand's in order."""
    result: list[Dims]
    """Per group, the result's."""


@dataclass(slots=True)
class Block:
    """A box inside a whole: which part it is along every dimension."""

    dims: Dims
    part: tuple[int, ...]


@dataclass(slots=True)
class Blocks:
    """Boxes laid into a whole (``concatenate``, ``pad``) or cut out of one (``slice``, ``split``).

    Along dimension i the whole is the sum of ``parts[i]``; a box takes one part of each.
    """

    whole: Dims
    parts: list[list[Dim]]
    blocks: list[Block]
    pasted: bool
    """Whether the boxes are the operands and the whole is the result."""
    filler: bool = False
    """Whether the last operand, a scalar, fills what the boxes leave."""
    fixed: Sequence[tuple[Dim, str]] = ()


Description: TypeAlias = Labelled | Regrouped | Blocks
