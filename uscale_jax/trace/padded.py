"""Growth to sizes that are no multiples, with new lanes on the axes that need them."""

from __future__ import annotations

from uscale_jax import _tree
from uscale_jax.trace import factors, sizes
from uscale_jax.trace.atoms import Atom
from uscale_jax.trace.keep import Solution, fulfilled
from uscale_jax.trace.padding import Unpaddable, pads
from uscale_jax.trace.tracing import Traced
from uscale_jax.trace.two_pass import padded_trace
from uscale_jax.trace.uneven import Unequal, powers


def solve(traced: Traced) -> Solution:
    """Returns factors that keep the function, with new lanes where units cannot be copied.

    Raises:
      ValueError: an axis that is fixed has another size in the big model, a size is smaller, new
        units would change the function, or equations contradict each other.
    """
    sizes.check_sizes(traced)
    traced = padded_trace(traced)
    strided = traced.structure.strided.atoms
    padded = needing(traced) | strided
    try:
        padding = pads(traced, padded)
    except Unpaddable as unpaddable:
        raise ValueError(_text(traced, unpaddable, unpaddable.atom in strided)) from None
    names, apart = [_tree.name(key) for key in traced.keys], sizes.uneven(traced) - padded
    system = factors.build(traced.structure, names, shifting=True, uneven=apart, sums=padding.sums)
    return Solution(
        traced, system, fulfilled(traced, system), powers(traced, apart), padding.leaves
    )


def needing(traced: Traced) -> frozenset[Atom]:
    """Returns the axes whose units must be repeated equally often, though they cannot be."""
    apart, found = sizes.uneven(traced), frozenset[Atom]()
    while True:
        try:
            powers(traced, apart - found)
            return found
        except Unequal as unequal:
            found |= frozenset(unequal.atoms)


def _text(traced: Traced, unpaddable: Unpaddable, strided: bool) -> str:
    small, big = unpaddable.atom.size[0], unpaddable.atom.size[-1]
    where = sizes.places(traced).get(unpaddable.atom, [])
    advice = f"Expected: a multiple of {small}. Fix: choose one, or keep that size."
    if strided:
        advice = (
            "Expected: places that only products with queries, keys or kernels add up. Fix: keep "
            "that size."
        )
    return (
        f"an axis of {small} (small), {big} (big) cannot get units that change nothing.\n"
        f"  {unpaddable}\n  {sizes.describe_places(where)}\n"
        f"{advice}"
    )
