"""Networks of jax.example_libraries.stax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("jax.example_libraries",)


def _model(
    name: str,
    sizes: Sizes,
    layers: Callable[[Sizes, Any], Any],
    data: Callable[[Sizes], np.ndarray],
    free: str,
    **fixed: str,
) -> Model:
    def build(s: Sizes) -> Built:
        from jax.example_libraries import stax

        init, apply = layers(s, stax)
        x = data(s)
        return Built(apply, jax.eval_shape(lambda k: init(k, x.shape)[1], jax.random.key(0)), (x,))

    return Model(f"stax {name}", sizes, build, tuple(free.split()), fixed)


def _mlp(s: Sizes, stax: Any) -> Any:
    hidden = [stax.Dense(s["width_0"]), stax.Relu, stax.Dense(s["width_1"]), stax.Gelu]
    return stax.serial(*hidden, stax.Dense(s["labels"]), stax.LogSoftmax)


def _residual(stax: Any, inner: int, channels: int) -> Any:
    """An identity block as in the ResNet example of JAX."""
    main = stax.serial(
        stax.Conv(inner, (1, 1)),
        stax.BatchNorm(),
        stax.Relu,
        stax.Conv(inner, (3, 3), padding="SAME"),
        stax.BatchNorm(),
        stax.Relu,
        stax.Conv(channels, (1, 1)),
        stax.BatchNorm(),
    )
    shortcut = stax.serial(stax.FanOut(2), stax.parallel(main, stax.Identity), stax.FanInSum)
    return stax.serial(shortcut, stax.Relu)


def _resnet(s: Sizes, stax: Any) -> Any:
    return stax.serial(
        stax.Conv(s["channels"], (3, 3), padding="SAME"),
        stax.BatchNorm(),
        stax.Relu,
        _residual(stax, s["inner_0"], s["channels"]),
        stax.MaxPool((2, 2), strides=(2, 2)),
        _residual(stax, s["inner_1"], s["channels"]),
        stax.AvgPool((2, 2)),
        stax.Flatten,
        stax.Dense(s["labels"]),
    )


MODELS = (
    _model(
        "MLP",
        {"batch": 4, "features": 5, "width_0": 7, "width_1": 9, "labels": 3},
        _mlp,
        lambda s: floats(s["batch"], s["features"]),
        "width_0 width_1",
        labels="output",
    ),
    _model(
        "ResNet",
        {"batch": 4, "side": 8, "colours": 3, "channels": 9, "inner_0": 5, "inner_1": 7}
        | {"labels": 6},
        _resnet,
        lambda s: floats(s["batch"], s["side"], s["side"], s["colours"]),
        "channels inner_0 inner_1",
        labels="output",
    ),
)
