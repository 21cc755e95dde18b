"""budget: sizes of a smaller model that has so many parameters, FLOPs or bytes."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

from uscale_jax import _budget_search
from uscale_jax._axes import Axes, Axis, named_axes, read_axes
from uscale_jax._budget_search import Costs
from uscale_jax._table import places_words, table
from uscale_jax._types import Apply, Tree
from uscale_jax.trace.atoms import Atom
from uscale_jax.trace.sizes import places
from uscale_jax.trace.tracing import Model, trace

Limit: TypeAlias = "int | tuple[int, int]"

_UNITS = {"params": "parameters", "flops": "FLOPs", "memory_bytes": "bytes of parameters"}


@dataclass(frozen=True)
class BudgetAxis:
    """One free axis of the big model and of the smaller one."""

    name: str
    """Its letter, as :func:`trace_axes` prints it."""
    big: int
    size: int
    """In the smaller model."""
    places: tuple[tuple[str, int], ...]
    """Where it occurs: the names of leaves, and which dimension."""


@dataclass(frozen=True)
class Budget:
    """Sizes of a smaller model, and what both models cost; ``print`` shows them as a table."""

    sizes: Mapping[str, int]
    """The size of every free axis, by its letter."""
    params: int
    """Elements of all leaves of the smaller model."""
    flops: int
    """Of its matrix products and convolutions, one forward call."""
    memory_bytes: int
    """Of its leaves."""
    big_params: int
    big_flops: int
    big_memory_bytes: int
    shapes: Tree
    """A tree like the big model's of ``jax.ShapeDtypeStruct``, with the smaller shapes."""
    axes: tuple[BudgetAxis, ...]
    """Every free axis, in the order of ``sizes``."""

    def __str__(self) -> str:
        """Return a table of axes, and a line per cost."""
        rows = [(a.name, str(a.big), str(a.size), places_words(a.places)) for a in self.axes]
        costs = [self._cost(name) for name in _UNITS]
        header = ("axis", "big", "small", "places")
        return "\n\n".join([table(header, rows), table(costs[0], costs[1:])])

    def _cost(self, name: str) -> tuple[str, str]:
        big, small = getattr(self, f"big_{name}"), getattr(self, name)
        share = small / big if big else 1.0
        return name, f"{big:,} -> {small:,} ({share:.1%})"


def budget(
    apply: Apply,
    model: Tree,
    /,
    *inputs: Any,
    params: float | None = None,
    flops: float | None = None,
    memory_bytes: float | None = None,
    limits: Mapping[str, Limit] | None = None,
    multiples: int | Mapping[str, int] | None = None,
) -> Budget:
    r"""Returns sizes of a smaller model of the same architecture that meets a budget.

    .. math::
      s_i = m_i \max(1, \operatorname{round}(\varrho\, n_i / m_i)), \qquad
      \varrho = \max \{\varrho \le 1 : C_t(s) \le B_t \text{ for every target } t\}

    One share :math:`\varrho` for all axes keeps the proportions of the big model, whose sizes are
    :math:`n_i`; :math:`m_i` are multiples that the hardware likes.  Then each size takes one step
    more where the budget allows, the one that lost most first.  Axes of one size and with the same
    limits and multiple stay equal, so layers stay alike.

    The costs :math:`C_t` are polynomials of the sizes, read off one trace of the big model, which
    computes nothing:

    * ``params``: elements of all leaves of the tree, whatever their dtype;
    * ``flops``: :math:`2mnk` for matrix products and :math:`2\cdot` output size :math:`\cdot`
      kernel fan-in for convolutions, of one forward call on ``inputs``.  The body of a ``scan``
      counts once a turn, that of a ``while_loop`` once, of a ``cond`` the dearest branch, that of
      a ``shard_map`` once a device.  Products that no output depends on, and those inside kernels
      that JAX does not see into (Pallas), do not count;
    * ``memory_bytes``: bytes of all leaves, without optimizer state or activations.

    All free axes shrink (:func:`trace_axes`) that the program reads, but inner ones: of several
    that one product with a kernel sums over together, or makes together, only the outermost one
    shrinks.  So heads are dropped and keep their size, groups of queries per key too, and groups
    of channels rather than channels per group.  An inner axis with a range in ``limits`` shrinks
    as well.

    Args:
      apply: ``apply(model, *inputs)``, any pure function that JAX can trace.
      model: the big model's parameter tree: arrays or ``jax.ShapeDtypeStruct``.
      *inputs: inputs, likewise; FLOPs are those of one call on them.
      params: at most how many parameters: a share of the big model's below 1, else a number.
      flops: at most how many floating-point operations, likewise.
      memory_bytes: at most how many bytes of parameters, likewise.
      limits: by axis, its size, or the least and the largest one.  An axis is named by its letter
        in the table of :func:`trace_axes`, or by a place that is this axis alone:
        ``"params/up/kernel[1]"``.
      multiples: what sizes are multiples of: one number, or numbers by axis.  The default is the
        largest power of two up to 128 and up to an eighth of the size.  The big model's own size
        and one set in ``limits`` need not be multiples.

    Returns:
      :class:`Budget`: sizes by letter, ``shapes`` of the smaller model's parameters, and costs.
      Where several targets are given all are met.

    Raises:
      ValueError: no target; one that is not positive, or that no sizes reach; no axis is free;
        ``limits`` or ``multiples`` name an axis that is unknown or fixed, a size that is less than
        1 or larger than the big one, or contradict each other; or what tracing ``apply`` raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> big = {"up": f32(5, 256), "down": f32(256, 3)}
      >>> budget = us.budget(apply, big, f32(2, 5), params=0.4)
      >>> print(budget)
      axis  big  small  places
      a     256  96     down[0], up[1]
      <BLANKLINE>
      params        2,048 -> 768 (37.5%)
      flops         8,192 -> 3,072 (37.5%)
      memory_bytes  8,192 -> 3,072 (37.5%)
      >>> budget.shapes["up"].shape
      (5, 96)

    References:
      Muralidharan et al., *Compact language models via pruning and knowledge distillation*
      (Minitron), 2024 (arXiv:2407.14679): one architecture under a budget of parameters, widths,
      heads and channels pruned by axis.
    """
    traced = trace([Model(apply, model)], inputs)
    named = named_axes(places(traced))
    _check_free(named)
    free = {a: replace(axis, size=int(axis.size)) for a, axis in named.items() if axis.free}
    names = _Names(read_axes(traced), "limits")
    ranges = _by_letter(limits or {}, names, _range)
    shrinking = _budget_search.shrinking(traced, free)
    for atom, axis in free.items():
        least = 1 if atom in shrinking else axis.size
        ranges.setdefault(axis.name, (least, axis.size))
    steps = _multiples(multiples, names)
    candidates = [_candidates(a, ranges[a.name], steps.get(a.name)) for a in free.values()]
    costs = _budget_search.costs(traced, {atom: i for i, atom in enumerate(free)})
    big = [axis.size for axis in free.values()]
    given = {"params": params, "flops": flops, "memory_bytes": memory_bytes}
    targets = _targets(given, {name: cost.at(big) for name, cost in costs.targets.items()})
    _check_reachable(costs, targets, list(free.values()), candidates)
    groups = _budget_search.grouped(big, candidates)
    sizes = _budget_search.largest(groups, lambda sizes: _meets(costs, targets, sizes))
    return _result(costs, list(free.values()), sizes)


def _meets(costs: Costs, targets: Mapping[str, int], sizes: Sequence[int]) -> bool:
    return all(costs.targets[name].at(sizes) <= most for name, most in targets.items())


def _result(costs: Costs, axes: Sequence[Axis], sizes: Sequence[int]) -> Budget:
    big = [axis.size for axis in axes]
    rows = [BudgetAxis(a.name, a.size, n, a.places) for a, n in zip(axes, sizes, strict=True)]
    return Budget(
        sizes={row.name: row.size for row in rows},
        **{name: cost.at(sizes) for name, cost in costs.targets.items()},
        **{f"big_{name}": cost.at(big) for name, cost in costs.targets.items()},
        shapes=costs.shapes(sizes),
        axes=tuple(rows),
    )


def _check_free(named: Mapping[Atom, Axis]) -> None:
    if any(axis.free for axis in named.values()):
        return
    lines = ["no axis of this model can change its size."]
    lines += [f"  {axis.name} ({axis.size}): {axis.why}" for axis in named.values()][:8]
    lines.append(
        "Expected: a model with at least one free axis. Fix: print(us.trace_axes(apply, model, "
        "*inputs)) shows what holds each axis."
    )
    raise ValueError("\n".join(lines))


def _targets(given: Mapping[str, Any], big: Mapping[str, int]) -> dict[str, int]:
    """The most that each given target allows."""
    found = {name: _target(name, x, big[name]) for name, x in given.items() if x is not None}
    if not found:
        raise ValueError(
            "there is no target. Expected: at least one of params, flops and memory_bytes. Fix: "
            "params=0.5 for half of the big model's parameters."
        )
    return found


def _target(name: str, target: Any, big: int) -> int:
    real = isinstance(target, Real) and not isinstance(target, bool)
    if not real or not math.isfinite(target) or target <= 0:
        raise ValueError(
            f"{name}={target!r} is no target. Expected: a share of the big model's {big:,} "
            f"{_UNITS[name]} between 0 and 1, or a number of them, 1 or more. Fix: {name}=0.5."
        )
    # A share is meant as it is written, 0.3 of 10 as 3, not as the float below it.
    return math.floor(Fraction(str(float(target))) * big if target < 1 else target)


class _Names(NamedTuple):
    """What axes are called."""

    axes: Axes
    argument: str
    """Which argument names them, for messages."""

    def axis(self, name: Any) -> Axis:
        """Return a free axis, from its letter or from a place."""
        axis = next((a for a in self.axes.axes if a.name == name), None) or self._at(name)
        if not axis.free:
            raise ValueError(
                f"{self.argument} names {name!r}, which cannot change: axis {axis.name} "
                f"({axis.size}) {axis.why}. Expected: {self._known()}. Fix: leave it out."
            )
        return axis

    def _at(self, name: Any) -> Axis:
        match = re.fullmatch(r"(.*)\[(\d+)\]", name, re.DOTALL) if isinstance(name, str) else None
        dims = self.axes.leaves.get(match[1], ()) if match else ()
        if match is None or int(match[2]) >= len(dims):
            raise self._unknown(name, "which is no axis of this model")
        dim = dims[int(match[2])]
        if len(dim.factors) != 1 or not isinstance(dim.factors[0], Axis):
            raise self._unknown(name, f"which is not one axis but {dim}")
        return dim.factors[0]

    def _unknown(self, name: Any, why: str) -> ValueError:
        return ValueError(
            f"{self.argument} names {name!r}, {why}. Expected: {self._known()}, or a place such as "
            "'params/up/kernel[1]' that is one axis. Fix: print(us.trace_axes(apply, model, "
            "*inputs)) shows all."
        )

    def _known(self) -> str:
        shown = [f"{a.name!r} ({places_words(a.places, 1)})" for a in self.axes.free]
        more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
        return f"one of {', '.join(shown[:12])}{more}"


def _by_letter(given: Mapping[str, Any], names: _Names, read: Callable[..., Any]) -> dict[str, Any]:
    """What is said of axes, by letter, once ``read`` has checked it."""
    found: dict[str, Any] = {}
    for name, said in given.items():
        axis = names.axis(name)
        own = read(f"{names.argument}[{name!r}]={said!r}", said, axis.size)
        if found.setdefault(axis.name, own) != own:
            raise ValueError(
                f"{names.argument} names axis {axis.name!r} twice, for {found[axis.name]} and for "
                f"{own}. Expected: one entry an axis. Fix: leave {name!r} out."
            )
    return found


def _range(said: str, limit: Any, size: int) -> tuple[int, int]:
    ends = limit if isinstance(limit, tuple | list) else (limit, limit)
    low, high = map(_whole, ends) if len(ends) == 2 else (0, 0)
    if not 1 <= low <= high <= size:
        raise ValueError(
            f"{said} is no limit of an axis of size {size}. Expected: a size, or (low, high) with "
            f"1 <= low <= high <= {size}. Fix: (1, {size}) for any size."
        )
    return low, high


def _multiple(said: str, multiple: Any, size: int) -> int:
    if _whole(multiple) < 1:
        raise ValueError(f"{said} is no multiple. Expected: an int of 1 or more. Fix: 1 for any.")
    return _whole(multiple)


def _whole(x: Any) -> int:
    """An integer of any kind; 0 for what is none."""
    return operator.index(x) if hasattr(x, "__index__") and not isinstance(x, bool) else 0


def _multiples(given: int | Mapping[str, int] | None, names: _Names) -> dict[str, int]:
    if given is None or isinstance(given, Mapping):
        return _by_letter(given or {}, names._replace(argument="multiples"), _multiple)
    multiple = _multiple(f"multiples={given!r}", given, 0)
    return {axis.name: multiple for axis in names.axes.free}


def _candidates(axis: Axis, limit: tuple[int, int], multiple: int | None) -> tuple[int, ...]:
    found = _budget_search.candidates(axis.size, *limit, multiple)
    if not found:
        raise ValueError(
            f"limits and multiples contradict each other: axis {axis.name} ({axis.size}) has no "
            f"multiple of {multiple} from {limit[0]} to {limit[1]}. Expected: one at least. Fix: "
            f"multiples={{{axis.name!r}: 1}}."
        )
    return found


def _check_reachable(
    costs: Costs,
    targets: Mapping[str, int],
    axes: Sequence[Axis],
    candidates: Sequence[Sequence[int]],
) -> None:
    smallest = [sizes[0] for sizes in candidates]
    least = {name: costs.targets[name].at(smallest) for name in targets}
    lines = [
        f"  {name}: at most {most:,} asked for, the smallest reachable number is {least[name]:,}"
        for name, most in targets.items()
        if least[name] > most
    ]
    if not lines:
        return
    kept = [f"{a.name} ({a.size})" for a, n in zip(axes, smallest, strict=True) if a.size == n]
    lines += [f"  axes that keep their sizes: {', '.join(kept[:12])}"] if kept else []
    lines.append(
        "Expected: targets that can be met. Fix: raise them; let axes shrink that keep their "
        "sizes, limits={axis: (1, size)}; or multiples=1."
    )
    raise ValueError("\n".join(["no sizes within these limits meet the budget.", *lines]))
