"""Which leaves are layers of which family, from the numbers in their names.

``params/layers_3/attend/kernel`` is layer 3 of the family ``params/layers_*`` if the small and
the big model have different numbers of ``layers_``.  Numbers that are the same in both models,
such as those of a block's own list of layers, are names like any others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from uscale_jax import _tree
from uscale_jax._types import Key

Depth: TypeAlias = str | Sequence[int] | Mapping[str, Sequence[int]]

_Entries: TypeAlias = list[tuple[tuple[str, ...], Key]]
"""What is left of every name, as text and numbers in turn, and the key it is of."""


@dataclass(frozen=True)
class Family:
    """Layers of one kind, of which the big model has more than the small one."""

    name: str
    """What their leaves are called, up to the number: ``params/layers_*``."""
    small: int
    """How many layers the small model has."""
    sources: tuple[int, ...]
    """For every layer of the big model, the layer of the small one that it is a copy of."""

    @property
    def big(self) -> int:
        """Return how many layers the big model has."""
        return len(self.sources)

    @property
    def kept(self) -> tuple[int, ...]:
        """Return the big model's layer that stands for each layer of the small one."""
        return tuple(map(self.sources.index, range(self.small)))

    @property
    def new(self) -> tuple[int, ...]:
        """Return the big model's layers that the small one has not."""
        kept = set(self.kept)
        return tuple(i for i in range(self.big) if i not in kept)


@dataclass(frozen=True)
class Named:
    """A family whose layers have leaves of their own."""

    name: str
    small: list[dict[tuple[str, ...], Key]]
    """For every layer, its keys by what follows the number in them."""
    big: list[dict[tuple[str, ...], Key]]


@dataclass
class Names:
    """How the leaves of two models correspond, as far as their names tell."""

    shared: dict[Key, Key] = field(default_factory=dict)
    """Small key by big key."""
    families: list[Named] = field(default_factory=list)
    only_small: list[Key] = field(default_factory=list)
    only_big: list[Key] = field(default_factory=list)


def correspondence(small: Sequence[Key], big: Sequence[Key]) -> Names:
    """Returns which leaves are the same in both models, and which are layers of a family.

    Raises:
      ValueError: leaves outside of any family are in one model only.
    """
    names = Names()
    _compare(_entries(small), _entries(big), "", names)
    if names.only_small or names.only_big:
        raise _different(names)
    return names


def sources(depth: Depth, name: str, small: int, big: int) -> Family:
    """Returns a family with the source of every layer, as ``depth`` says.

    Raises:
      ValueError: it would not be the same function, or ``depth`` does not fit.
    """
    if small > big:
        raise ValueError(
            f"{name} has {small} layers in the small model and {big} in the big one. Expected: at "
            "least as many. Fix: swap the models if they are in the wrong order."
        )
    family = Family(name, small, tuple(_listed(depth, name, small, big)))
    if family.big != big or sorted({*family.sources}) != [*range(small)]:
        raise _misfit(family, big, f"{big} numbers, in which each of 0 to {small - 1} occurs")
    if [*family.kept] != sorted(family.kept):
        raise _misfit(
            family, big, "layers that first occur in their order, for it is to be the same function"
        )
    return family


def _listed(depth: Depth, name: str, small: int, big: int) -> Sequence[int]:
    if isinstance(depth, Mapping):
        if name not in depth:
            raise ValueError(
                f"depth says nothing of {name}, got entries for {sorted(depth)}. Expected: for "
                f"each family that grows, the source of every layer. Fix: add {name!r}."
            )
        return depth[name]
    if not isinstance(depth, str):
        return depth
    if depth not in ("interleave", "stack"):
        raise ValueError(
            f"depth is {depth!r}. Expected: 'interleave', 'stack', the source of every layer, or "
            "those by family. Fix: say one of them."
        )
    return [i * small // big if depth == "interleave" else i % small for i in range(big)]


def _misfit(family: Family, big: int, expected: str) -> ValueError:
    return ValueError(
        f"depth does not fit {family.name}, which grows from {family.small} to {big} layers: got "
        f"{[*family.sources]}. Expected: {expected}. Fix: 'interleave' and 'stack' always fit; "
        "give a mapping by family where families differ in length."
    )


def check_layers(named: Named, family: Family) -> None:
    """Raises ValueError unless every layer has the leaves that its source has."""
    for layer, source in enumerate(family.sources):
        a, b = named.small[source], named.big[layer]
        odd = [key for rest, key in a.items() if rest not in b]
        odd += [key for rest, key in b.items() if rest not in a]
        if odd:
            raise ValueError(
                f"layer {layer} of {family.name} is to be a copy of layer {source}, but only one "
                f"of them has {', '.join(map(repr, map(_tree.name, odd[:8])))}. Expected: the same "
                "leaves in both. Fix: give `depth` sources whose layers are alike."
            )


def check_leaves(
    sources: Mapping[Key, Key],
    kept: Mapping[Key, Key],
    small: Mapping[Key, Any],
    big: Mapping[Key, Any],
) -> None:
    """Raises ValueError unless leaves have the rank and dtype of their sources.

    A copy must also have all sizes of the leaf in its source's place in the big model.
    """
    for key, source in sources.items():
        a, b, place = small[source], big[key], kept[source]
        if len(a.shape) != len(b.shape) or a.dtype != b.dtype:
            raise _unlike(f"{_tree.name(source)!r} of the small one", a, key, b)
        if b.shape != big[place].shape:
            raise _unlike(f"{_tree.name(place)!r}, of which it is a copy,", big[place], key, b)


def _unlike(other: str, like: Any, key: Key, leaf: Any) -> ValueError:
    return ValueError(
        f"parameter {_tree.name(key)!r} of the big model is {_tree.describe(leaf)}, {other} is "
        f"{_tree.describe(like)}. Expected: the same dtype and rank in both models, and the same "
        "sizes in layers that are copies of one. Fix: build both from one definition, and give "
        "`depth` sources whose layers are alike."
    )


def _entries(keys: Sequence[Key]) -> _Entries:
    return [(tuple(re.split(r"(\d+)", _tree.name(key))), key) for key in keys]


def _compare(small: _Entries, big: _Entries, prefix: str, names: Names) -> None:
    """Compares names from their first text on; ``prefix`` is what came before it."""
    left, right = _grouped(small), _grouped(big)
    for text in left | right:
        numbered, leaves = _split(left.get(text, [])), _split(right.get(text, []))
        _compare_leaf(numbered[0], leaves[0], names)
        _compare_numbers(numbered[1], leaves[1], prefix + text, names)


def _grouped(entries: _Entries) -> dict[str, _Entries]:
    groups: dict[str, _Entries] = {}
    for (first, *rest), key in entries:
        groups.setdefault(first, []).append((tuple(rest), key))
    return groups


def _split(entries: _Entries) -> tuple[list[Key], _Entries]:
    """Returns the keys of names that end here, and the names that go on."""
    return [key for rest, key in entries if not rest], [entry for entry in entries if entry[0]]


def _compare_leaf(small: list[Key], big: list[Key], names: Names) -> None:
    if small and big:
        names.shared[big[0]] = small[0]
    else:
        names.only_small += small
        names.only_big += big


def _compare_numbers(small: _Entries, big: _Entries, prefix: str, names: Names) -> None:
    left, right = _grouped(small), _grouped(big)
    if left.keys() == right.keys():
        for number in left:
            _compare(left[number], right[number], prefix + number, names)
    elif len(left) != len(right) and _counts(left) and _counts(right):
        layers = [[dict(side[i]) for i in sorted(side, key=int)] for side in (left, right)]
        names.families.append(Named(f"{prefix}*", *layers))
    else:
        names.only_small += [
            key for number in left.keys() - right.keys() for _, key in left[number]
        ]
        names.only_big += [key for number in right.keys() - left.keys() for _, key in right[number]]
        for number in sorted(left.keys() & right.keys(), key=int):
            _compare(left[number], right[number], prefix + number, names)


def _counts(groups: Mapping[str, Any]) -> bool:
    """Returns whether numbers follow on each other, from any first one."""
    numbers = sorted(map(int, groups))
    return bool(numbers) and numbers == [*range(numbers[0], numbers[0] + len(groups))]


def _different(names: Names) -> ValueError:
    lines = ["the two models have different parameters, apart from layers that are numbered."]
    lines += [f"  only the small one has {_tree.name(k)!r}" for k in sorted(names.only_small)[:8]]
    lines += [f"  only the big one has {_tree.name(k)!r}" for k in sorted(names.only_big)[:8]]
    lines.append(
        "Expected: the same tree with more layers, whose names end in consecutive numbers. Fix: "
        "build both from one definition."
    )
    return ValueError("\n".join(lines))
