"""Axes as sums of products: against hand-computed structures, and against known ground truths."""

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uscale_jax.trace import atoms
from uscale_jax.trace.atoms import Atom, Dim, Reason, Size, find, fix, mark_read, sum_of, unify

WHY = Reason("is held here", None)


def new(*sizes: int | Size) -> Dim:
    """A product of unbound atoms: one program (ints) or two (pairs)."""
    return tuple(Atom((n,) if isinstance(n, int) else n) for n in sizes)


def laid(*parts: Dim) -> Dim:
    """Dimensions one after the other."""
    sizes = [atoms.dim_size(part, len(programs(parts))) for part in parts]
    return sum_of(parts, tuple(map(sum, zip(*sizes, strict=True))))


def programs(parts: tuple[Dim, ...]) -> Size:
    return next(atom.size for part in parts for atom in part)


def text(*dims: Dim) -> str:
    """Structures in letters by first occurrence, sums nested as they are."""
    letters = map("abcdefghijklmnopqrstuvwxyz".__getitem__, range(26))
    names: dict[int, str] = {}

    def one(dim: Dim) -> str:
        return "·".join(map(factor, atoms.resolve(dim))) or "1"

    def factor(atom: Atom) -> str:
        if atom.parts is not None:
            return "(" + "|".join(map(one, atom.parts)) + ")"
        if id(atom) not in names:
            names[id(atom)] = next(letters)
        return names[id(atom)]

    return ", ".join(map(one, dims))


def sizes(dim: Dim) -> list[Size]:
    return [atom.size for atom in atoms.leaves(dim)]


# Products.


def test_equal_sizes_become_one_atom():
    a, b, c = new(7), new(7), new(7)
    unify(a, b, None)
    unify(b, c, None)
    assert text(a, b, c) == "a, a, a"
    assert find(a[0]) is find(c[0])


def test_the_empty_product_has_size_one():
    assert atoms.fresh((1, 1)) == ()
    assert len(atoms.fresh((1, 2))) == 1
    assert atoms.dim_size((), 2) == (1, 1)
    unify((), (), None)


def test_a_dimension_splits_where_the_other_side_does():
    whole, pieces = new(24), new(2, 3, 4)
    unify(whole, pieces, None)
    assert text(whole, pieces) == "a·b·c, a·b·c"


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_splits_at_different_places_refine_each_other(order):
    whole, left, right = new(30), new(2, 15), new(6, 5)
    steps = [(whole, left), (whole, right), (left, right)]
    for i in order:
        unify(*steps[i], None)
    assert text(whole, left, right) == "a·b·c, a·b·c, a·b·c"
    assert sizes(whole) == [(2,), (3,), (5,)]


def test_a_later_split_reaches_every_place_of_the_axis():
    a, b, c = new(12), new(12), new(12)
    unify(a, b, None)
    unify(c, b, None)
    unify(c, new(3, 4), None)
    assert text(a, b, c) == "a·b, a·b, a·b"


def test_an_atom_may_occur_twice_in_a_product():
    (h,) = new(4)
    square, halves = new(16), new(2, 2)
    unify(square, (h, h), None)
    unify((h,), halves, None)
    assert text(square, halves) == "a·b·a·b, a·b"


# Two programs.


def test_what_grows_is_not_what_stays():
    """Both are 12 in the small program."""
    whole, pieces = new((144, 288)), new((12, 24), (12, 12))
    unify(whole, pieces, None)
    assert text(whole) == "a·b"
    assert sizes(whole) == [(12, 24), (12, 12)]
    others = new((12, 24), (12, 12))
    unify(others, whole, None)
    assert text(pieces, others) == "a·b, a·b"


def test_size_one_in_the_small_program_only_is_an_axis():
    whole, pieces = new((6, 12)), new((1, 2), (6, 6))
    unify(whole, pieces, None)
    assert sizes(whole) == [(1, 2), (6, 6)]
    assert not any(atom.fixed for atom in atoms.leaves(whole))


def test_a_size_one_axis_does_not_match_its_neighbours():
    """(1→2)·6 against 6·(1→2): 1·6·1 in the small program, 2·3·2 in the big one."""
    left, right = new((1, 2), (6, 6)), new((6, 6), (1, 2))
    unify(left, right, None)
    assert text(left, right) == "a·b·c, a·b·c"
    assert sizes(left) == [(1, 2), (6, 3), (1, 2)]


def test_sizes_that_fit_in_one_program_only_clash():
    left, right = new((12, 12), (2, 4)), new((8, 8), (3, 6))
    unify(left, right, None)
    assert all(atom.fixed and atom.opaque for atom in atoms.leaves(left + right))


# Sums.


def test_a_sum_of_one_part_is_that_part():
    part = new(3, 4)
    assert sum_of([part], (12,)) == part


def test_equal_sums_match_part_by_part():
    left, right = laid(new(3), new(4)), laid(new(3), new(4))
    unify(left, right, None)
    assert text(left, right) == "(a|b), (a|b)"


def test_sums_cut_at_different_places_cut_each_other():
    left, right = laid(new(3), new(7), new(2)), laid(new(5), new(5), new(2))
    unify(left, right, None)
    assert text(left, right) == "(a|(b|c)|d), (a|(b|c)|d)"
    assert [n for (n,) in sizes(left)] == [3, 2, 5, 2]


def test_nested_sums_are_laid_flat():
    left, right = laid(laid(new(2), new(3)), new(4)), laid(new(2), laid(new(3), new(4)))
    unify(left, right, None)
    assert [n for (n,) in sizes(left)] == [2, 3, 4]
    assert atoms.leaves(left) == atoms.leaves(right)


def test_fused_leading_sum_distributes():
    """(q|k|v)·heads·size, as jnp.split(x @ qkv, 3) and three reshapes give it."""
    fused = new(36)
    q, k, v = new(12), new(12), new(12)
    unify(fused, laid(q, k, v), None)
    head = new(3, 4)
    for part in (q, k, v):
        unify(part, head, None)
    assert text(fused, head) == "(a·b|a·b|a·b), a·b"


def test_fused_leading_sum_from_a_reshape_first():
    """The same axis reshaped to (3 heads) · size before the parts are known."""
    fused, (n, size) = new(36), new(9, 4)
    unify(fused, (n, size), None)
    q, k, v = new(12), new(12), new(12)
    unify(fused, laid(q, k, v), None)
    assert text(q, k, v, (n,), fused) == "a·b, c·b, d·b, (a|c|d), (a|c|d)·b"


def test_fused_inner_sum_stays_within_heads():
    """heads·(q|k|v)·size: the axis is reshaped to heads first and then split."""
    fused, heads = new(36), new(3)
    each, q, k, v = new(12), new(4), new(4), new(4)
    unify(fused, heads + each, None)
    unify(each, laid(q, k, v), None)
    unify(q, k, None)
    assert text(fused, heads, q, v) == "a·(b|b|c), a, b, c"


def test_a_tail_that_does_not_divide_the_parts_clashes():
    fused = laid(new(5), new(7))
    pieces = new(3, 4)
    unify(fused, pieces, None)
    assert all(atom.fixed and atom.opaque for atom in atoms.leaves(fused + pieces))


def test_cuts_that_cross_between_programs_clash():
    left, right = laid(new((2, 6)), new((4, 4))), laid(new((4, 4)), new((2, 6)))
    unify(left, right, None)
    assert all(atom.fixed and atom.opaque for atom in atoms.leaves(left + right))


def test_cells_of_a_dimension():
    (h, s), part = new(2, 3), new(5)
    dim = (h, *laid(part, (s,), part))
    assert atoms.alternatives(dim) == 3
    assert atoms.monomials(dim) == [(h, *part), (h, s), (h, *part)]
    assert atoms.monomials(()) == [()]


# Clashes, flags.


def test_a_clash_fixes_both_sides_and_says_so():
    left, right = new(4, 6), new(3, 8)
    unify(left, right, None)
    for atom in (*left, *right):
        assert atom.opaque
        assert "cuts across its structure" in str(atom.fixed)


def test_a_clash_leaves_what_fitted_before_it():
    left, right = new(5, 4, 9), new(5, 6, 6)
    unify(left, right, None)
    assert find(left[0]) is find(right[0])
    assert not find(left[0]).fixed
    assert all(find(atom).fixed for atom in (*left[1:], *right[1:]))


def test_opacity_reaches_what_is_bound_later():
    left, right = new(4, 6), new(3, 8)
    unify(left, right, None)
    parts = new(2, 3)
    unify((left[1],), parts, None)
    assert all(atom.opaque for atom in atoms.leaves(parts))


def test_the_first_reason_stays():
    dim = new(5)
    fix(dim, WHY)
    fix(dim, Reason("another", None))
    assert find(dim[0]).fixed is WHY


# Ground truths: random structures, of which only views are told, in random order.


@dataclass
class Truth:
    """A leaf (no parts) or a sum of products."""

    size: Size
    parts: list["list[Truth]"] = field(default_factory=list)


def product_size(factors: list[Truth]) -> Size:
    return atoms.times((f.size for f in factors), 2)


class Problem:
    """True dimensions over a pool of true atoms, and what a program tells of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        small = [self.rng.randint(1, 4) for _ in range(5)]
        self.pool = [Truth((n, n * self.rng.choice([1, 2, 3]) + (n == 1))) for n in small]
        self.atoms = {id(t): Atom(t.size) for t in self.pool}
        self.constraints: list[tuple[Dim, Dim]] = []
        self.views: list[tuple[list[Truth], Dim]] = []
        for _ in range(self.rng.randint(1, 3)):
            self.add(self.product(2))

    def product(self, depth: int) -> list[Truth]:
        return [self.factor(depth) for _ in range(self.rng.randint(1, 3))]

    def factor(self, depth: int) -> Truth:
        if not depth or self.rng.random() < 0.5:
            return self.rng.choice(self.pool)
        parts = [self.product(depth - 1) for _ in range(self.rng.randint(2, 3))]
        total = tuple(map(sum, zip(*map(product_size, parts), strict=True)))
        return Truth(total, parts)

    def add(self, dim: list[Truth]) -> None:
        views = [self.view(dim, 0.0), *(self.view(dim, 0.6) for _ in range(3))]
        self.views += [(dim, view) for view in views]
        self.constraints += [(views[i], views[self.rng.randrange(i)]) for i in range(1, 4)]

    def view(self, dim: list[Truth], blur: float) -> Dim:
        """A dimension as a program may see it; with ``blur`` 0 all of its structure."""
        found: list[Atom] = []
        rest = list(dim)
        while rest:
            n = self.rng.randint(1, len(rest)) if self.rng.random() < blur else 1
            found += self.run(rest[:n], blur)
            del rest[:n]
        return tuple(found)

    def run(self, run: list[Truth], blur: float) -> Dim:
        head, *tail = run
        hidden = self.rng.random() < blur
        if head.parts and not hidden:
            groups = [part + tail for part in head.parts]  # a leading sum distributes
            return sum_of([self.view(part, blur) for part in groups], product_size(run))
        if tail or hidden:
            return atoms.fresh(product_size(run))
        occurrence = Atom(head.size)
        self.constraints.append(((occurrence,), (self.atoms[id(head)],)))
        return (occurrence,)

    def apply(self, order: random.Random) -> None:
        steps = list(self.constraints)
        order.shuffle(steps)
        for left, right in steps:
            unify(*order.sample([left, right], 2), None)

    def expected(self, dim: list[Truth]) -> object:
        if not dim:
            return ()
        head, *tail = dim
        if head.parts:
            return flat([self.expected(part + tail) for part in head.parts])
        return (find(self.atoms[id(head)]), self.expected(tail))


def flat(cells: list) -> list:
    """Sums within sums laid flat."""
    return [c for cell in cells for c in (cell if isinstance(cell, list) else [cell])]


def normal(dim: Dim) -> object:
    """Leading sums distributed: two structures are the same layout iff these are equal."""
    resolved = atoms.resolve(dim)
    if not resolved:
        return ()
    head, *tail = resolved
    if head.parts is not None:
        return flat([normal((*part, *tail)) for part in head.parts])
    return (head, normal(tuple(tail)))


@settings(max_examples=300)
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_views_of_a_ground_truth_give_it_back_in_any_order(seed, order):
    problem = Problem(seed)
    problem.apply(random.Random(order))
    roots = [find(atom) for atom in problem.atoms.values()]
    assert len(set(map(id, roots))) == len(roots), "atoms that differ were merged"
    for dim, view in problem.views:
        assert normal(view) == problem.expected(dim)
        assert not any(atom.fixed or atom.opaque for atom in atoms.leaves(view))


@settings(max_examples=200)
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_flags_survive_binding_in_any_order(seed, order):
    """Marks set before, among and after the unifications reach exactly the true atoms."""
    problem, shuffled = Problem(seed), random.Random(order)
    held, read = shuffled.sample(problem.views, 1)[0], shuffled.sample(problem.views, 1)[0]
    before = shuffled.random() < 0.7
    if before:
        fix(held[1], WHY), mark_read(read[1])
    problem.apply(shuffled)
    if not before:
        fix(held[1], WHY), mark_read(read[1])
    in_held, in_read = (set(map(id, true_leaves(dim))) for dim, _ in (held, read))
    for key, atom in problem.atoms.items():
        assert (find(atom).fixed is WHY) == (key in in_held)
        assert find(atom).read == (key in in_read)


def true_leaves(dim: list[Truth]) -> list[Truth]:
    inner = [leaf for t in dim for part in t.parts for leaf in true_leaves(part)]
    return [t for t in dim if not t.parts] + inner


@settings(max_examples=200)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=3), st.integers(0, 10**9))
def test_whatever_is_said_sizes_are_kept(factors, seed):
    """Regroupings that contradict each other too: no atom's structure may change its size."""
    rng = random.Random(seed)
    total = atoms.times(((n,) for n in factors), 1)
    dims = [new(*total)]
    for _ in range(4):
        cut = rng.randrange(1, total[0])
        laid_out = laid(new(cut), new(total[0] - cut))
        dims += [new(*rng.sample(factors, len(factors))), laid_out]
    for _ in range(8):
        unify(rng.choice(dims), rng.choice(dims), None)
        for dim in dims:
            assert inner_size(dim) == total
            assert atoms.dim_size(atoms.resolve(dim), 1) == total


def inner_size(dim: Dim) -> Size:
    """The size of a dimension by its leaves alone."""
    found = 1
    for atom in atoms.resolve(dim):
        parts = atom.parts
        found *= atom.size[0] if parts is None else sum(inner_size(part)[0] for part in parts)
    return (found,)
