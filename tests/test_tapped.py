"""Programs with taps: the same outputs, and what is taken is what the flat program says."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import resizing
from tests.zoo import ZOO, prepared
from uscale_jax import _jax
from uscale_jax.trace import tapped
from uscale_jax.trace.inline import program
from uscale_jax.trace.readings import PRODUCTS

LOOPS = ("scan", "while", "cond")
RUN = (
    "cnn flat",
    "cond",
    "conv lstm",
    "custom derivatives",
    "fori loop",
    "llama",
    "mamba",
    "nnx scan",
    "scan remat attention",
    "top-k mixture",
    "while loop",
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def products(closed) -> dict[int, list[tuple[int, ...]]]:
    """Operand shapes of every product of the flat program, by visit."""
    return {
        eqn.visit: [tuple(int(n) for (n,) in value.shape) for value in eqn.inputs]
        for eqn in program([closed]).equations
        if eqn.name in PRODUCTS
    }


def recording(seen: dict, visit: int) -> Callable:
    def tap(operands):
        seen.setdefault(visit, []).append([x.shape for x in operands])
        return jnp.float32(0)

    return tap


def shapes_of(built) -> tuple:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (built.params, *built.inputs)
    )


@pytest.mark.parametrize("name", ZOO)
def test_every_product_of_the_zoo_is_met_at_its_visit(name):
    """By operand shapes; sizes of the zoo all differ, so another equation has others."""
    built = ZOO[name].build(ZOO[name].sizes)
    args = shapes_of(built)
    closed, outputs = _jax.closed_jaxpr(built.apply, *args)
    wanted, seen = products(closed), {}
    taps = {visit: recording(seen, visit) for visit in wanted}
    outs, taken = jax.eval_shape(
        lambda *flat: tapped.run(closed, taps, flat), *jax.tree.leaves(args)
    )
    assert wanted
    assert set(taken) == set(wanted)
    # A loop's program is traced several times: for its shapes, and for itself.
    assert {visit: shapes[0] for visit, shapes in seen.items()} == wanted
    assert all(each == shapes[0] for shapes in seen.values() for each in shapes)
    same = lambda x: (x.shape, x.dtype)  # noqa: E731
    assert [*map(same, outs)] == [*map(same, jax.tree.leaves(outputs))]


@pytest.mark.parametrize("name", RUN)
def test_outputs_are_those_of_the_program(name):
    model = prepared(name)
    with jax.enable_x64(True):
        closed, _ = _jax.closed_jaxpr(model.model.apply, model.params, *model.inputs)
        taps = {visit: lambda xs: jnp.sum(xs[0]) for visit in products(closed)}
        args = jax.tree.leaves((model.params, model.inputs))
        outs, taken = jax.jit(lambda args: tapped.run(closed, taps, args))(args)
    assert resizing.difference(model.outputs, [np.asarray(x) for x in outs]) <= 1e-14
    assert all(np.isfinite(x) for x in taken.values())


class Tapped:
    """A function run with a tap at every product of it, in float64: the left operands' squares."""

    def __init__(self, fun: Callable, *args, stacked: Callable = lambda visits, closed: ()) -> None:
        with jax.enable_x64(True):
            closed = jax.make_jaxpr(fun)(*args)
            self.visits = sorted(products(closed))
            taps = {visit: lambda xs: jnp.sum(xs[0] ** 2, 0) for visit in self.visits}
            run = lambda args: tapped.run(closed, taps, args, stacked(self.visits, closed))  # noqa: E731
            outs, taken = jax.jit(run)(jax.tree.leaves(args))
            self.outputs, self.taken = jax.device_get((outs, taken))
            self.plain = jax.device_get(jax.tree.leaves(fun(*args)))

    def check(self, *wanted) -> None:
        """What was taken, in the order of the program, None where nothing was."""
        for visit, each in zip(self.visits, wanted, strict=True):
            if each is None:
                assert visit not in self.taken
            else:
                np.testing.assert_allclose(self.taken[visit], each, rtol=1e-12)
        for a, b in zip(self.outputs, self.plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def step(kernel, h, x):
    return np.tanh(h @ kernel + x)


def test_turns_of_a_scan_are_added_up():
    kernel, xs = normal(0, 4, 4), normal(1, 6, 3, 4)

    def fun(kernel, xs):
        def body(h, x):
            h = jnp.tanh(h @ kernel + x)
            return h, 2 * h

        return jax.lax.scan(body, jnp.ones((3, 4)), xs)

    h, total = np.ones((3, 4)), 0.0
    for x in xs:
        total, h = total + np.sum(h**2, 0), step(kernel, h, x)
    Tapped(fun, kernel, xs).check(total)


def test_a_scan_backwards():
    kernel, xs = normal(0, 4, 4), normal(1, 6, 3, 4)

    def fun(kernel, xs):
        body = lambda h, x: (jnp.tanh(h @ kernel + x), x @ kernel)  # noqa: E731
        return jax.lax.scan(body, jnp.ones((3, 4)), xs, reverse=True)

    h, total = np.ones((3, 4)), 0.0
    for x in xs[::-1]:
        total, h = total + np.sum(h**2, 0), step(kernel, h, x)
    Tapped(fun, kernel, xs).check(total, np.sum(xs**2, (0, 1)))


def layers_of_time(kernels, xs):
    """An outer scan through layers, an inner one through time."""

    def layer(xs, kernel):
        body = lambda h, x: (jnp.tanh(h @ kernel + x),) * 2  # noqa: E731
        return jax.lax.scan(body, jnp.ones(xs.shape[1:]), xs)[1], None

    return jax.lax.scan(layer, xs, kernels)[0]


def test_scans_through_layers_are_stacked_and_those_through_time_are_not():
    kernels, xs = normal(0, 5, 4, 4), normal(1, 6, 3, 4)
    each, seen = [], xs
    for kernel in kernels:
        h, total, states = np.ones((3, 4)), 0.0, []
        for x in seen:
            total, h = total + np.sum(h**2, 0), step(kernel, h, x)
            states.append(h)
        each.append(total)
        seen = np.stack(states)

    def outer(visits, closed):
        (at,) = [i for i, eqn in enumerate(closed.jaxpr.eqns) if eqn.primitive.name == "scan"]
        return [(visits[0], at)]

    Tapped(layers_of_time, kernels, xs, stacked=outer).check(np.stack(each))
    Tapped(layers_of_time, kernels, xs).check(np.sum(each, 0))


def test_iterations_of_a_while_loop_are_added_up():
    kernel, x = 0.3 * normal(0, 4, 4), normal(1, 3, 4)

    def fun(kernel, x):
        body = lambda state: (state[0] + 1, jnp.tanh(state[1] @ kernel + x))  # noqa: E731
        going = lambda state: jnp.sum(state[1] @ kernel) + state[0] < 4  # noqa: E731
        return jax.lax.while_loop(going, body, (jnp.asarray(0), x))

    h, total, turns = x, 0.0, 0
    while np.sum(h @ kernel) + turns < 4:
        total, h, turns = total + np.sum(h**2, 0), step(kernel, h, x), turns + 1
    assert turns > 1
    Tapped(fun, kernel, x).check(None, total)  # nothing of the condition's product


def test_nothing_is_taken_of_what_the_condition_of_a_loop_multiplies():
    """It is run once more than the loop, and decides no more than when to stop."""
    kernel, x = np.abs(normal(0, 4, 4)), normal(1, 3, 4)

    def fun(kernel, x):
        going = lambda state: jnp.sum(state @ kernel) < 30  # noqa: E731
        return jax.lax.while_loop(going, lambda state: state + 1.0, x)

    Tapped(fun, kernel, x).check(None)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_the_branch_that_is_taken_gives_anything(index):
    kernels, x = [normal(i, 4, 5) for i in range(3)], normal(9, 3, 4)

    def fun(index, kernels, x):
        cases = [
            lambda x: jnp.tanh(x @ kernels[0]),
            lambda x: (2 * x) @ kernels[1],
            lambda x: jnp.tanh((x - 1) @ kernels[2]) * 3,
        ]
        return jax.lax.switch(index, cases, x)

    wanted = [np.zeros(4)] * 3
    wanted[index] = np.sum((x, 2 * x, x - 1)[index] ** 2, 0)
    Tapped(fun, jnp.asarray(index), kernels, x).check(*wanted)


def test_calls_of_calls():
    kernels, x = [normal(0, 4, 5), normal(1, 5, 6), normal(2, 6, 7)], normal(9, 3, 4)

    @jax.custom_vjp
    def outer(x, kernel):
        return jax.jit(lambda x: jnp.tanh(x) @ kernel)(x)

    outer.defvjp(lambda *args: (outer(*args), args), lambda res, g: (g @ res[1].T, res[0].T @ g))

    @jax.custom_jvp
    def last(x, kernel):
        return x @ kernel

    last.defjvp(lambda primals, tangents: (last(*primals), tangents[0] @ primals[1]))

    def fun(kernels, x):
        x = jax.checkpoint(lambda x: x @ kernels[0])(x)
        return last(outer(x, kernels[1]), kernels[2])

    first = x @ kernels[0]
    second = np.tanh(first) @ kernels[1]
    seen = [x, np.tanh(first), second]
    Tapped(fun, kernels, x).check(*(np.sum(each**2, 0) for each in seen))


def test_a_function_called_twice_has_visits_of_its_own():
    kernel, x = normal(0, 4, 4), normal(9, 3, 4)
    again = jax.jit(lambda x, kernel: jnp.tanh(x @ kernel))

    def fun(kernel, x):
        return again(again(x, kernel), kernel)

    seen = [x, np.tanh(x @ kernel)]
    Tapped(fun, kernel, x).check(*(np.sum(each**2, 0) for each in seen))


def test_what_is_run_as_it_is_takes_nothing():
    """Products within ``shard_map`` and solvers; those behind them are met all the same."""
    kernel, x = normal(0, 5, 6), normal(9, 8, 5)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")
    sharded = partial(jax.shard_map, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()))

    def fun(kernel, x):
        y = sharded(lambda x, kernel: jnp.tanh(x @ kernel), out_specs=spec)(x, kernel)
        return y @ kernel.T

    Tapped(fun, kernel, x).check(None, np.sum(np.tanh(x @ kernel) ** 2, 0))


def test_taps_do_not_stand_in_the_way_of_gradients_of_what_surrounds_them():
    kernel, x = normal(0, 4, 5), normal(9, 3, 4)
    with jax.enable_x64(True):
        closed = jax.make_jaxpr(lambda kernel, x: jnp.tanh(x @ kernel))(kernel, x)
        taps = {visit: lambda xs: jnp.sum(xs[0]) for visit in products(closed)}
        cost = lambda kernel: jnp.sum(tapped.run(closed, taps, [kernel, x])[0][0] ** 2)  # noqa: E731
        found = jax.grad(cost)(kernel)
        wanted = jax.grad(lambda kernel: jnp.sum(jnp.tanh(x @ kernel) ** 2))(kernel)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
