"""Backbones of KerasHub with the JAX backend (``KERAS_BACKEND=jax``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.foreign.keras_nets import keras_built
from benchmarks.zoo.registry import Built, Model, Sizes, floats, tokens

REQUIRES = ("keras", "keras_hub")

_TEXT = {"batch": 2, "length": 5, "vocabulary": 11, "heads": 4, "head_dim": 6, "inner": 21}
_EPSILON = 0.01  # seen above the rounding of norms in float32
_NO_DROPOUT = {"num_layers": 2, "dropout": 0.0}


def _model(
    name: str,
    sizes: Sizes,
    options: Callable[[Sizes], dict[str, Any]],
    free: str,
    inputs: Callable[[Sizes], Any],
    **fixed: str,
) -> Model:
    """Return a backbone whose last features are read out by its embedding or a mean."""

    def build(s: Sizes) -> Built:
        import keras
        import keras_hub

        def make() -> Any:
            net = getattr(keras_hub.models, f"{name}Backbone")(**options(s))
            last = net.output
            if isinstance(last, dict):
                last = last.get("decoder_sequence_output", last.get("sequence_output"))
            if "vocabulary" not in s:
                pooled = keras.layers.GlobalAveragePooling1D()(last)
                return keras.Model(net.inputs, keras.layers.Dense(s["labels"])(pooled))
            return keras.Model(net.inputs, keras.layers.Dense(s["vocabulary"])(last))

        given = inputs(s)
        return keras_built(make, given)

    return Model(f"keras_hub {name}", sizes, build, tuple(free.split()), fixed)


def _ids(s: Sizes) -> dict[str, np.ndarray]:
    ids = tokens(s["batch"], s["length"], vocabulary=s["vocabulary"])
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def _segments(s: Sizes) -> dict[str, np.ndarray]:
    ids = tokens(s["batch"], s["length"], vocabulary=s["vocabulary"])
    return {"token_ids": ids, "segment_ids": np.zeros_like(ids)}


def _two(s: Sizes) -> dict[str, np.ndarray]:
    encoder = {f"encoder_{name}": x for name, x in _ids(s).items()}
    return encoder | {f"decoder_{name}": x for name, x in _ids(s).items()}


def _plain(s: Sizes) -> dict[str, Any]:
    return _NO_DROPOUT | {
        "vocabulary_size": s["vocabulary"],
        "num_heads": s["heads"],
        "hidden_dim": s["heads"] * s["head_dim"],
        "intermediate_dim": s["inner"],
        "max_sequence_length": s["length"],
    }


def _t5(s: Sizes) -> dict[str, Any]:
    own = {"layer_norm_epsilon": _EPSILON, "key_value_dim": s["head_dim"], "hidden_dim": s["width"]}
    options = _plain(s) | own
    del options["max_sequence_length"]
    return options


def _f_net(s: Sizes) -> dict[str, Any]:
    options = _plain({**s, "heads": 1, "head_dim": s["width"]})
    del options["num_heads"]
    return options


def _mixtral(s: Sizes) -> dict[str, Any]:
    heads = s["kv_heads"] * s["per_kv"]
    return _NO_DROPOUT | {
        "vocabulary_size": s["vocabulary"],
        "num_query_heads": heads,
        "num_key_value_heads": s["kv_heads"],
        "hidden_dim": heads * s["head_dim"],
        "intermediate_dim": s["inner"],
        "num_experts": s["experts"],
        "top_k": 2,
        "layer_norm_epsilon": _EPSILON,
    }


def _swin(s: Sizes) -> dict[str, Any]:
    return {
        "image_shape": (s["side"], s["side"], s["colours"]),
        "embed_dim": s["heads"] * s["head_dim"],
        "depths": (2, 2),
        "num_heads": (s["heads"], 2 * s["heads"]),
        "window_size": 2,
        "patch_size": 2,
        "mlp_ratio": s["inner_per_width"],
        "drop_path": 0.0,
    }


MODELS = (
    _model("T5", _TEXT | {"width": 15}, _t5, "heads head_dim width inner", _two),
    _model(
        "FNet",
        {"batch": 2, "length": 6, "vocabulary": 11, "width": 12, "inner": 21},
        _f_net,
        "inner",
        _segments,
        width="`fft` transforms",
    ),
    _model("DebertaV3", _TEXT, _plain, "heads head_dim inner", _ids),
    _model(
        "Mixtral",
        {"batch": 2, "length": 7, "vocabulary": 11, "kv_heads": 3, "per_kv": 4, "head_dim": 6}
        | {"inner": 21, "experts": 5},
        _mixtral,
        "kv_heads per_kv inner",
        _ids,
        vocabulary="output",
    ),
    _model(
        "SwinTransformer",
        {"batch": 2, "side": 8, "colours": 3, "labels": 5, "heads": 4, "head_dim": 6}
        | {"inner_per_width": 7},
        _swin,
        "heads head_dim inner_per_width",
        lambda s: floats(s["batch"], s["side"], s["side"], s["colours"]),
        labels="output",
    ),
)
