"""How much layers matter: what they change, and what is lost without them; and what is refused."""

import re
import warnings
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from benchmarks.zoo import attention, stacks
from tests import depth_models, resizing, shrink_models
from tests.depth_models import encoder, nnx_list, scan
from tests.nets import f32
from tests.shrink_models import axis, best, normal

FEATURES = (2, 6, 7)


class Deep:
    """A big model with more layers than a small one, in float64, and batches for it."""

    def __init__(
        self, build: Any, small: int = 2, big: int = 4, width: int = 6, to: int = 6
    ) -> None:
        self.small, self.big = build(small, width=to), build(big, width=width)
        with jax.enable_x64(True):
            self.shapes = [resizing.as_double(each.params) for each in (self.small, self.big)]
            self.params = resizing.random_params(self.shapes[1], seed=3)
            self.inputs = resizing.as_double(tuple(self.big.inputs))
            models = (self.small.apply, self.shapes[0], self.big.apply, self.shapes[1])
            self.plan = us.plan(*models, *self.inputs, depth="interleave", exact=False)
        shapes = [x.shape for x in self.inputs]
        self.batches = [(*(normal(i, *s) for s in shapes), normal(9 + i, 2)) for i in range(3)]

    def importance(self, **how: Any) -> us.Importance:
        how = {"method": "activation", **how}
        with jax.enable_x64(True):
            return us.importance(self.big.apply, self.params, self.batches, self.plan, **how)


def apart(before: np.ndarray, after: np.ndarray) -> float:
    sizes = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    return float(np.mean(1 - (before * after).sum(-1) / sizes))


def called(module: Any, apply: Any, *args: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """What goes into every call of a kind of Flax module and comes out."""
    seen = []

    def note(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if type(context.module) is module and context.method_name == "__call__":
            seen.append((np.asarray(args[0]), np.asarray(jax.tree.leaves(out)[0])))
        return out

    with jax.enable_x64(True), nn.intercept_methods(note):
        apply(*args)
    return seen


def test_influence_is_how_far_a_layer_turns_what_goes_through_it():
    deep = Deep(encoder)
    of = lambda x: called(attention.Layer, deep.big.apply, deep.params, x)  # noqa: E731
    wanted = np.mean([[apart(*pair) for pair in of(x)] for x, _ in deep.batches], 0)
    found = deep.importance()
    (scores,) = found.layers.values()
    assert scores[0] == 1.0
    np.testing.assert_allclose(scores[1:], wanted[1:], rtol=1e-5)
    with jax.enable_x64(True):
        selected = us.select(deep.plan, found)
    assert selected.kept == {"params/Layer_*": (0, int(1 + np.argmax(wanted[1:])))}


def test_influence_of_the_layers_of_a_scan():
    """By running layers of the same kind one after the other."""
    deep = Deep(scan)
    p, block = deep.params["params"], stacks.Attention(2, 3, 5)
    wanted = []
    for x, _ in deep.batches:
        h, row = x @ p["embed"]["kernel"] + p["embed"]["bias"], []
        for i in range(4):
            layer = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])}
            with jax.enable_x64(True):
                out = np.asarray(block.apply(layer, h, None)[0])
            row.append(apart(h, out))
            h = out
        wanted.append(row)
    (scores,) = deep.importance().layers.values()
    assert scores[0] == 1.0
    np.testing.assert_allclose(scores[1:], np.mean(wanted, 0)[1:], rtol=1e-5)


def cost(out: Any, x: Any, y: Any) -> Any:
    return jnp.mean((jnp.mean(out, (1, 2)) - y) ** 2)


def without_list(params: Any, layer: int) -> Any:
    """A tree of named layers without one, the later ones moved up."""
    p = dict(params["params"])
    for i in range(layer, 3):
        p[f"Layer_{i}"] = p[f"Layer_{i + 1}"]
    del p["Layer_3"]
    return {"params": p}


def without_row(params: Any, layer: int) -> Any:
    p = dict(params["params"])
    cut = partial(np.delete, obj=layer, axis=0)
    return {"params": p | {"layers": jax.tree.map(cut, p["layers"])}}


@pytest.mark.parametrize(
    ("build", "without"), [(encoder, without_list), (scan, without_row)], ids=["list", "scan"]
)
def test_what_a_layer_is_worth_is_what_the_loss_rises_without_it(build, without):
    deep, less = Deep(build), build(3, width=6)
    (scores,) = deep.importance(layers="loss", loss=cost).layers.values()
    assert np.isposinf(scores[0])
    with jax.enable_x64(True):
        run = jax.jit(lambda p, x, y: cost(less.apply(p, x), x, y))
        whole = jax.jit(lambda p, x, y: cost(deep.big.apply(p, x), x, y))
        for i in (1, 2, 3):
            cut = without(deep.params, i)
            rises = [run(cut, *batch) - whole(deep.params, *batch) for batch in deep.batches]
            np.testing.assert_allclose(scores[i], np.mean(rises), rtol=1e-6)


@pytest.mark.parametrize("build", [encoder, scan, nnx_list], ids=["list", "scan", "nnx"])
def test_units_are_measured_in_the_model_of_the_layers_that_stay(build):
    """With layers and width chosen at once, against a model of those layers by hand."""
    deep = Deep(build, width=6, to=4)
    found = deep.importance()
    (scores,), middle = found.layers.values(), build(2, width=6)
    kept = (0, int(1 + np.argmax(scores[1:])))
    with jax.enable_x64(True):
        shapes = resizing.as_double(middle.params)
        same = Deep(build, width=6, to=6)
        params = us.shrink(deep.params, us.select(same.plan, {next(iter(found.layers)): scores}))
        assert shrink_models.shapes(params) == jax.tree.map(lambda x: x.shape, shapes)
        models = (deep.small.apply, deep.shapes[0], middle.apply, shapes, *deep.inputs)
        plan = us.plan(*models, exact=False)
        inner = us.importance(middle.apply, params, deep.batches, plan, method="activation")
        selected = us.select(deep.plan, found)
    assert selected.kept[next(iter(found.layers))] == kept
    assert set(found.scores) == set(inner.scores)
    for name, each in inner.scores.items():
        np.testing.assert_allclose(found.scores[name], each, rtol=1e-5)
        assert selected.kept[name] == best(each, len(selected.kept[name]))


def test_lists_that_belong_together_have_the_same_scores():
    small, big = depth_models.lists(2), depth_models.lists(5)
    params = resizing.random_params(big.params, dtype=np.float32)
    models = (small.apply, small.params, big.apply, big.params, *big.inputs)
    plan = us.plan(*models, depth="interleave", exact=False)
    found = us.importance(big.apply, params, [*big.inputs], plan, method="magnitude")
    assert len(found.layers) == 2
    a, b = found.layers.values()
    np.testing.assert_array_equal(a, b)
    x, row = big.inputs[0], []
    for norm, kernel in zip(params["norms"], params["kernels"], strict=True):
        y = x + np.tanh(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm) @ kernel
        row.append(apart(x, y))
        x = y
    np.testing.assert_allclose(a[1:], row[1:], rtol=1e-4)


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def shapes(n: int) -> dict:
    return {"down": f32(n, 3), "up": f32(5, n)}


def small_plan(small: int = 4, big: int = 7, x: Any = None) -> tuple[us.Plan, dict]:
    params = {"down": np.float32(normal(0, big, 3)), "up": np.float32(normal(1, 5, big))}
    return us.plan(mlp, shapes(small), mlp, shapes(big), f32(2, 5) if x is None else x), params


X = np.float32(normal(2, 9, 5))


def test_what_cannot_be_measured_is_refused():
    plan, params = small_plan()
    refused = [
        ("read from JSON", [X], us.Plan.from_json(plan.to_json()), {}),
        ("there is no batch", [], plan, {}),
        ("there is no batch", iter(()), plan, {"method": "wanda"}),
        ("there is no batch", [], plan, {"method": "taylor", "loss": lambda out, x: out.sum()}),
        ("batch 1 has 0 inputs, and the plan was made with 1", [X, ()], plan, {}),
        ("method is 'weights'. Expected: one of magnitude, ", [X], plan, {"method": "weights"}),
        ("layers is 'all'", [X], plan, {"layers": "all"}),
        ("method='taylor' needs a loss", [X], plan, {"method": "taylor"}),
        ("no axis is smaller", [X], small_plan(7, 7)[0], {}),
    ]
    for words, batches, given, how in refused:
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            us.importance(mlp, params, batches, given, **how)
        assert "Expected:" in str(error.value), words


def test_layers_by_loss_need_one():
    deep = Deep(encoder)
    with pytest.raises(ValueError, match="layers='loss' needs a loss"):
        deep.importance(layers="loss")


@pytest.mark.parametrize("method", ["magnitude", "activation", "wanda", "reconstruction"])
def test_parameters_that_are_no_numbers_are_refused(method):
    plan, params = small_plan()
    params["up"][2, 3] = np.nan
    with pytest.raises(ValueError, match="NaN, of unit .* first"):
        us.importance(mlp, params, [X], plan, method=method)


def test_choices_that_do_not_fit_are_refused():
    plan, params = small_plan()
    (name,) = [each.name for each in plan.axes if each.small != each.big]
    other = us.importance(mlp, small_plan(3, 6)[1], [X], small_plan(3, 6)[0], method="wanda")
    refused = [
        ("nothing says which of the 7 units of 'a' are to stay, 4 of them", {"b": range(7)}),
        ("have shape (6,), and the big model has 7", {name: range(6)}),
        ("the score of unit 2 of 'a' is NaN", {name: [0, 1, np.nan, 3, 4, 5, np.nan]}),
        ("this importance was measured for another plan: 'down' is ((3, 3), (6, 3))", other),
    ]
    for words, importance in refused:
        for fun in (us.select, lambda plan, i: us.shrink(params, plan, importance=i)):
            with pytest.raises(ValueError, match=re.escape(words)) as error:
                fun(plan, importance)
            assert "Fix:" in str(error.value)
    with pytest.raises(ValueError, match="read from JSON"):
        us.select(us.Plan.from_json(plan.to_json()), {name: range(7)})


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_choice_without_data_says_what_it_did(method):
    """How much the outputs of the big model change, measured against those."""
    plan, params = small_plan(x=X[:2])
    found = us.importance(mlp, params, [X], plan, method=method)
    (scores,) = found.scores.values()
    kept = list(best(scores, 4))
    cut = {"down": params["down"][kept], "up": params["up"][:, kept]}
    out, less = (np.tanh(X[:2] @ p["up"]) @ p["down"] for p in (params, cut))
    change = np.abs(out - less).max() / np.abs(out).max()
    with pytest.warns(us.UnitScaleShrinkWarning, match=f"'{method}'.*change by") as caught:
        us.shrink(params, plan, importance=found)
    assert f"change by {change:.0%}" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_choice_with_data_is_no_cause_for_a_warning():
    plan, params = small_plan()
    for method in ("activation", "reconstruction"):
        found = us.importance(mlp, params, [X], plan, method=method)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            us.shrink(params, plan, importance=found)
    assert axis(plan, "up", 1) in found.scores
