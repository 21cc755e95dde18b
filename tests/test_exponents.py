"""trace_exponents: value scaling and rescaling symmetries against float64 runs and Jacobians."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from tests import resizing
from tests.nets import f32, layers, relu_net
from tests.zoo import LOOSE, ZOO, prepared
from uscale_jax.trace import layout, scaling, tracing

K = 1.3


def scaled(params, exponents, k=K):
    """p · k**e on floating leaves; the exponents of a leaf may be an array."""

    def leaf(p, e):
        return p * k ** np.asarray(e) if jnp.issubdtype(p.dtype, jnp.inexact) else p

    return jax.tree.map(leaf, params, exponents)


def traced(name: str) -> us.TracedExponents:
    small = prepared(name)
    with jax.enable_x64(True):
        return us.trace_exponents(*small.model, *small.inputs)


def times_power(outputs, exponents):
    return [out * K**e for out, e in zip(outputs, jax.tree.leaves(exponents), strict=True)]


# Every model of the zoo


@pytest.mark.parametrize("name", ZOO)
def test_outputs_scale_by_the_power_that_is_said(name):
    small, exponents = prepared(name), traced(name)
    expected = times_power(small.outputs, exponents.output)
    got = small.run(scaled(small.params, exponents.params))
    assert resizing.difference(expected, got) <= LOOSE.get(name, 1e-13)


@pytest.mark.parametrize("name", ZOO)
def test_symmetries_keep_the_function(name):
    small = prepared(name)
    for symmetry in traced(name).symmetries:
        got = small.run(scaled(small.params, symmetry.params))
        assert resizing.difference(small.outputs, got) <= LOOSE.get(name, 1e-13), str(symmetry)


@pytest.mark.parametrize("name", ZOO)
def test_scaling_every_leaf_is_a_power_of_k_exactly_where_that_is_said(name):
    small, exponents = prepared(name), traced(name)
    got = small.run(scaled(small.params, jax.tree.map(lambda _: 1.0, exponents.params)))
    if exponents.uniform is not None:
        expected = times_power(small.outputs, exponents.uniform.output)
        assert resizing.difference(expected, got) <= 1e-13
        return
    assert exponents.obstacles
    nearest = [old * np.vdot(old, new) / np.vdot(old, old) for old, new in pairs(small, got)]
    assert resizing.difference(got, nearest) > 1e-6


def pairs(small, got):
    return zip(small.outputs, got, strict=True)


# Nothing is missed: a symmetry is a direction, in logarithms of factors, that no output notices.

# A bias of keys adds the same number to all scores of a query, which softmax ignores: it may have
# any value, so any factor, though not by a rule about factors.  One for each of two layers.
SHIFTS = {"gpt-2": 2}


@pytest.mark.parametrize(
    "name",
    ["mlp relu", "mlp gelu", "gpt-2", "llama", "t5", "cnn batch norm", "lstm", "soft mixture"],
)
def test_there_are_as_many_symmetries_as_the_jacobian_has_null_directions(name):
    with jax.enable_x64(True):
        directions = cell_directions(name)
        jacobians = [jacobian(name, directions, seed) for seed in range(2)]
    values = np.linalg.svd(np.concatenate(jacobians), compute_uv=False)
    # An epsilon of 1e-6 breaks the symmetry in front of a norm by about as much.
    null = len(directions) - np.sum(values > 1e-10 * values[0])
    assert null == len(traced(name).symmetries) + SHIFTS.get(name, 0)


def cell_directions(name: str) -> list[tuple[int, Any]]:
    """For every cell of every leaf, exponents per leaf that scale this cell alone."""
    small = prepared(name)
    model = tracing.trace([small.model], small.inputs)
    system = scaling.system_of(model)
    found = []
    for unknown in system.leaf_of:
        [(leaf, cells)] = scaling.by_leaf(system, {unknown: 1}).items()
        dims = model.structure.of(model.structure.program.inputs[leaf])
        found.append((leaf, layout.spread(cells, dims, 0)))
    return found


def jacobian(name: str, directions: list[tuple[int, Any]], seed: int) -> np.ndarray:
    """Derivatives of all outputs by the logarithms of the factors of all cells."""
    small = prepared(name)
    params, treedef = jax.tree.flatten(resizing.random_params(small.model.params, seed))

    def outputs(logs):
        exponents = [0.0] * len(params)
        for log, (leaf, direction) in zip(logs, directions, strict=True):
            exponents[leaf] = exponents[leaf] + log * direction
        scaled_leaves = [p * jnp.exp(e) for p, e in zip(params, exponents, strict=True)]
        out = small.model.apply(jax.tree.unflatten(treedef, scaled_leaves), *small.inputs)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(out)])

    return np.asarray(jax.jit(jax.jacfwd(outputs))(jnp.zeros(len(directions))))


# What people ask


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_net_without_biases_scales_by_k_to_its_depth(depth):
    widths = [5, 7, 9, 11, 13, 3][: depth + 1]
    exponents = us.trace_exponents(relu_net, layers(*widths, bias=False), f32(2, 5))
    assert exponents.uniform.output == depth
    assert exponents.obstacles == ()
    assert len(exponents.symmetries) == depth - 1


def test_biases_of_layer_l_take_k_to_the_l():
    exponents = us.trace_exponents(relu_net, layers(5, 7, 9, 3, bias=True), f32(2, 5))
    assert exponents.uniform is None
    assert [layer["bias"] for layer in exponents.params] == [1.0, 2.0, 3.0]
    assert [layer["kernel"] for layer in exponents.params] == [1.0, 1.0, 1.0]
    assert exponents.output == 3.0


def test_agrees_with_the_closed_form():
    params = {"params": {f"l{i}": layer for i, layer in enumerate(layers(5, 7, 9, 3, bias=True))}}
    apply = lambda p, x: relu_net([*p["params"].values()], x)  # noqa: E731
    closed = us.homogeneous_exponents(params, [f"params/l{i}" for i in range(3)])
    exponents = us.trace_exponents(apply, params, f32(2, 5))
    assert (exponents.params, exponents.output) == tuple(closed)


def test_the_obstacle_names_leaves_powers_and_the_line():
    exponents = us.trace_exponents(relu_net, layers(5, 7, 3, bias=True), f32(2, 5))
    line = inspect.getsourcelines(relu_net)[1] + 2
    [obstacle] = exponents.obstacles
    assert f"nets.py:{line}" in obstacle.reason
    assert "`add`" in obstacle.reason
    assert obstacle.equation == "[0/kernel] · [1/kernel] · [1/bias]^-1 must be 1, is k"


def test_fused_attention_has_a_symmetry_of_parts():
    def apply(params, x):
        query, key, value = jnp.split(x @ params["qkv"], 3, axis=-1)
        return jax.nn.softmax(query @ key.T) @ value

    exponents = us.trace_exponents(apply, {"qkv": f32(5, 21)}, f32(2, 5))
    [symmetry] = exponents.symmetries
    assert symmetry.powers == {"qkv[:, 0:7]": 1.0, "qkv[:, 7:14]": -1.0}
    expected = np.repeat([1.0, -1.0, 0.0], 7)[None]
    np.testing.assert_array_equal(symmetry.params["qkv"], expected)
    assert str(symmetry) == "qkv[:, 0:7] · k, qkv[:, 7:14] · k^-1"


def test_compensate_takes_what_was_traced():
    params = resizing.random_params(layers(5, 7, 3, bias=True), dtype=np.float32)
    x = np.float32(np.random.default_rng(3).standard_normal((2, 5)))
    exponents = us.trace_exponents(relu_net, params, x)
    larger = us.scale_params(params, 2.0, exponents=exponents.params)
    restored = us.compensate(relu_net, exponents, 2.0)
    np.testing.assert_array_equal(restored(larger, x), relu_net(params, x))
    bare = layers(5, 7, 3, bias=False)
    bare_params = resizing.random_params(bare, dtype=np.float32)
    uniform = us.trace_exponents(relu_net, bare, x).uniform
    restored = us.compensate(relu_net, uniform, 4.0)
    doubled = us.scale_params(bare_params, 4.0)
    np.testing.assert_array_equal(restored(doubled, x), relu_net(bare_params, x))


def test_several_outputs_have_powers_of_their_own():
    def apply(params, x):
        y = x @ params["w"]
        return {"y": y, "energy": jnp.sum(y**2), "sign": jnp.sign(y), "count": jnp.int32(3)}

    exponents = us.trace_exponents(apply, {"w": f32(5, 3)}, f32(2, 5))
    assert exponents.output == {"y": 1.0, "energy": 2.0, "sign": 0.0, "count": 0.0}


def test_parts_of_one_output_must_scale_alike():
    def apply(params, x):
        y = x @ params["w"]
        return jnp.concatenate([y, y**2], axis=-1)

    exponents = us.trace_exponents(apply, {"w": f32(5, 3)}, f32(2, 5))
    assert exponents.uniform is None
    assert "the parts of the output" in str(exponents.obstacles[0])
    assert exponents.params == {"w": 0.0}


def test_integer_leaves_and_unread_leaves_are_no_trouble():
    def apply(params, x):
        return x @ params["w"] + params["steps"].astype(jnp.float32)

    params = {"w": f32(5, 3), "steps": jax.ShapeDtypeStruct((), jnp.int32), "unread": f32(4)}
    exponents = us.trace_exponents(apply, params, f32(2, 5))
    assert exponents.params == {"w": 0.0, "steps": 0.0, "unread": 1.0}
    assert [s.powers for s in exponents.symmetries] == [{"unread": 1.0}]


def test_the_tables_read_as_text():
    exponents = us.trace_exponents(relu_net, layers(5, 7, 3, bias=True), f32(2, 5))
    text = str(exponents)
    assert re.search(r"1/bias +2 +in the way of k on every leaf\n", text)
    assert re.search(r"the output +2\n", text)
    assert "keeps the function: 0/bias · k, 0/kernel · k, 1/kernel · k^-1" in text
