"""One pass over real batches: what the products of a model read, added up as it streams by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _jax, _tree
from uscale_jax._plan import Models, Plan
from uscale_jax._planning import Remade, remade
from uscale_jax._types import Key, Tree
from uscale_jax._work import at_place
from uscale_jax.trace import tapped
from uscale_jax.trace.readings import Reading, readings

Take: TypeAlias = Callable[[Reading, Sequence[Any]], Any]
"""What to take at a reading, given its operands."""

NO_BATCH = (
    "there is no batch to calibrate with. Expected: an iterable of inputs for the model, or of "
    "tuples of inputs. Fix: pass a list; an iterator can be gone through once only."
)

Wanted: TypeAlias = Callable[[Reading], bool]


class Calibration(NamedTuple):
    """What was taken while a model ran over all batches."""

    remade: Remade
    """The programs of the first batch."""
    readings: list[Reading]
    taken: list[Any]
    """One a reading, in float64; with a leading dimension where a scan goes through layers."""
    batches: int


def calibrate(
    plan: Plan,
    models: Models,
    params: Tree,
    batches: Iterable[Any],
    wanted: Callable[[Remade], Wanted],
    take: Take,
) -> Calibration:
    """Returns what ``take`` gives at the ``wanted`` readings of the big model, over all batches.

    Raises:
      ValueError: there is no batch, or one that the model does not take.
    """
    programs: dict[Any, _Instrumented] = {}
    first: _Instrumented | None = None
    total: list[Any] = []
    count = 0
    for inputs in each_batch(batches, len(models.inputs)):
        kind = _kind(inputs)
        if kind not in programs:
            programs[kind] = _Instrumented(plan, models, inputs, wanted, take)
        program = programs[kind]
        first = first or program
        taken = program(params, inputs)
        total = taken if not count else [_sum(a, b) for a, b in zip(total, taken, strict=True)]
        count += 1
    if first is None:
        raise ValueError(NO_BATCH)
    return Calibration(first.remade, first.readings, total, count)


def each_batch(batches: Iterable[Any], inputs: int) -> Iterator[tuple[Any, ...]]:
    """Yields the inputs of every batch; what follows them in a batch is not for the model.

    Raises:
      ValueError: a batch has fewer inputs than the model takes.
    """
    for number, batch in enumerate(batches):
        given = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if len(given) < inputs:
            raise ValueError(
                f"batch {number} has {len(given)} inputs, and the plan was made with {inputs}. "
                "Expected: what follows params in apply(params, *inputs), as a tuple. Fix: pass "
                "all inputs in every batch."
            )
        yield given[:inputs]


def _kind(inputs: Sequence[Any]) -> Any:
    shapes = jax.tree.map(lambda x: (np.shape(x), str(jax.numpy.result_type(x))), tuple(inputs))
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef, tuple(leaves)


def _sum(a: Any, b: Any) -> Any:
    return jax.tree.map(np.add, a, b)


class _Instrumented:
    """The big model's program for inputs of one shape, and what is taken of it."""

    def __init__(
        self,
        plan: Plan,
        models: Models,
        inputs: Sequence[Any],
        wanted: Callable[[Remade], Wanted],
        take: Take,
    ) -> None:
        # Tables that nest are of no interest here: what is run must be what was read.
        self.remade = remade(plan, models._replace(rotary=False), inputs)
        want = wanted(self.remade)
        found = [r for r in readings(self.remade.traced) if want(r)]
        self.keys = self.remade.traced.keys
        closed = self.remade.traced.closed[-1]
        taps: dict[int, tapped.Tap] = {}
        for visit in {r.visit for r in found}:
            own = [r for r in found if r.visit == visit]
            taps[visit] = _tap(own, take)
        stacked = {(r.visit, scan) for r in found if r.view for scan in r.view.scans}

        def run(leaves: Sequence[Any], inputs: Sequence[Any]) -> Mapping[int, Any]:
            return tapped.run(closed, taps, [*leaves, *jax.tree.leaves(inputs)], stacked)[1]

        self._run = jax.jit(run)
        self.readings = found

    def __call__(self, params: Tree, inputs: Sequence[Any]) -> list[Any]:
        taken = _jax.fetched(self._run(big_leaves(self.remade, params), tuple(inputs)))
        rest = {visit: iter(each) for visit, each in taken.items()}
        wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
        return [
            jax.tree.map(wide, next(rest[r.visit])) if r.visit in rest else None
            for r in self.readings
        ]


def _tap(own: Sequence[Reading], take: Take) -> tapped.Tap:
    return lambda operands: [take(reading, operands) for reading in own]


def big_leaves(remade: Remade, params: Tree) -> list[Any]:
    """Returns the big model's leaves as its program takes them: those of the layers that stay."""
    keys, leaves, _ = _tree.flatten_named(params)
    given = dict(zip(keys, leaves, strict=True))
    found = []
    for key in remade.traced.keys:
        big, dim, layers = _place(remade, key)
        found.append(given[big] if dim is None else jnp.take(given[big], layers, axis=dim))
    return found


def with_leaves(remade: Remade, params: Tree, changed: Mapping[int, Any]) -> Tree:
    """Returns the big model's parameters with some of ``big_leaves`` changed."""
    keys, leaves, treedef = _tree.flatten_named(params)
    order = {key: i for i, key in enumerate(keys)}
    for i, value in changed.items():
        big, dim, layers = _place(remade, remade.traced.keys[i])
        leaf = jnp.asarray(leaves[order[big]])
        new = _jax.with_weak_type(jnp.asarray(value).astype(leaf.dtype), leaf)
        if dim is not None:
            new = leaf.at[(slice(None),) * dim + (layers,)].set(new)
        leaves[order[big]] = at_place(new, _jax.named_sharding(leaf))
    return jax.tree.unflatten(treedef, leaves)


def _place(remade: Remade, key: Key) -> tuple[Key, int | None, Any]:
    """Where a leaf of the cut program stands in the big model, and which of its layers it has."""
    deepened = remade.deepened
    if deepened is None:
        return key, None, None
    big = deepened.kept[key]
    if big not in deepened.steps:
        return big, None, None
    steps = deepened.steps[big]
    return big, steps.dim, np.unique(steps.sources, return_index=True)[1]
