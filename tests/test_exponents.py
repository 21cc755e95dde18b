"""trace_exponents: value scaling and rescaling symmetries against float64 runs and Jacobians."""

import inspect
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from tests import resizing
from tests.test_zoo import LOOSE, ZOO, prepared
from uscale_jax.trace import layout, scaling, tracing

K = 1.3


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


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


def relu_net(params, x):
    for i in range(len(params)):
        x = x @ params[i]["kernel"] + params[i].get("bias", 0.0)
        x = jnp.maximum(x, 0.0) if i + 1 < len(params) else x
    return x


def layers(*widths: int, bias: bool) -> list[dict[str, jax.ShapeDtypeStruct]]:
    shapes = itertools.pairwise(widths)
    return [{"kernel": f32(a, b)} | ({"bias": f32(1, b)} if bias else {}) for a, b in shapes]


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
    assert f"test_exponents.py:{line}" in obstacle.reason
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


# Growth


def test_growth_prints_shapes_and_factors():
    small, big = layers(5, 7, 3, bias=True), layers(5, 42, 3, bias=True)
    growth = us.trace_exponents(relu_net, small, f32(2, 5), big=(relu_net, big))
    assert growth.factors[1] == {"bias": 1.0, "kernel": 1 / 6}
    assert re.search(r"1/kernel +7 × 3 +42 × 3 +1/6", str(growth))


def test_parts_of_a_leaf_may_take_different_factors():
    def apply(params, x):
        a, b = jnp.tanh(x @ params["a"]), jnp.tanh(x @ params["b"])
        return jnp.concatenate([a, b], axis=-1) @ params["out"]

    def shapes(a, b):
        return {"a": f32(5, a), "b": f32(5, b), "out": f32(a + b, 3)}

    growth = us.trace_exponents(apply, shapes(4, 7), f32(2, 5), big=(apply, shapes(8, 21)))
    expected = np.repeat([1 / 2, 1 / 3], [8, 21])[:, None]
    np.testing.assert_array_equal(growth.factors["out"], expected)


def test_tied_embeddings_put_the_factor_on_the_last_norm():
    small, inputs = prepared("gpt-2").given[:2], prepared("gpt-2").given[2:]
    sizes = resizing.resized(ZOO["gpt-2"].sizes, {"width": 2})
    big = ZOO["gpt-2"].build(sizes)
    growth = us.trace_exponents(*small, *inputs, big=(big.apply, big.params))
    halved = {key for key, factor in named(growth.factors) if np.all(np.asarray(factor) == 0.5)}
    kept = {key for key, factor in named(growth.factors) if np.all(np.asarray(factor) == 1.0)}
    tied = {name for name in kept if "embed" in name or "token" in name or "wte" in name}
    assert tied
    assert {name.rpartition("/")[2] for name in halved} == {"kernel", "scale", "bias"}
    assert halved | kept == {key for key, _ in named(growth.factors)}


def gain_net(gain):
    """A tied net whose last gain is ``gain(params, x)``."""

    def apply(params, ids):
        x = params["table"][ids]
        x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.01)
        return jnp.tanh(gain(params["gain"][None], x) @ params["table"].T)

    shapes = lambda n: {"table": f32(11, n), "gain": f32(n)}  # noqa: E731
    return apply, shapes


@pytest.mark.parametrize(
    ("gain", "shift"),
    [
        (lambda g, x: (1.0 + g) * x, 1.0),
        (lambda g, x: (g + 0.5) * x, 0.5),
        (lambda g, x: (g - 2.0) * x, -2.0),
        (lambda g, x: (3.0 - g) * x, -3.0),
        (lambda g, x: (1.0 + g.astype(x.dtype)) * x + (1.0 + g), 1.0),
    ],
)
def test_a_leaf_that_is_read_as_c_plus_leaf_takes_the_factor_on_the_sum(gain, shift):
    apply, shapes = gain_net(gain)
    small, big = (tracing.Model(apply, shapes(n)) for n in (7, 21))
    ids = np.array([1, 5, 4])
    growth = us.trace_exponents(*small, ids, big=tuple(big))
    assert growth.shifts == {"table": 0.0, "gain": shift}
    assert growth.factors["gain"] == 1 / 3
    assert f"1/3 on {shift:g} + leaf" in str(growth)
    assert resizing.error(small, big, [ids]) <= 1e-13


@pytest.mark.parametrize(
    "gain",
    [
        lambda g, x: (1.0 + g) * x + jnp.tanh(g),
        lambda g, x: (1.0 + g) * (2.0 + g) * x,
        lambda g, x: (1.0 + g * g) * x,
    ],
)
def test_a_leaf_that_is_read_otherwise_too_takes_no_factor_on_a_sum(gain):
    apply, shapes = gain_net(gain)
    text = refusal(apply, shapes(7), shapes(21), np.array([1, 5, 4]))
    assert "1 + gain" not in text


def named(tree):
    return [
        ("/".join(str(k.key) for k in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


# Refusals


def refusal(apply, small, big, *inputs, big_apply=None) -> str:
    with pytest.raises(ValueError, match="Fix:") as error:
        us.trace_exponents(apply, small, *inputs, big=(big_apply or apply, big))
    return str(error.value)


def test_clashing_equations_are_shown_in_words_with_their_lines():
    def apply(params, x):
        h = x @ params["in"]
        return jax.nn.logsumexp(h, axis=-1)

    text = refusal(apply, {"in": f32(5, 7)}, {"in": f32(5, 14)}, f32(2, 5))
    line = inspect.getsourcelines(apply)[1] + 2
    assert "contradict each other" in text
    assert "`log` needs an operand without a factor" in text
    assert f"test_exponents.py:{line}" in text


def test_the_clash_is_minimal():
    """Only what matters is shown, however much else the model holds."""

    def apply(params, x):
        h = jnp.tanh(x @ params["in"])
        other = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
        return jax.nn.logsumexp(h, axis=-1), other

    shapes = lambda n: {"in": f32(5, n), "a": f32(5, 6), "b": f32(6, 3)}  # noqa: E731
    text = refusal(apply, shapes(7), shapes(14), f32(2, 5))
    assert text.count("= 1") <= 2
    assert "[a]" not in text


def test_a_size_that_is_no_multiple():
    text = refusal(relu_net, layers(5, 48, 3, bias=True), layers(5, 77, 3, bias=True), f32(2, 5))
    assert "48 (small), 77 (big)" in text
    assert "no multiple" in text
    assert "dimension 1 of 0/kernel" in text


def test_a_fixed_axis_says_where_and_why():
    def apply(params, x):
        h = jnp.cumsum(x @ params["in"], axis=-1)
        return h @ params["out"]

    shapes = lambda n: {"in": f32(5, n), "out": f32(n, 3)}  # noqa: E731
    text = refusal(apply, shapes(7), shapes(14), f32(2, 5))
    line = inspect.getsourcelines(apply)[1] + 1
    assert "`cumsum` mixes places along it at" in text
    assert f"test_exponents.py:{line}" in text
    assert "dimension 1 of in" in text
    assert "dimension 0 of out" in text


def test_models_of_different_trees():
    text = refusal(relu_net, {"a": f32(3)}, {"b": f32(3)}, f32(2, 5))
    assert "only the small one has 'a'" in text
    assert "only the big one has 'b'" in text


def test_models_of_different_programs():
    def relu(params, x):
        return jnp.maximum(x @ params, 0.0)

    def tanh(params, x):
        return jnp.tanh(x @ params)

    text = refusal(relu, f32(5, 3), f32(5, 3), f32(2, 5), big_apply=tanh)
    assert "different programs" in text
    assert f"test_exponents.py:{inspect.getsourcelines(relu)[1] + 1}" in text
    assert f"test_exponents.py:{inspect.getsourcelines(tanh)[1] + 1}" in text


def test_outputs_of_different_shapes():
    shapes = lambda n: {"in": f32(5, n)}  # noqa: E731
    apply = lambda params, x: x @ params["in"]  # noqa: E731
    text = refusal(apply, shapes(7), shapes(14), f32(2, 5))
    assert "the output" in text
    assert "float32[2,14]" in text
