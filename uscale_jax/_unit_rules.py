"""How operations compute with values held in units: one rule a kind of operation.

A value x = s·x' is held as x', what flows back to it as g' of ∂L/∂x' = ρ·g'.  An operation
y = f(a, b, …) that is homogeneous, f(s_a·a', …) = u·f(a', …), computes on what is held and is
multiplied once, by κ = u/s_y, in the forward pass alone; what flows back to a is multiplied by
κ·ρ_y/ρ_a.  Sums bring their operands to one unit first.  All others compute on s·x' itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax
from uscale_jax._jax import JaxprEqn
from uscale_jax._unit_units import Unit, Units, largest
from uscale_jax.numerics._scale import FORWARD, OPERAND, scale_bwd, scale_fwd
from uscale_jax.trace import readings
from uscale_jax.trace.views import is_layout

PRODUCTS = (*readings.PRODUCTS, "ragged_dot_general")


class Held(NamedTuple):
    """A value in its unit; integers and the like have none."""

    x: Any
    unit: Unit | None = None

    @property
    def size(self) -> float:
        """Return s."""
        return 1.0 if self.unit is None else self.unit.size

    @property
    def slope(self) -> float | None:
        """Return ρ; None of what has no gradient."""
        return None if self.unit is None else self.unit.slope


def has_unit(x: Any) -> bool:
    """Returns whether an array, or its type, is of numbers with a size."""
    dtype = getattr(x, "dtype", None)
    return bool(jnp.issubdtype(jnp.result_type(x) if dtype is None else dtype, jnp.inexact))


def _is_complex(x: Any) -> bool:
    return bool(jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.complexfloating))


_OF_COMPLEX = Unit(1.0, 1.0)


def held(x: Any) -> Held:
    """Returns a constant, in the unit 1."""
    if not has_unit(x):
        return Held(x)
    return Held(x, _OF_COMPLEX if _is_complex(x) else Unit())


def results(eqn: JaxprEqn, operands: Sequence[Held], units: Units, visit: int) -> list[Held]:
    """Returns the results of an equation that is bound as it is."""
    name = _jax.primitive_name(eqn)
    real = [h for h in operands if h.unit is not None]
    types = [*(h.x for h in real), *(v.aval for v in eqn.outvars)]
    if not real or any(_is_complex(x) or not has_unit(x) for x in types):
        return _plainly(eqn, operands, units, visit)
    if is_layout(name) or name in _PASSED:
        return _passed(eqn, operands)
    if name in _JOINS:
        return [_joined(eqn, operands, units, visit)]
    power = _power(name, eqn.params, real)
    if power is not None:
        return [_homogeneous(eqn, operands, power, units, visit)]
    return _plainly(eqn, operands, units, visit)


_PASSED = ("optimization_barrier", "pcast", "pvary", "reduce_precision", "rev")


def _passed(eqn: JaxprEqn, operands: Sequence[Held]) -> list[Held]:
    outs = _jax.rebound(eqn, [h.x for h in operands])
    first = next(h.unit for h in operands if h.unit is not None)
    if len(operands) != len(outs):
        return [Held(x, first) for x in outs]
    return [Held(x, h.unit) for x, h in zip(outs, operands, strict=True)]


# Sums and choices: operands are brought to one unit.

_JOINS = (
    *("add", "add_any", "clamp", "concatenate", "dynamic_update_slice", "max", "min"),
    *("pad", "scatter", "scatter-add", "scatter_add", "select_n", "sub"),
)


def _joined(eqn: JaxprEqn, operands: Sequence[Held], units: Units, visit: int) -> Held:
    real = [h.unit for h in operands if h.unit is not None]
    natural = largest(real)
    mixed = any(unit.slope is None or unit.wild for unit in real)
    unit = units.of((visit, 0), natural, joined=mixed)
    return Held(_jax.rebound(eqn, [_brought(h, unit) for h in operands])[0], unit)


def _brought(h: Held, unit: Unit) -> Any:
    """A value in another unit."""
    if h.unit is None:
        return h.x
    factor = h.unit.size / unit.size
    with jax.named_scope(OPERAND):
        if h.unit.slope is None or unit.slope is None:
            return _constant(h.x, factor)
        return scale_fwd(_back(h.x, factor * unit.slope / h.unit.slope), factor)


def _back(x: Any, factor: float) -> Any:
    return x if factor == 1 else scale_bwd(x, factor)


def _constant(x: Any, factor: float) -> Any:
    """A multiple of what has no gradient; what stands for infinity, in masks, stays finite."""
    if factor == 1:
        return x
    array = jnp.asarray(x)
    found = _factors.multiply(array, factor)
    if factor < 1:
        return found
    top = float(jnp.finfo(array.dtype).max)
    return jnp.where(jnp.isfinite(array), jnp.clip(found, -top, top), found)


# Products, quotients, powers, and what is linear in one operand.


def _power(name: str, params: Mapping[str, Any], real: Sequence[Held]) -> tuple[float, ...] | None:
    """The exponents with which an operation is homogeneous in its real operands."""
    if name in PRODUCTS or name == "mul":
        return (1.0,) * len(real)
    if name == "div":
        return (1.0, -1.0)
    if name == "integer_pow":
        return (float(params["y"]),)
    return (_POWERS[name],) if name in _POWERS and len(real) == 1 else None


_POWERS = {
    **dict.fromkeys(
        (
            *("abs", "cummax", "cummin", "cumsum", "dynamic_slice", "gather", "neg", "psum"),
            *("psum_invariant", "real", "reduce_max", "reduce_min", "reduce_sum"),
            *("reduce_window_max", "reduce_window_sum"),
        ),
        1.0,
    ),
    "rsqrt": -0.5,
    "sqrt": 0.5,
    "square": 2.0,
}


def _homogeneous(
    eqn: JaxprEqn, operands: Sequence[Held], power: Sequence[float], units: Units, visit: int
) -> Held:
    real = [h for h in operands if h.unit is not None]
    size = float(np.prod([h.size**p for h, p in zip(real, power, strict=True)]))
    wild = any(h.unit is not None and h.unit.wild for h in real)
    slopes = [h.slope for h in real if h.slope is not None]
    unit = units.of((visit, 0), Unit(size, slopes[0] if slopes else None), joined=wild)
    factor = size / unit.size
    [out] = _jax.rebound(eqn, [_flowing(h, unit, factor) for h in operands])
    return Held(_times(out, factor, unit), unit)


def _times(x: Any, factor: float, unit: Unit) -> Any:
    return _constant(x, factor) if unit.slope is None else scale_fwd(x, factor)


def _flowing(h: Held, unit: Unit, factor: float = 1.0) -> Any:
    """A value as it is, with what flows back brought from the unit of a result to its own."""
    if h.slope is None or unit.slope is None:
        return h.x
    return _back(h.x, factor * unit.slope / h.slope)


# All others.


def _plainly(eqn: JaxprEqn, operands: Sequence[Held], units: Units, visit: int) -> list[Held]:
    """Results of an equation on values as they are; each has a unit of its own afterwards."""
    slope = 1.0 if any(h.slope is not None for h in operands) else None
    own = [Unit(1.0, slope) if has_unit(v.aval) else None for v in eqn.outvars]
    found = [unit and units.of((visit, i), unit) for i, unit in enumerate(own)]
    found = [
        _OF_COMPLEX if _is_complex(v.aval) else unit
        for v, unit in zip(eqn.outvars, found, strict=True)
    ]
    involved = [*found, *(h.unit for h in operands if _is_complex(h.x))]
    slopes = [unit.slope for unit in reversed(involved) if unit and unit.slope is not None]
    common = Unit(1.0, slopes[0] if slopes else None)
    outs = _jax.rebound(eqn, [_freed(h, common) for h in operands])
    return [_caught(x, unit, common) for x, unit in zip(outs, found, strict=True)]


def _freed(h: Held, common: Unit) -> Any:
    """A value itself."""
    with jax.named_scope(OPERAND):
        return _multiplied(_flowing(h, common), h.size)


def _multiplied(x: Any, factor: float) -> Any:
    return x if factor == 1 else _factors.multiply(jnp.asarray(x), factor)


def _caught(x: Any, unit: Unit | None, common: Unit) -> Held:
    """What a value is held as."""
    if unit is None:
        return Held(x)
    if unit.slope is not None and common.slope is not None:
        x = _back(x, unit.slope / common.slope)
    with jax.named_scope(FORWARD):
        return Held(_multiplied(x, 1 / unit.size), unit)


def moved(h: Held, unit: Unit | None) -> Held:
    """Returns a value in another unit."""
    if h.unit is None or unit is None or h.unit == unit:
        return h
    return Held(_brought(h, unit), unit)


def entering(x: Any, units: Units, at: tuple[int, int]) -> Held:
    """Returns an input of the program, which is no parameter, in its unit.

    What flows back to it leaves as the gradient that it is.
    """
    if not has_unit(x) or _is_complex(x):
        return held(x)
    return moved(Held(x, Unit(1.0, 1.0)), units.of(at, Unit(1.0, 1.0)))


def leaving(h: Held) -> Any:
    """Returns a result of the program itself."""
    return moved(h, Unit(1.0, 1.0 if h.slope is not None else None)).x
