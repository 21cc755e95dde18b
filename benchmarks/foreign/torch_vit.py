"""A vision transformer in PyTorch and in JAX alike, with q, k and v in one layer or in three."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.foreign.torch_layers import (
    COLOURS,
    IMAGES,
    LABELS,
    SIDE,
    Params,
    Shapes,
    Sizes,
    Twin,
    conv,
    conv_shapes,
    layer_norm,
    layer_norm_shapes,
    linear,
    linear_shapes,
)

PATCH = 4
HEADS, DEPTH = 3, 2
_APART = ("q", "k", "v")


def _vit_shapes(s: Sizes, fused: bool) -> Shapes:
    width, inside = HEADS * s["lanes"], HEADS * s["head_dim"]
    tokens = (SIDE // PATCH) ** 2 + 1
    made = {
        "class_token": (1, 1, width),
        "positions": (1, tokens, width),
        **conv_shapes("patches", width, COLOURS, PATCH),
    }
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        made |= layer_norm_shapes(f"{block}.norm_1", width)
        projections = {"qkv": 3 * inside} if fused else dict.fromkeys(_APART, inside)
        for name, size in projections.items():
            made |= linear_shapes(f"{block}.{name}", size, width)
        made |= linear_shapes(f"{block}.out", width, inside)
        made |= layer_norm_shapes(f"{block}.norm_2", width)
        made |= linear_shapes(f"{block}.up", s["mlp"], width)
        made |= linear_shapes(f"{block}.down", width, s["mlp"])
    return made | layer_norm_shapes("norm", width) | linear_shapes("head", LABELS, width)


def _attention(params: Params, block: str, x: jax.Array, fused: bool) -> jax.Array:
    batch, tokens = x.shape[:2]
    if fused:
        y = linear(params, f"{block}.qkv", x).reshape(batch, tokens, 3, HEADS, -1)
        q, k, v = (y[:, :, i] for i in range(3))
    else:
        made = (linear(params, f"{block}.{name}", x) for name in _APART)
        q, k, v = (y.reshape(batch, tokens, HEADS, -1) for y in made)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return linear(params, f"{block}.out", mixed.reshape(batch, tokens, -1))


def vit(params: Params, x: jax.Array, fused: bool) -> jax.Array:
    """Return labels' scores, read off the class token."""
    x = conv(params, "patches", x, stride=PATCH)
    x = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
    first = jnp.broadcast_to(params["class_token"], (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([first, x], 1) + params["positions"]
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        x = x + _attention(params, block, layer_norm(params, f"{block}.norm_1", x), fused)
        y = linear(params, f"{block}.up", layer_norm(params, f"{block}.norm_2", x))
        x = x + linear(params, f"{block}.down", jax.nn.gelu(y, approximate=False))
    return linear(params, "head", layer_norm(params, "norm", x)[:, 0])


def _torch_block(s: Sizes, fused: bool) -> Any:
    from torch import nn
    from torch.nn.functional import gelu

    width, inside = HEADS * s["lanes"], HEADS * s["head_dim"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            for name, size in {"qkv": 3 * inside}.items() if fused else ():
                setattr(self, name, nn.Linear(width, size))
            for name in () if fused else _APART:
                setattr(self, name, nn.Linear(width, inside))
            self.out = nn.Linear(inside, width)
            self.up, self.down = nn.Linear(width, s["mlp"]), nn.Linear(s["mlp"], width)
            # A number as in timm: pruning leaves it, as it leaves the temperature of attention.
            self.scale = s["head_dim"] ** -0.5

        def attention(self, x: Any) -> Any:
            batch, tokens = x.shape[:2]
            if fused:
                y = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
                q, k, v = y.unbind(0)
            else:
                made = (getattr(self, name)(x) for name in _APART)
                q, k, v = (y.reshape(batch, tokens, HEADS, -1).transpose(1, 2) for y in made)
            mixed = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
            return self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm_1(x))
            return x + self.down(gelu(self.up(self.norm_2(x))))

    return Block()


def _torch_vit(s: Sizes, fused: bool) -> Any:
    import torch
    from torch import nn

    width = HEADS * s["lanes"]

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tokens = (SIDE // PATCH) ** 2 + 1
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(torch.zeros(1, tokens, width))
            self.patches = nn.Conv2d(COLOURS, width, PATCH, stride=PATCH)
            self.blocks = nn.Sequential(*(_torch_block(s, fused) for _ in range(DEPTH)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, LABELS)

        def forward(self, x: Any) -> Any:
            x = self.patches(x).flatten(2).transpose(1, 2)
            first = self.class_token.expand(x.shape[0], -1, -1)
            x = self.blocks(torch.cat([first, x], 1) + self.positions)
            return self.head(self.norm(x)[:, 0])

    return Vit()


def _vit_twin(name: str, fused: bool) -> Twin:
    projections = ("qkv",) if fused else _APART
    names = [f"blocks.{i}.{each}" for i in range(DEPTH) for each in projections]
    return Twin(
        name,
        partial(_vit_shapes, fused=fused),
        partial(vit, fused=fused),
        partial(_torch_vit, fused=fused),
        # Few lanes: Torch-Pruning 1.6.1 mixes up those of a LayerNorm where there are more
        # (``torch_programs.NORM``).
        {"lanes": 8, "head_dim": 8, "mlp": 40},
        IMAGES,
        heads=dict.fromkeys(names, HEADS),
    )


VITS = (_vit_twin("vit", fused=False), _vit_twin("vit qkv", fused=True))
