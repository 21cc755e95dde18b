"""Exact linear systems, against Gaussian elimination written out here and against brute force."""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uscale_jax.trace import affine, linear
from uscale_jax.trace.affine import Expr

KNOWN = ("2", "3")


def matrix(equations: Sequence[Expr], count: int) -> tuple[list[list[Fraction]], list[list]]:
    """Coefficients of the unknowns, and of the known symbols."""
    of = lambda e, symbols: [Fraction(e.get(s, 0)) for s in symbols]  # noqa: E731
    return [of(e, range(count)) for e in equations], [of(e, KNOWN) for e in equations]


def rank(rows: Iterable[Sequence[Fraction]]) -> int:
    rows, found = [list(row) for row in rows], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((r for r in range(found, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        for r in range(found + 1, len(rows)):
            times = rows[r][column] / rows[found][column]
            rows[r] = [a - times * b for a, b in zip(rows[r], rows[found], strict=True)]
        found += 1
    return found


def solvable(equations: Sequence[Expr], count: int) -> bool:
    left, right = matrix(equations, count)
    return rank(left) == rank([a + b for a, b in zip(left, right, strict=True)])


def at(equation: Expr, solution: Sequence[Expr]) -> Expr:
    """An equation with a solution put in, by the definition of both."""
    out: dict = {}
    for symbol, number in equation.items():
        inner = solution[symbol] if isinstance(symbol, int) else {symbol: 1}
        for s, n in inner.items():
            out[s] = out.get(s, 0) + Fraction(number) * n
    return {s: n for s, n in out.items() if n}


NUMBERS = st.sampled_from([-2, -1, Fraction(-1, 2), Fraction(1, 3), Fraction(1, 2), 1, 1, 2, 3])


@st.composite
def systems(draw, unknowns: int = 5, equations: int = 6) -> tuple[list[Expr], int]:
    count = draw(st.integers(1, unknowns))
    symbols = st.one_of(st.integers(0, count - 1), st.sampled_from(KNOWN))
    one = st.dictionaries(symbols, NUMBERS, max_size=4)
    return draw(st.lists(one, max_size=equations)), count


def wish_lists(count: int) -> st.SearchStrategy[dict[int, Expr]]:
    known = st.dictionaries(st.sampled_from(KNOWN), NUMBERS, max_size=2)
    return st.dictionaries(st.integers(0, count - 1), known)


# Elimination.


def test_a_system_by_hand():
    """x + y = 2 log 2, x − y = log 3."""
    rows = linear.eliminate([{0: 1, 1: 1, "2": -2}, {0: 1, 1: -1, "3": -1}])
    x, y = linear.values(rows, {}, 2)
    assert x == {"2": 1, "3": Fraction(1, 2)}
    assert y == {"2": 1, "3": Fraction(-1, 2)}


def test_results_are_exact():
    """A chain of halves, forty deep: a float would have lost the last bits at the first third."""
    equations: list[Expr] = [{i: 3, i + 1: -1} for i in range(40)] + [{40: 1, "2": -1}]
    found = linear.values(linear.eliminate(equations), {}, 41)
    assert found[0] == {"2": Fraction(1, 3**40)}


def test_whole_numbers_stay_integers():
    rows = linear.eliminate([{0: 2, 1: -4}, {1: Fraction(1, 2), "2": -3}])
    found = linear.values(rows, {}, 2)
    assert found == [{"2": 12}, {"2": 6}]


@settings(max_examples=150)
@given(systems(), st.data())
def test_elimination_solves_exactly_what_has_a_solution(system, data):
    equations, count = system
    wishes = data.draw(wish_lists(count))
    prefer = [data.draw(st.lists(st.integers(0, count - 1), max_size=3)) for _ in range(2)]
    before = [dict(e) for e in equations]
    if not solvable(equations, count):
        with pytest.raises(linear.Clash):
            linear.eliminate(equations, prefer)
        return
    rows = linear.eliminate(equations, prefer)
    found = linear.values(rows, wishes, count)
    assert all(not at(equation, found) for equation in equations)
    assert len(rows) == rank(matrix(equations, count)[0])
    for u in range(count):  # what is not solved for is as wished for
        assert u in rows or found[u] == {s: n for s, n in wishes.get(u, {}).items() if n}
    assert equations == before


@settings(max_examples=100)
@given(systems(), st.data())
def test_preferred_unknowns_give_way_first(system, data):
    """As many of them are solved for as there are independent columns among them."""
    equations, count = system
    if not solvable(equations, count):
        return
    group = data.draw(st.sets(st.integers(0, count - 1)))
    rows = linear.eliminate(equations, [group])
    columns = [[row[u] for u in group] for row in matrix(equations, count)[0]]
    assert len(group & rows.keys()) == (rank(columns) if group else 0)


def test_substitution_follows_rows_of_rows():
    rows: linear.Rows = {0: {1: 2, "2": 1}, 1: {2: -1}}
    assert linear.substitute({0: 1, 1: 1}, rows) == {2: -3, "2": 1}
    assert linear.substitute({0: 1, 1: -2}, rows) == {"2": 1}  # one pivot cancels the other


@settings(max_examples=100)
@given(systems())
def test_assuming_names_what_contradicts(system):
    """One equation after the other; each that fails does so with what went before it."""
    equations, count = system
    rows: linear.Rows = {}
    failing = linear.assume(equations, rows)
    kept = [e for i, e in enumerate(equations) if i not in failing]
    assert solvable(kept, count)
    for place, left in failing.items():
        before = [e for i, e in enumerate(equations[:place]) if i not in failing]
        assert not solvable([*before, equations[place]], count)
        assert left
        assert not affine.unknowns(left)


# Clashes.


def test_a_clash_by_hand():
    """x = log 2, y = z, x = log 3: the second has nothing to do with it."""
    with pytest.raises(linear.Clash) as caught:
        linear.eliminate([{0: 1, "2": -1}, {1: 1, 2: -1}, {0: 1, "3": -1}])
    assert caught.value.members == (0, 2)


@settings(max_examples=150)
@given(systems(unknowns=4, equations=7))
def test_certificates_clash_and_none_of_their_parts_does(system):
    equations, count = system
    if solvable(equations, count):
        return
    with pytest.raises(linear.Clash) as caught:
        linear.eliminate(equations)
    members = [equations[i] for i in caught.value.members]
    assert list(caught.value.members) == sorted(set(caught.value.members))
    assert not solvable(members, count)
    for size in range(len(members)):
        for part in itertools.combinations(members, size):
            assert solvable(part, count)


# Nearest to a wish.


def cost(found: Sequence[Expr], wishes: dict[int, Expr], weights: Sequence[float]) -> float:
    return sum(
        weight * abs(affine.to_float(affine.plus(found[u], wishes.get(u, {}), -1)))
        for u, weight in enumerate(weights)
        if weight
    )


def cheapest(equations: Sequence[Expr], wishes: dict[int, Expr], weights: Sequence[float]) -> float:
    """Least cost over all vertices: all ways to keep some unknowns as wished for, then solve."""
    count = len(weights)
    best = math.inf
    for size in range(count + 1):
        for kept in itertools.combinations(range(count), size):
            pinned = [affine.plus({u: 1}, wishes.get(u, {}), -1) for u in kept]
            both = [*equations, *pinned]
            if solvable(both, count):
                rows = linear.eliminate(both)
                best = min(best, cost(linear.values(rows, wishes, count), wishes, weights))
    return best


@settings(max_examples=60)
@given(systems(unknowns=4, equations=4), st.data())
def test_the_nearest_solution_is_the_cheapest_of_all(system, data):
    equations, count = system
    wishes = data.draw(wish_lists(count))
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, 5.0]), min_size=count))[:count]
    if not solvable(equations, count):
        with pytest.raises(linear.Clash):
            linear.nearest(equations, wishes, weights)
        return
    found = linear.nearest(equations, wishes, weights)
    assert all(not at(equation, found) for equation in equations)
    assert cost(found, wishes, weights) <= cheapest(equations, wishes, weights) + 1e-6


def test_wishes_that_are_a_solution_are_the_answer():
    """Where auxiliary unknowns can make it one: u0 = u1 + a, u2 = u1 − a."""
    equations: list[Expr] = [{0: 1, 1: -1, 3: -1}, {2: 1, 1: -1, 3: 1}]
    wishes: dict[int, Expr] = {0: {"2": 3}, 1: {"2": 1}, 2: {"2": -1}}
    found = linear.nearest(equations, wishes, [1, 1, 1, 0])
    assert found == [{"2": 3}, {"2": 1}, {"2": -1}, {"2": 2}]


def test_the_lighter_one_gives_way():
    """A bias follows its kernel: u0 = u1, wished for at k and at 1."""
    wishes: dict[int, Expr] = {0: {"k": 1}}
    assert linear.nearest([{0: 1, 1: -1}], wishes, [1000, 1]) == [{"k": 1}, {"k": 1}]
    assert linear.nearest([{0: 1, 1: -1}], wishes, [1, 1000]) == [{}, {}]


def test_one_departs_rather_than_three():
    """u0 is tied to three others by products: it gives way, and they stay."""
    equations: list[Expr] = [{0: 1, u: -1, "2": 1} for u in (1, 2, 3)]
    assert linear.nearest(equations, {}, [1, 1, 1, 1]) == [{"2": -1}, {}, {}, {}]


@pytest.mark.parametrize("seed", range(4))
def test_the_fewest_depart_where_each_does_so_by_as_much(seed):
    """Chains of kernels W1 ... Wn, each tied to the next through one activation."""
    rng = random.Random(seed)
    count = 5
    equations: list[Expr] = [{u: 1, u + 1: -1} for u in range(count - 1)]
    kept = rng.randrange(count)
    wishes: dict[int, Expr] = {u: {"2": 1} if u == kept else {} for u in range(count)}
    found = linear.nearest(equations, wishes, [1.0] * count)
    departing = [u for u in range(count) if found[u] != wishes[u]]
    fewest = min(
        size
        for size in range(count + 1)
        for free in itertools.combinations(range(count), size)
        if solvable(
            equations + [affine.plus({u: 1}, wishes[u], -1) for u in range(count) if u not in free],
            count,
        )
    )
    assert departing == [kept]
    assert len(departing) == fewest


# Null spaces.


def dense(vector: dict[int, affine.Number], count: int) -> list[Fraction]:
    return [Fraction(vector.get(u, 0)) for u in range(count)]


@settings(max_examples=100)
@given(systems())
def test_the_null_space_is_a_basis_of_all_that_changes_nothing(system):
    equations, count = system
    left, _ = matrix(equations, count)
    basis = [dense(vector, count) for vector in linear.null_space(equations, count)]
    assert len(basis) == count - rank(left)
    assert rank(basis) == len(basis)
    for row, vector in itertools.product(left, basis):
        assert sum(a * b for a, b in zip(row, vector, strict=True)) == 0


@settings(max_examples=100)
@given(systems(unknowns=6, equations=3))
def test_sparser_vectors_span_the_same_and_no_pair_is_shorter_combined(system):
    equations, count = system
    basis = linear.null_space(equations, count)
    found = linear.sparser(basis)
    before, after = ([dense(v, count) for v in vectors] for vectors in (basis, found))
    assert rank(before) == rank(after) == rank(before + after) == len(after)
    assert all(len(v) <= len(old) for v, old in zip(found, basis, strict=True))
    assert all(0 not in v.values() for v in found)
    for a, b in itertools.permutations(after, 2):
        ratios = {-x / y for x, y in zip(a, b, strict=True) if x and y}
        for ratio in ratios:
            combined = [x + ratio * y for x, y in zip(a, b, strict=True)]
            assert sum(map(bool, combined)) >= sum(map(bool, a))


def test_symmetries_of_a_chain_are_local():
    """W1, b1, W2, b2, W3: a basis that goes through all layers becomes one a layer."""
    first, second = {0: 1, 1: 1, 2: -1}, {2: 1, 3: 1, 4: -1}
    through = {0: 1, 1: 1, 3: 1, 4: -1}
    assert linear.sparser([first, through]) == [first, second]
