"""Plans for every model of the zoo: grown parameters are the same function, and shrink back."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest

import uscale_jax as us
from tests import resizing
from tests.zoo import EXACT, LOOSE, ZOO, big_model, prepared
from uscale_jax.trace.tracing import Model

NAMES = [name for name, model in ZOO.items() if model.free]


class Grown:
    """A zoo model's plan for other sizes, in float64, with the big model compiled once."""

    def __init__(self, name: str, big: Model) -> None:
        self.small, self.big = prepared(name), big
        with jax.enable_x64(True):
            self.shapes = resizing.as_double(big.params)
            models = (*self.small.model, big.apply, self.shapes)
            self.plan = us.plan(*models, *self.small.inputs)
            self.params = us.grow(self.small.params, self.plan, verify=False)
            self.run = resizing.compiled(big.apply, self.params, self.small.inputs)

    def error(self, **how) -> float:
        with jax.enable_x64(True):
            params = us.grow(self.small.params, self.plan, verify=False, **how)
            assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, self.shapes)
            return resizing.difference(self.small.outputs, self.run(params))


def mixed(name: str) -> dict[str, int]:
    """3 and 2 in turn, so that growing together is not growing alike."""
    return {size: 3 - i % 2 for i, size in enumerate(ZOO[name].free)}


WAYS = ("noise", "uneven", "zero_fan_out", "paired")


@pytest.mark.parametrize("name", NAMES)
def test_all_sizes_at_once_copies_told_apart_and_back(name):
    grown = Grown(name, big_model(name, mixed(name)))
    exact = LOOSE.get(name, EXACT)
    assert grown.error() <= exact
    way = WAYS[NAMES.index(name) % len(WAYS)]  # each is compiled anew: one a model is enough
    assert grown.error(symmetry=way, key=jax.random.key(1)) <= exact
    with jax.enable_x64(True):
        back = us.shrink(grown.params, grown.plan)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(grown.small.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)
    assert us.Plan.from_json(grown.plan.to_json()) == grown.plan


def no_multiples(name: str, sizes: Sequence[str]) -> Model:
    """The big model with some sizes that are no multiples: 7 → 11, 1 → 3."""
    small = ZOO[name].sizes
    new = {size: n + (n + 1) // 2 if (n := small[size]) > 2 else 2 * n + 1 for size in sizes}
    built = ZOO[name].build({**small, **new})
    return Model(built.apply, built.params)


# Sizes whose units have to be repeated equally often, for none can be added either: norms after
# the residual sum, over groups and space, or behind which units are multiplied; softmax over units.
EQUALLY = {
    "bert": ("width",),
    "cnn group norm": ("per_group_0", "per_group_1"),
    "convnext": ("channels",),
    "encoder post-norm": ("width",),
    "linear attention": ("key",),
    "memory slots": ("slots",),
    "mlp-mixer": ("width",),
    "nnx cnn": ("per_group",),
    "perceiver": ("latents",),
    "soft mixture": ("experts",),
    "soft mixture stack": ("experts",),
    "unet group norm": ("down_0", "down_1", "bottom", "up_1", "up_0"),
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_are_no_multiples(name):
    sizes = [size for size in ZOO[name].free if size not in EQUALLY.get(name, ())]
    if sizes:
        assert Grown(name, no_multiples(name, sizes)).error() <= LOOSE.get(name, EXACT)


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, sizes in EQUALLY.items() for size in sizes]
)
def test_units_that_must_be_repeated_equally_often(name, size):
    with pytest.raises(ValueError, match="needs every unit repeated equally often"):
        Grown(name, no_multiples(name, [size]))
