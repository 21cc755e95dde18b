"""What a value is on lanes that are added to an axis, and what is still to be decided of it.

An axis of n units that grows to ``n' = k·n + r`` gets r lanes that are copies of no unit.  A value
may be 0 on them, or the mean of what it is on the old ones; a sum over the axis is a multiple of
what it was in these two cases only.  Parameters can be made either; which of them is decided when
something that is computed needs it, for all at once that are added to each other (a group).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias


class Fact(enum.Flag):
    """What holds on the new lanes; several may."""

    ANY = 0
    """Nothing is known, or nothing matters."""
    ZERO = enum.auto()
    MEAN = enum.auto()
    """The value is the mean over the old lanes; along a strided axis, whose new lanes stand behind
    old ones (``trace.rotary``), it is that of the old lane before."""
    SAME = enum.auto()
    """It is the same on all lanes, old and new; so it is the mean."""


CONSTANT = Fact.MEAN | Fact.SAME
NOUGHT = CONSTANT | Fact.ZERO


class Undecidable(Exception):
    """Lanes are not what an equation needs them to be, whatever is decided."""


@dataclass(eq=False, slots=True)
class Group:
    """Lanes of parameters, or of what a loop carries, that are decided together."""

    parent: Group | None = None
    choice: Fact | None = None
    allowed: Fact = Fact.MEAN | Fact.ZERO
    follow: list[Lanes] = field(default_factory=list)
    """What must be of the same kind as the group."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """Facts about the new lanes of a value along an axis."""

    sure: Fact
    group: Group | None = None
    if_mean: Fact = Fact.ANY
    """What holds if the group is the mean."""
    if_zero: Fact = Fact.ANY


Combine: TypeAlias = Callable[[Sequence[Fact]], Fact]


def undecided(allowed: Fact = Fact.MEAN | Fact.ZERO, follow: Sequence[Lanes] = ()) -> Lanes:
    """Returns lanes of a group of their own."""
    return Lanes(Fact.ANY, Group(allowed=allowed, follow=[*follow]), Fact.MEAN, Fact.ZERO)


def find(group: Group) -> Group:
    """Returns the group that stands for all that are decided together with this one."""
    while group.parent is not None:
        group = group.parent
    return group


def settled(lanes: Lanes) -> Lanes:
    """Returns lanes as they are after all decisions so far."""
    if lanes.group is None:
        return lanes
    group = find(lanes.group)
    if group.choice is not None:
        return Lanes(lanes.if_mean if group.choice is Fact.MEAN else lanes.if_zero)
    if_mean = lanes.if_mean if Fact.MEAN in group.allowed else lanes.sure
    if_zero = lanes.if_zero if Fact.ZERO in group.allowed else lanes.sure
    if if_mean == if_zero == lanes.sure:
        return Lanes(lanes.sure)
    return Lanes(lanes.sure, group, if_mean, if_zero)


def combined(fun: Combine, each: Sequence[Lanes], first: int = 0) -> Lanes:
    """Returns ``fun`` of lanes, for every decision on one group; nothing is known of others.

    The group is that of the operand ``first``, if it has one.
    """
    each = [settled(lanes) for lanes in each]
    groups = [lanes.group for lanes in (*each[first:], *each[:first]) if lanes.group is not None]
    sure = fun([lanes.sure for lanes in each])
    if not groups:
        return Lanes(sure)
    mine = [replace(lanes, group=None) if lanes.group is not groups[0] else lanes for lanes in each]
    if_mean = fun([lanes.if_mean if lanes.group else lanes.sure for lanes in mine])
    if_zero = fun([lanes.if_zero if lanes.group else lanes.sure for lanes in mine])
    return settled(Lanes(sure, groups[0], if_mean, if_zero))


def added(fun: Combine, each: Sequence[Lanes]) -> Lanes:
    """Returns ``fun`` of lanes that are of the same kind if they are of any.

    Groups become one; what is added to known lanes becomes what they are.
    """
    each = [settled(lanes) for lanes in each]
    groups = [lanes.group for lanes in each if lanes.group is not None]
    for group in groups[1:]:
        _merge(find(groups[0]), find(group))
    found = combined(fun, each)
    known = [lanes.sure for lanes in each if lanes.group is None and Fact.SAME not in lanes.sure]
    if found.group is not None and known:
        for fact, then in ((Fact.ZERO, found.if_zero), (Fact.MEAN, found.if_mean)):
            if all(sure == fact for sure in known) and fact in then:
                decide(found.group, fact)
    return settled(found)


def _merge(group: Group, other: Group) -> None:
    if group is not other:
        other.parent = group
        group.allowed &= other.allowed
        group.follow += other.follow


def tie(group: Group, lanes: Lanes) -> None:
    """Makes a group only what these lanes can be, and these what the group is once decided."""
    group = find(group)
    group.allowed &= could(lanes)
    group.follow.append(lanes)


def decide(group: Group, choice: Fact) -> None:
    """Decides what the lanes of a group are, and of all that must follow.

    Raises:
      Undecidable: they cannot.
    """
    group = find(group)
    group.choice = choice
    for lanes in group.follow:
        need(lanes, choice)


def need(lanes: Lanes, wanted: Fact) -> None:
    """Sees to it that one of the facts that are wanted holds.

    Raises:
      Undecidable: none can.
    """
    lanes = settled(lanes)
    if lanes.sure & wanted:
        return
    if lanes.group is None:
        raise Undecidable
    if lanes.if_mean & wanted:
        decide(lanes.group, Fact.MEAN)
    elif lanes.if_zero & wanted:
        decide(lanes.group, Fact.ZERO)
    else:
        raise Undecidable


def could(lanes: Lanes) -> Fact:
    """Returns which facts may come to hold."""
    lanes = settled(lanes)
    return lanes.sure | lanes.if_mean | lanes.if_zero


def is_open(lanes: Lanes, wanted: Fact) -> bool:
    """Returns whether one of the facts holds whatever is decided, though not the same one."""
    lanes = settled(lanes)
    return bool(lanes.if_mean & wanted and lanes.if_zero & wanted and not lanes.sure & wanted)


def both(facts: Sequence[Fact]) -> Fact:
    """Returns what holds of a sum, or of a value that is sometimes one and sometimes another."""
    found = NOUGHT
    for fact in facts:
        found &= fact
    return found


def product(facts: Sequence[Fact]) -> Fact:
    """Returns what holds of a product."""
    varying = [fact for fact in facts if Fact.SAME not in fact]
    zero = Fact.ZERO if any(Fact.ZERO in fact for fact in facts) else Fact.ANY
    if not varying:
        return zero | CONSTANT
    return zero | (varying[0] & Fact.MEAN if len(varying) == 1 else Fact.ANY)
