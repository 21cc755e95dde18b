"""Plans as JSON: every array is kept once, leaves refer to it by number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from uscale_jax._plan import LeafPlan, Plan, PlanAxis

FORMAT = "uscale_jax.plan"
VERSION = 1


class _Arrays:
    """Arrays by number; equal ones are one."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.number: dict[tuple[Any, ...], int] = {}

    def put(self, array: np.ndarray[Any, Any] | None) -> int | None:
        """Returns the number of an array."""
        if array is None:
            return None
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.number:
            self.number[key] = len(self.kept)
            values = array.reshape(-1).tolist()
            self.kept.append({"shape": list(array.shape), "values": values})
        return self.number[key]


def to_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as plain data."""
    arrays = _Arrays()
    leaves = [_leaf_to_dict(leaf, arrays) for leaf in plan.leaves.values()]
    axes = [
        {**vars(axis), "places": [[name, dim] for name, dim in axis.places]} for axis in plan.axes
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "exact": plan.exact,
        "precision": plan.precision,
        "small_keys": [list(key) for key in plan.small_keys],
        "notes": list(plan.notes),
        "axes": axes,
        "kept": {name: list(units) for name, units in plan.kept.items()},
        "leaves": leaves,
        "arrays": arrays.kept,
    }


def _leaf_to_dict(leaf: LeafPlan, arrays: _Arrays) -> dict[str, Any]:
    return {
        "key": list(leaf.key),
        "source": list(leaf.source),
        "small": list(leaf.small),
        "big": list(leaf.big),
        "dtype": leaf.dtype,
        "maps": [arrays.put(each) for each in leaf.maps],
        "averages": [[arrays.put(each) for each in sets] for sets in leaf.averages],
        "factors": [arrays.put(each) for each in leaf.factors],
        "copies": [arrays.put(each) for each in leaf.copies],
        "shift": leaf.shift,
        "roles": list(leaf.roles),
        "partners": [arrays.put(each) for each in leaf.partners],
        "layer_dim": leaf.layer_dim,
        "layers": list(leaf.layers),
        "zero": leaf.zero,
        "new": leaf.new,
        "words": leaf.words,
        "rates": None if leaf.rates is None else [arrays.put(each) for each in leaf.rates],
    }


def from_json(text: str) -> Plan:
    """Returns the plan that ``to_dict`` described.

    Raises:
      ValueError: the text is no JSON, or no plan, or of a later version.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(f"it is no JSON ({error})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _unreadable('it has no "format": "uscale_jax.plan"')
    if data.get("version") != VERSION:
        raise _unreadable(f"its version is {data.get('version')}, not {VERSION}")
    try:
        return _plan(data)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from None


def _unreadable(why: str) -> ValueError:
    return ValueError(
        f"this is no plan: {why}. Expected: what Plan.to_json wrote. Fix: write it again."
    )


def _plan(data: Mapping[str, Any]) -> Plan:
    raw = data["arrays"]
    leaves = [_leaf(each, raw) for each in data["leaves"]]
    return Plan(
        leaves={leaf.name: leaf for leaf in leaves},
        axes=tuple(_axis(each) for each in data["axes"]),
        notes=tuple(data["notes"]),
        exact=bool(data["exact"]),
        precision=str(data["precision"]),
        small_keys=tuple(tuple(key) for key in data["small_keys"]),
        kept={str(k): tuple(map(int, v)) for k, v in data.get("kept", {}).items()},
    )


def _axis(data: Mapping[str, Any]) -> PlanAxis:
    places = tuple((str(name), int(dim)) for name, dim in data["places"])
    return PlanAxis(**{**data, "places": places})


def _leaf(data: Mapping[str, Any], raw: list[Any]) -> LeafPlan:
    def arrays(numbers: list[int], dtype: type) -> tuple[np.ndarray[Any, Any], ...]:
        return tuple(np.array(raw[n]["values"], dtype).reshape(raw[n]["shape"]) for n in numbers)

    def indices(numbers: list[int | None]) -> tuple[np.ndarray[Any, Any] | None, ...]:
        return tuple(None if n is None else arrays([n], np.int64)[0] for n in numbers)

    return LeafPlan(
        key=tuple(data["key"]),
        source=tuple(data["source"]),
        small=tuple(data["small"]),
        big=tuple(data["big"]),
        dtype=data["dtype"],
        maps=indices(data["maps"]),
        averages=tuple(arrays(sets, np.int64) for sets in data["averages"]),
        factors=arrays(data["factors"], np.float64),
        copies=arrays(data["copies"], np.float64),
        shift=float(data["shift"]),
        roles=tuple(data["roles"]),
        partners=indices(data["partners"]),
        layer_dim=data["layer_dim"],
        layers=tuple(data["layers"]),
        zero=bool(data["zero"]),
        new=bool(data["new"]),
        words=str(data["words"]),
        rates=None if data.get("rates") is None else arrays(data["rates"], np.float64),
    )
