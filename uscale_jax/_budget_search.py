"""What a model costs as polynomials of its axis sizes, which axes shrink, and the search."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import jax

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn
from uscale_jax.trace import tapped
from uscale_jax.trace.atoms import Atom, Dim, monomials, resolve
from uscale_jax.trace.description import Dims, Labelled
from uscale_jax.trace.program import Equation
from uscale_jax.trace.tracing import Traced

Polynomial: TypeAlias = dict[tuple[int, ...], int]
"""Coefficients by monomial: the numbers of its axes, sorted, each as often as its power says."""

Order: TypeAlias = Mapping[Atom, int]
"""The numbers of the axes that may shrink; others count as the sizes they have."""


def _add(total: Polynomial, more: Polynomial, times: int = 1) -> None:
    for monomial, coefficient in more.items():
        total[monomial] = total.get(monomial, 0) + times * coefficient


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    total: Polynomial = {}
    for (m, a), (n, b) in itertools.product(left.items(), right.items()):
        _add(total, {tuple(sorted((*m, *n))): a * b})
    return total


def polynomial(dims: Iterable[Dim], order: Order) -> Polynomial:
    """Returns the product of the sizes of dimensions."""
    total: Polynomial = {(): 1}
    for dim in dims:
        for atom in resolve(dim):
            total = _product(total, _size(atom, order))
    return total


def _size(atom: Atom, order: Order) -> Polynomial:
    if atom.parts is None:
        return {(order[atom],): 1} if atom in order else {(): int(atom.size[0])}
    total: Polynomial = {}
    for part in atom.parts:
        _add(total, polynomial([part], order))
    return total


@dataclass(frozen=True)
class Cost:
    """A polynomial of the axis sizes, and for every ``cond`` its branches: the dearest counts."""

    polynomial: Polynomial
    branches: Sequence[Sequence[Cost]] = ()

    def at(self, sizes: Sequence[int]) -> int:
        """Return the cost at these sizes, by the numbers of the axes."""
        own = sum(c * math.prod(sizes[i] for i in m) for m, c in self.polynomial.items())
        return own + sum(max(case.at(sizes) for case in cases) for cases in self.branches)


class Costs(NamedTuple):
    """What a model costs at any sizes of its axes."""

    targets: Mapping[str, Cost]
    """By the name of the target: ``params``, ``flops``, ``memory_bytes``."""
    dims: Sequence[Sequence[Cost]]
    """The size of every dimension of every leaf."""
    traced: Traced

    def shapes(self, sizes: Sequence[int]) -> Any:
        """Return the tree of parameters of these sizes."""
        values = self.traced.structure.program.inputs
        leaves = [
            jax.ShapeDtypeStruct(tuple(dim.at(sizes) for dim in dims), value.dtype)
            for dims, value in zip(self.dims, values, strict=False)
        ]
        return jax.tree.unflatten(self.traced.treedef, leaves)


def costs(traced: Traced, order: Order) -> Costs:
    """Returns what a traced model costs."""
    structure = traced.structure
    params: Polynomial = {}
    memory: Polynomial = {}
    dims = []
    for value in structure.program.inputs[: len(traced.keys)]:
        size = polynomial(structure.of(value), order)
        _add(params, size)
        _add(memory, size, value.dtype.itemsize)
        dims.append([Cost(polynomial([dim], order)) for dim in structure.of(value)])
    targets = {"params": Cost(params), "flops": _flops(traced, order), "memory_bytes": Cost(memory)}
    return Costs(targets, dims, traced)


def _flops(traced: Traced, order: Order) -> Cost:
    """Dimensions are known in the flat program, how often its equations run in the jaxpr."""
    structure, products = traced.structure, {}
    for eqn, what in zip(structure.program.equations, structure.descriptions, strict=True):
        if eqn.name in _MULTIPLIED and isinstance(what, Labelled):
            products[eqn.visit] = polynomial(_MULTIPLIED[eqn.name](eqn, what), order)
    walk = _Walk(products)
    cost = walk.cost(traced.closed[0].jaxpr, 1)
    assert walk.met == products.keys(), "the jaxpr and the flat program are counted alike"
    return cost


class _Walk:
    """Meets equations in the order in which the flat program was made."""

    def __init__(self, products: Mapping[int, Polynomial]) -> None:
        self.products = products
        self.visits = itertools.count()
        self.met: set[int] = set()

    def cost(self, jaxpr: Jaxpr, turns: int) -> Cost:
        total: Polynomial = {}
        branches: list[Sequence[Cost]] = []
        for eqn in jaxpr.eqns:
            visit, name = next(self.visits), _jax.primitive_name(eqn)
            if visit in self.products:
                assert name in _MULTIPLIED
                self.met.add(visit)
                _add(total, self.products[visit], 2 * turns)
            inner = self._inner(eqn, turns * _turns(name, eqn))
            if name == "cond":
                branches.append(inner)
                continue
            for cost in inner:
                _add(total, cost.polynomial)
                branches += cost.branches
        return Cost(total, branches)

    def _inner(self, eqn: JaxprEqn, turns: int) -> list[Cost]:
        bodies = tapped.bodies(eqn)
        opened = [b.jaxpr if isinstance(b, ClosedJaxpr) else b for b in bodies]
        return [self.cost(jaxpr, turns) for jaxpr in opened]


def _turns(name: str, eqn: JaxprEqn) -> int:
    """How often a body runs; of a ``while``, where it is not known, once."""
    if name == "scan":
        return int(eqn.params["length"])
    return int(eqn.params["mesh"].size) if name == "shard_map" else 1


class _Places(NamedTuple):
    """Which dimensions of the two operands of a matrix product are what."""

    summed: tuple[Sequence[int], Sequence[int]]
    shared: tuple[Sequence[int], Sequence[int]]
    """Batch dimensions; of a ragged product the right operand's groups too."""


def _places(eqn: Equation) -> _Places:
    if eqn.name == "dot_general":
        return _Places(*eqn.param("dimension_numbers"))
    numbers = eqn.param("ragged_dot_dimension_numbers")
    summed, (left, right) = numbers.dot_dimension_numbers
    return _Places(summed, (left, (*right, *numbers.rhs_group_dimensions)))


def _matrix_product(eqn: Equation, what: Labelled) -> Dims:
    summed, shared = _places(eqn)
    left, right = what.operands[:2]
    used = {*summed[1], *shared[1]}
    return [*left, *(dim for i, dim in enumerate(right) if i not in used)]


def _convolution(eqn: Equation, what: Labelled) -> Dims:
    """Output size times kernel fan-in."""
    makes = eqn.param("dimension_numbers").rhs_spec[0]
    fan_in = [dim for i, dim in enumerate(what.operands[1]) if i != makes]
    return [*what.results[0], *fan_in]


_MULTIPLIED: Mapping[str, Callable[[Equation, Labelled], Dims]] = {
    "conv_general_dilated": _convolution,
    "dot_general": _matrix_product,
    "ragged_dot_general": _matrix_product,
}


def shrinking(traced: Traced, free: Iterable[Atom]) -> frozenset[Atom]:
    """Returns which free axes shrink unless told otherwise: all but unread and inner ones.

    Of every product that is summed over as one, the first axis shrinks that is not inner already:
    shuffled channels are groups · channels here and channels · groups there.
    """
    shrinks = {atom for atom in free if atom.read and atom.size[0] >= 2}
    for dim in _summed_dims(traced):
        for cell in monomials(dim):
            outer = next((atom for atom in cell if atom in shrinks), None)
            shrinks.difference_update(atom for atom in cell if atom is not outer)
    return frozenset(shrinks)


def _summed_dims(traced: Traced) -> Iterator[Dim]:
    """What is summed over as one by every product, and by its transpose in the backward pass.

    The transpose sums over what a kernel makes: without it the head size of queries and keys,
    which meet each other only, would shrink while that of values does not.
    """
    kernels = _made_of_parameters(traced)
    structure = traced.structure
    for eqn, what in zip(structure.program.equations, structure.descriptions, strict=True):
        if eqn.name in _MULTIPLIED and isinstance(what, Labelled):
            is_kernel = [id(value) in kernels for value in eqn.inputs[:2]]
            yield from _joined(eqn, what, is_kernel)


def _joined(eqn: Equation, what: Labelled, is_kernel: Sequence[bool]) -> Iterator[Dim]:
    if eqn.name == "conv_general_dilated":
        makes, reads = eqn.param("dimension_numbers").rhs_spec[:2]
        yield from (what.operands[1][i] for i in ((reads, makes) if is_kernel[1] else (reads,)))
        return
    summed, shared = _places(eqn)
    reader = 1 if is_kernel == [True, False] else 0
    yield _flat(what.operands[reader], sorted(summed[reader]))
    if is_kernel[0] != is_kernel[1]:
        kernel = what.operands[1 - reader]
        used = {*summed[1 - reader], *shared[1 - reader]}
        yield _flat(kernel, [i for i in range(len(kernel)) if i not in used])


def _flat(dims: Dims, places: Iterable[int]) -> Dim:
    return tuple(atom for i in places for atom in dims[i])


def _made_of_parameters(traced: Traced) -> set[int]:
    """Ids of the values that parameters and constants alone make; what loops carry is none."""
    program = traced.structure.program
    made = {id(value) for value in program.inputs[: len(traced.keys)]}
    constant = {id(value) for value in program.captured}
    for eqn in program.equations:
        own = [id(v) for v in eqn.inputs if v.uniform is None and id(v) not in constant]
        if eqn.name != "loop_enter" and own and made.issuperset(own):
            made.update(map(id, eqn.outputs))
    return made


# A default multiple is at most a tile of 128 lanes, and at most an eighth of the size.
_TILE, _STEPS = 128, 8


def candidates(size: int, low: int, high: int, multiple: int | None) -> tuple[int, ...]:
    """Returns the sizes from ``low`` to ``high`` an axis may have, ascending; none may be.

    ``multiple`` is what they are multiples of; the default one is halved until there are any.
    """
    if low == high:
        return (low,)
    step = multiple or 1 << (min(_TILE, max(size // _STEPS, 1)).bit_length() - 1)
    while not multiple and -(-low // step) * step > high:
        step //= 2
    found = range(-(-low // step) * step, high + 1, step)
    return (*found, high) if high == size and high not in found else (*found,)


class Group(NamedTuple):
    """Axes that always have equal sizes: equal ones in the big model, with equal candidates."""

    size: int
    candidates: Sequence[int]
    """The sizes it may have, ascending."""
    members: Sequence[int]
    """The numbers of its axes."""


def grouped(sizes: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[Group]:
    """Returns the groups of axes, in order of first occurrence."""
    members: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, (size, own) in enumerate(zip(sizes, candidates, strict=True)):
        members.setdefault((size, tuple(own)), []).append(i)
    return [Group(*key, own) for key, own in members.items()]


def largest(groups: Sequence[Group], fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """Returns the sizes nearest to one share of the big ones that fit, and then some.

    Costs grow with every size, so the share is found by bisection of those at which any size
    changes; then each group takes one step more where that fits, the smallest share first.
    ``fits`` must hold for the smallest candidates.
    """
    turning = [
        [Fraction(a + b, 2 * group.size) for a, b in itertools.pairwise(group.candidates)]
        for group in groups
    ]
    shares = [Fraction(0), *sorted({share for own in turning for share in own})]

    def steps(i: int) -> list[int]:
        return [bisect.bisect_right(own, shares[i]) for own in turning]

    beyond = range(1, len(shares))
    found = bisect.bisect_left(beyond, True, key=lambda i: not fits(_sizes(groups, steps(i))))
    return _topped_up(groups, steps(found), fits)


def _topped_up(
    groups: Sequence[Group], steps: list[int], fits: Callable[[Sequence[int]], bool]
) -> list[int]:
    """One step each keeps the sizes near one share; what did not fit once fits no later."""
    room = [i for i, group in enumerate(groups) if steps[i] + 1 < len(group.candidates)]
    for i in sorted(room, key=lambda i: Fraction(groups[i].candidates[steps[i]], groups[i].size)):
        steps[i] += 1
        steps[i] -= not fits(_sizes(groups, steps))
    return _sizes(groups, steps)


def _sizes(groups: Sequence[Group], steps: Sequence[int]) -> list[int]:
    pairs = zip(groups, steps, strict=True)
    sizes = {i: group.candidates[step] for group, step in pairs for i in group.members}
    return [sizes[i] for i in range(len(sizes))]
