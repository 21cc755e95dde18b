"""select and shrink: what stays of a model is that model without the units that go."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import uscale_jax as us
from tests import resizing, shrink_models
from tests.depth_models import encoder, llama, nnx_list, nnx_scan, scan
from tests.nets import f32
from tests.shrink_models import Chosen, best, normal, zoo_pair
from tests.zoo import EXACT, LOOSE

# Sizes of which units are only read by products: without those they may as well not be there.
PRIVATE = {
    "bilinear": ("left", "right"),
    "channel shuffle": ("groups", "in_per_group", "out_per_group", "channels"),
    "cnn batch norm train": ("channels_0", "channels_1"),
    "cnn flat batch norm": ("channels_0", "channels_1"),
    "cond": ("width", "wide", "deep_0", "deep_1"),
    "conv lstm": ("hidden",),
    "convnext": ("hidden",),
    "deepseek": ("hidden_0", "hidden_1", "heads", "value"),
    "depthwise": ("channels_0", "multiplier", "channels_1"),
    "encoder pre-norm": ("heads", "hidden_0", "hidden_1"),
    "ensemble": ("hidden",),
    "fori loop": ("width",),
    "fused lstm": ("hidden",),
    "gemma": ("hidden_0", "hidden_1", "kv_heads", "groups"),
    "gpt-2": ("hidden_0", "hidden_1", "heads"),
    "gpt-2 by head": ("hidden_0", "hidden_1", "heads"),
    "llama query norm": ("hidden_0", "hidden_1", "kv_heads", "groups"),
    "lora": ("rank", "kv_heads"),
    "lstm language": ("embedding", "hidden"),
    "mamba": ("inner", "rank"),
    "nnx gru": ("hidden_0", "hidden_1"),
    "nnx lora": ("width_0", "width_1", "rank_0", "rank_1"),
    "nnx transformer": ("kv_heads", "groups", "hidden"),
    "resnet pad": ("channels", "extra", "inner_0", "inner_1"),
    "rslora": ("rank",),
    "rwkv": ("inner",),
    "scan remat attention": ("heads", "hidden"),
    "squeeze excite": ("channels", "squeezed"),
    "t5 gated": ("heads", "encoder_0", "decoder_0", "decoder_1"),
    "top-k mixture gathered": ("hidden_0", "hidden_1"),
}
# What reads units although no role says so: kernels that are first joined, or looked up.
GATES = [(f"/h{gate}/kernel", 0) for gate in "ifgo"]
UNSAID = {
    "bilinear": [("params/kernel", 0), ("params/kernel", 1)],
    "lstm language": [*GATES, *((f"/i{gate}/kernel", 0) for gate in "ifgo"), ("readout/kernel", 0)],
    "top-k mixture gathered": [("down", 1)],
}


def leaf_equal(a, b) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def check_kept(chosen: Chosen) -> None:
    sizes = {axis.name: axis.small for axis in chosen.plan.axes if axis.small != axis.big}
    wanted = {name: best(chosen.scores[name], size) for name, size in sizes.items()}
    assert chosen.selected.kept == wanted
    assert not chosen.selected.exact
    for name, units in wanted.items():
        count = f"{len(units)} of {len(chosen.scores[name])}"
        assert f"units chosen along {name}: {count}" in chosen.selected.notes


@pytest.mark.parametrize("name", PRIVATE)
def test_the_small_model_is_the_big_one_without_what_reads_removed_units(name):
    chosen = Chosen(*zoo_pair(name, PRIVATE[name]))
    check_kept(chosen)
    without = chosen.big_outputs(chosen.switched_off(UNSAID.get(name, ())))
    difference = resizing.difference(without, chosen.outputs())
    assert difference <= LOOSE.get(name, EXACT)
    read = us.Plan.from_json(chosen.selected.to_json())
    assert read == chosen.selected
    with jax.enable_x64(True):
        jax.tree.map(leaf_equal, us.shrink(chosen.params, read), chosen.shrunk)


@pytest.mark.parametrize("name", ["cond", "lora", "nnx gru"])
def test_choosing_and_shrinking_at_once(name):
    chosen = Chosen(*zoo_pair(name, PRIVATE[name]))
    with jax.enable_x64(True):
        at_once = us.shrink(chosen.params, chosen.plan, importance=chosen.scores)
    jax.tree.map(leaf_equal, at_once, chosen.shrunk)


def test_removed_units_do_matter_where_they_are_not_switched_off():
    """So the test above can fail."""
    chosen = Chosen(*zoo_pair("encoder pre-norm", ("heads", "hidden_0")))
    assert resizing.difference(chosen.big_outputs(chosen.params), chosen.outputs()) > 1e-2


@pytest.mark.parametrize("name", ["encoder pre-norm", "scan remat attention", "perceiver"])
def test_products_of_kept_queries_and_keys_are_what_they_were(name):
    """The small model divides by the root of a smaller head: a factor makes up for it."""
    chosen = Chosen(*zoo_pair(name, ("head_dim",)))
    params = chosen.switched_off([("/out/kernel", chosen_dim(chosen, "/out/kernel"))])
    leaves = chosen.selected.leaves
    named = zip(leaves.values(), jax.tree.leaves(params), strict=True)
    cut = [zeroed(leaf, x) if "/query/" in leaf.name else x for leaf, x in named]
    params = jax.tree.unflatten(jax.tree.structure(params), cut)
    assert resizing.difference(chosen.big_outputs(params), chosen.outputs()) <= EXACT


def chosen_dim(chosen: Chosen, end: str) -> int:
    (dims,) = {
        tuple(i for i, places in enumerate(leaf.maps) if places is not None)
        for leaf in chosen.selected.leaves.values()
        if leaf.name.endswith(end)
    }
    return dims[0]


def zeroed(leaf: us.LeafPlan, x):
    x = np.array(x)
    x[..., leaf.maps[-1] < 0] = 0
    return x


def swiglu(params, x):
    """Gate and value in one kernel, whole after whole."""
    gate, value = jnp.split(x @ params["up"] + params["bias"][None], 2, axis=-1)
    return (jax.nn.silu(gate) * value) @ params["down"]


def test_units_of_a_fused_kernel_go_in_all_its_parts():
    sizes = lambda n: {"bias": f32(2 * n), "down": f32(n, 3), "up": f32(5, 2 * n)}  # noqa: E731
    plan = us.plan(swiglu, sizes(4), swiglu, sizes(7), f32(2, 5))
    params = {"bias": normal(0, 14), "down": normal(1, 7, 3), "up": normal(2, 5, 14)}
    (name,) = [axis.name for axis in plan.axes if axis.small == 4]
    shrunk = us.shrink(params, plan, importance={name: [3.0, 9, 1, 7, 2, 8, 4]})
    columns = [1, 3, 5, 6, 8, 10, 12, 13]
    np.testing.assert_allclose(shrunk["up"], params["up"][:, columns], rtol=1e-6)
    np.testing.assert_allclose(shrunk["bias"], params["bias"][columns], rtol=1e-6)
    np.testing.assert_allclose(shrunk["down"], params["down"][[1, 3, 5, 6]], rtol=1e-6)


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def mlp_shapes(n: int, **more):
    return {"down": f32(n, 3), "up": f32(5, n), **more}


def mlp_plan(small: int = 4, big: int = 7, **more) -> us.Plan:
    return us.plan(mlp, mlp_shapes(small, **more), mlp, mlp_shapes(big, **more), f32(2, 5))


def test_of_equal_units_the_first_stay():
    assert us.select(mlp_plan(), {"a": [1, 2, 1, 1, 2, 1, 1]}).kept == {"a": (0, 1, 2, 4)}


def test_learning_rates_go_by_sizes_and_parameters_stay_as_they_are():
    selected = us.select(mlp_plan(), {"a": range(7)})
    assert selected.factors == {"down": 1.0, "up": 1.0}
    np.testing.assert_allclose(selected.lr_factors["down"], 4 / 7)
    assert selected.lr_factors["up"] == 1.0
    assert json.loads(selected.to_json())["kept"] == {"a": [3, 4, 5, 6]}


def test_dtypes_weak_types_and_integers_are_kept():
    def apply(params, x):
        h = jnp.tanh(x @ params["up"].astype(jnp.float32))
        y = (h * params["on"][None].astype(jnp.float32)) @ params["down"]
        return y * params["gain"]

    def tree(n, make):
        leaves = {"up": make((5, n), jnp.bfloat16), "down": make((n, 3), jnp.float32)}
        return leaves | {"on": make((n,), jnp.int32), "gain": jnp.asarray(2.0)}

    small = tree(4, jax.ShapeDtypeStruct)
    big = tree(7, lambda shape, dtype: jnp.arange(np.prod(shape), dtype=dtype).reshape(shape))
    plan = us.plan(apply, small, apply, big, f32(2, 5))
    (name,) = [axis.name for axis in plan.axes if axis.small == 4]
    shrunk = us.shrink(big, plan, importance={name: [5, 4, 3, 9, 8, 7, 6]})
    assert shrunk["on"].dtype == jnp.int32
    assert shrunk["on"].tolist() == [3, 4, 5, 6]
    assert shrunk["up"].dtype == jnp.bfloat16
    assert shrunk["gain"].weak_type
    assert shrunk["gain"] == 2.0
    assert not shrunk["down"].weak_type
    leaf_equal(shrunk["up"], big["up"][:, 3:])


def test_integers_of_the_layers_that_stay_are_theirs():
    """Both of chosen layers, and of those that growing copied."""
    drawn = shrink_models.draw({"up": (2, 4, 7), "down": (2, 7, 4)})
    small = jax.tree.map(np.float32, drawn) | {"on": np.arange(14, dtype=np.int32).reshape(2, 7)}
    shapes = {name: jax.ShapeDtypeStruct((4, *x.shape[1:]), x.dtype) for name, x in small.items()}
    apply = shrink_models.gated_layers
    plan = us.plan(apply, small, apply, shapes, f32(5, 4), depth="interleave")
    big = us.grow(small, plan)
    leaf_equal(us.shrink(big, plan)["on"], small["on"])
    big["on"] = jnp.arange(28, dtype=jnp.int32).reshape(4, 7)
    family = next(note.split()[1:] for note in plan.notes if note.startswith("layers "))
    name = " ".join(family).split(": ")[0]
    leaf_equal(
        us.shrink(big, plan, importance={name: [1, 5, 9, 7]})["on"], big["on"][np.array([0, 2])]
    )


def test_tree_types_are_kept():
    frozen = flax.core.freeze({"down": normal(0, 7, 3), "up": normal(1, 5, 7)})
    shapes = flax.core.freeze(mlp_shapes(4))
    plan = us.plan(mlp, shapes, mlp, frozen, f32(2, 5))
    shrunk = us.shrink(frozen, plan, importance={"a": range(7)})
    assert isinstance(shrunk, flax.core.FrozenDict)
    leaf_equal(shrunk["down"], np.float32(frozen["down"][3:]))
    chosen = Chosen(*zoo_pair("nnx lstm", ("hidden_0",)))
    assert isinstance(chosen.shrunk, nnx.State)
    assert jax.tree.structure(chosen.shrunk) == jax.tree.structure(chosen.shapes[0])


def test_shrinking_can_be_compiled():
    plan, params = mlp_plan(), {"down": normal(0, 7, 3), "up": normal(1, 5, 7)}
    how = {"importance": {"a": range(7)}}
    compiled = jax.jit(lambda params: us.shrink(params, plan, **how))(params)
    jax.tree.map(leaf_equal, compiled, us.shrink(params, plan, **how))


DEEP = {
    "encoder": (encoder, 6, "params/Layer_*"),
    "llama": (llama, 6, None),
    "nnx list": (nnx_list, 6, None),
    "nnx scan": (nnx_scan, 6, None),
    "scan": (scan, 6, None),
}


def cut(params, small_shapes, kept):
    """By hand: layers by number, of names or of a leading dimension, as the small model's."""
    leaves = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    wanted, treedef = jax.tree_util.tree_flatten_with_path(small_shapes)

    def source(path):
        words = jax.tree_util.keystr(path)
        for new, old in enumerate(kept):
            for mark in (
                f"Layer_{new}']",
                f"block_{new}']",
                f"Block_{new}']",
                f"['blocks'][{new}]",
            ):
                if mark in words:
                    return words.replace(mark, mark.replace(str(new), str(old)))
        return words

    named = {jax.tree_util.keystr(path): x for path, x in leaves.items()}
    found = [np.asarray(named[source(path)]) for path, _ in wanted]
    stacked = lambda x, like: x.shape[0] == 5 and like.shape[0] == len(kept)  # noqa: E731
    pairs = zip(found, wanted, strict=True)
    cut = [x[list(kept)] if x.ndim and stacked(x, like) else x for x, (_, like) in pairs]
    return jax.tree.unflatten(treedef, cut)


@pytest.mark.parametrize("name", DEEP)
def test_layers_of_the_highest_scores_stay_with_the_first_and_widths_with_them(name):
    build, width, _ = DEEP[name]
    small, big = build(3, width=width), build(5, width=width)
    with jax.enable_x64(True):
        shapes = [resizing.as_double(each.params) for each in (small, big)]
        params = resizing.random_params(shapes[1])
        models = (small.apply, shapes[0], big.apply, shapes[1], *resizing.as_double(big.inputs))
        plan = us.plan(*models, depth="interleave", exact=False)
        family = next(
            note.split()[1].rstrip(":") for note in plan.notes if note.startswith("layers ")
        )
        selected = us.select(plan, {family: [0.0, 3, 9, 1, 5]})
        shrunk = us.shrink(params, selected)
    assert selected.kept == {family: (0, 2, 4)}
    jax.tree.map(leaf_equal, shrunk, cut(params, shapes[0], (0, 2, 4)))
    read = us.Plan.from_json(selected.to_json())
    with jax.enable_x64(True):
        again = jax.tree.leaves(us.shrink(params, read))
    assert sum(map(np.size, again)) == sum(map(np.size, jax.tree.leaves(shrunk)))


@pytest.mark.parametrize("name", ["encoder", "nnx list", "scan"])
def test_layers_and_widths_at_once_are_one_after_the_other(name):
    build = DEEP[name][0]
    middle, chosen = build(3, width=6), Chosen(build(3, width=4), build(3, width=6), seed=1)
    both = deep_and_narrow(build, chosen)
    with jax.enable_x64(True):
        inner = cut(both["params"], resizing.as_double(middle.params), (0, 1, 4))
        wanted = us.shrink(inner, chosen.selected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), both["shrunk"], wanted)


def deep_and_narrow(build, chosen: Chosen) -> dict:
    small, big = build(3, width=4), build(5, width=6)
    with jax.enable_x64(True):
        shapes = [resizing.as_double(each.params) for each in (small, big)]
        params = resizing.random_params(shapes[1])
        models = (small.apply, shapes[0], big.apply, shapes[1], *chosen.inputs)
        plan = us.plan(*models, depth="interleave", exact=False)
        family = next(
            note.split()[1].rstrip(":") for note in plan.notes if note.startswith("layers ")
        )
        scores = {**chosen.scores, family: [0.0, 8, 3, 1, 5]}
        shrunk = us.shrink(params, plan, importance=scores)
    assert shrink_models.shapes(shrunk) == jax.tree.map(lambda x: x.shape, shapes[0])
    return {"params": params, "shrunk": shrunk}
