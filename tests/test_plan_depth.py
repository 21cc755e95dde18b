"""Plans that add layers: the same function where it can be, said where it cannot."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from benchmarks.zoo.registry import Built
from tests import depth_models, resizing
from tests.depth_models import encoder, llama, nnx_list, nnx_scan, scan

MODELS = {
    "encoder": (encoder, 4),
    "encoder remat": (partial(encoder, remat=True), 4),
    "llama": (llama, 6),
    "nnx list": (nnx_list, 4),
    "nnx scan": (nnx_scan, 4),
    "scan": (scan, 4),
    "scan remat": (partial(scan, remat=True), 4),
}


class Deepened:
    """A plan in float64, and the error of what it makes."""

    def __init__(self, small: Built, big: Built, **how) -> None:
        with jax.enable_x64(True):
            self.inputs = resizing.as_double(tuple(small.inputs))
            shapes = resizing.as_double(small.params)
            self.params = resizing.random_params(shapes)
            self.small, self.big = small, big
            self.shapes = resizing.as_double(big.params)
            models = (small.apply, shapes, big.apply, self.shapes)
            self.plan = us.plan(*models, *self.inputs, **how)
            self.grown = us.grow(self.params, self.plan, verify=False)

    def error(self, params=None) -> float:
        with jax.enable_x64(True):
            given = self.grown if params is None else params
            models = (self.small.apply, self.params, self.big.apply, given)
            return us.verify(self.plan, *models, *self.inputs, tolerance=np.inf).error


@pytest.mark.parametrize("width", [1, 2], ids=["same width", "twice the width"])
@pytest.mark.parametrize(("layers", "depth"), [((2, 3), "interleave"), ((2, 4), "stack")])
@pytest.mark.parametrize("name", MODELS)
def test_new_layers_are_the_identity(name, layers, depth, width):
    build, size = MODELS[name]
    small, big = build(layers[0], width=size), build(layers[1], width=size * width)
    deep = Deepened(small, big, depth=depth)
    assert deep.plan.exact
    assert deep.error() <= (0.0 if width == 1 else 1e-12)
    shapes = lambda tree: jax.tree.map(np.shape, tree)  # noqa: E731
    assert shapes(deep.grown) == jax.tree.map(lambda leaf: leaf.shape, deep.shapes)
    with jax.enable_x64(True):
        back = us.shrink(deep.grown, deep.plan)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-14), back, deep.params)
    assert us.Plan.from_json(deep.plan.to_json()) == deep.plan


def test_what_is_zero_is_read_off_the_program_and_said():
    plan = Deepened(encoder(2), encoder(3), depth="stack").plan
    zero = {leaf.name for leaf in plan.leaves.values() if leaf.zero}
    ends = [f"{part}/{leaf}" for part in ("attend/out", "mlp/down") for leaf in ("kernel", "bias")]
    assert zero == {f"params/Layer_2/{end}" for end in ends}
    assert {leaf.new for leaf in plan.leaves.values() if "Layer_2" in leaf.name} == {True}
    assert "layers params/Layer_*: 2 → 3, copies of 0, 1, 0" in plan.notes
    assert "params/Layer_2/mlp/down/bias (new, from params/Layer_0/mlp/down/bias)" in str(plan)


def test_a_new_layer_that_is_not_silent_changes_the_function():
    """So the zeros are what keeps it."""
    deep = Deepened(encoder(2), encoder(3), depth="stack")
    kernel = deep.grown["params"]["Layer_2"]["mlp"]["down"]["kernel"]
    with jax.enable_x64(True):
        uneven = 0.1 * np.arange(kernel.size).reshape(kernel.shape)
        deep.grown["params"]["Layer_2"]["mlp"]["down"]["kernel"] = kernel + uneven
    assert deep.error() > 1e-3


def test_layers_in_an_order_of_ones_own():
    deep = Deepened(encoder(2), encoder(5), depth=[0, 0, 1, 0, 1])
    assert deep.error() == 0.0
    sources = [deep.plan.leaves[f"params/Layer_{i}/mlp/up/kernel"].source[1] for i in range(5)]
    assert sources == ["Layer_0", "Layer_0", "Layer_1", "Layer_0", "Layer_1"]


def test_copies_are_not_exact_and_said_so():
    deep = Deepened(encoder(2), encoder(4), depth="stack", new_layers="copy")
    assert not deep.plan.exact
    assert "not the same function: copies of layers are not the identity" in deep.plan.notes
    assert deep.error() > 1e-3
    up = [deep.grown["params"][f"Layer_{i}"]["mlp"]["up"]["kernel"] for i in range(4)]
    np.testing.assert_array_equal(up[3], up[1])
    us.grow(deep.params, deep.plan)  # is not verified, since it cannot pass


def test_post_norm_layers_cannot_be_the_identity():
    """BERT's: a norm of the sum is not the sum."""
    with pytest.raises(ValueError, match="new_layers='copy'"):
        Deepened(encoder(2, pre=False), encoder(3, pre=False), depth="stack")
    deep = Deepened(encoder(2, pre=False), encoder(3, pre=False), depth="stack", new_layers="copy")
    assert not deep.plan.exact


def test_more_layers_without_saying_how():
    with pytest.raises(ValueError, match="depth="):
        Deepened(encoder(2), encoder(3))
    with pytest.raises(ValueError, match="depth="):
        Deepened(scan(2), scan(4))


def test_the_literal_of_a_depth_scaled_residual_is_made_up_for():
    """A branch times 1/sqrt(2·layers): old layers take sqrt(L'/L) on what writes to the stream."""

    def build(layers: int) -> Built:
        def apply(params, x):
            h = x
            for i in range(layers):
                layer = params[f"layer_{i}"]
                h = h + jnp.tanh(h @ layer["in"]) @ layer["out"] / (2 * layers) ** 0.5
            return h @ params["readout"]

        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        layer = {"in": f32(5, 7), "out": f32(7, 5)}
        params = {f"layer_{i}": layer for i in range(layers)} | {"readout": f32(5, 3)}
        return Built(apply, params, (depth_models.floats(2, 5),))

    deep = Deepened(build(2), build(6), depth="interleave")
    assert deep.error() <= 1e-12
    assert deep.plan.leaves["layer_0/out"].words == "3^(1/2)"
