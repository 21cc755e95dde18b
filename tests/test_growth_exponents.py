"""trace_exponents(..., big=): factors of growth, and what is refused."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from tests import resizing
from tests.nets import f32, layers, relu_net
from tests.zoo import ZOO, prepared
from uscale_jax.trace import tracing


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
    assert f"test_growth_exponents.py:{line}" in text


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
    def apply(params, x):
        h = x @ params["in"]
        return (h - jnp.mean(h, -1, keepdims=True)) ** 2 @ params["out"]

    shapes = lambda n: {"in": f32(5, n), "out": f32(n, 3)}  # noqa: E731
    text = refusal(apply, shapes(48), shapes(77), f32(2, 5))
    assert "48 (small), 77 (big) is no multiple" in text
    assert "it is dimension 1 of in, dimension 0 of out" in text
    assert "`reduce_sum` needs every unit repeated equally often" in text
    assert f"test_growth_exponents.py:{inspect.getsourcelines(apply)[1] + 2}" in text


def test_smaller_and_swapped():
    text = refusal(relu_net, layers(5, 48, 3, bias=True), layers(5, 24, 3, bias=True), f32(2, 5))
    assert "smaller than the small one in every size" in text
    sizes = [layers(*n, bias=True) for n in ((5, 6, 8, 3), (5, 12, 4, 3))]
    text = refusal(relu_net, *sizes, f32(2, 5))
    assert "8 (small), 4 (big): is smaller in the big model" in text


def test_a_fixed_axis_says_where_and_why():
    def apply(params, x):
        h = jnp.cumsum(x @ params["in"], axis=-1)
        return h @ params["out"]

    shapes = lambda n: {"in": f32(5, n), "out": f32(n, 3)}  # noqa: E731
    text = refusal(apply, shapes(7), shapes(14), f32(2, 5))
    line = inspect.getsourcelines(apply)[1] + 1
    assert "`cumsum` mixes places along it at" in text
    assert f"test_growth_exponents.py:{line}" in text
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
    assert f"test_growth_exponents.py:{inspect.getsourcelines(relu)[1] + 1}" in text
    assert f"test_growth_exponents.py:{inspect.getsourcelines(tanh)[1] + 1}" in text


def test_outputs_of_different_shapes():
    shapes = lambda n: {"in": f32(5, n)}  # noqa: E731
    apply = lambda params, x: x @ params["in"]  # noqa: E731
    text = refusal(apply, shapes(7), shapes(14), f32(2, 5))
    assert "the output" in text
    assert "float32[2,14]" in text
