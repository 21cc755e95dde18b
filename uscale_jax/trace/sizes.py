"""Whether a big model's sizes are ones that a small model can grow to."""

from __future__ import annotations

from collections.abc import Iterator

from uscale_jax import _tree
from uscale_jax.trace.atoms import Atom, leaves
from uscale_jax.trace.rotary import CAPTURED
from uscale_jax.trace.tracing import Traced


def places(traced: Traced) -> dict[Atom, list[tuple[str, int]]]:
    """Returns where every axis occurs: names of parameter leaves, and which dimension."""
    found: dict[Atom, list[tuple[str, int]]] = {}
    for key, value in zip(traced.keys, traced.structure.program.inputs, strict=False):
        for i, dim in enumerate(traced.structure.of(value)):
            for atom in dict.fromkeys(leaves(dim)):
                found.setdefault(atom, []).append((_tree.name(key), i))
    return found


def check_sizes(traced: Traced) -> None:
    """Refuses sizes that differ where they cannot, or that are smaller in the big model.

    Raises:
      ValueError: naming the axes, their places, and why.
    """
    changed = changing(traced)
    wrong = [(atom, why) for atom in changed if (why := _objection(atom))]
    if not wrong:
        return
    if all(atom.size[-1] < atom.size[0] for atom in changed):
        raise ValueError(
            "the big model is smaller than the small one in every size that differs. Expected: "
            "the small model first. Fix: swap them."
        )
    where = places(traced)
    lines = ["the big model has sizes that the small one cannot grow to."]
    for atom, why in wrong[:8]:
        lines.append(f"  {atom.size[0]} (small), {atom.size[-1]} (big): {why}")
        lines.append(f"    {describe_places(where.get(atom, []))}")
    lines += [f"  and {len(wrong) - 8} axes more"] if len(wrong) > 8 else []
    layers = any("a loop steps" in why for _, why in wrong)
    tables = traced.structure.program.tables is None and any(_is_table(*each) for each in wrong)
    more = "; if these are layers, say so to `plan`: depth='interleave'" if layers else ""
    more += "; for rotary embeddings, say rotary=True to `plan`" if tables else ""
    lines.append(
        f"Expected: fixed axes as they are, free ones larger. Fix: change those sizes{more}."
    )
    raise ValueError("\n".join(lines))


def _is_table(atom: Atom, why: str) -> bool:
    """Whether an axis that grows by a whole factor is held by numbers that differ along it."""
    small, big = atom.size[0], atom.size[-1]
    return big > small > 0 == big % small and ("`iota` counts it" in why or CAPTURED in why)


def changing(traced: Traced) -> list[Atom]:
    """Returns the axes, of parameters first, whose size is not the same in all programs."""
    return [atom for atom in dict.fromkeys(_all_atoms(traced)) if len(set(atom.size)) > 1]


def _all_atoms(traced: Traced) -> Iterator[Atom]:
    structure = traced.structure
    for value in structure.program.inputs:
        for dim in structure.of(value):
            yield from leaves(dim)
    for dims in structure.dims.values():
        for dim in dims:
            yield from leaves(dim)


def _objection(atom: Atom) -> str | None:
    if not atom.read:
        return None
    if atom.fixed is not None:
        return str(atom.fixed)
    if atom.size[-1] < atom.size[0]:
        return "is smaller in the big model"
    return None


def uneven(traced: Traced) -> frozenset[Atom]:
    """Returns the axes whose units cannot all be repeated equally often."""
    return frozenset(atom for atom in changing(traced) if atom.size[-1] % atom.size[0])


def describe_places(where: list[tuple[str, int]]) -> str:
    """Returns where an axis occurs, in words."""
    if not where:
        return "no parameter has this axis"
    shown = [f"dimension {i} of {name}" for name, i in where[:4]]
    more = [f"{len(where) - 4} more"] if len(where) > 4 else []
    return "it is " + ", ".join([*shown, *more])
