"""Multilayer perceptrons."""

from __future__ import annotations

import flax.linen as nn
import jax

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats


class MLP(nn.Module):
    """Dense layers with an activation between them."""

    widths: tuple[int, ...]
    out: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        for i, width in enumerate(self.widths):
            x = getattr(nn, self.activation)(nn.Dense(width, name=f"layer_{i}")(x))
        return nn.Dense(self.out, name="readout")(x)


def _mlp(activation: str) -> Model:
    def build(sizes: Sizes) -> Built:
        module = MLP((sizes["width_0"], sizes["width_1"]), sizes["out"], activation)
        return built(module, floats(sizes["batch"], sizes["features"]))

    return Model(
        f"mlp {activation}",
        {"batch": 4, "features": 5, "width_0": 7, "width_1": 9, "out": 3},
        build,
        free=("width_0", "width_1"),
        fixed={"out": "output"},
    )


MODELS = (_mlp("relu"), _mlp("gelu"))
