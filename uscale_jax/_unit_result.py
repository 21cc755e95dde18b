"""What unit_scale returns: the model in units, and the way there and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax, _track_rows, _tree
from uscale_jax._plan import LeafPlan, Plan
from uscale_jax._powers import Scale
from uscale_jax._table import table
from uscale_jax._track_report import Scales
from uscale_jax._track_rows import INPUTS
from uscale_jax._types import Apply, Key, Tree
from uscale_jax._unit_program import UnitProgram
from uscale_jax._unit_rules import Held, entering, leaving
from uscale_jax._unit_units import Unit, Units
from uscale_jax.trace import rebuilt
from uscale_jax.trace.spots import spots


@dataclass(frozen=True, eq=False)
class UnitScaled:
    """A model in units; what :func:`unit_scale` returns."""

    _apply: Apply
    original: Tree
    """The model's own parameters, as they were given."""
    _keys: Sequence[Key]
    _units: Units
    scales: Scales
    """How large values and gradients of the model are, in its own units."""
    _signature: Sequence[Any]

    def apply(self, params: Tree, *inputs: Any, **kwargs: Any) -> Any:
        """Return what the model returns, from parameters in units."""
        program = Traced(self._apply, (params, *inputs), kwargs)
        self._check(program)
        own = self._held(params)
        others = [
            entering(x, self._units, (INPUTS, i))
            for i, x in enumerate(program.arrays[len(own) :], start=len(own))
        ]
        found = UnitProgram(self._units).closed(program.closed, [*own, *others])
        return jax.tree.unflatten(program.structure, [leaving(h) for h in found])

    @cached_property
    def params(self) -> Tree:
        """Return the parameters that were given, in units: of size one."""
        return self.scale(self.original)

    @property
    def units(self) -> Tree:
        """Return s of every parameter, a tree of floats; 1 of what has none."""
        return self._tree(lambda unit: unit.size)

    @property
    def gradient_units(self) -> Tree:
        """Return ρ of every parameter's gradient."""
        return self._tree(lambda unit: 1.0 if unit.slope is None else unit.slope)

    def scale(self, params: Tree) -> Tree:
        """Return parameters of the model in units, W' = W/s."""
        return self._mapped(params, lambda unit: 1 / unit.size)

    def restore(self, params: Tree) -> Tree:
        """Return parameters in units as the model's, W = s·W'."""
        return self._mapped(params, lambda unit: unit.size)

    def gradients(self, grads: Tree) -> Tree:
        """Return gradients of :meth:`apply` as those of the model, ∂L/∂W = (ρ/s)·g'."""
        return self._mapped(
            grads, lambda unit: 1.0 if unit.slope is None else unit.slope / unit.size
        )

    @cached_property
    def plan(self) -> Plan:
        """Return the plan from the model to itself: its leaves, for :func:`scale_optimizer`."""
        leaves = jax.tree.leaves(self.original)
        named = zip(self._keys, leaves, strict=True)
        return Plan({_tree.name(key): _same(key, x) for key, x in named}, ())

    def frame(self) -> Mapping[Key, Scale]:
        """Return what takes parameters and gradients to the model's own, and steps back."""
        return {key: _scale(unit) for key, unit in self._own.items()}

    def __str__(self) -> str:
        """Return a table of parameters: sizes as measured, and the units that they are held in."""
        return table(("parameter", "rms", "s", "gradient rms", "ρ"), self._rows())

    def _rows(self) -> Iterator[Sequence[str]]:
        values, slopes = jax.device_get((self.scales.values, self.scales.gradients))
        for row in self.scales.tracked:
            if row.kind == _track_rows.PARAMETER:
                unit = self._measured(row.place)
                sizes = values[row.name].rms, unit.size, slopes[row.name].rms, unit.slope or 1.0
                yield row.name, *(f"{number:.3g}" for number in sizes)

    @cached_property
    def _own(self) -> Mapping[Key, Unit]:
        """Units of parameters by name; numbers and objects among them are in no unit."""
        places, leaves = itertools.count(), jax.tree.leaves(self.original)
        units = [self._measured(next(places)) if rebuilt.is_array(x) else Unit() for x in leaves]
        return {
            key: unit if _is_real(x) else Unit(1.0, 1.0)
            for key, unit, x in zip(self._keys, units, leaves, strict=True)
        }

    def _measured(self, place: int) -> Unit:
        return self._units.of((INPUTS, place), Unit(1.0, 1.0))

    def _held(self, params: Tree) -> list[Held]:
        """The arrays among parameters."""
        pairs = self._with_units(params)
        return [
            Held(jnp.asarray(x), unit if _factors.is_scaled(jnp.asarray(x)) else None)
            for x, unit in pairs
            if rebuilt.is_array(x)
        ]

    def _with_units(self, tree: Tree) -> list[tuple[Any, Unit]]:
        keys, leaves, _ = _tree.flatten_named(tree)
        unknown = [_tree.name(key) for key in keys if key not in self._own]
        if unknown:
            raise ValueError(
                f"{unknown[:5]} are no parameters of the unit-scaled model. Expected: a tree of "
                f"{[*map(_tree.name, self._keys)][:5]} and so on. Fix: pass parameters, or "
                "gradients, of this model."
            )
        return [(x, self._own[key]) for key, x in zip(keys, leaves, strict=True)]

    def _tree(self, of: Callable[[Unit], float]) -> Tree:
        structure = jax.tree.structure(self.original)
        return jax.tree.unflatten(structure, [*map(of, self._own.values())])

    def _mapped(self, tree: Tree, of: Callable[[Unit], float]) -> Tree:
        scaled = [
            _factors.multiply(jnp.asarray(x), of(unit)) if of(unit) != 1 and _is_real(x) else x
            for x, unit in self._with_units(tree)
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), scaled)

    def _check(self, program: Traced) -> None:
        for now, then in zip(program.signature, self._signature, strict=False):
            if now[0] != then[0]:
                raise ValueError(
                    f"the model is another program here: {now[0]!r} at {now[1]} where it was "
                    f"{then[0]!r} at {then[1]} when it was measured. Expected: the same operations "
                    "in the same order, on batches of any size. Fix: unit_scale it with arguments "
                    "like these (training and evaluation are two programs)."
                )
        if len(program.signature) != len(self._signature):
            raise ValueError(
                f"the model is another program here, of {len(program.signature)} operations, "
                f"{len(self._signature)} when it was measured. Expected: the same operations in "
                "the same order. Fix: unit_scale it with arguments like these."
            )


def _same(key: Key, leaf: Any) -> LeafPlan:
    shape = np.shape(leaf)
    return LeafPlan(key, key, shape, shape, str(jnp.result_type(leaf)), (None,) * len(shape))


def _scale(unit: Unit) -> Scale:
    slope = unit.size if unit.slope is None else unit.slope
    return Scale((unit.size,), (slope / unit.size,), (1 / unit.size,), 0.0)


def _is_real(x: Any) -> bool:
    return hasattr(x, "dtype") and bool(jnp.issubdtype(x.dtype, jnp.floating))


class Traced:
    """A call of a model as a program of the arrays in its arguments."""

    def __init__(self, apply: Apply, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arrays, call = rebuilt.by_arrays(apply, args, kwargs)
        self.closed, outputs = _jax.closed_jaxpr(call, self.arrays)
        self.structure = jax.tree.structure(outputs)

    @cached_property
    def signature(self) -> list[tuple[tuple[int, str], str]]:
        """Visits and names of its equations, and where they are."""
        return [
            ((spot.visit, _jax.primitive_name(spot.eqn)), str(spot.source))
            for spot in spots(self.closed)
        ]
