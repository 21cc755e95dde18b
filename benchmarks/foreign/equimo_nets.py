"""Vision models of equimo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from benchmarks.foreign.registry import by_name
from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("equimo",)


def _model(name: str, make: Callable[[Any, Sizes, Any], Any], hidden: Sizes, free: str) -> Model:
    def build(s: Sizes) -> Built:
        import equimo.models

        net = make(equimo.models, s, jax.random.key(0))

        def call(m: Any, images: Any) -> Any:
            key = jax.random.key(1)
            return jax.vmap(lambda image: m(image, key=key, inference=True))(images)

        return by_name(net, call, floats(s["batch"], s["colours"], s["side"], s["side"]))

    sizes = {"batch": 2, "side": 16, "colours": 3, "labels": 5, **hidden}
    return Model(f"equimo {name}", sizes, build, tuple(free.split()), {"labels": "output"})


def _vit(models: Any, s: Sizes, key: Any) -> Any:
    return models.VisionTransformer(
        s["side"],
        s["colours"],
        s["heads"] * s["head_dim"],
        8,
        s["heads"],
        [2],
        mlp_ratio=s["inner_per_width"],
        num_classes=s["labels"],
        key=key,
    )


def _convnext(models: Any, s: Sizes, key: Any) -> Any:
    from equimo.models.convnext import ConvNeXt

    return ConvNeXt(
        s["colours"],
        depths=[1, 1],
        dims=[s["width_0"], s["width_1"]],
        layer_scale_init_value=0.1,
        num_classes=s["labels"],
        key=key,
    )


MODELS = (
    _model(
        "VisionTransformer",
        _vit,
        {"heads": 4, "head_dim": 6, "inner_per_width": 7},
        "heads head_dim inner_per_width",
    ),
    _model("ConvNeXt", _convnext, {"width_0": 8, "width_1": 12}, "width_0 width_1"),
)
