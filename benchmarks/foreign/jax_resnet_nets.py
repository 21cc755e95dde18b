"""Residual networks of jax-resnet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("jax_resnet",)


def _model(name: str, block: Callable[[Any, Sizes], Any], free: str, **more: int) -> Model:
    def build(s: Sizes) -> Built:
        import jax_resnet
        from jax_resnet.resnet import ResNet, ResNetDStem, ResNetStem

        module = ResNet(
            partial(block(jax_resnet.resnet, s)),
            stage_sizes=(1, 2),
            n_classes=s["labels"],
            hidden_sizes=(s["width_0"], s["width_1"]),
            stem_cls=ResNetDStem if "D" in name or "St" in name else ResNetStem,
            norm_cls=partial(nn.BatchNorm, use_running_average=True),
        )
        x = floats(s["batch"], s["side"], s["side"], s["colours"])
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        return Built(module.apply, params, (x,))

    sizes = {"batch": 2, "side": 16, "colours": 3, "labels": 5, **more}
    return Model(f"jax_resnet {name}", sizes, build, tuple(free.split()), {"labels": "output"})


MODELS = (
    _model("ResNet", lambda r, _: r.ResNetBlock, "width_0 width_1", width_0=7, width_1=9),
    _model("ResNetD", lambda r, _: r.ResNetDBlock, "width_0 width_1", width_0=7, width_1=9),
    _model(
        "ResNeXt",
        lambda r, s: partial(r.ResNetBottleneckBlock, groups=s["groups"], base_width=16),
        "width_0 width_1 groups",
        width_0=12,
        width_1=20,
        groups=4,
    ),
    _model(
        "ResNeSt",
        lambda r, _: partial(r.ResNeStBottleneckBlock, base_width=64),
        "width_0 width_1",
        width_0=12,
        width_1=20,
    ),
)
