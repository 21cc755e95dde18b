"""Networks of Keras with the JAX backend (``KERAS_BACKEND=jax``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.foreign.registry import floating
from benchmarks.zoo.registry import Built, Model, Sizes, floats, tokens

REQUIRES = ("keras",)

# Keras normalises in float32 whatever the dtype: large enough to be seen above its rounding.
_EPSILON = 0.01


def keras_built(make: Callable[[], Any], *inputs: Any) -> Built:
    """Return a Keras model; its variables are parameters by their path.

    Keras decides on its dtype when a model is made, so there is one for each.
    """
    import keras

    models = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            before = keras.config.floatx()
            keras.config.set_floatx(dtype)
            keras.config.set_dtype_policy(dtype)
            keras.utils.clear_session(free_memory=False)
            models[dtype] = make()
            keras.config.set_floatx(before)
            keras.config.set_dtype_policy(before)

    def parts(model: Any) -> tuple[list[Any], list[Any]]:
        return model.trainable_variables, model.non_trainable_variables

    def apply(params: dict[str, Any], *args: Any) -> Any:
        model = models[str(floating())]
        given = [[params.get(v.path, v.value) for v in part] for part in parts(model)]
        return model.stateless_call(*given, *args, training=False)[0]

    shapes = {
        v.path: jax.ShapeDtypeStruct(v.shape, np.float32)
        for part in parts(models["float32"])
        for v in part
        if str(v.dtype).startswith("float")
    }
    return Built(apply, shapes, inputs)


def _model(
    name: str,
    sizes: Sizes,
    make: Callable[[Any, Sizes], Any],
    data: Callable[[Sizes], Any],
    free: str,
    **fixed: str,
) -> Model:
    def build(s: Sizes) -> Built:
        import keras

        return keras_built(lambda: make(keras, s), data(s))

    return Model(f"keras {name}", sizes, build, tuple(free.split()), fixed)


def _image(s: Sizes) -> np.ndarray:
    return floats(s["batch"], s["side"], s["side"], s["colours"])


def _mobile_net(keras: Any, s: Sizes) -> Any:
    return keras.applications.MobileNet(
        (s["side"], s["side"], s["colours"]),
        alpha=s["alpha"] / 8,
        weights=None,
        classes=s["labels"],
        dropout=0.0,
    )


def _convnext(keras: Any, s: Sizes) -> Any:
    from keras.src.applications.convnext import ConvNeXt

    return ConvNeXt(
        depths=[1, 1, 1, 1],
        projection_dims=[s[f"width_{i}"] for i in range(4)],
        include_preprocessing=False,
        weights=None,
        input_shape=(s["side"], s["side"], s["colours"]),
        classes=s["labels"],
        weights_name="",
        name="convnext",
    )


def _recurrent(keras: Any, s: Sizes) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((s["length"],), dtype="int32"),
            layers.Embedding(s["vocabulary"], s["embedded"]),
            layers.Bidirectional(layers.LSTM(s["lstm"], return_sequences=True)),
            layers.GRU(s["gru"]),
            layers.Dense(s["labels"], activation="softmax"),
        ]
    )


def _separable(keras: Any, s: Sizes) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((s["side"], s["side"], s["colours"])),
            layers.Conv2D(s["channels_0"], 3, padding="same", use_bias=False),
            layers.BatchNormalization(epsilon=_EPSILON),
            layers.Activation("swish"),
            layers.SeparableConv2D(s["channels_1"], 3, depth_multiplier=2, activation="relu"),
            layers.AveragePooling2D(2),
            layers.Conv2DTranspose(s["channels_2"], 2, strides=2),
            layers.LayerNormalization(epsilon=_EPSILON),
            layers.GlobalMaxPooling2D(),
            layers.Dense(s["labels"]),
        ]
    )


def _transformer(keras: Any, s: Sizes) -> Any:
    layers = keras.layers
    x = first = keras.Input((s["length"], s["features"]))
    x = layers.Dense(s["width"])(x)
    y = layers.LayerNormalization(epsilon=_EPSILON)(x)
    x = x + layers.MultiHeadAttention(s["heads"], s["key_dim"])(y, y)
    y = layers.LayerNormalization(epsilon=_EPSILON)(x)
    x = x + layers.Dense(s["width"])(layers.Dense(s["inner"], activation="gelu")(y))
    x = x + layers.GroupQueryAttention(s["head_dim"], s["kv_heads"] * s["per_kv"], s["kv_heads"])(
        x, x
    )
    return keras.Model(first, layers.Dense(s["labels"])(layers.GlobalAveragePooling1D()(x)))


_IMAGE = {"batch": 2, "side": 32, "colours": 3, "labels": 5}

MODELS = (
    _model("MobileNet", _IMAGE | {"alpha": 1}, _mobile_net, _image, "alpha", labels="output"),
    _model(
        "ConvNeXt",
        _IMAGE | {"width_0": 6, "width_1": 7, "width_2": 9, "width_3": 10},
        _convnext,
        _image,
        "width_0 width_1 width_2 width_3",
        labels="output",
    ),
    _model(
        "LSTM GRU",
        {"batch": 2, "length": 5, "vocabulary": 11, "embedded": 7, "lstm": 9, "gru": 8}
        | {"labels": 3},
        _recurrent,
        lambda s: tokens(s["batch"], s["length"], vocabulary=s["vocabulary"]),
        "embedded lstm gru",
        labels="output",
    ),
    _model(
        "SeparableConv2D",
        _IMAGE | {"side": 8, "channels_0": 7, "channels_1": 9, "channels_2": 10},
        _separable,
        _image,
        "channels_0 channels_1 channels_2",
        labels="output",
    ),
    _model(
        "MultiHeadAttention",
        {"batch": 2, "length": 5, "features": 13, "width": 14, "heads": 4, "key_dim": 6}
        | {"inner": 17, "head_dim": 8, "kv_heads": 3, "per_kv": 7, "labels": 11},
        _transformer,
        lambda s: floats(s["batch"], s["length"], s["features"]),
        "width heads key_dim inner head_dim kv_heads per_kv",
        labels="output",
    ),
)
