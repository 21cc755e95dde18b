"""Each thing the library relies on beyond JAX's documented names, on the installed release."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uscale_jax import _jax


def test_tracers_are_told_from_arrays():
    seen = []
    jax.jit(lambda x: seen.append(_jax.is_traced(x)))(jnp.ones(3))
    assert seen == [True]
    assert not any(map(_jax.is_traced, (jnp.ones(3), np.ones(3), 2.0)))


def test_dtypes_of_arrays_and_of_everything_else():
    leaves = [jnp.ones(3), jnp.ones(2, jnp.bfloat16), jax.random.key(0)]
    assert _jax.dtypes(leaves) == [leaf.dtype for leaf in leaves]
    mixed = [jnp.ones(3), np.ones(2), "text"]
    assert _jax.dtypes(mixed) == [np.float32, np.float64, None]


def test_committed_devices():
    device = jax.devices()[3]
    assert _jax.committed_devices(jnp.ones(3)) is None
    assert _jax.committed_devices(np.ones(3)) is None
    assert _jax.committed_devices(jax.device_put(jnp.ones(3), device)) == {device}


def test_weak_types_can_be_put_on():
    weak, strong = jnp.asarray(2.0), jnp.float32(3.0)
    assert weak.weak_type
    assert not strong.weak_type
    assert _jax.with_weak_type(strong, weak).weak_type
    assert not _jax.with_weak_type(strong, strong).weak_type


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_staged_functions_run_concretely_in_the_middle_of_a_trace(wrap):
    results = []

    def user(lr):
        staged = _jax.stage(lambda x: (x["a"] * lr, x["a"] + 1.0), {"a": jnp.ones(3)})
        with _jax.concretely():
            results.append(staged({"a": jnp.full((3,), 5.0)}))
        return lr

    wrap(user)(jnp.full((2,), 7.0) if wrap is jax.vmap else 7.0)
    scaled, shifted = (np.asarray(out) for out in results[0])  # fails on tracers
    np.testing.assert_array_equal(shifted, np.full(3, 6.0))
    traced = wrap in (jax.jit, jax.vmap)  # then lr has become a one
    np.testing.assert_array_equal(scaled, np.full(3, 5.0 if traced else 35.0))


def test_operands_of_a_scan_are_counted():
    def fun(w, start, xs):
        return jax.lax.scan(lambda c, x: (c @ w + x, None), start, xs)[0]

    closed, _ = _jax.closed_jaxpr(fun, jnp.ones((3, 3)), jnp.ones(3), jnp.ones((4, 3)))
    [scan] = [eqn for eqn in closed.jaxpr.eqns if _jax.primitive_name(eqn) == "scan"]
    assert _jax.scan_counts(scan.params) == (1, 1)


def test_calls_keep_their_programs_where_they_are_looked_for():
    composite = jax.lax.composite(jnp.sin, "tests.sin")
    functions = [jax.jit(jnp.sin), jax.checkpoint(jnp.sin), jax.nn.relu, composite]
    for fun in functions:
        closed, _ = _jax.closed_jaxpr(fun, jnp.float32(2.0))
        for eqn in closed.jaxpr.eqns:
            body = _jax.called_program(_jax.primitive_name(eqn), eqn.params)
            assert isinstance(body, _jax.Jaxpr | _jax.ClosedJaxpr)


def test_mutable_arrays_are_told():
    def fun(x):
        ref = jax.new_ref(x)
        ref[...] = jnp.sin(ref[...])
        return ref[...]

    closed, _ = _jax.closed_jaxpr(fun, jnp.ones(3))
    told = {_jax.primitive_name(e): _jax.refers_to_memory(e) for e in closed.jaxpr.eqns}
    assert told == {"new_ref": True, "get": True, "sin": False, "swap": True}


def scoped(w, x):
    with jax.named_scope("head"):
        return jnp.sin(x @ w)


def test_equations_are_bound_again_with_their_line_and_scopes():
    w, x = jnp.ones((5, 3)), jnp.ones((7, 5))
    closed = jax.make_jaxpr(scoped)(w, x)

    def again(w, x):
        with jax.named_scope("outer"):
            product, sine = closed.jaxpr.eqns
            [made] = _jax.bound(product, [x, w])
            with _jax.as_made(sine):
                return _jax.rebound(sine, [made])[0]

    eqns = jax.make_jaxpr(again)(w, x).jaxpr.eqns
    assert [_jax.scopes(eqn.source_info) for eqn in eqns] == ["outer/head", "outer/head"]
    functions = [{frame[1] for frame in _jax.frames(eqn.source_info)} for eqn in eqns]
    assert all("scoped" in names for names in functions)
    assert not any("again" in names for names in functions)
    np.testing.assert_array_equal(again(w, x), scoped(w, x))


def test_arrays_are_made_to_vary_over_manual_axes():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    seen = []

    def local(x):
        whole = _jax.spread(jnp.float32(3), ("a", "b"))
        seen.extend([_jax.varying(x), _jax.varying(whole), _jax.varying(_jax.spread(x, ("a",)))])
        return x * whole

    one, both = (jax.sharding.PartitionSpec(axes) for axes in ("a", ("a", "b")))
    jax.shard_map(local, mesh=mesh, in_specs=one, out_specs=both)(jnp.arange(2.0))
    assert seen == [{"a"}, {"a", "b"}, {"a"}]
