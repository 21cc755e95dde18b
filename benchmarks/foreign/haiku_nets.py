"""Networks of dm-haiku."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.zoo.registry import Built, Model, Sizes, floats, tokens

REQUIRES = ("haiku",)

Forward = Callable[[Sizes, Any, bool], Any]

_IMAGE = {"batch": 2, "side": 16, "colours": 3, "labels": 5}
_SERIES = {"steps": 4, "batch": 2, "features": 5, "labels": 3}


def _image(s: Sizes) -> np.ndarray:
    return floats(s["batch"], s["side"], s["side"], s["colours"])


def _series(s: Sizes) -> np.ndarray:
    return floats(s["steps"], s["batch"], s["features"])


def _model(
    name: str,
    sizes: Sizes,
    forward: Forward,
    data: Callable[[Sizes], np.ndarray],
    free: str,
    **fixed: str,
) -> Model:
    """Return a model of a function that calls Haiku modules."""

    def build(s: Sizes) -> Built:
        import haiku as hk

        def net(training: bool) -> Any:
            called = hk.transform_with_state(lambda x: forward(s, x, training))
            return hk.without_apply_rng(called)

        x = data(s)
        params = jax.eval_shape(net(True).init, jax.random.key(0), x)
        return Built(lambda p, x: net(False).apply(*p, x)[0], params, (x,))

    return Model(f"haiku {name}", sizes, build, tuple(free.split()), fixed)


def _mlp(s: Sizes, x: Any, training: bool) -> Any:
    import haiku as hk

    return hk.nets.MLP((s["width_0"], s["width_1"], s["labels"]), activation=jax.nn.silu)(x)


def _resnet(bottleneck: bool, v2: bool) -> Forward:
    def forward(s: Sizes, x: Any, training: bool) -> Any:
        import haiku as hk

        times = 4 if bottleneck else 1
        net = hk.nets.ResNet(
            (1, 1, 2, 1),
            s["labels"],
            resnet_v2=v2,
            bottleneck=bottleneck,
            channels_per_group=[times * s[f"channels_{i}"] for i in range(4)],
            initial_conv_config={"output_channels": s["stem"]},
        )
        return net(x, is_training=training)

    return forward


def _mobile_net(s: Sizes, x: Any, training: bool) -> Any:
    import haiku as hk

    channels = [s["channels_0"], s["channels_1"], s["channels_2"]]
    return hk.nets.MobileNetV1((1, 2, 1), channels, s["labels"])(x, is_training=training)


def _recurrent(core: str) -> Forward:
    def forward(s: Sizes, x: Any, training: bool) -> Any:
        import haiku as hk

        layer = getattr(hk, core)
        net = hk.DeepRNN([layer(s["width_0"]), jax.nn.relu, layer(s["width_1"])])
        outputs, _ = hk.dynamic_unroll(net, x, net.initial_state(x.shape[1]))
        return hk.Linear(s["labels"])(outputs)

    return forward


def _conv_lstm(s: Sizes, x: Any, training: bool) -> Any:
    import haiku as hk

    net = hk.Conv2DLSTM((s["side"], s["side"]), s["channels"], 3)
    frames = x[None].repeat(3, 0) if x.ndim == 4 else x
    outputs, _ = hk.dynamic_unroll(net, frames, net.initial_state(x.shape[0]))
    return hk.Linear(s["labels"])(outputs[-1].mean((1, 2)))


def _transformer(s: Sizes, x: Any, training: bool) -> Any:
    import haiku as hk

    y = hk.Embed(s["vocabulary"], s["width"])(x)
    for _ in range(2):
        z = hk.LayerNorm(-1, True, True)(y)
        attention = hk.MultiHeadAttention(
            s["heads"],
            s["key_dim"],
            w_init=hk.initializers.VarianceScaling(1.0),
            value_size=s["value_dim"],
            model_size=s["width"],
        )
        y = y + attention(z, z, z)
        z = hk.LayerNorm(-1, True, True)(y)
        y = y + hk.nets.MLP((s["inner"], s["width"]), activation=jax.nn.gelu)(z)
    return hk.Linear(s["vocabulary"])(hk.RMSNorm(-1)(y))


def _quantised(s: Sizes, x: Any, training: bool) -> Any:
    import haiku as hk

    z = hk.Linear(s["code_dim"])(x)
    codes = hk.nets.VectorQuantizer(s["code_dim"], s["codes"], 0.25)(z, is_training=training)
    return hk.nets.MLP((s["width"], s["labels"]))(codes["quantize"])


_CHANNELS = {"stem": 6, "channels_0": 7, "channels_1": 9, "channels_2": 11, "channels_3": 13}

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
        "ResNet v1",
        _IMAGE | _CHANNELS,
        _resnet(bottleneck=False, v2=False),
        _image,
        " ".join(_CHANNELS),
        labels="output",
    ),
    _model(
        "ResNet v2 bottleneck",
        _IMAGE | _CHANNELS,
        _resnet(bottleneck=True, v2=True),
        _image,
        " ".join(_CHANNELS),
        labels="output",
    ),
    _model(
        "MobileNetV1",
        _IMAGE | {"channels_0": 7, "channels_1": 9, "channels_2": 11},
        _mobile_net,
        _image,
        "channels_0 channels_1 channels_2",
        labels="output",
    ),
    *(
        _model(
            core,
            _SERIES | {"width_0": 7, "width_1": 9},
            _recurrent(core),
            _series,
            "width_0 width_1",
            labels="output",
        )
        for core in ("LSTM", "GRU", "VanillaRNN")
    ),
    _model(
        "Conv2DLSTM",
        {"batch": 2, "side": 4, "colours": 3, "channels": 7, "labels": 5},
        _conv_lstm,
        _image,
        "channels",
        labels="output",
    ),
    _model(
        "MultiHeadAttention",
        {"batch": 2, "length": 5, "vocabulary": 11, "heads": 3, "key_dim": 4, "value_dim": 6}
        | {"width": 15, "inner": 21},
        _transformer,
        lambda s: tokens(s["batch"], s["length"], vocabulary=s["vocabulary"]),
        "heads key_dim value_dim width inner",
        vocabulary="output",
    ),
    _model(
        "VectorQuantizer",
        {"batch": 4, "features": 5, "code_dim": 6, "codes": 10, "width": 7, "labels": 3},
        _quantised,
        lambda s: floats(s["batch"], s["features"]),
        "code_dim width",
        codes="gather",
    ),
)
