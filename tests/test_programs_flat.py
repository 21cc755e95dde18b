"""Flat programs: what is inlined, folded, dropped and rewritten."""

import inspect
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core.primitives import closed_call_p
from jax.sharding import Mesh, PartitionSpec

import uscale_jax as us
from tests.nets import f32, flat
from uscale_jax import _jax
from uscale_jax.trace.inline import program
from uscale_jax.trace.program import Equation, Program


def names(fun: Any, *shapes: Any) -> list[str]:
    return [eqn.name for eqn in flat(fun, *shapes).equations]


def only(fun: Any, *shapes: Any) -> Equation:
    """The one equation of a function."""
    (eqn,) = flat(fun, *shapes).equations
    return eqn


# Calls.


@jax.custom_jvp
def jvp_helper(x):
    return jnp.sin(x) * 2


jvp_helper.defjvp(lambda x, t: (jvp_helper(*x), t[0]))


@jax.custom_vjp
def vjp_helper(x):
    return jnp.sin(x) * 2


vjp_helper.defvjp(lambda x: (vjp_helper(x), None), lambda _, g: (g,))


@jax.custom_batching.custom_vmap
def vmap_helper(x):
    return jnp.sin(x) * 2


vmap_helper.def_vmap(lambda _, batched, x: (vmap_helper(x), batched[0]))


@jax.jit
def jit_helper(x):
    return jnp.sin(x) * 2


CALLS = {
    "jit": jit_helper,
    "nested jit": jax.jit(lambda x: jit_helper(jax.jit(jnp.negative)(x)) * -1),
    "remat": jax.checkpoint(lambda x: jnp.sin(x) * 2),
    "remat of jit": jax.checkpoint(jit_helper),
    "custom_jvp": jvp_helper,
    "custom_vjp": vjp_helper,
    "custom_vmap": vmap_helper,
    "composite": lax.composite(lambda x: jnp.sin(x) * 2, "ours.helper"),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_are_inlined_with_values_of_their_own(call):
    """One helper on two sizes that are equal by accident: two axes, not one."""
    helper = CALLS[call]

    def apply(params):
        return helper(params["a"]).sum(), helper(params["b"]).sum()

    eqns = flat(apply, {"a": f32(5), "b": f32(5)}).equations
    assert Counter(eqn.name for eqn in eqns)["sin"] == 2
    assert not {eqn.name for eqn in eqns} & {"jit", "pjit", "remat2", "checkpoint"}
    outputs = [id(value) for eqn in eqns for value in eqn.outputs]
    assert len(set(outputs)) == len(outputs)
    axes = us.trace_axes(apply, {"a": f32(5), "b": f32(5)})
    assert [axis.places for axis in axes.free] == [(("a", 0),), (("b", 0),)]


def test_closed_calls_are_inlined():
    """No public function leaves one in a program, so one is put there by hand."""
    closed = jax.make_jaxpr(jit_helper)(f32(5))
    (eqn,) = closed.jaxpr.eqns
    if _jax.CALLS.get(closed_call_p.name) != "call_jaxpr":
        pytest.skip("releases of JAX without closed calls")
    call = eqn.replace(primitive=closed_call_p, params={"call_jaxpr": eqn.params["jaxpr"]})
    by_hand = closed.replace(jaxpr=closed.jaxpr.replace(eqns=[call]))
    assert [e.name for e in program([by_hand]).equations] == ["sin", "mul"]


def block(params, x):
    h = jax.nn.silu(x @ params["w1"] + params["b"][None])
    q, k = jnp.split(h @ params["qk"], 2, axis=-1)
    p = jax.nn.softmax(jnp.einsum("sd,td->st", q, k) / jnp.sqrt(jnp.float32(q.shape[-1])))
    return p @ (h - h.mean(-1, keepdims=True)) @ params["w2"]


BLOCK = {"w1": f32(5, 14), "b": f32(14), "qk": f32(14, 22), "w2": f32(14, 3)}


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f))])
def test_wrapping_changes_nothing(wrap):
    plain, wrapped = flat(block, BLOCK, f32(4, 5)), flat(wrap(block), BLOCK, f32(4, 5))
    assert [eqn.name for eqn in plain.equations] == [eqn.name for eqn in wrapped.equations]
    for a, b in zip(plain.equations, wrapped.equations, strict=True):
        assert [v.shape for v in a.inputs + a.outputs] == [v.shape for v in b.inputs + b.outputs]
        assert [v.uniform for v in a.inputs] == [v.uniform for v in b.inputs]
    axes = [us.trace_axes(f, BLOCK, f32(4, 5)) for f in (block, wrap(block))]
    assert str(axes[0]) == str(axes[1])
    assert len(axes[0].free) == 2


def test_arrays_closed_over_are_one_value_however_often_used():
    table = np.arange(5.0, dtype=np.float32)
    found = flat(lambda x: x * table + table, f32(5))
    (value,) = found.captured
    assert [e.inputs[1] for e in found.equations] == [value, value]
    np.testing.assert_array_equal(value.captured[0], table)


# Loops and branches.


def test_scans_become_four_equations():
    def fun(xs):
        return lax.scan(lambda c, x: (c + x, jnp.sin(c)), jnp.zeros(6), xs)

    found = flat(fun, f32(4, 6))
    assert [e.name for e in found.equations] == [
        *("loop_enter", "loop_slice", "add", "sin", "loop_close", "loop_stack")
    ]
    enter, cut, add, _, close, stack = found.equations
    assert add.inputs == (enter.outputs[0], cut.outputs[0])
    assert close.inputs == (enter.outputs[0], add.outputs[0])
    assert found.outputs == (close.outputs[0], stack.outputs[0])
    assert cut.number("length") == (4,)


def test_while_loops_close_on_their_predicate():
    def fun(x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1]

    found = flat(fun, f32(6)).equations
    assert Counter(e.name for e in found) == Counter(
        {"loop_enter": 2, "loop_close": 2, "lt": 1, "add": 1, "mul": 1}
    )
    (predicate,) = [e.outputs[0] for e in found if e.name == "lt"]
    assert all(e.inputs[2:] == (predicate,) for e in found if e.name == "loop_close")


def test_counted_loops_carry_what_they_change():
    assert names(lambda x: lax.fori_loop(0, 3, lambda _, c: c * 2, x), f32(6)) == [
        *("loop_enter", "mul", "loop_close")
    ]


def test_branches_become_a_selection():
    def fun(x, i):
        return lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh], x)

    *_, select = flat(fun, f32(6), jax.ShapeDtypeStruct((), jnp.int32)).equations
    assert select.name == "select_n"
    producers = {id(e.outputs[0]): e.name for e in flat(fun, f32(6), 0).equations}
    assert len(producers) >= 4
    assert [v.shape for v in select.inputs] == [(), *[((6,),)] * 3]


def test_branches_of_a_known_index_are_taken():
    assert names(lambda x: lax.cond(jnp.bool_(True), jnp.sin, jnp.cos, x), f32(6)) == ["sin"]


def test_sharded_bodies_are_inlined_between_shards():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = PartitionSpec("d")
    fun = jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)
    shard, sin, unshard = flat(fun, f32(4, 6)).equations
    assert [e.name for e in (shard, sin, unshard)] == ["shard", "sin", "unshard"]
    assert sin.inputs[0].shape == ((2,), (6,))
    assert shard.param("shards") == unshard.param("shards") == [2, 1]


# Dead code.


def test_what_no_output_needs_is_dropped():
    assert names(lambda x: (jnp.sort(x), x * 2)[1], f32(6)) == ["mul"]
    assert names(lambda x: (lax.scan(lambda c, y: (c, y), x[0], x), x * 2)[1], f32(4, 6)) == ["mul"]


def test_arrays_that_only_dead_code_reads_are_dropped():
    table = np.arange(6, dtype=np.float32)
    assert not flat(lambda x: ((x * table).sum(), x * 2)[1], f32(6)).captured


def test_what_a_loop_carries_for_nothing_is_dropped():
    def fun(xs):
        step = lambda c, x: ((c[0] + x, jnp.sort(c[1])), jnp.cumsum(x))  # noqa: E731
        return lax.scan(step, (jnp.zeros(6), xs[0]), xs)[0][0]

    assert names(fun, f32(4, 6)) == ["loop_enter", "loop_slice", "add", "loop_close"]


def test_what_a_loop_carries_for_another_is_kept():
    def fun(xs):
        step = lambda c, x: ((c[0] + c[1], c[1] * x), None)  # noqa: E731
        return lax.scan(step, (jnp.zeros(6), xs[0]), xs)[0][0]

    assert Counter(names(fun, f32(4, 6)))["loop_close"] == 2


# Constants.


@pytest.mark.parametrize("ddof", [0, 1])
def test_the_divisor_of_a_variance_is_a_number(ddof):
    eqns = flat(lambda x: jnp.var(x, axis=-1, ddof=ddof), f32(4, 6)).equations
    assert "select_n" not in [e.name for e in eqns]
    assert eqns[-1].name == "div"
    assert eqns[-1].inputs[1].uniform == (6 - ddof,)


X = jnp.float32(0.37)
FOLDED = {
    "sqrt": lambda: jnp.sqrt(jnp.float32(24)),
    "rsqrt": lambda: lax.rsqrt(jnp.float32(24)),
    "pow": lambda: lax.pow(jnp.float32(24), jnp.float32(-0.25)),
    "integer_pow": lambda: lax.integer_pow(X, -3),
    "power of a complex number": lambda: lax.abs(lax.integer_pow(jnp.complex64(2j), 3)),
    "power of an integer": lambda: lax.integer_pow(jnp.int32(7), 12).astype(jnp.float32),
    "cbrt": lambda: lax.cbrt(X),
    "log": lambda: jnp.log(X) + jnp.log1p(X) + jnp.exp(X) + jnp.expm1(X) + lax.exp2(X),
    "trigonometry": lambda: jnp.sin(X) + jnp.cos(X) + jnp.tanh(X),
    "rounding": lambda: jnp.floor(X * 10) + jnp.ceil(X * 10) + jnp.sign(-X) + jnp.abs(-X),
    "where": lambda: jnp.where(jnp.float32(5) - 1 > 0, X, jnp.nan),
    "logic": lambda: jnp.where(~((X > 1) | (X <= 0)) & (X != 2), X, 2 * X),
    "max": lambda: jnp.maximum(X, 1) * jnp.minimum(X, 1) - lax.square(X),
    "finite": lambda: jnp.where(jnp.isfinite(X / 0), X, 3 * X),
    "integers": lambda: lax.div(jnp.int32(-7), jnp.int32(2)).astype(jnp.float32),
    "moved": lambda: jnp.full((3, 4), X).T.reshape(12)[2],
    "reduced": lambda: jnp.full((3, 4), X).max(0)[1],
    "narrow": lambda: X.astype(jnp.bfloat16).astype(jnp.float32),
}


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_what_jax_computes(name):
    constant = FOLDED[name]
    eqn = only(lambda x: x * constant(), f32())
    np.testing.assert_allclose(eqn.inputs[1].uniform[0], constant(), rtol=3e-7)


def test_rounding_of_constants_is_not_taken_for_a_move():
    assert "reduce_precision" in names(lambda x: x * lax.reduce_precision(X, 4, 2), f32())


def test_sums_of_constants_are_not_folded_as_if_they_moved():
    assert "reduce_sum" in names(lambda x: x * jnp.full((3,), X).sum(), f32())


# Equations said in simpler ones.


@pytest.mark.parametrize("start", [-30, -3, -1, 0, 2, 9, 30])
def test_known_starts_are_clamped_as_jax_clamps_them(start):
    expected = lax.dynamic_slice(np.arange(10.0), (start,), (4,))
    eqn = only(lambda x: lax.dynamic_slice(x, (start,), (4,)), f32(10))
    assert eqn.name == "slice"
    assert eqn.param("start_indices") == (expected[0],)
    assert eqn.param("limit_indices") == (expected[-1] + 1,)


@pytest.mark.parametrize("index", [-4, -1, 0, 3, jnp.int32(-2)])
def test_known_places_are_slices(index):
    cut = flat(lambda x: x[index], f32(4, 6)).equations[0]
    assert cut.name == "slice"
    assert cut.param("start_indices") == (int(index) % 4, 0)


def test_an_unknown_start_is_looked_up():
    assert names(lambda x, i: lax.dynamic_slice(x, (i,), (4,)), f32(10), 0)[-1] == "dynamic_slice"


def moved(found: Program, x: np.ndarray) -> np.ndarray:
    """Runs a program that only lays elements out in another way."""
    run = {
        "reshape": lambda p, a: a.reshape(p["new_sizes"]),
        "broadcast_in_dim": lambda p, a: a.reshape(p["shape"]),  # of ones, as older stacks do
        "slice": lambda p, a: a[
            tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * a.ndim))
        ],
        "concatenate": lambda p, *a: np.concatenate(a, p["dimension"]),
    }
    known = {id(found.inputs[0]): x}
    for eqn in found.equations:
        operands = [known[id(v)] for v in eqn.inputs]
        known[id(eqn.outputs[0])] = run[eqn.name](eqn.params[0], *operands)
    return known[id(found.outputs[0])]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacks_are_concatenations(axis):
    """Of halves of the rows, so that nothing but layout is in the program."""
    x = np.arange(24).reshape(4, 6)
    found = flat(lambda x: jnp.stack([x[:2], x[2:]], axis=axis), f32(4, 6))
    assert "stack" not in {e.name for e in found.equations}
    np.testing.assert_array_equal(moved(found, x), np.stack([x[:2], x[2:]], axis=axis))


CUTS = [np.s_[:, 1::3], np.s_[::2, 1::2], np.s_[:, :5:2], np.s_[1:3, ::3]]


@pytest.mark.parametrize("cut", CUTS)
def test_steps_that_divide_are_slices_of_a_reshape(cut):
    x = np.arange(24).reshape(4, 6)
    found = flat(lambda x: lax.slice(x, *bounds(cut)), f32(4, 6))
    assert [e.name for e in found.equations] == ["reshape", "slice", "reshape"]
    assert found.equations[1].param("strides") is None
    np.testing.assert_array_equal(moved(found, x), x[cut])


@pytest.mark.parametrize("cut", [np.s_[:, ::4], np.s_[:, 3::2], np.s_[:, :4:2], np.s_[::3, ::2]])
def test_steps_that_do_not_go_from_end_to_end_stay(cut):
    x = np.arange(24).reshape(4, 6)
    found = flat(lambda x: lax.slice(x, *bounds(cut)), f32(4, 6))
    assert [e.name for e in found.equations] == ["slice"]
    np.testing.assert_array_equal(moved(found, x), x[cut])


def test_unstacked_arrays_are_split():
    found = flat(lambda x: jnp.concatenate(jnp.unstack(x, axis=1)), f32(4, 3, 2))
    assert "unstack" not in {e.name for e in found.equations}
    assert found.outputs[0].shape == ((12,), (2,))
    axes = us.trace_axes(lambda p: [part.sum() for part in jnp.unstack(p, axis=1)], f32(4, 3, 2))
    assert "fixed" not in str(axes)


def test_what_has_no_elements_leaves_no_trace():
    """As rotary embeddings of whole heads cut it off, and empty caches put it on."""
    assert names(lambda x: jnp.concatenate([x[:, :0], x, x[:, 6:]], axis=1) * 2, f32(4, 6)) == [
        "mul"
    ]
    assert names(lambda x: lax.split(x, (0, 2, 4), axis=1)[1:], f32(4, 6)) == ["split"]
    assert names(lambda x: lax.split(x, (6, 0), axis=1)[0] * 2, f32(4, 6)) == ["mul"]
    assert names(lambda x: x[:, :0].sum() + x, f32(4, 6)) == ["reduce_sum", "add"]
    ((dim,),) = us.trace_axes(lambda p: (p * jnp.r_[p[:0], p]).sum(), f32(6)).leaves.values()
    assert str(dim) == "a"


def bounds(cut: tuple[slice, slice]) -> tuple[list[int], ...]:
    """Starts, stops and steps within (4, 6)."""
    found = zip(*(c.indices(n) for c, n in zip(cut, (4, 6), strict=True)), strict=True)
    return tuple(map(list, found))


def test_mutable_arrays_are_refused_with_the_line():
    def apply(params, x):
        ref = jax.new_ref(x)
        ref[...] = x @ params
        return ref[...]

    line = inspect.getsourcelines(apply)[1] + 1
    with pytest.raises(ValueError, match="mutable array") as refusal:
        us.trace_axes(apply, jnp.ones((3, 3)), jnp.ones((2, 3)))
    assert f"test_programs_flat.py:{line}" in str(refusal.value)
    assert "Fix:" in str(refusal.value)
