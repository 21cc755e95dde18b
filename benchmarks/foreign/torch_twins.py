"""Models written in PyTorch and in JAX alike, for comparing with tools that work on PyTorch's."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.foreign.torch_layers import (
    COLOURS,
    IMAGES,
    LABELS,
    SIDE,
    Params,
    Shapes,
    Sizes,
    Twin,
    batch_norm,
    batch_norm_shapes,
    conv,
    conv_shapes,
    linear,
    linear_shapes,
)
from benchmarks.foreign.torch_vit import VITS

# A convolutional network with a residual block whose middle is depthwise, and flattened features


def _cnn_shapes(s: Sizes) -> Shapes:
    return {
        **conv_shapes("stem", s["stream"], COLOURS, 3),
        **batch_norm_shapes("stem_norm", s["stream"]),
        **conv_shapes("expand", s["inner"], s["stream"], 3),
        **batch_norm_shapes("expand_norm", s["inner"]),
        **conv_shapes("depthwise", s["inner"], 1, 3),
        **batch_norm_shapes("depthwise_norm", s["inner"]),
        **conv_shapes("project", s["stream"], s["inner"], 1),
        **batch_norm_shapes("project_norm", s["stream"]),
        **conv_shapes("down", s["down"], s["stream"], 3),
        **batch_norm_shapes("down_norm", s["down"]),
        **linear_shapes("head", LABELS, s["down"] * (SIDE // 2) ** 2),
    }


def cnn(params: Params, x: jax.Array) -> jax.Array:
    """Return labels' scores."""

    def block(name: str, x: jax.Array, **how: int) -> jax.Array:
        return batch_norm(params, f"{name}_norm", conv(params, name, x, **how))

    x = jax.nn.relu(block("stem", x, pad=1))
    y = jax.nn.relu(block("expand", x, pad=1))
    y = jax.nn.relu(block("depthwise", y, pad=1))
    x = jax.nn.relu(x + block("project", y))
    x = jax.nn.relu(block("down", x, stride=2, pad=1))
    return linear(params, "head", x.reshape(x.shape[0], -1))


def _torch_cnn(s: Sizes) -> Any:
    from torch import nn, relu

    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stream, inner, down = s["stream"], s["inner"], s["down"]
            self.stem = nn.Conv2d(COLOURS, stream, 3, padding=1)
            self.stem_norm = nn.BatchNorm2d(stream)
            self.expand = nn.Conv2d(stream, inner, 3, padding=1)
            self.expand_norm = nn.BatchNorm2d(inner)
            self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
            self.depthwise_norm = nn.BatchNorm2d(inner)
            self.project = nn.Conv2d(inner, stream, 1)
            self.project_norm = nn.BatchNorm2d(stream)
            self.down = nn.Conv2d(stream, down, 3, stride=2, padding=1)
            self.down_norm = nn.BatchNorm2d(down)
            self.head = nn.Linear(down * (SIDE // 2) ** 2, LABELS)

        def forward(self, x: Any) -> Any:
            x = relu(self.stem_norm(self.stem(x)))
            y = relu(self.expand_norm(self.expand(x)))
            y = relu(self.depthwise_norm(self.depthwise(y)))
            x = relu(x + self.project_norm(self.project(y)))
            x = relu(self.down_norm(self.down(x)))
            return self.head(x.flatten(1))

    return Cnn()


# A convolution in groups, and the mean position

GROUPS = 4


def _grouped_shapes(s: Sizes) -> Shapes:
    into, out = GROUPS * s["into"], GROUPS * s["out"]
    return {
        **conv_shapes("stem", into, COLOURS, 3),
        **conv_shapes("grouped", out, s["into"], 3),
        **batch_norm_shapes("norm", out),
        **linear_shapes("head", LABELS, out),
    }


def grouped(params: Params, x: jax.Array) -> jax.Array:
    """Return labels' scores."""
    x = jax.nn.relu(conv(params, "stem", x, pad=1))
    x = jax.nn.relu(batch_norm(params, "norm", conv(params, "grouped", x, pad=1)))
    return linear(params, "head", x.mean((2, 3)))


def _torch_grouped(s: Sizes) -> Any:
    from torch import nn, relu

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            into, out = GROUPS * s["into"], GROUPS * s["out"]
            self.stem = nn.Conv2d(COLOURS, into, 3, padding=1)
            self.grouped = nn.Conv2d(into, out, 3, padding=1, groups=GROUPS)
            self.norm = nn.BatchNorm2d(out)
            self.head = nn.Linear(out, LABELS)

        def forward(self, x: Any) -> Any:
            x = relu(self.norm(self.grouped(relu(self.stem(x)))))
            return self.head(x.mean((2, 3)))

    return Grouped()


TWINS = (
    Twin("cnn", _cnn_shapes, cnn, _torch_cnn, {"stream": 16, "inner": 24, "down": 32}, IMAGES),
    Twin("grouped", _grouped_shapes, grouped, _torch_grouped, {"into": 8, "out": 12}, IMAGES),
    *VITS,
)
