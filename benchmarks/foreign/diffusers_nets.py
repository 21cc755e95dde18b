"""The Flax models of Hugging Face's diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.foreign.registry import floating
from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("diffusers",)


def _model(
    name: str,
    sizes: Sizes,
    options: Callable[[Sizes], dict[str, Any]],
    inputs: Callable[[Sizes], tuple[np.ndarray, ...]],
    free: str,
    **fixed: str,
) -> Model:
    def build(s: Sizes) -> Built:
        import diffusers

        def make() -> Any:
            return getattr(diffusers, name)(dtype=floating(), **options(s))

        def apply(params: Any, *args: Any) -> Any:
            return make().apply({"params": params}, *args).sample

        return Built(apply, jax.eval_shape(make().init_weights, jax.random.key(0)), inputs(s))

    return Model(f"diffusers {name}", sizes, build, tuple(free.split()), fixed)


def _unet(s: Sizes) -> dict[str, Any]:
    return {
        "sample_size": s["side"],
        "in_channels": s["colours"],
        "out_channels": s["out"],
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32 * s["per_group_0"], 32 * s["per_group_1"]),
        "layers_per_block": 1,
        "attention_head_dim": (s["heads_0"], s["heads_1"]),  # their number, whatever the name
        "cross_attention_dim": s["text"],
    }


def _autoencoder(s: Sizes) -> dict[str, Any]:
    return {
        "sample_size": s["side"],
        "in_channels": s["colours"],
        "out_channels": s["out"],
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (3 * s["per_group_0"], 3 * s["per_group_1"]),
        "latent_channels": s["latent"],
        "norm_num_groups": 3,
    }


MODELS = (
    _model(
        "FlaxUNet2DConditionModel",
        {"batch": 2, "side": 4, "colours": 9, "out": 5, "per_group_0": 1, "per_group_1": 3}
        | {"text": 7, "length": 6, "heads_0": 16, "heads_1": 8},
        _unet,
        lambda s: (
            floats(s["batch"], s["colours"], s["side"], s["side"]),
            np.array([3.0, 5.0], np.float32),
            floats(s["batch"], s["length"], s["text"]),
        ),
        "",
        per_group_0="cuts across",
        per_group_1="cuts across",
    ),
    _model(
        "FlaxAutoencoderKL",
        {"batch": 2, "side": 8, "colours": 4, "out": 5, "per_group_0": 3, "per_group_1": 7}
        | {"latent": 6},
        _autoencoder,
        lambda s: (floats(s["batch"], s["colours"], s["side"], s["side"]),),
        "per_group_0 per_group_1 latent",
        out="output",
    ),
)
