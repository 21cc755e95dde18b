"""Axes as sums of products of atoms, and what it means that two of them are the same.

A dimension is a product of atoms in row-major order (``heads * head_dim``); an atom may turn out
to be such a product itself, or a sum of dimensions laid one after the other (``q | k | v``).
Atoms are bound at most once, and resolved when looked at, so that the order in which a program
reveals its structure does not matter and one pass over it is enough.

Every size is a tuple with one entry per program, so that a small and a big model are analysed
together: 12 that grows to 24 is not 12 that stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from uscale_jax.trace.source import Source

Size: TypeAlias = tuple[int, ...]
"""The size of a dimension in every program."""

Dim: TypeAlias = "tuple[Atom, ...]"
"""A dimension: a product of atoms, row-major; the empty product has size 1."""


class Reason(NamedTuple):
    """Why an atom cannot change its size."""

    text: str
    source: Source | None

    def __str__(self) -> str:
        """Return ``cumsum mixes places along it at model.py:31``."""
        return self.text if self.source is None else f"{self.text} at {self.source}"


class Atom:
    """A factor of a dimension, until it is found to be a product or a sum of others."""

    __slots__ = ("fixed", "opaque", "parent", "parts", "product", "read", "size")

    def __init__(self, size: Size) -> None:
        """Create an atom that nothing is known about."""
        self.size = size
        self.parent: Atom | None = None
        self.product: Dim | None = None
        self.parts: tuple[Dim, ...] | None = None
        self.fixed: Reason | None = None
        self.opaque = False
        self.read = False


def ones(size: Size) -> bool:
    """Returns whether a size is 1 in every program."""
    return all(n == 1 for n in size)


def times(sizes: Iterable[Size], programs: int) -> Size:
    """Returns the elementwise product of sizes."""
    columns = list(zip(*sizes, strict=True)) or [()] * programs
    return tuple(math.prod(column) for column in columns)


def fresh(size: Size) -> Dim:
    """Returns a dimension of its own: one atom, or none for size 1."""
    return () if ones(size) else (Atom(size),)


def sum_of(parts: Sequence[Dim], size: Size) -> Dim:
    """Returns the dimension made of ``parts`` one after the other; ``size`` is its size."""
    if len(parts) == 1:
        return parts[0]
    atom = Atom(size)
    atom.parts = tuple(parts)
    return (atom,)


def find(atom: Atom) -> Atom:
    """Returns the atom that stands for all that were found to be the same as this one."""
    root = atom
    while root.parent is not None:
        root = root.parent
    while atom.parent is not None:
        atom.parent, atom = root, atom.parent
    return root


def resolve(dim: Dim) -> Dim:
    """Returns the dimension in atoms that are unbound or sums."""
    found: list[Atom] = []
    for atom in dim:
        root = find(atom)
        if root.product is None:
            found.append(root)
        else:
            found.extend(resolve(root.product))
    return tuple(found)


def leaves(dim: Dim) -> list[Atom]:
    """Returns the unbound atoms of a dimension, those inside sums too, in order."""
    found: list[Atom] = []
    for atom in resolve(dim):
        if atom.parts is None:
            found.append(atom)
        else:
            for part in atom.parts:
                found.extend(leaves(part))
    return found


def fix(dim: Dim, reason: Reason) -> None:
    """Marks every atom of a dimension as one that must keep its size; the first reason stays."""
    for atom in resolve(dim):
        if atom.fixed is None:
            atom.fixed = reason
            for part in atom.parts or ():
                fix(part, reason)


def mark_read(dim: Dim) -> None:
    """Marks every atom of a dimension as used by the program."""
    for atom in resolve(dim):
        if not atom.read:
            atom.read = True
            for part in atom.parts or ():
                mark_read(part)


def _inherit(dim: Dim, atom: Atom) -> None:
    """Hands to ``dim`` what was known of ``atom``, which has just been bound to it."""
    if atom.fixed is not None:
        fix(dim, atom.fixed)
    if atom.read:
        mark_read(dim)
    if atom.opaque:
        _make_opaque(dim)


def _make_opaque(dim: Dim) -> None:
    for atom in resolve(dim):
        if not atom.opaque:
            atom.opaque = True
            for part in atom.parts or ():
                _make_opaque(part)


def unify(left: Dim, right: Dim, source: Source | None) -> None:
    """Makes two dimensions of equal size the same, splitting atoms where the other side does.

    Where no row-major structure fits both, everything that is left on either side becomes fixed
    and opaque: never wrong, only cautious.
    """
    rest_left, rest_right = list(resolve(left)), list(resolve(right))
    for end in (_FRONT, _BACK):
        _unify_from(end, rest_left, rest_right, source)
    if rest_left or rest_right:
        _clash(tuple(rest_left), tuple(rest_right), source)


_FRONT, _BACK = 0, -1


def _unify_from(end: int, left: list[Atom], right: list[Atom], source: Source | None) -> None:
    """Takes off both what fits, beginning at one end."""
    while left and right:
        a, b = left[end], right[end]
        if a is b or a.size == b.size:
            left.pop(end), right.pop(end)
            _merge(a, b, source)
        elif not (
            (_divides(b.size, a.size) and _split(a, b, end, source))
            or (_divides(a.size, b.size) and _split(b, a, end, source))
        ):
            return
        for rest in (left, right):
            _resolve_at(end, rest)


def _resolve_at(end: int, rest: list[Atom]) -> None:
    """Resolves the next atom: the last step may have bound it."""
    if rest and (rest[end].parent is not None or rest[end].product is not None):
        found = resolve((rest.pop(end),))
        rest[:] = [*found, *rest] if end == _FRONT else [*rest, *found]


def _divides(small: Size, big: Size) -> bool:
    return all(s > 0 and b % s == 0 for s, b in zip(small, big, strict=True))


def _quotient(big: Size, small: Size) -> Size:
    return tuple(b // s for b, s in zip(big, small, strict=True))


def _merge(a: Atom, b: Atom, source: Source | None) -> None:
    """Makes two atoms of equal size one."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.product is not None or b.product is not None:
        unify((a,), (b,), source)
        return
    if a.parts is None:
        a, b = b, a
    b.parent, parts = a, b.parts
    if a.fixed is None and b.fixed is not None:
        fix((a,), b.fixed)
    if b.read:
        mark_read((a,))
    if b.opaque:
        _make_opaque((a,))
    if a.parts is not None and parts is not None:
        _align(list(a.parts), list(parts), source)


def _split(whole: Atom, factor: Atom, end: int, source: Source | None) -> bool:
    """Makes ``whole`` a product with ``factor`` at one end; False where its parts forbid it."""
    rest = fresh(_quotient(whole.size, factor.size))
    head, tail = ((factor,), rest) if end == _FRONT else (rest, (factor,))
    if whole.parts is not None:
        return _distribute(whole, head, tail, source)
    whole.product = (*head, *tail)
    _inherit(whole.product, whole)
    return True


def _distribute(whole: Atom, head: Dim, tail: Dim, source: Source | None) -> bool:
    """``(x | y) = head * tail`` where tail divides x and y: then ``head = (x/tail | y/tail)``."""
    assert whole.parts is not None
    programs = len(whole.size)
    size = dim_size(tail, programs)
    sizes = [dim_size(part, programs) for part in whole.parts]
    if not all(_divides(size, part) for part in sizes):
        return False
    heads = [fresh(_quotient(part, size)) for part in sizes]
    parts, whole.parts = whole.parts, None
    whole.product = (*head, *tail)
    unify(head, sum_of(heads, dim_size(head, programs)), source)
    for part, its_head in zip(parts, heads, strict=True):
        unify(part, (*its_head, *tail), source)
    _inherit(whole.product, whole)
    return True


def dim_size(dim: Dim, programs: int) -> Size:
    """Returns the size of a dimension in every program."""
    return times((atom.size for atom in dim), programs)


def _flat(parts: Sequence[Dim]) -> list[Dim]:
    """Parts of sums within a sum, laid out one after the other."""
    found: list[Dim] = []
    for part in parts:
        atoms = resolve(part)
        inner = atoms[0].parts if len(atoms) == 1 else None
        found.extend([part] if inner is None else _flat(inner))
    return found


# Sums of more parts than this are not cut further: a shift by one place, or a slice for every
# place, would else make a part of every place, each within the last.
_MANY = 100


def _align(left: list[Dim], right: list[Dim], source: Source | None) -> None:
    """Makes two sums the same by cutting the parts of each where the other is cut."""
    left, right = _flat(left)[::-1], _flat(right)[::-1]
    parts = max(len(left), len(right))
    while left and right:
        a, b = _next(left), _next(right)
        programs = max((len(atom.size) for atom in (*a, *b)), default=1)
        size_a, size_b = dim_size(a, programs), dim_size(b, programs)
        if size_a == size_b:
            unify(a, b, source)
            continue
        parts += 1
        if parts <= _MANY and all(m < n for m, n in zip(size_a, size_b, strict=True)):
            right.append(_cut(a, size_a, b, size_b, source))
        elif parts <= _MANY and all(m > n for m, n in zip(size_a, size_b, strict=True)):
            left.append(_cut(b, size_b, a, size_a, source))
        else:
            _clash(a, b, source)
            for part in (*left, *right):
                _clash(part, (), source)
            return


def _next(rest: list[Dim]) -> Dim:
    """Takes the next part off a reversed list, of a sum its first: cuts before may have made it."""
    rest.extend(reversed(_flat([rest.pop()])))
    return rest.pop()


def _cut(piece: Dim, size: Size, whole: Dim, total: Size, source: Source | None) -> Dim:
    """Cuts ``piece`` off the front of ``whole``; returns the rest."""
    rest = fresh(tuple(t - s for t, s in zip(total, size, strict=True)))
    unify(whole, sum_of([piece, rest], total), source)
    return rest


def _clash(left: Dim, right: Dim, source: Source | None) -> None:
    reason = Reason("is regrouped in a way that cuts across its structure", source)
    for side in (left, right):
        fix(side, reason)
        _make_opaque(side)


def alternatives(dim: Dim) -> int:
    """Returns into how many cells the sums of a dimension cut it."""
    count = 1
    for atom in resolve(dim):
        if atom.parts is not None:
            count *= sum(map(alternatives, atom.parts))
    return count


def is_opaque(dim: Dim) -> bool:
    """Returns whether the structure of a dimension, or of a part of it, is not to be trusted."""
    return any(
        atom.opaque or any(is_opaque(part) for part in atom.parts or ()) for atom in resolve(dim)
    )


def monomials(dim: Dim) -> list[tuple[Atom, ...]]:
    """Returns the unbound atoms of every cell of a dimension, row-major."""
    cells: list[tuple[Atom, ...]] = [()]
    for atom in resolve(dim):
        if atom.parts is None:
            choices: list[tuple[Atom, ...]] = [(atom,)]
        else:
            choices = [cell for part in atom.parts for cell in monomials(part)]
        cells = [(*cell, *choice) for cell in cells for choice in choices]
    return cells
