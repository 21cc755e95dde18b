"""Whether a factor would make a leaf overflow, or vanish, and how to say so."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _tree
from uscale_jax._types import Factor, Key

# No trained parameter is larger than this, nor its reciprocal smaller: a leaf is looked at for
# overflow (which costs one more pass over it) only where a parameter below it could overflow.
_PLAUSIBLE = 2.0**80


def places_to_check(dtypes: Sequence[Any], factors: Sequence[Factor]) -> tuple[int, ...]:
    """Returns the places of leaves whose dtype and factor could lose plausible values."""
    kinds = set(zip(dtypes, factors, strict=True))
    extreme = {kind for kind in kinds if _is_extreme(*kind)}
    if not extreme:
        return ()
    return tuple(n for n, kind in enumerate(zip(dtypes, factors, strict=True)) if kind in extreme)


@lru_cache(maxsize=1024)
def _is_extreme(dtype: Any, factor: Any) -> bool:
    """Whether plausible values of this dtype could overflow, or all vanish, under this factor."""
    info = jnp.finfo(dtype)
    return float(info.max) / factor < _PLAUSIBLE or factor / float(info.tiny) < _PLAUSIBLE


def largest_finite(x: jax.Array) -> jax.Array:
    """Returns the largest finite magnitude in ``x``, 0 if there is none."""
    magnitude = jnp.abs(x.astype(_factors.compute_dtype(x.dtype)))
    return jnp.max(magnitude, initial=0, where=jnp.isfinite(magnitude))


def complaint(dtype: Any, factor: float, peak: float) -> str | None:
    """Returns what is wrong with factor·leaf, given its largest magnitude, or None.

    Rounding is monotone, so that element alone tells whether anything overflows, or all vanishes.
    """
    info, largest = jnp.finfo(dtype), peak * factor
    top = float(info.max)
    half_step = 2.0 ** np.floor(np.log2(top)) * float(info.eps) / 2
    with np.errstate(over="ignore"):
        rounded = float(np.asarray(largest).astype(info.dtype))
    if not np.isfinite(rounded) or largest > top + half_step:
        return (
            f"overflows: its largest |k·W| is {largest:.4g}, {dtype} ends at {top:.4g}; "
            f"expected k ≤ {top / peak:.4g}"
        )
    if peak > 0 and rounded == 0:
        least = float(info.smallest_subnormal)
        return (
            f"vanishes: its largest |k·W| is {largest:.4g}, which rounds to zero; "
            f"expected k ≥ {least / peak:.4g}"
        )
    return None


def refuse(
    keys: Sequence[Key], leaves: Sequence[Any], factors: Sequence[Factor], lost: Mapping[int, str]
) -> NoReturn:
    """Raises a ValueError that names the leaves at the places of ``lost`` with their complaints."""
    lines = [
        f"  leaf {_tree.name(keys[i])!r}: {_tree.describe(leaves[i])} × {factors[i]:g} {why}"
        for i, why in list(lost.items())[:8]
    ]
    advice = "Fix: a factor in that range, or a wider dtype: leaf.astype(jnp.float32)."
    raise ValueError("\n".join(["scale_params would lose values.", *lines, advice]))
