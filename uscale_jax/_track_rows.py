"""What is tracked in a program: parameters, inputs, and what equations return."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from uscale_jax import _jax, _tree
from uscale_jax._jax import ClosedJaxpr, Literal
from uscale_jax.numerics._scale import BACKWARD, FORWARD, OPERAND
from uscale_jax.trace import readings, rebuilt
from uscale_jax.trace.spots import Spot, spots
from uscale_jax.trace.views import is_layout

INPUTS = -1
"""The visit under which inputs of the program are tracked."""

PARAMETER, INPUT, PRODUCT, VALUE = "parameter", "input", "product", "value"
_PRODUCTS = (*readings.PRODUCTS, "ragged_dot_general")


class TrackedValue(NamedTuple):
    """A tensor of the model: where it is, and what it is.

    Names are module paths with the operation behind them, ``encoder/layer_0/up/dot_general``: from
    the scopes around it (Flax modules, ``jax.named_scope``), else from the parameter that is read
    there, else from the line.
    """

    name: str
    kind: str
    """``"parameter"`` (a leaf of the first argument), ``"input"``, ``"product"`` (matrix products
    and convolutions) or ``"value"``."""
    operation: str
    """JAX's primitive, ``"dot_general"``; "" of parameters and inputs."""
    source: str
    """The line in the user's file, ``model.py:31``."""
    shape: tuple[int, ...]
    dtype: str
    turns: tuple[int, ...]
    """How often there is one, in the scans and shards around it."""
    visit: int
    """The equation in the program."""
    place: int
    """Which of its results."""


class InputName(NamedTuple):
    """An array in the arguments of a call."""

    name: str
    kind: str
    argument: int | None
    """Which positional one it is in."""


class Found(NamedTuple):
    """What is tracked, in the order of the program, and where."""

    rows: tuple[TrackedValue, ...]
    spots: dict[int, Spot]
    """Of the equations that rows are of, by visit."""


def find(
    closed: ClosedJaxpr,
    names: Sequence[InputName],
    where: Callable[[TrackedValue], bool] | None = None,
    factors: bool = True,
) -> Found:
    """Returns what to track; ``names`` are those of the program's inputs.

    With ``factors``, results that are multiplied by factors of their own are tracked behind them.
    """
    here = spots(closed)
    pairs = _with_factors(here) if factors else zip(here, here, strict=True)
    results = (row for spot, at in pairs for row in _results(spot, at, names))
    rows = _with_names([*_inputs(closed, names), *results])
    kept = [row for row in rows if where is None or where(row)]
    wanted = {row.visit for row in kept}
    return Found((*kept,), {spot.visit: spot for spot in here if spot.visit in wanted})


def _with_factors(here: Sequence[Spot]) -> Iterator[tuple[Spot, Spot]]:
    """Equations, and those whose results are tracked in place of theirs.

    The result of a unit-scaled operation is what its factor has been applied to.
    """
    made = {var: spot.visit for spot in here for var in spot.eqn.outvars}
    scaled: dict[int, Spot] = {}
    for spot in here:
        if _factor(spot) == FORWARD:
            first = spot.eqn.invars[0]
            if not isinstance(first, Literal) and first in made:
                scaled[made[first]] = spot
    results = {spot.visit for spot in scaled.values()}
    for spot in here:
        if _factor(spot) not in (BACKWARD, OPERAND) and spot.visit not in results:
            at = spot
            while at.visit in scaled:
                at = scaled[at.visit]
            yield spot, at


def _factor(spot: Spot) -> str:
    """Which factor an equation applies, "" of what is none."""
    names = spot.scope.split("/")
    return OPERAND if OPERAND in names else names[-1] if names[-1] in (FORWARD, BACKWARD) else ""


def input_names(
    apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[InputName]:
    """Returns the name of every array in the arguments of a call.

    The leaves of the first argument, the parameters, are called as in its tree.
    """
    own = _parameter_names(apply, len(args))
    keys, leaves, _ = _tree.flatten_named((args, kwargs))
    found = []
    for (part, entry, *path), leaf in zip(keys, leaves, strict=True):
        if rebuilt.is_array(leaf):
            argument = int(entry) if part == "0" else None
            prefix = entry if argument is None else own[argument]
            name = "/".join(path if argument == 0 and path else (prefix, *path))
            found.append(InputName(name, PARAMETER if argument == 0 else INPUT, argument))
    return found


def _parameter_names(apply: Callable[..., Any], count: int) -> list[str]:
    try:
        own = [
            p.name
            for p in inspect.signature(apply).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        own = []
    return [own[i] if i < len(own) else f"argument {i}" for i in range(count)]


def is_measured(aval: Any) -> bool:
    """Returns whether there is a size to speak of: integers and keys have none."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact)) and aval.size > 0


def _inputs(closed: ClosedJaxpr, names: Sequence[InputName]) -> Iterator[TrackedValue]:
    for i, (var, (name, kind, _)) in enumerate(zip(closed.jaxpr.invars, names, strict=True)):
        if is_measured(var.aval):
            yield _row(name, kind, "", "", var.aval, (), INPUTS, i)


def _results(spot: Spot, at: Spot, names: Sequence[InputName]) -> Iterator[TrackedValue]:
    operation = _jax.primitive_name(spot.eqn)
    if not spot.varies or is_layout(operation):
        return
    kind = PRODUCT if operation in _PRODUCTS else VALUE
    source = str(spot.source)
    path = _clean(spot.scope) or _leaves(spot, names)
    name = f"{path}/{operation}" if path else f"{operation} at {source}"
    for i, var in enumerate(at.eqn.outvars):
        if is_measured(var.aval):
            yield _row(name, kind, operation, source, var.aval, at.turns, at.visit, i)


def _row(
    name: str,
    kind: str,
    operation: str,
    source: str,
    aval: Any,
    turns: tuple[int, ...],
    visit: int,
    place: int,
) -> TrackedValue:
    shape = (*map(int, aval.shape),)
    return TrackedValue(name, kind, operation, source, shape, str(aval.dtype), turns, visit, place)


def _clean(scope: str) -> str:
    """A scope without the names that Flax gives to functions of its own."""
    return "/".join(part for part in scope.split("/") if "<" not in part)


def _leaves(spot: Spot, names: Sequence[InputName]) -> str:
    """The parameters that an equation reads."""
    read = {i for i in spot.reads if i >= 0 and names[i].kind == PARAMETER}
    return ", ".join(names[i].name for i in sorted(read))


def _with_names(rows: Iterable[TrackedValue]) -> Iterator[TrackedValue]:
    """Rows with names of their own: those of the same name again are numbered."""
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row.name] += 1
        yield row._replace(name=f"{row.name} #{seen[row.name]}") if seen[row.name] > 1 else row
