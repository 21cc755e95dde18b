"""Every rule is run: axes by hand, then by moving units about; exponents by scaling inputs."""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

import uscale_jax as us
from tests.rule_examples import EXAMPLES, NOT_BOUND, Example
from uscale_jax import _jax
from uscale_jax.trace import atoms, primitives
from uscale_jax.trace.atoms import Atom, Dim
from uscale_jax.trace.axes import Structure, analyse
from uscale_jax.trace.description import Labelled
from uscale_jax.trace.inline import program
from uscale_jax.trace.primitives import RULES
from uscale_jax.trace.program import Program

OURS = {"loop_enter", "loop_close", "loop_slice", "loop_stack", "shard", "unshard"}


@cache
def own_primitives() -> set[str]:
    """Names of the primitives that the installed JAX defines."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("jax.") and m]
    found = [v for m in modules for v in vars(m).values()]
    return {v.name for v in found if type(v).__name__.endswith("Primitive")}


# Every rule, run.


def test_every_rule_has_an_example():
    """But for primitives that only other releases of JAX have, and those that cannot be bound."""
    here = {name for name in RULES if name in own_primitives() | OURS}
    run = {name.split()[0] for name in EXAMPLES}
    assert here - run == NOT_BOUND.keys() & here
    assert run <= RULES.keys()


class Run(NamedTuple):
    """An example in double precision, with the dimensions of its arguments and results."""

    found: Program
    structure: Structure
    inputs: list[list[Dim]]
    outputs: list[list[Dim]]


def run(fun: Callable[..., Any], args: tuple[Any, ...]) -> Run:
    found = program([_jax.closed_jaxpr(fun, *args)[0]])
    structure = analyse(replace(found, outputs=()), [], [])  # outputs hold their axes otherwise
    dims = [[structure.of(v) for v in values] for values in (found.inputs, found.outputs)]
    return Run(found, structure, *dims)


def example(name: str) -> Example:
    axes, fun, args = EXAMPLES[name]
    if name.split()[0] not in own_primitives() | OURS:
        pytest.skip("a primitive of other releases of JAX")
    return Example(axes, jax.jit(fun), args)


def letters(atom: Atom, names: dict[int, str]) -> str:
    if atom.parts is not None:
        return "(" + "|".join(product(part, names) for part in atom.parts) + ")"
    letter = names.setdefault(id(atom), chr(ord("a") + len(names)))
    return letter.upper() if atom.fixed else letter


def product(dim: Dim, names: dict[int, str]) -> str:
    return "·".join(letters(atom, names) for atom in atoms.resolve(dim)) or "1"


def text(sides: list[list[list[Dim]]]) -> str:
    names: dict[int, str] = {}
    values = lambda side: (" ".join(product(d, names) for d in dims) for dims in side)  # noqa: E731
    return " -> ".join([", ".join(values(side)) for side in sides])


@pytest.fixture
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", EXAMPLES)
def test_axes_are_those_by_hand_and_units_can_be_moved(name):
    """Units of free axes in any order, and copies of some in place of others, give the same."""
    axes, fun, args = example(name)
    what = run(fun, args)
    assert name.split()[0] in [eqn.name for eqn in what.found.equations]
    assert text([what.inputs, what.outputs]) == axes
    expected = jax.tree.leaves(fun(*args))
    rng = np.random.default_rng(1)
    for _ in range(2):
        maps = moves(what, rng)
        moved = [at_places(a, dims, maps) for a, dims in zip(args, what.inputs, strict=True)]
        for out, was, dims in zip(
            jax.tree.leaves(fun(*moved)), expected, what.outputs, strict=True
        ):
            np.testing.assert_allclose(
                np.asarray(out), at_places(np.asarray(was), dims, maps), rtol=1e-12, atol=1e-12
            )


def moves(what: Run, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Where the units of every free axis come from: copied at random, permuted if summed over."""
    dims = [dim for side in (what.inputs, what.outputs) for value in side for dim in value]
    free = {id(a): a for dim in dims for a in atoms.leaves(dim) if not a.fixed}
    reduced = set().union(*map(gone, what.structure.descriptions))
    return {
        key: rng.permutation(a.size[0]) if key in reduced else rng.integers(0, a.size[0], a.size[0])
        for key, a in free.items()
    }


def gone(what: Any) -> set[int]:
    """Axes of which an operand has an occurrence that results have not."""
    if not isinstance(what, Labelled):
        return set()
    here, there = (
        {id(a): a for dims in side for dim in dims for a in dim}
        for side in (what.operands, what.results)
    )
    return {id(leaf) for key in here.keys() - there for leaf in atoms.leaves((here[key],))}


def places(dim: Dim, maps: dict[int, np.ndarray]) -> np.ndarray:
    """Where every place along a dimension comes from."""
    found = np.zeros(1, int)
    for atom in atoms.resolve(dim):
        size = atom.size[0]
        if atom.parts is None:
            inner = maps.get(id(atom), np.arange(size))
        else:
            pieces = [places(part, maps) for part in atom.parts]
            starts = itertools.accumulate(map(len, pieces), initial=0)
            inner = np.concatenate([s + p for s, p in zip(starts, pieces, strict=False)])
        found = (found[:, None] * size + inner).reshape(-1)
    return found


def at_places(array: Any, dims: list[Dim], maps: dict[int, np.ndarray]) -> Any:
    return np.asarray(array)[np.ix_(*(places(dim, maps) for dim in dims))] if dims else array


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", EXAMPLES)
def test_exponents_are_those_of_scaled_inputs(name):
    """Whatever powers of k the tracer gives inputs, the outputs take the powers it gives them."""
    _, fun, args = example(name)
    traced = us.trace_exponents(lambda params: fun(*params), args)
    expected = fun(*args)
    zeros = jax.tree.map(lambda _: 0.0, traced.output)
    cases = [(traced.params, traced.output), *((s.params, zeros) for s in traced.symmetries)]
    cases += [] if traced.uniform is None else [tuple(traced.uniform)]
    for powers, outputs in cases:
        found = fun(*jax.tree.map(scaled, args, powers))
        for out, was, power in zip(*map(jax.tree.leaves, (found, expected, outputs)), strict=True):
            np.testing.assert_allclose(
                np.asarray(out), scaled(np.asarray(was), power), rtol=1e-12, atol=1e-12
            )


def scaled(array: Any, power: Any) -> Any:
    return array * 1.37 ** np.asarray(power) if jnp.issubdtype(array.dtype, jnp.inexact) else array


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("names", "power"),
    [
        ("mul dot_general ragged_dot_general conv_general_dilated square", 2),
        ("add max rem clamp gather concatenate cumsum fft reduce_sum reduce_window_max pad", 1),
        ("div sign lt atan2 argmax", 0),
        ("sqrt", 0.5),
        ("rsqrt", -0.5),
        ("cbrt", 1 / 3),
        ("integer_pow", -3),
        ("pow", -1.5),
        ("exp tanh round nextafter cumprod reduce_prod igamma bitcast_convert_type", None),
    ],
)
def test_powers_by_hand(names, power):
    """Of the output when every input takes k; None where it takes no power of k."""
    for name in names.split():
        _, fun, args = example(name)
        uniform = us.trace_exponents(lambda params: fun(*params), args).uniform  # noqa: B023
        found = None if uniform is None else jax.tree.leaves(uniform.output)[0]
        assert found is None if power is None else found == pytest.approx(power, abs=1e-12), name


# What has no rule.


def test_a_second_rule_is_refused():
    with pytest.raises(ValueError, match="primitive 'add' has a rule already"):
        primitives.define("brand_new add", primitives.opaque)
    del RULES["brand_new"]


def foreign(name: str) -> Callable[[Any], Any]:
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda a: a)
    return primitive.bind


@pytest.mark.parametrize("name", ["our_kernel", "add", "tanh"])
def test_primitives_of_others_hold_their_axes_and_say_so(name):
    kernel = foreign(name)

    def apply(params):
        return kernel(params["w"]).sum()

    (row, column) = us.trace_axes(apply, {"w": np.ones((3, 4), np.float32)}).axes
    here = f"test_rules.py:{apply.__code__.co_firstlineno + 1}"
    for axis in (row, column):
        assert not axis.free
        assert axis.why.startswith(
            f"`{name} (not JAX's own)`, for which there is no rule, is applied"
        )
        assert axis.why.endswith(here)


def test_primitives_of_others_take_no_factors():
    kernel = foreign("neg")
    traced = us.trace_exponents(lambda p: kernel(p["w"]) * 2, {"w": np.ones(3, np.float32)})
    assert traced.uniform is None
    assert traced.params == {"w": 0}
    assert "`neg (not JAX's own)` needs an operand without a factor" in traced.obstacles[0].reason
