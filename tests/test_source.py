"""Source lines: the user's own, whatever JAX and Flax put in between."""

import os
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import uscale_jax as us
from uscale_jax import _jax
from uscale_jax.trace.inline import program
from uscale_jax.trace.source import Source

# Called once already, at shapes of the tests below: JAX keeps their programs with these lines.
jax.eval_shape(lambda x: jax.nn.silu(x), jnp.ones(3))
jax.eval_shape(lambda x: jnp.var(x) + jnp.take(x, jnp.int32(1)), jnp.ones(3))

ROWS = Path(__file__).read_text().splitlines()


def line(mark: str) -> str:
    """Where in this file a line with a mark at its end is, as tests are run from the root."""
    (number,) = [i for i, row in enumerate(ROWS, 1) if row.endswith(f"# line: {mark}")]
    relative = os.path.relpath(__file__)
    return f"{__file__ if relative.startswith('..') else relative}:{number}"


def where(fun, *args, of: str) -> str:
    """The source line of the first equation of a kind."""
    found = program([_jax.closed_jaxpr(fun, *args)[0]]).equations
    return next(str(eqn.source) for eqn in found if eqn.name == of)


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# Plain functions.


def test_a_plain_line():
    def fun(x):
        y = x * 2
        return jnp.tanh(y)  # line: plain

    assert where(fun, f32(3), of="tanh") == line("plain")


def test_the_innermost_function_of_the_user():
    def inner(x):
        return jnp.tanh(x)  # line: inner

    assert where(lambda x: inner(x) + 1, f32(3), of="tanh") == line("inner")


def test_each_call_of_a_cached_helper_of_jax_has_a_line_of_its_own():
    """The program of jax.nn.silu is cached with the line where it was first traced."""

    def first(x):
        return jax.nn.silu(x)  # line: first call

    def second(x):
        return jax.nn.silu(x)  # line: second call

    assert where(first, jnp.ones(3), of="logistic") == line("first call")
    assert where(second, jnp.ones(3), of="logistic") == line("second call")


def test_helpers_of_helpers_too():
    """jnp.var calls jitted helpers itself, jnp.take folds indices in some."""

    def variance(x):
        return jnp.var(x)  # line: variance

    def taken(x, i):
        return jnp.take(x, i)  # line: taken

    assert where(variance, jnp.ones(3), of="square") == line("variance")
    assert where(taken, jnp.ones(3), jnp.int32(1), of="gather") == line("taken")


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap])
def test_wrapped_functions_of_the_user_are_looked_into(wrap):
    @wrap
    def helper(x):
        x = x * 2
        return jnp.tanh(x)  # line: wrapped

    def fun(x):
        return helper(x) + 1

    for _ in range(2):  # the second time from JAX's cache
        assert where(fun, jnp.ones((3, 2)), of="tanh") == line("wrapped")


def test_jitted_functions_called_twice_are_looked_into():
    @jax.jit
    def helper(x):
        return jnp.tanh(x)  # line: jitted helper

    found = program([_jax.closed_jaxpr(lambda x: helper(x) + helper(2 * x), f32(3))[0]])
    tanhs = [str(e.source) for e in found.equations if e.name == "tanh"]
    assert tanhs == [line("jitted helper")] * 2


def test_a_helper_of_jax_in_a_jitted_function_of_the_user():
    @jax.jit
    def helper(x):
        return jax.nn.silu(x)  # line: silu in jit

    assert where(lambda x: helper(x) + 1, jnp.ones(3), of="logistic") == line("silu in jit")


def test_custom_derivatives_are_looked_into():
    @jax.custom_jvp
    def helper(x):
        return jnp.tanh(x)  # line: custom

    helper.defjvp(lambda x, t: (helper(*x), t[0]))
    assert where(lambda x: helper(x) + 1, f32(3), of="tanh") == line("custom")


# Loops and branches.


def test_bodies_of_loops():
    def fun(x):
        def body(c, y):
            c = c + y
            return jnp.tanh(c), jnp.sin(y)  # line: scanned

        return lax.scan(body, x[0], x)  # line: scan

    assert where(fun, f32(4, 3), of="tanh") == line("scanned")
    assert where(fun, f32(4, 3), of="loop_slice") == line("scan")
    assert where(fun, f32(4, 3), of="loop_enter") == line("scan")


def test_bodies_and_predicates_of_while_loops_and_branches():
    def fun(x):
        x = lax.while_loop(
            lambda c: jnp.sum(c) > 3,  # line: predicate
            lambda c: jnp.cos(c),  # line: body
            x,
        )
        return lax.cond(x[0] > 0, jnp.sin, lambda y: jnp.tanh(y), x)  # line: branch

    assert where(fun, f32(3), of="reduce_sum") == line("predicate")
    assert where(fun, f32(3), of="cos") == line("body")
    assert where(fun, f32(3), of="tanh") == line("branch")
    assert where(fun, f32(3), of="select_n") == line("branch")


# Layers.


class Net(nn.Module):
    """Linen layers, one a line."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7)(x)  # line: dense
        x = nn.LayerNorm()(x)  # line: norm
        x = jax.nn.silu(x)  # line: silu
        x = nn.Conv(6, (3,))(x)  # line: conv
        return nn.RNN(nn.LSTMCell(5))(x)  # line: lstm


@pytest.mark.parametrize(
    ("primitive", "mark"),
    [
        ("dot_general", "dense"),
        ("rsqrt", "norm"),
        ("logistic", "silu"),
        ("conv_general_dilated", "conv"),
        ("tanh", "lstm"),
        ("loop_enter", "lstm"),
    ],
)
def test_lines_of_linen_layers(primitive, mark):
    x = jnp.ones((2, 4, 3))
    params = jax.eval_shape(Net().init, jax.random.key(0), x)
    assert where(Net().apply, params, x, of=primitive) == line(mark)


class NnxNet(nnx.Module):
    """NNX layers, one a line."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 7, rngs=rngs)
        self.norm = nnx.LayerNorm(7, rngs=rngs)

    def __call__(self, x):
        x = self.linear(x)  # line: nnx linear
        return nnx.silu(self.norm(x))  # line: nnx norm


def test_lines_of_nnx_layers():
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)))
    fun = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    assert where(fun, state, jnp.ones((2, 3)), of="dot_general") == line("nnx linear")
    assert where(fun, state, jnp.ones((2, 3)), of="rsqrt") == line("nnx norm")
    assert where(fun, state, jnp.ones((2, 3)), of="logistic") == line("nnx norm")


def test_layers_that_the_user_lifts():
    """nn.scan and nn.remat around a module of the user."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(3)(x)), None  # line: block

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=4)
            return layers()(x, None)[0]

    x = jnp.ones((2, 3))
    params = jax.eval_shape(Stack().init, jax.random.key(0), x)
    assert where(Stack().apply, params, x, of="tanh") == line("block")
    assert where(Stack().apply, params, x, of="dot_general") == line("block")


# Where nothing is known, and where the line is used.


def test_no_line_is_known():
    assert str(Source(None)) == "an unknown line"
    assert str(Source(None, Source(None), "helper")) == "an unknown line"


def traced(*frames: tuple[str, str, int]) -> SimpleNamespace:
    """What JAX keeps of where an equation was traced, as of these calls, innermost first."""
    names = ("file_name", "function_name", "line_num")
    kept = [SimpleNamespace(**dict(zip(names, frame, strict=True))) for frame in frames]
    return SimpleNamespace(traceback=SimpleNamespace(frames=kept))


def test_lines_of_whoever_first_called_a_cached_helper_are_not_taken():
    """Releases of JAX differ in how far out the lines go that they keep with a cached program."""
    library = (jax.__file__, "silu", 5)
    caller = Source(traced(library, ("/home/me/model.py", "apply", 31)))
    helper = traced(library, ("/home/me/elsewhere.py", "first_user", 7))
    assert str(Source(helper)) == "/home/me/elsewhere.py:7"
    assert str(Source(helper, caller, "silu")) == "/home/me/model.py:31"
    mine = traced(library, ("/home/me/parts.py", "outer.<locals>.block", 12))
    assert str(Source(mine, caller, "block")) == "/home/me/parts.py:12"
    assert str(Source(mine, Source(traced(library)), "silu")) == "/home/me/parts.py:12"


@pytest.mark.parametrize("package", ["jax", "flax", "haiku", "equinox", "einops"])
def test_lines_of_libraries_are_passed_over(package):
    inner = (f"/opt/lib/python3.11/site-packages/{package}/deep/file.py", "call", 3)
    mine = ("/opt/lib/python3.11/site-packages/my_models/net.py", "apply", 8)
    assert (
        str(Source(traced(inner, mine))) == "/opt/lib/python3.11/site-packages/my_models/net.py:8"
    )
    assert str(Source(traced(inner))) == "an unknown line"
    assert str(Source(traced((os.__file__, "call", 3)))) == "an unknown line"
    assert str(Source(traced((us.__file__, "call", 3)))) == "an unknown line"


def test_the_caller_stands_in_for_a_callee_without_a_line():
    def fun(x):
        return jnp.tanh(x)  # line: caller

    (eqn,) = jax.make_jaxpr(fun)(jnp.ones(3)).eqns
    assert str(Source(None, Source(eqn.source_info))) == line("caller")


def test_reasons_end_with_the_line():
    def apply(params):
        y = jnp.cumsum(params["w"])  # line: reason
        return y.sum()

    (axis,) = us.trace_axes(apply, {"w": f32(7)}).axes
    assert axis.why == f"`cumsum` mixes places along it at {line('reason')}"


def test_lines_do_not_depend_on_the_working_directory_being_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fun(x):
        return jnp.tanh(x)  # line: elsewhere

    found = where(fun, f32(3), of="tanh")
    assert found == line("elsewhere")
    assert found.startswith(__file__)
