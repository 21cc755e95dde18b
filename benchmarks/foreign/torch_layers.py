"""What a model written in PyTorch and in JAX alike is, and layers for them.

A twin's parameters are a flat dictionary with the names, shapes and layouts of PyTorch's
``state_dict``, running statistics included, so that a name and a dimension mean the same on both
sides.  PyTorch is imported where its modules are made, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Params: TypeAlias = "dict[str, jax.Array]"
Shapes: TypeAlias = "dict[str, tuple[int, ...]]"
Sizes: TypeAlias = "Mapping[str, int]"

EPSILON = 1e-5
COLOURS, SIDE, LABELS = 3, 8, 5
IMAGES = (2, COLOURS, SIDE, SIDE)


@dataclass(frozen=True)
class Twin:
    """One model in both frameworks.

    ``module(sizes)`` makes PyTorch's, with weights of its own; ``fixed`` names layers whose outputs
    stay, ``heads`` those whose outputs are heads, by how many.
    """

    name: str
    shapes: Callable[[Sizes], Shapes]
    apply: Callable[[Params, jax.Array], jax.Array]
    module: Callable[[Sizes], Any]
    sizes: Sizes
    input: tuple[int, ...]
    fixed: tuple[str, ...] = ("head",)
    heads: Mapping[str, int] = field(default_factory=dict)

    def smaller(self, share: float) -> Sizes:
        """Return the sizes with ``share`` of the units taken away."""
        return {name: round(size * (1 - share)) for name, size in self.sizes.items()}

    def weights(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random weights of the big model; variances are positive."""
        rng = np.random.default_rng(seed)
        made = {}
        for name, shape in self.shapes(self.sizes).items():
            drawn = rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))
            if name.endswith("running_var"):
                drawn = np.exp(drawn)
            made[name] = drawn.astype(np.float32)
        return made

    def params(self, seed: int = 0) -> Params:
        """Return the weights as JAX's arrays."""
        return {name: jnp.asarray(leaf) for name, leaf in self.weights(seed).items()}

    def small_params(self, share: float) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the small model's parameters."""
        shapes = self.shapes(self.smaller(share))
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def inputs(self, seed: int = 1) -> np.ndarray:
        """Return random inputs."""
        return np.random.default_rng(seed).normal(size=self.input).astype(np.float32)

    def torch_module(self, seed: int = 0) -> Any:
        """Return PyTorch's module with the same weights, in evaluation mode."""
        import torch

        module = self.module(self.sizes)
        given = {name: torch.tensor(leaf) for name, leaf in self.weights(seed).items()}
        # strict=False: PyTorch also counts the batches that a norm has seen, which nothing reads.
        found = module.load_state_dict(given, strict=False)
        odd = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
        if odd or found.unexpected_keys:
            raise ValueError(f"the twins of {self.name} differ: {odd}, {found.unexpected_keys}")
        return module.eval()


# Layers, in PyTorch's layouts


def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    """Return ``x Wᵀ + b``."""
    y = jnp.einsum("...i,oi->...o", x, params[f"{name}.weight"])
    bias = params[f"{name}.bias"]
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def conv(params: Params, name: str, x: jax.Array, stride: int = 1, pad: int = 0) -> jax.Array:
    """Return the convolution of images (channels first); the kernel's shape says the groups."""
    kernel = params[f"{name}.weight"]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=x.shape[1] // kernel.shape[1],
    )
    return y + params[f"{name}.bias"].reshape(1, -1, 1, 1)


def batch_norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    """Return channels normalised by their running statistics."""
    own = {
        each: params[f"{name}.{each}"].reshape(1, -1, 1, 1)
        for each in ("running_mean", "running_var", "weight", "bias")
    }
    scaled = (x - own["running_mean"]) / jnp.sqrt(own["running_var"] + EPSILON)
    return scaled * own["weight"] + own["bias"]


def layer_norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    """Return lanes normalised at every position."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
    weight, bias = (params[f"{name}.{each}"].reshape(1, 1, -1) for each in ("weight", "bias"))
    return scaled * weight + bias


def conv_shapes(name: str, out: int, into: int, kernel: int) -> Shapes:
    """Return the shapes of a convolution with biases."""
    return {f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)}


def linear_shapes(name: str, out: int, into: int) -> Shapes:
    """Return the shapes of a linear layer."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def batch_norm_shapes(name: str, size: int) -> Shapes:
    """Return the shapes of a norm of channels and its statistics."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (size,) for part in parts}


def layer_norm_shapes(name: str, size: int) -> Shapes:
    """Return the shapes of a norm of lanes."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
