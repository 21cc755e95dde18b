"""budget: costs against models built at the smaller sizes, the search, limits and refusals."""

import math
from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax import lax

import uscale_jax as us
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.transformer_linen import Transformer
from tests.nets import f32, layers, relu_net
from tests.zoo import ZOO
from uscale_jax._budget import Budget, budget

X = f32(2, 5)


# Costs counted apart from the library, on models of the smaller sizes.


def inner_jaxprs(eqn):
    for param in eqn.params.values():
        for each in param if isinstance(param, tuple | list) else (param,):
            if hasattr(each, "jaxpr") or hasattr(each, "eqns"):
                yield getattr(each, "jaxpr", each)


def flops_of(jaxpr) -> int:
    return sum(map(equation_flops, jaxpr.eqns))


def equation_flops(eqn) -> int:
    name, shapes = eqn.primitive.name, [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
    if name == "dot_general":
        summed = eqn.params["dimension_numbers"][0][0]
        return 2 * math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in summed)
    if name == "ragged_dot_general":
        return 2 * math.prod(shapes[-1]) * shapes[0][-1]
    if name == "conv_general_dilated":
        makes = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(shapes[-1]) * math.prod(shapes[1]) // makes
    inner = [flops_of(jaxpr) for jaxpr in inner_jaxprs(eqn)]
    if name == "cond":
        return max(inner)
    if name.startswith("custom_"):
        return inner[0]  # not the derivatives
    return sum(inner) * eqn.params.get("length", 1)


def costs_of(apply, params, *inputs) -> tuple[int, int, int]:
    sizes = [(math.prod(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(params)]
    flops = flops_of(jax.make_jaxpr(apply)(params, *inputs).jaxpr)
    return sum(n for n, _ in sizes), flops, sum(n * width for n, width in sizes)


def small_costs(found: Budget) -> tuple[int, int, int]:
    return found.params, found.flops, found.memory_bytes


def big_costs(found: Budget) -> tuple[int, int, int]:
    return found.big_params, found.big_flops, found.big_memory_bytes


def kinds(tree) -> object:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def small_sizes(found: Budget) -> dict[int, int]:
    """The small size of every big one; axes of one big size must agree."""
    sizes = {axis.big: axis.size for axis in found.axes}
    assert all(sizes[axis.big] == axis.size for axis in found.axes)
    return sizes


ATTENTION = "gpt-2|gpt-2 by head|llama|palm|deepseek|bert|vit|top-k mixture gathered|nnx lora"
CHANNELS = (
    "grouped conv|depthwise|channel shuffle|cnn flat|cnn group norm|resnet pad|unet layer norm"
)
LOOPS = "scan remat attention|fori loop|while loop|cond|lstm language|mamba|nnx scan|nnx lstm"


@pytest.mark.parametrize("name", f"{ATTENTION}|{CHANNELS}|{LOOPS}".split("|"))
def test_costs_and_shapes_are_those_of_the_model_built_at_the_smaller_sizes(name):
    model = ZOO[name]
    big = model.build(model.sizes)
    found = budget(big.apply, big.params, *big.inputs, params=0.55)
    new = small_sizes(found)
    named = {size: new.get(n, n) for size, n in model.sizes.items() if size in model.free}
    small = model.build({**model.sizes, **named})
    assert kinds(found.shapes) == kinds(small.params)
    assert small_costs(found) == costs_of(small.apply, found.shapes, *small.inputs)
    assert big_costs(found) == costs_of(big.apply, big.params, *big.inputs)
    assert 0.3 * found.big_params < found.params <= 0.55 * found.big_params


CONFIG = TransformerConfig(311, 208, layers=3, heads=12, kv_heads=6, head_dim=10, mlp=528)
TOKENS = jax.ShapeDtypeStruct((3, 7), jnp.int32)


def transformer(config: TransformerConfig):
    module = Transformer(config)
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), TOKENS)


@pytest.mark.parametrize(
    "targets",
    [{"params": 0.3}, {"flops": 9_000_000}, {"memory_bytes": 2e6}, {"params": 0.5, "flops": 0.4}],
)
def test_a_transformer_under_each_target(targets):
    found = budget(*transformer(CONFIG), TOKENS, **targets)
    new = small_sizes(found)
    assert new[2] == 2  # queries per key
    assert new[208] % 16 == new[528] % 64 == 0
    sizes = {"hidden": new[208], "kv_heads": new[6], "heads": 2 * new[6], "mlp": new[528]}
    small = transformer(replace(CONFIG, **sizes))
    assert kinds(found.shapes) == kinds(small[1])
    assert small_costs(found) == costs_of(*small, TOKENS)
    for name, target in targets.items():
        most = target * getattr(found, f"big_{name}") if target < 1 else target
        assert 0.75 * most < getattr(found, name) <= most


def test_loops_within_loops_and_branches_within_loops():
    def apply(params, x):
        def wide(x):
            return lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ params["square"]), x)

        def deep(x):
            return jnp.tanh(x @ params["up"]) @ params["down"]

        def step(x, i):
            return lax.cond(i > 1, wide, deep, x) @ params["square"], None

        x, _ = lax.scan(step, x @ params["in"], jnp.arange(3))
        return lax.while_loop(lambda y: jnp.max(y) > 1, wide, x) @ params["out"]

    def at(width, hidden):
        kernels = {"in": f32(5, width), "square": f32(width, width), "out": f32(width, 3)}
        return kernels | {"up": f32(width, hidden), "down": f32(hidden, width)}

    for hidden in (8, 100):  # either branch is the dearest
        found = budget(apply, at(7, hidden), X, flops=0.6)
        new = small_sizes(found)
        assert small_costs(found) == costs_of(apply, at(new[7], new[hidden]), X)
        assert new[7] < 7


def test_ragged_products_and_sharded_bodies():
    mesh, spec = jax.sharding.Mesh(np.array(jax.devices()), "i"), jax.sharding.PartitionSpec

    def apply(params, x, counts):
        y = lax.ragged_dot(x, params["experts"], counts)
        run = lambda y, w: jnp.tanh(y) @ w  # noqa: E731
        specs = {"in_specs": (spec("i"), spec()), "out_specs": spec("i")}
        return jax.shard_map(run, mesh=mesh, **specs)(y, params["out"])

    params = {"experts": f32(4, 5, 14), "out": f32(14, 3)}
    rows = 6 * jax.device_count()
    counts = jax.ShapeDtypeStruct((4,), jnp.int32)
    found = budget(apply, params, f32(rows, 5), counts, params=0.6)
    assert list(found.sizes.values()) == [8]
    assert found.flops == 2 * rows * (5 * 8 + 8 * 3)


# Trees, dtypes and what is printed.


def test_trees_and_leaves_of_every_kind():
    def apply(params, x):
        y = jnp.tanh(x @ params["up"].astype(jnp.float32))
        return y @ params["down"] + jax.random.uniform(params["key"], (2, 3)) * params["step"]

    up, down = jax.ShapeDtypeStruct((5, 32), jnp.bfloat16), np.zeros((32, 3), np.float32)
    tree = {"up": up, "down": down, "key": jax.random.key(0), "step": 7.0, "no": f32(0, 4)}
    tree = freeze(tree)
    found = budget(apply, tree, X, memory_bytes=0.7)
    assert type(found.shapes) is type(tree)
    assert kinds(found.shapes["up"]) == ((5, 20), jnp.bfloat16)
    assert found.shapes["key"].dtype == tree["key"].dtype
    assert found.memory_bytes == 5 * 20 * 2 + 20 * 3 * 4 + 8 + 4
    assert found.params == 5 * 20 + 20 * 3 + 2
    assert jax.eval_shape(apply, found.shapes, X).shape == (2, 3)


NET = layers(5, 64, 96, 3, bias=True)


def test_what_is_printed():
    found = budget(relu_net, NET, X, params=0.5)
    assert str(found).splitlines() == [
        "axis  big  small  places",
        "a     64   40     0/bias[1], 0/kernel[1], 1/kernel[0]",
        "c     96   72     1/bias[1], 1/kernel[1], 2/kernel[0]",
        "",
        "params        6,915 -> 3,411 (49.3%)",
        "flops         27,008 -> 13,184 (48.8%)",
        "memory_bytes  27,660 -> 13,644 (49.3%)",
    ]
    assert found.sizes == {"a": 40, "c": 72}
    free = us.trace_axes(relu_net, NET, X).free
    assert [axis.places for axis in found.axes] == [axis.places for axis in free]
    assert jax.eval_shape(relu_net, found.shapes, X).shape == (2, 3)


# The search.


def net_params(a: int, b: int) -> int:
    return 5 * a + a * b + 3 * b + a + b + 3


@pytest.mark.parametrize("percent", range(5, 100, 7))
def test_one_share_for_all_then_one_step_each(percent):
    """Every share in steps of a thousandth, tried one after the other."""
    big, most = (64, 96), Fraction(percent, 100) * net_params(64, 96)
    tried = [[8 * max(1, (n * i + 4000) // 8000) for n in big] for i in range(1001)]
    sizes = max(each for each in tried if net_params(*each) <= most)
    for i in sorted((0, 1), key=lambda i: sizes[i] / big[i]):
        more = [n + 8 * (i == j) for j, n in enumerate(sizes)]
        sizes = more if more[i] <= big[i] and net_params(*more) <= most else sizes
    found = budget(relu_net, NET, X, params=percent / 100)
    assert list(found.sizes.values()) == sizes


def test_axes_of_equal_size_stay_equal():
    net = layers(5, 48, 48, 48, 3, bias=False)
    for percent in range(20, 100, 8):
        found = budget(relu_net, net, X, params=percent / 100)
        assert len(set(found.sizes.values())) == 1


def test_more_budget_than_the_model_needs():
    net = layers(5, 50, 99, 3, bias=True)
    found = budget(relu_net, net, X, params=10**12, flops=1e30, multiples=64)
    assert list(found.sizes.values()) == [50, 99]
    assert small_costs(found) == big_costs(found) == costs_of(relu_net, net, X)


def test_a_share_is_taken_as_written():
    """As a float, 0.29 of 100 is a little less than 29."""
    apply = lambda params, x: jnp.tanh(x * params["a"]).sum()  # noqa: E731
    found = budget(apply, {"a": f32(1, 100)}, f32(2, 1), params=0.29, multiples=1)
    assert (found.params, found.flops, found.big_flops) == (29, 0, 0)
    assert "flops         0 -> 0 (100.0%)" in str(found)


# Which axes shrink, limits and multiples.


def attention(params, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, params[name]) for name in "qkv")
    p = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    y = jnp.einsum("bhts,bshe->bthe", p, v)
    return y.reshape(2, 6, -1) @ params["out"]


HEADS = {name: f32(5, 16, 24) for name in "qk"} | {"v": f32(5, 16, 32), "out": f32(512, 5)}
TIME = f32(2, 6, 5)


def test_heads_shrink_and_keep_their_sizes():
    found = budget(attention, HEADS, TIME, params=0.4)
    assert small_sizes(found) == {16: 6, 32: 32, 24: 24}
    assert jax.eval_shape(attention, found.shapes, TIME).shape == (2, 6, 5)


def test_an_inner_axis_with_a_range_shrinks():
    limits = {"v[2]": (8, 24), "q[1]": 16}
    found = budget(attention, HEADS, TIME, params=0.75, limits=limits)
    assert small_sizes(found) == {16: 16, 32: 16, 24: 24}
    assert found.params == 5 * 16 * (24 + 24 + 16 + 16)


def test_a_kernel_on_the_left():
    """The order of axes is the activation's, whichever side it is on."""

    def apply(params, x):
        y = jnp.tanh(jnp.einsum("fi,bi->bf", params["in"], x)).reshape(2, 9, 8)
        return jnp.einsum("oeh,bhe->bo", params["out"], y)

    found = budget(apply, {"in": f32(72, 5), "out": f32(3, 8, 9)}, X, params=0.5)
    assert small_sizes(found) == {9: 4, 8: 8}


def test_unread_axes_keep_their_sizes_unless_named():
    params = {"in": f32(5, 16), "out": f32(16, 3), "spare": f32(11, 4)}
    apply = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]  # noqa: E731
    assert budget(apply, params, X, params=0.7).shapes["spare"].shape == (11, 4)
    found = budget(apply, params, X, params=0.7, limits={"spare[0]": 1})
    assert found.shapes["spare"].shape == (1, 4)


def test_limits_by_letter_and_by_place():
    exact = budget(relu_net, NET, X, params=0.5, limits={"a": np.int64(33)})
    place = budget(relu_net, NET, X, params=0.5, limits={"0/kernel[1]": 33, "a": (33, 33)})
    assert exact.sizes == place.sizes == {"a": 33, "c": 88}
    low = budget(relu_net, NET, X, params=0.4, limits={"c": [50, 70]})
    assert low.sizes == {"a": 40, "c": 56}
    narrow = budget(relu_net, NET, X, params=0.5, limits={"c": (33, 35)})
    assert narrow.sizes["c"] == 34  # no multiple of 8 or 4


def test_multiples_for_all_or_by_axis():
    assert budget(relu_net, NET, X, params=0.5, multiples=24).sizes == {"a": 48, "c": 48}
    found = budget(relu_net, NET, X, params=0.5, multiples={"0/bias[1]": 1, "c": 20})
    assert found.sizes["c"] % 20 == 0
    assert found.params > 0.98 * 0.5 * found.big_params


@pytest.mark.parametrize(
    ("size", "step"), [(7, 1), (16, 2), (100, 8), (1000, 64), (1024, 128), (5000, 128)]
)
def test_default_multiples(size, step):
    net = layers(5, size, 3, bias=True)
    found = {budget(relu_net, net, X, params=i / 40).sizes["a"] for i in range(12, 40)}
    assert math.gcd(*found) == step


# Refusals.


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ValueError, match="Expected: .* Fix: ") as error:
        budget(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("target", [0, -1, -0.5, math.nan, math.inf, True, "0.5", np.bool_(1)])
def test_targets_that_are_none(target):
    text = refusal(relu_net, NET, X, flops=target)
    assert f"flops={target!r} is no target" in text
    assert "27,008 FLOPs" in text


def test_no_target_and_a_place_that_is_two_axes():
    assert "at least one of params, flops and memory_bytes" in refusal(relu_net, NET, X)
    text = refusal(attention, HEADS, TIME, params=0.5, limits={"out[0]": 256})
    assert "limits names 'out[0]', which is not one axis but b·d" in text


def test_budgets_that_no_sizes_meet():
    text = refusal(relu_net, NET, X, params=0.01, memory_bytes=200, flops=0.9)
    least = net_params(8, 8)
    assert f"params: at most 69 asked for, the smallest reachable number is {least}\n" in text
    assert (
        f"memory_bytes: at most 200 asked for, the smallest reachable number is {4 * least}" in text
    )
    assert "flops" not in text
    text = refusal(attention, HEADS, TIME, params=5, limits={"q[1]": (4, 16)})
    assert "axes that keep their sizes: c (24), d (32)" in text


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"zz": 3}, "limits names 'zz', which is no axis of this model. Expected: one of 'a' ("),
        ({"0/kernel[2]": 3}, "'0/kernel[2]', which is no axis"),
        ({3: 3}, "limits names 3, which is no axis"),
        ({"0/bias[0]": 1}, "which is not one axis but 1"),
        ({"0/kernel[0]": 4}, "cannot change: axis B (5) is an axis of input 0"),
        ({"a": 0}, "limits['a']=0 is no limit of an axis of size 64"),
        ({"a": 65}, "1 <= low <= high <= 64"),
        ({"a": (9, 8)}, "limits['a']=(9, 8) is no limit"),
        ({"a": True}, "limits['a']=True is no limit"),
        ({"a": 8.0}, "limits['a']=8.0 is no limit"),
        ({"a": 8, "1/kernel[0]": 16}, "names axis 'a' twice, for (8, 8) and for (16, 16)"),
    ],
)
def test_limits_that_are_refused(limits, words):
    assert words in refusal(relu_net, NET, X, params=0.5, limits=limits)


@pytest.mark.parametrize(
    ("multiples", "words"),
    [
        (0, "multiples=0 is no multiple"),
        ({"a": -8}, "multiples['a']=-8 is no multiple"),
        ({"c": True}, "multiples['c']=True is no multiple"),
        ({"zz": 8}, "multiples names 'zz', which is no axis"),
        ({"B": 8}, "multiples names 'B', which cannot change"),
        ({"a": 32}, "axis a (64) has no multiple of 32 from 33 to 63"),
    ],
)
def test_multiples_that_are_refused(multiples, words):
    limits = {"a": (33, 63)}
    assert words in refusal(relu_net, NET, X, params=0.5, limits=limits, multiples=multiples)


def test_models_without_free_axes():
    apply = lambda params, x: x @ params["kernel"]  # noqa: E731
    text = refusal(apply, {"kernel": f32(5, 3)}, X, params=0.5)
    assert "no axis of this model can change its size" in text
    assert "A (5): is an axis of input 0" in text
