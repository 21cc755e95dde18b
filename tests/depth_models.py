"""Models of any number of layers, for growth in depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.zoo import attention, decoders, nnx_models, stacks
from benchmarks.zoo.registry import Built, built, floats, tokens
from uscale_jax.trace.depth import Deepened, deepen
from uscale_jax.trace.tracing import Model

_normal = nn.initializers.normal(0.5)


def encoder(layers: int, pre: bool = True, remat: bool = False, width: int = 4) -> Built:
    layer = nn.remat(attention.Layer) if remat else attention.Layer
    made = (*(partial(layer, 2, 3, width + 2, pre) for _ in range(layers)),)
    return built(attention.Encoder(made, width, 5, pre), floats(2, 6, 7))


def llama(layers: int, width: int = 6, hidden: int = 5) -> Built:
    mixer = partial(decoders.Grouped, 2, 2, 4)
    block = partial(decoders.Block, mixer, partial(attention.Gated, hidden), nn.RMSNorm, False)
    module = decoders.Decoder(11, width, (block,) * layers, nn.RMSNorm, False)
    return built(module, tokens(2, 5, vocabulary=11))


class Blocks(nnx.Module):
    """Pre-norm layers in a list, each with a list of its own."""

    def __init__(self, layers: int, width: int, rngs: nnx.Rngs) -> None:
        sizes = {"width": width, "heads": 2, "head_dim": 3}
        self.embed = nnx.Linear(7, width, rngs=rngs)
        self.blocks = nnx.List([nnx_models.Layer(sizes, 5, True, rngs) for _ in range(layers)])
        self.readout = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


def nnx_list(layers: int, width: int = 4) -> Built:
    return nnx_models.functional(partial(Blocks, layers, width), floats(2, 6, 7))


def nnx_scan(layers: int, width: int = 4) -> Built:
    sizes = {"layers": layers, "width": width, "heads": 2, "head_dim": 3, "hidden": 5}
    sizes |= {"features": 7, "out": 3}
    return nnx_models.functional(partial(nnx_models.Scanned, sizes), floats(2, 6, 7))


def scan(layers: int, width: int = 4, remat: bool = False) -> Built:
    block = nn.remat(stacks.Attention) if remat else stacks.Attention
    return built(stacks.Scanned(block, (2, 3, 5), layers, width, 3), floats(2, 6, 7))


def shapes(tree: Any) -> Any:
    """Return float32 shapes for sizes given as tuples."""
    make = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    return jax.tree.map(make, tree, is_leaf=lambda x: isinstance(x, tuple))


def repeated(
    layer: Callable[[Any, jax.Array], jax.Array],
    leaves: dict[str, tuple[int, ...]],
    layers: int,
    width: int = 4,
    remat: bool = False,
) -> Built:
    """Return a readout of one kind of layer after another, in a plain dict."""
    params = {f"block{i + 1}": leaves for i in range(layers)} | {"out": (width, 3)}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        step = jax.jit(layer) if remat else layer
        for i in range(layers):
            x = step(p[f"block{i + 1}"], x)
        return x @ p["out"]

    return Built(jax.jit(apply) if remat else apply, shapes(params), (floats(3, width),))


MLP = {"norm": (4,), "up": (4, 6), "bias": (6,), "down": (6, 4), "shift": (4,)}


def mlp(p: Any, x: jax.Array) -> jax.Array:
    """Return ``x`` plus a perceptron of its norm."""
    y = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["norm"][None]
    return x + jax.nn.gelu(y @ p["up"] + p["bias"][None]) @ p["down"] + p["shift"][None]


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)


def normed(p: Any, x: jax.Array) -> jax.Array:
    """Return ``x`` through a batch norm of given statistics."""
    mean, var, scale, bias = (
        p[name][None, None, None] for name in ("mean", "var", "scale", "bias")
    )
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def resnet(layers: int, width: int = 3, activated: bool = True) -> Built:
    """Return residual blocks, with a relu behind the sum or before the first convolution."""
    norm = dict.fromkeys(("mean", "var", "scale", "bias"), (width,))
    kernel = (3, 3, width, width)
    block = {"conv_a": kernel, "conv_b": kernel, "norm_a": norm, "norm_b": norm}
    params = {"stages": [block] * layers, "out": (width, 2)}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x)
        for b in p["stages"]:
            y = x if activated else jax.nn.relu(normed(b["norm_a"], x))
            y = conv(y, b["conv_a"])
            y = jax.nn.relu(normed(b["norm_a"], y) if activated else normed(b["norm_b"], y))
            y = conv(y, b["conv_b"])
            x = jax.nn.relu(x + normed(b["norm_b"], y)) if activated else x + y
        return x.mean((1, 2)) @ p["out"]

    return Built(apply, shapes(params), (floats(2, 5, 4, width),))


def lstm(layers: int, width: int = 4, residual: bool = False) -> Built:
    """Return LSTMs on each other's states, plus their inputs if ``residual``."""
    layer = {"inside": (width, 4 * width), "state": (width, 4 * width), "bias": (4 * width,)}
    params = {"lstm": {f"l{i}": layer for i in range(layers)}, "out": (width, 3)}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        for i in range(layers):
            y = run_lstm(p["lstm"][f"l{i}"], x)
            x = x + y if residual else y
        return x @ p["out"]

    return Built(apply, shapes(params), (floats(5, 2, width),))


def run_lstm(p: Any, x: jax.Array) -> jax.Array:
    """Return the states over ``x`` float[time, batch, width]."""

    def step(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> Any:
        c, h = carry
        gates = jnp.split(x @ p["inside"] + h @ p["state"] + p["bias"][None], 4, axis=-1)
        i, f, o = (jax.nn.sigmoid(gate) for gate in gates[:3])
        c = f * c + i * jnp.tanh(gates[3])
        h = o * jnp.tanh(c)
        return (c, h), h

    start = jnp.zeros(x.shape[1:], x.dtype)
    return jax.lax.scan(step, (start, start), x)[1]


def translator(encoders: int, decoders: int, width: int = 4) -> Built:
    """Return an encoder, and a decoder that reads its last states; T5's flat names."""
    attend = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    params: dict[str, Any] = {"out": (width, 3), "dec_norm": (width,)}
    for i in range(encoders):
        params |= {f"enc_{i}_attend": attend, f"enc_{i}_norm": (width,)}
    for i in range(decoders):
        params |= {f"dec_{i}_cross": attend, f"dec_{i}_attend": attend, f"dec_{i}_norm": (width,)}

    def apply(p: Any, source: jax.Array, target: jax.Array) -> jax.Array:
        for i in range(encoders):
            y = rms(source) * p[f"enc_{i}_norm"][None, None]
            source = source + cross(p[f"enc_{i}_attend"], y, y)
        for i in range(decoders):
            y = rms(target) * p[f"dec_{i}_norm"][None, None]
            target = target + cross(p[f"dec_{i}_attend"], y, y)
            target = target + cross(p[f"dec_{i}_cross"], rms(target), source)
        return rms(target) * p["dec_norm"][None, None] @ p["out"]

    return Built(apply, shapes(params), (floats(2, 5, width), floats(2, 3, width, seed=1)))


def rms(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def cross(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = jnp.einsum("btd,bsd->bts", x @ p["q"], y @ p["k"])
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(logits), y @ p["v"]) @ p["o"]


def lists(layers: int) -> Built:
    """Return layers whose norms are in a list of their own."""
    params = {"norms": [(4,)] * layers, "kernels": [(4, 4)] * layers, "out": (4, 3)}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        for norm, kernel in zip(p["norms"], p["kernels"], strict=True):
            x = x + jnp.tanh(rms(x) * norm[None]) @ kernel
        return x @ p["out"]

    return Built(apply, shapes(params), (floats(3, 4),))


def stacked(layers: int, body: Callable[[Any, Any], Any], axis: int = 0) -> Built:
    """Return a hand-written scan over layers stacked on ``axis``, cast on the way."""
    place = lambda shape: (*shape[:axis], layers, *shape[axis:])  # noqa: E731
    params = {"layers": {k: place(v) for k, v in MLP.items() if len(v) >= axis}, "out": (4, 3)}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        xs = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0) * 0.5, p["layers"])
        x, _ = jax.lax.scan(lambda x, p: (body(p, x), None), x, xs)
        return x @ p["out"]

    return Built(apply, shapes(params), (floats(3, 4),))


def twice(layers: int) -> Built:
    """Return one stack of layers applied to two inputs."""
    params = {"layers": {k: (layers, *v) for k, v in MLP.items()}, "out": (4, 3)}

    def apply(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        step = lambda x, p: (mlp(p, x), None)  # noqa: E731
        x, y = (jax.lax.scan(step, z, p["layers"])[0] for z in (x, y))
        return (x * y) @ p["out"]

    return Built(apply, shapes(params), (floats(3, 4), floats(3, 4, seed=1)))


class Pair(NamedTuple):
    small: Built
    big: Built
    depth: Any = "interleave"
    mode: str = "identity"


def grow(pair: Pair) -> Deepened:
    small, big = (Model(b.apply, b.params) for b in pair[:2])
    return deepen(small, big, pair.small.inputs, pair.depth, pair.mode)


def pair(
    make: Any, small: int, big: int, depth: Any = "interleave", mode: str = "identity"
) -> Pair:
    return Pair(make(small), make(big), depth, mode)


def model(sizes: Any, apply: Any, *inputs: np.ndarray) -> Built:
    return Built(apply, shapes(sizes), inputs or (floats(3, 4),))


def residual(p: Any, x: jax.Array, **leaves: Any) -> jax.Array:
    del leaves
    for i in range(sum(key.startswith("h_") for key in p)):
        x = x + jnp.tanh(x @ p[f"h_{i}"]["up"]) @ p[f"h_{i}"]["down"]
    return x


def flat_layers(layers: int, hidden: int = 5) -> dict[str, Any]:
    return {f"h_{i}": {"up": (4, hidden), "down": (hidden, 4)} for i in range(layers)}


chain = partial(repeated, mlp, MLP)
row = partial(stacked, body=mlp)
