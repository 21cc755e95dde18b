"""Encoders with attention, and models of the same build: ViT, MLP-Mixer, T5, Perceiver."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats, tokens
from benchmarks.zoo.vision import normalise

VOCABULARY = 23
_WIDTHS = {"width": 11, "heads": 5, "head_dim": 6, "hidden_0": 13, "hidden_1": 17}
_IMAGE = {"batch": 3, "side": 12, "patch": 4, "colours": 7, "out": 8}

Layers: TypeAlias = tuple[Callable[[], nn.Module], ...]

_normal = nn.initializers.normal(0.5)


def layer_norm(x: jax.Array, name: str | None = None) -> jax.Array:
    """Return ``x`` through a LayerNorm of the module that calls this."""
    return normalise(nn.LayerNorm(name=name), x)


def rms_norm(x: jax.Array, name: str | None = None) -> jax.Array:
    """Return ``x`` through an RMSNorm of the module that calls this."""
    return normalise(nn.RMSNorm(name=name), x)


class MLP(nn.Module):
    """Two dense layers with an activation between them."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array] = nn.gelu
    biases: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        dense = partial(nn.Dense, use_bias=self.biases)
        y = self.activation(dense(self.hidden, name="up")(x))
        return dense(x.shape[-1], name="down")(y)


class Gated(nn.Module):
    """An activation times a linear layer, projected back, without biases."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array] = nn.silu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        dense = partial(nn.Dense, use_bias=False)
        gate = self.activation(dense(self.hidden, name="gate")(x))
        return dense(x.shape[-1], name="down")(gate * dense(self.hidden, name="up")(x))


class Layer(nn.Module):
    """Self-attention and a multilayer perceptron, a LayerNorm before or after each."""

    heads: int
    head_dim: int
    hidden: int
    pre: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        attend = nn.MultiHeadDotProductAttention(
            self.heads, qkv_features=self.heads * self.head_dim, deterministic=True, name="attend"
        )
        if self.pre:
            x = x + attend(layer_norm(x, "attend_norm"))
            return x + MLP(self.hidden, name="mlp")(layer_norm(x, "mlp_norm"))
        x = layer_norm(x + attend(x), "attend_norm")
        return layer_norm(x + MLP(self.hidden, name="mlp")(x), "mlp_norm")


class Encoder(nn.Module):
    """Projected features, layers, and a readout of every step."""

    layers: Layers
    width: int
    out: int
    pre: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, time, out]."""
        x = nn.Dense(self.width, name="embed")(x)
        for layer in self.layers:
            x = layer()(x)
        x = layer_norm(x, "norm") if self.pre else x
        return nn.Dense(self.out, name="readout")(x)


class BERT(nn.Module):
    """Token, position and segment vectors, post-norm layers, a pooled and a token head."""

    layers: Layers
    vocabulary: int
    context: int
    segments: int
    width: int
    pooled: int
    out: int

    @nn.compact
    def __call__(self, ids: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return float[batch, out] of the first token, float[batch, time, vocabulary] of all."""
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        places = nn.Embed(self.context, self.width, name="positions")(jnp.arange(ids.shape[1]))
        parts = nn.Embed(self.segments, self.width, name="segments")(segments)
        x = layer_norm(embed(ids) + places[None] + parts, "norm")
        for layer in self.layers:
            x = layer()(x)
        pooled = jnp.tanh(nn.Dense(self.pooled, name="pooler")(x[:, 0]))
        x = layer_norm(nn.gelu(nn.Dense(self.width, name="transform")(x)), "transform_norm")
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,), x.dtype)
        return nn.Dense(self.out, name="readout")(pooled), embed.attend(x) + bias[None, None]


class MixerLayer(nn.Module):
    """A multilayer perceptron along the patches, then one along the channels."""

    tokens: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x`` float[batch, patches, width]."""
        y = layer_norm(x, "tokens_norm").swapaxes(1, 2)
        x = x + MLP(self.tokens, name="tokens")(y).swapaxes(1, 2)
        return x + MLP(self.hidden, name="channels")(layer_norm(x, "channels_norm"))


class Patches(nn.Module):
    """Layers on the patches of images: learned positions and a class token, or neither."""

    layers: Layers
    width: int
    patch: int
    out: int
    token: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out], read from the class token or from the mean of the patches."""
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, window, "VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.token:
            token = self.param("token", _normal, (1, 1, self.width), x.dtype)
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
            x = x + self.param("positions", _normal, (1, *x.shape[1:]), x.dtype)
        for layer in self.layers:
            x = layer()(x)
        x = layer_norm(x, "norm")
        return nn.Dense(self.out, name="readout")(x[:, 0] if self.token else x.mean(1))


def bucket(distance: np.ndarray, buckets: int, both_ways: bool) -> np.ndarray:
    """Return T5's bucket of each distance: exact when short, logarithmic when long."""
    sign = np.zeros_like(distance)
    if both_ways:
        buckets //= 2
        sign, distance = np.where(distance > 0, buckets, 0), np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(distance, 1) / exact) / np.log(32 / exact)
    far = np.minimum(exact + (ratio * (buckets - exact)).astype(int), buckets - 1)
    return sign + np.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A learned number for every bucket of distances and every head."""

    buckets: int
    heads: int
    both_ways: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[1, heads, time, time] for ``x`` float[batch, time, width]."""
        table = self.param("table", _normal, (self.buckets, self.heads), x.dtype)
        places = np.arange(x.shape[1])
        found = bucket(places[None] - places[:, None], self.buckets, self.both_ways)
        bias = table[jnp.asarray(found)].transpose(2, 0, 1)[None]
        if self.both_ways:
            return bias
        seen = jnp.tril(jnp.ones(bias.shape[2:], bool))[None, None]
        return jnp.where(seen, bias, jnp.finfo(x.dtype).min)


class UnscaledAttention(nn.Module):
    """T5's attention: no biases in the projections, no scale of the logits."""

    heads: int
    head_dim: int

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Return an array like ``x``, whose places attend to those of ``y``."""
        project = partial(nn.DenseGeneral, (self.heads, self.head_dim), use_bias=False)
        q, k, v = project(name="query")(x), project(name="key")(y), project(name="value")(y)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = nn.softmax(logits if bias is None else logits + bias)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.DenseGeneral(x.shape[-1], (-2, -1), use_bias=False, name="out")(mixed)


class T5(nn.Module):
    """An encoder and a decoder over one embedding, which also reads out."""

    sizes: Sizes
    mlp: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        """Return float[batch, target, vocabulary]."""
        vocabulary, width = self.sizes["vocabulary"], self.sizes["width"]
        embed = nn.Embed(vocabulary, width, name="tokens")
        seen = self._stack("encoder", embed(source), None)
        x = self._stack("decoder", embed(target), seen)
        return embed.attend(x * width**-0.5)

    def _stack(self, name: str, x: jax.Array, seen: jax.Array | None) -> jax.Array:
        s = self.sizes
        bias = RelativeBias(s["buckets"], s["heads"], seen is None, name=f"{name}_bias")(x)
        attention = partial(UnscaledAttention, s["heads"], s["head_dim"])
        for i in range(2):
            layer = f"{name}_{i}"
            y = rms_norm(x, f"{layer}_norm")
            x = x + attention(name=f"{layer}_attend")(y, y, bias)
            if seen is not None:
                y = rms_norm(x, f"{layer}_cross_norm")
                x = x + attention(name=f"{layer}_cross")(y, seen)
            mlp = self.mlp(s[f"{name}_{i}"], name=f"{layer}_mlp")
            x = x + mlp(rms_norm(x, f"{layer}_mlp_norm"))
        return rms_norm(x, f"{name}_norm")


class Perceiver(nn.Module):
    """Learned latents that attend to the inputs, then to each other."""

    layers: Layers
    latents: int
    width: int
    heads: int
    head_dim: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out], read from the mean of the latents."""
        latents = self.param("latents", _normal, (self.latents, self.width), x.dtype)
        z = jnp.broadcast_to(latents[None], (x.shape[0], *latents.shape))
        width = self.heads * self.head_dim
        cross = nn.MultiHeadDotProductAttention(self.heads, qkv_features=width, name="cross")
        z = z + cross(layer_norm(z, "cross_norm"), layer_norm(x, "input_norm"))
        for layer in self.layers:
            z = layer()(z)
        return nn.Dense(self.out, name="readout")(layer_norm(z, "norm").mean(1))


def _layers(s: Sizes, pre: bool) -> Layers:
    return (*(partial(Layer, s["heads"], s["head_dim"], s[f"hidden_{i}"], pre) for i in range(2)),)


def _encoder(name: str, pre: bool) -> Model:
    def build(s: Sizes) -> Built:
        module = Encoder(_layers(s, pre), s["width"], s["out"], pre)
        return built(module, floats(s["batch"], s["time"], s["features"]))

    sizes = {"batch": 3, "time": 7, "features": 10, "out": 8} | _WIDTHS
    return Model(name, sizes, build, tuple(_WIDTHS), {"out": "output"})


def _bert() -> Model:
    sizes = {"batch": 4, "time": 7, "vocabulary": VOCABULARY, "context": 9, "segments": 3}
    hidden = _WIDTHS | {"pooled": 8}

    def build(s: Sizes) -> Built:
        names = "vocabulary", "context", "segments", "width", "pooled", "out"
        ids = tokens(s["batch"], s["time"], vocabulary=VOCABULARY)
        segments = tokens(s["batch"], s["time"], vocabulary=3, seed=1)
        return built(BERT(_layers(s, False), *(s[name] for name in names)), ids, segments)

    fixed = {"vocabulary": "output", "out": "output", "context": "gather", "segments": "gather"}
    return Model("bert", sizes | hidden | {"out": 10}, build, tuple(hidden), fixed)


def _patches(name: str, hidden: Sizes, layers: Callable[[Sizes], Layers]) -> Model:
    """Return a model on patches, with a class token if it has heads; data chooses their number."""

    def build(s: Sizes) -> Built:
        module = Patches(layers(s), s["width"], s["patch"], s["out"], "heads" in hidden)
        return built(module, floats(s["batch"], s["side"], s["side"], s["colours"]))

    return Model(name, _IMAGE | dict(hidden), build, tuple(hidden), {"out": "output"})


def _t5(name: str, mlp: Callable[..., nn.Module]) -> Model:
    hidden = {"width": 11, "heads": 5, "head_dim": 6}
    hidden |= {"encoder_0": 13, "encoder_1": 17, "decoder_0": 14, "decoder_1": 19}
    sizes = {"batch": 3, "source": 9, "target": 7, "vocabulary": VOCABULARY, "buckets": 8}

    def build(s: Sizes) -> Built:
        source = tokens(s["batch"], s["source"], vocabulary=VOCABULARY)
        target = tokens(s["batch"], s["target"], vocabulary=VOCABULARY, seed=1)
        return built(T5(dict(s), mlp), source, target)

    fixed = {"vocabulary": "output", "buckets": "gather"}
    return Model(name, sizes | hidden, build, tuple(hidden), fixed)


def _perceiver() -> Model:
    hidden = _WIDTHS | {"latents": 9}

    def build(s: Sizes) -> Built:
        names = "latents", "width", "heads", "head_dim", "out"
        module = Perceiver(_layers(s, pre=True), *(s[name] for name in names))
        return built(module, floats(s["batch"], s["time"], s["features"]))

    sizes = {"batch": 3, "time": 7, "features": 10, "out": 8} | hidden
    return Model("perceiver", sizes, build, tuple(hidden), {"out": "output"})


MODELS = (
    _encoder("encoder pre-norm", pre=True),
    _encoder("encoder post-norm", pre=False),
    _bert(),
    _patches("vit", _WIDTHS, partial(_layers, pre=True)),
    _patches(
        "mlp-mixer",
        {"width": 11, "tokens_0": 5, "tokens_1": 6, "hidden_0": 13, "hidden_1": 17},
        lambda s: (*(partial(MixerLayer, s[f"tokens_{i}"], s[f"hidden_{i}"]) for i in range(2)),),
    ),
    _t5("t5", partial(MLP, activation=nn.relu, biases=False)),
    _t5("t5 gated", partial(Gated, activation=nn.gelu)),
    _perceiver(),
)
