"""Tiny programs on which tools for structured pruning differ, in PyTorch and in JAX alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.foreign.torch_layers import (
    COLOURS,
    IMAGES,
    LABELS,
    Params,
    Shapes,
    Sizes,
    Twin,
    conv,
    conv_shapes,
    layer_norm,
    linear,
    linear_shapes,
)

FEATURES, INNER, SHUFFLED = 6, 9, 3


# Channels in another order between two convolutions


def _conv_shapes(s: Sizes) -> Shapes:
    channels = s["units"]
    return conv_shapes("first", channels, COLOURS, 3) | conv_shapes("head", LABELS, channels, 3)


def _shuffle_shapes(s: Sizes) -> Shapes:
    return _conv_shapes({"units": SHUFFLED * s["units"]})


def flip(params: Params, x: jax.Array) -> jax.Array:
    """Return labels' scores of channels read backwards."""
    y = jax.nn.relu(conv(params, "first", x, pad=1))
    return conv(params, "head", jnp.flip(y, 1), pad=1).mean((2, 3))


def shuffle(params: Params, x: jax.Array) -> jax.Array:
    """Return labels' scores of channels in ShuffleNet's order."""
    y = jax.nn.relu(conv(params, "first", x, pad=1))
    parts = y.reshape(y.shape[0], SHUFFLED, -1, *y.shape[2:])
    return conv(params, "head", parts.swapaxes(1, 2).reshape(y.shape), pad=1).mean((2, 3))


def _torch_shuffled(y: Any) -> Any:
    batch, channels, *image = y.shape
    parts = y.view(batch, SHUFFLED, channels // SHUFFLED, *image)
    return parts.transpose(1, 2).reshape(y.shape)


def _torch_convs(between: Callable[[Any], Any], groups: int = 1) -> Callable[[Sizes], Any]:
    def make(s: Sizes) -> Any:
        from torch import nn, relu

        class Convs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Conv2d(COLOURS, groups * s["units"], 3, padding=1)
                self.head = nn.Conv2d(groups * s["units"], LABELS, 3, padding=1)

            def forward(self, x: Any) -> Any:
                return self.head(between(relu(self.first(x)))).mean((2, 3))

        return Convs()

    return make


# A parameter that is of no layer


def _matrix_shapes(s: Sizes) -> Shapes:
    first, head = linear_shapes("first", s["units"], FEATURES), linear_shapes("head", LABELS, INNER)
    return first | {"matrix": (s["units"], INNER)} | head


def _matrix(product: str) -> Callable[[Params, jax.Array], jax.Array]:
    def apply(params: Params, x: jax.Array) -> jax.Array:
        y, matrix = jax.nn.relu(linear(params, "first", x)), params["matrix"]
        y = y @ matrix if product == "@" else jnp.einsum("bi,ij->bj", y, matrix)
        return linear(params, "head", jax.nn.relu(y))

    return apply


def _torch_matrix(product: str) -> Callable[[Sizes], Any]:
    def make(s: Sizes) -> Any:
        import torch
        from torch import nn, relu

        class Matrix(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(FEATURES, s["units"])
                self.matrix = nn.Parameter(torch.zeros(s["units"], INNER))
                self.head = nn.Linear(INNER, LABELS)

            def forward(self, x: Any) -> Any:
                y, matrix = relu(self.first(x)), self.matrix
                y = y @ matrix if product == "@" else torch.einsum("bi,ij->bj", y, matrix)
                return self.head(relu(y))

        return Matrix()

    return make


# A norm over many lanes


def _norm_shapes(s: Sizes) -> Shapes:
    units = s["units"]
    first, head = linear_shapes("first", units, FEATURES), linear_shapes("head", LABELS, units)
    return first | {"norm.weight": (units,), "norm.bias": (units,)} | head


def norm(params: Params, x: jax.Array) -> jax.Array:
    """Return labels' scores, read off normalised lanes."""
    y = layer_norm(params, "norm", linear(params, "first", x)[:, None])
    return linear(params, "head", y[:, 0])


def _torch_norm(s: Sizes) -> Any:
    from torch import nn

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(FEATURES, s["units"])
            self.norm = nn.LayerNorm(s["units"])
            self.head = nn.Linear(s["units"], LABELS)

        def forward(self, x: Any) -> Any:
            return self.head(self.norm(self.first(x)))

    return Norm()


_UNITS = {"units": 12}
_ROWS = (2, FEATURES)
FLIP = Twin("flip", _conv_shapes, flip, _torch_convs(lambda y: y.flip(1)), _UNITS, IMAGES)
SHUFFLE = Twin(
    "channel shuffle",
    _shuffle_shapes,
    shuffle,
    _torch_convs(_torch_shuffled, SHUFFLED),
    {"units": 4},
    IMAGES,
)
MATRIX = Twin("h @ parameter", _matrix_shapes, _matrix("@"), _torch_matrix("@"), _UNITS, _ROWS)
EINSUM = Twin("einsum", _matrix_shapes, _matrix("einsum"), _torch_matrix("einsum"), _UNITS, _ROWS)
NORM = Twin("LayerNorm of 768", _norm_shapes, norm, _torch_norm, {"units": 768}, _ROWS)
"""Wide, because of a set that is as good as sorted where numbers are small."""
PROGRAMS = (FLIP, SHUFFLE, MATRIX, EINSUM, NORM)
