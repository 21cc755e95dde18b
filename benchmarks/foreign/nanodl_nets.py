"""Models of nanodl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats, tokens

REQUIRES = ("nanodl",)

_TEXT = {"batch": 2, "length": 6, "vocabulary": 11}
_WIDTHS = {"heads": 3, "head_dim": 4, "inner": 21}
_VIT = {"batch": 2, "side": 12, "colours": 7, "labels": 5, "heads": 3, "head_dim": 4}
_IMAGE = {"batch": 2, "side": 8, "colours": 7, "labels": 5}


def _model(
    name: str,
    sizes: Sizes,
    options: Callable[[Sizes], dict[str, Any]],
    inputs: Callable[[Sizes], tuple[np.ndarray, ...]],
    free: str,
    switch: str = "training",
    **fixed: str,
) -> Model:
    def build(s: Sizes) -> Built:
        import nanodl

        switched = {switch: False} if switch else {}
        made = built(getattr(nanodl, name)(**options(s)), *inputs(s), **switched)

        def apply(params: Any, *args: np.ndarray) -> Any:
            outputs = made.apply(params, *args)
            return outputs[0] if isinstance(outputs, tuple) else outputs

        return made._replace(apply=apply)

    return Model(f"nanodl {name}", sizes, build, tuple(free.split()), fixed)


def _text(s: Sizes) -> dict[str, Any]:
    return {
        "num_layers": 2,
        "num_heads": s["heads"],
        "hidden_dim": s["heads"] * s["head_dim"],
        "feedforward_dim": s["inner"],
        "embed_dim": s["heads"] * s["head_dim"],
        "vocab_size": s["vocabulary"],
        "max_length": s["length"],
        "dropout": 0.0,
        "start_token": 0,
        "end_token": 1,
    }


def _grouped(s: Sizes) -> dict[str, Any]:
    return _text(s) | {"num_groups": 2}


def _square(s: Sizes) -> dict[str, Any]:
    return _grouped({**s, "inner": s["heads"] * s["head_dim"]})


def _windowed(s: Sizes) -> dict[str, Any]:
    return _grouped(s) | {"window_size": 3, "shift_size": 1}


def _image(s: Sizes) -> dict[str, Any]:
    return {
        "patch_size": (4, 4),
        "num_layers": 2,
        "num_heads": s["heads"],
        "hidden_dim": s["heads"] * s["head_dim"],
        "feedforward_dim": s["inner"],
        "n_outputs": s["labels"],
        "dropout": 0.0,
    }


def _equal(s: Sizes) -> dict[str, Any]:
    return _image({**s, "inner": s["heads"] * s["head_dim"]})


def _experts(s: Sizes) -> dict[str, Any]:
    return _text(s) | {"num_experts": 4, "top_k": 2}


def _ids(s: Sizes) -> tuple[np.ndarray, ...]:
    return (tokens(s["batch"], s["length"], vocabulary=s["vocabulary"]),)


def _two(s: Sizes) -> tuple[np.ndarray, ...]:
    return *_ids(s), tokens(s["batch"], s["length"], vocabulary=s["vocabulary"], seed=1)


def _pixels(s: Sizes) -> tuple[np.ndarray, ...]:
    return (floats(s["batch"], s["side"], s["side"], s["colours"]),)


def _decoder(name: str, options: Callable[[Sizes], dict[str, Any]], **more: Any) -> Model:
    free = more.pop("free", "inner heads head_dim")
    inputs = more.pop("inputs", _ids)
    return _model(name, _TEXT | _WIDTHS, options, inputs, free, vocabulary="output", **more)


MODELS = (
    # Their attention reshapes (length, heads · head_dim) to (heads, length, head_dim).
    _decoder("GPT3", _text, free="inner head_dim", heads="iota"),
    _decoder("GPT4", _experts, free="inner head_dim", heads="iota"),
    _decoder("Transformer", _text, inputs=_two, free="inner head_dim", heads="iota"),
    # Places are added to the features of the queries.
    _decoder("LaMDA", _text, free="inner", heads="iota", head_dim="iota"),
    _decoder("T5", _text, inputs=_two, free="inner", heads="iota", head_dim="iota"),
    _decoder("Llama3", _grouped, free="inner"),
    _model("Gemma", _TEXT | {"heads": 3, "head_dim": 4}, _square, _ids, "", vocabulary="output"),
    _decoder("Mistral", _windowed, free="inner"),
    _decoder("Mixtral", _windowed, free="inner"),
    _model("ViT", _VIT, _equal, _pixels, "head_dim", labels="output", heads="cuts across"),
    _model("Mixer", _IMAGE | _WIDTHS, _image, _pixels, "inner", labels="output"),
    _model(
        "GAT",
        {"nodes": 6, "features": 5, "labels": 4, "heads": 2, "hidden": 7},
        lambda s: {
            "nfeat": s["features"],
            "nhid": s["hidden"],
            "nclass": s["labels"],
            "nheads": s["heads"],
            "dropout_rate": 0.0,
            "alpha": 0.2,
        },
        lambda s: (
            floats(s["nodes"], s["features"]),
            (floats(s["nodes"], s["nodes"], seed=1) > 0).astype(np.float32),
        ),
        "hidden",
        labels="output",
    ),
    _model(
        "UNet",
        {"batch": 2, "side": 8, "colours": 3, "width_0": 12, "width_1": 10, "embedded": 6},
        lambda s: {
            "image_size": (s["side"], s["side"]),
            "widths": [s["width_0"], s["width_1"]],
            "block_depth": 2,
            "embed_dims": s["embedded"],
            "embed_min_freq": 1.0,
            "embed_max_freq": 50.0,
        },
        lambda s: (*_pixels(s), np.abs(floats(s["batch"], 1, 1, 1, seed=1))),
        "",
        "",
        width_0="cuts across",
        width_1="cuts across",
    ),
)
