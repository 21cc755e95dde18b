"""plan: what it says, prints and keeps, and what it refuses."""

import inspect
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from tests.nets import f32, layers, relu_net

X = f32(2, 5)


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ValueError, match="Expected:") as error:
        us.plan(*args, **kwargs)
    return str(error.value)


def relu_plan(*widths: int) -> us.Plan:
    small, big = layers(5, 7, 9, 3, bias=True), layers(5, *widths, 3, bias=True)
    return us.plan(relu_net, small, relu_net, big, X)


def test_factors_copies_and_learning_rates_are_those_of_the_published_table():
    """Tensor Programs V, Table 3: rows input, hidden, output; n → 2n everywhere."""
    plan = relu_plan(14, 18)
    table = {
        "0/kernel": (1.0, 2.0, 1.0, 2.0),
        "1/kernel": (0.5, 4.0, 0.5, 1.0),
        "2/kernel": (0.5, 2.0, 0.5, 0.5),
        "0/bias": (1.0, 2.0, 1.0, 2.0),
        "2/bias": (1.0, 1.0, 1.0, 1.0),
    }
    for name, (m, n, adam, sgd) in table.items():
        leaf = plan.leaves[name]
        assert (leaf.factor, leaf.replicas) == (m, n), name
        layer, which = int(name[0]), name[2:]
        assert plan.lr_factors[layer][which] == adam
        assert plan.sgd_lr_factors[layer][which] == sgd


def test_maps_say_which_unit_a_place_copies():
    plan = relu_plan(10, 9)
    rows, columns = plan.leaves["1/kernel"].maps
    assert columns is None
    assert rows.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6]
    factor = np.asarray(plan.leaves["1/kernel"].factor)
    np.testing.assert_array_equal(factor[:, 0], [0.5, 0.5, 1, 0.5, 0.5, 1, 0.5, 0.5, 1, 1])
    np.testing.assert_array_equal(plan.leaves["0/kernel"].replicas[0, :4], [2, 2, 1, 2])
    assert "1/copies along dimension 0" in str(plan)


def test_it_prints_leaves_and_axes_with_both_sizes():
    text = str(relu_plan(14, 18))
    assert "1/kernel  7 × 9  14 × 18  1/2     4       1/2        1" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["c", "9", "18", "free", "1/bias[1],", "1/kernel[1],", "2/kernel[0]"] in lines
    assert any(line[:4] == ["D", "3", "3", "fixed"] for line in lines if line)


def test_json_keeps_all_but_the_models():
    plan = relu_plan(10, 18)
    read = us.Plan.from_json(plan.to_json())
    assert read == plan
    assert str(read) == str(plan)
    assert read.models is None
    assert plan != relu_plan(14, 18)
    data = json.loads(plan.to_json())
    assert [data["axes"][0][key] for key in ("name", "small", "big")] == ["a", 7, 10]
    assert len(data["arrays"]) < sum(len(leaf["maps"]) for leaf in data["leaves"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is no JSON"),
        ("[]", "it has no"),
        ('{"format": "uscale_jax.plan", "version": 99}', "its version is 99"),
        ('{"format": "uscale_jax.plan", "version": 1}', "KeyError"),
    ],
)
def test_what_is_no_plan_is_refused(text, why):
    with pytest.raises(ValueError, match=f"no plan: .*{why}"):
        us.Plan.from_json(text)


def test_a_plan_is_made_of_shapes_without_computing():
    """At a size that no machine could hold."""
    small, big = (layers(5, n, n, 3, bias=False) for n in (10**7, 2 * 10**7))
    assert us.plan(relu_net, small, relu_net, big, X).leaves["1/kernel"].factor == 0.5


def test_precision_is_the_narrowest_dtype_computed_in():
    def apply(params, x):
        h = (x @ params["a"]).astype(jnp.bfloat16)
        return (h.astype(jnp.float32)) @ params["b"]

    shapes = lambda n: {"a": f32(5, n), "b": f32(n, 3)}  # noqa: E731
    assert us.plan(apply, shapes(7), apply, shapes(14), X).precision == "bfloat16"
    assert relu_plan(14, 18).precision == "float32"


def test_leaves_without_factors_are_named():
    def apply(params, x):
        return x @ params["w"] * params["count"].astype(jnp.float32)

    shapes = {"w": f32(5, 3), "count": jax.ShapeDtypeStruct((), jnp.int32)}
    plan = us.plan(apply, shapes, apply, shapes, X)
    assert plan.notes == ("without factor or learning rate, being no floating leaves: count",)
    assert not plan.leaves["count"].floating


def test_swapped_models():
    small, big = layers(5, 7, 3, bias=True), layers(5, 14, 3, bias=True)
    text = refusal(relu_net, big, relu_net, small, X)
    assert "smaller than the small one in every size that differs" in text
    assert "swap them" in text


def test_one_size_is_smaller():
    small, big = layers(5, 6, 8, 3, bias=True), layers(5, 12, 4, 3, bias=True)
    text = refusal(relu_net, small, relu_net, big, X)
    assert "8 (small), 4 (big): is smaller in the big model" in text


def test_other_trees():
    small, big = layers(5, 7, 3, bias=True), layers(5, 14, 3, bias=False)
    text = refusal(relu_net, small, relu_net, big, X)
    assert "only the small one has '0/bias'" in text


def test_an_input_that_is_counted():
    def apply(params, ids):
        return params["table"][ids] @ params["out"]

    shapes = lambda n: {"table": f32(n, 6), "out": f32(6, 3)}  # noqa: E731
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = refusal(apply, shapes(11), apply, shapes(22), ids)
    assert "11 (small), 22 (big): `gather` looks places up along it" in text
    assert f"test_plan.py:{inspect.getsourcelines(apply)[1] + 1}" in text


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        return nn.Dense(3)(nn.relu(x))


def test_tree_types_are_kept_in_trees_of_the_plan():
    shapes = [jax.eval_shape(Net(n).init, jax.random.key(0), X) for n in (7, 14)]
    plan = us.plan(Net(7).apply, shapes[0], Net(14).apply, shapes[1], X)
    assert plan.factors["params"]["Dense_1"]["kernel"] == 0.5
    assert jax.tree.structure(plan.replicas) == jax.tree.structure(shapes[1])
    read = us.Plan.from_json(plan.to_json())
    assert read.lr_factors == plan.lr_factors
