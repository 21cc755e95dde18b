"""Convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats

IMAGE = {"batch": 2, "side": 12, "colours": 4, "out": 5}
_LEVELS = {"down_0": 3, "down_1": 6, "bottom": 7, "up_1": 8, "up_0": 9}
Layer = Callable[..., nn.Module]

_BatchNorm = partial(nn.BatchNorm, use_running_average=True)
_BatchNormTrain = partial(nn.BatchNorm, use_running_average=False)
_Conv = partial(nn.Conv, kernel_size=(3, 3))


def normalise(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return ``layer(x)`` without strict dtype promotion.

    The normalisation layers of Flax promote float64 statistics with float32, which changes
    nothing and which strict promotion refuses.
    """
    with jax.numpy_dtype_promotion("standard"):
        return layer(x)


def _group_norm(groups: int) -> Layer:
    return partial(nn.GroupNorm, num_groups=groups)


def max_pool(x: jax.Array) -> jax.Array:
    """Return the largest of each 2×2 window."""
    return nn.max_pool(x, (2, 2), (2, 2))


def avg_pool(x: jax.Array) -> jax.Array:
    """Return the mean of each 2×2 window (``nn.avg_pool`` divides by a strongly typed int64)."""
    return nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4.0


class CNN(nn.Module):
    """Blocks of convolution, norm, relu and pool, then a linear readout."""

    channels: tuple[int, ...]
    norms: tuple[Layer, ...]
    pool: Callable[[jax.Array], jax.Array]
    out: int
    flat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]; ``flat`` reads every position, else their mean."""
        for channels, norm in zip(self.channels, self.norms, strict=True):
            x = self.pool(nn.relu(normalise(norm(), _Conv(channels)(x))))
        x = x.reshape(x.shape[0], -1) if self.flat else x.mean((1, 2))
        return nn.Dense(self.out, name="readout")(x)


class Layers(nn.Module):
    """A stem, then any layers with a relu before each, and a readout of the mean position."""

    layers: tuple[Layer, ...]
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        for i, layer in enumerate(self.layers):
            x = layer(name=f"layer_{i}")(nn.relu(x) if i else x)
        return nn.Dense(self.out, name="readout")(nn.relu(x).mean((1, 2)))


class SqueezeExcite(nn.Module):
    """Channels weighted by a small network of their means."""

    squeezed: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        gate = nn.relu(nn.Dense(self.squeezed)(x.mean((1, 2), keepdims=True)))
        return x * nn.sigmoid(nn.Dense(x.shape[-1])(gate))


class Shuffle(nn.Module):
    """The channel shuffle of ShuffleNet."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x`` with the two parts of its channel axis exchanged."""
        parts = x.reshape(*x.shape[:-1], self.groups, -1)
        return jnp.swapaxes(parts, -1, -2).reshape(x.shape)


class ConvNeXt(nn.Module):
    """A ConvNeXt block: depthwise, LayerNorm, two pointwise layers, layer scale, residual."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        width = x.shape[-1]
        y = nn.Conv(width, (7, 7), feature_group_count=width)(x)
        y = nn.gelu(nn.Dense(self.hidden)(normalise(nn.LayerNorm(), y)))
        scale = self.param("scale", nn.initializers.constant(0.1), (width,), x.dtype)
        return x + nn.Dense(width)(y) * scale.reshape(1, 1, 1, -1)


class Residual(nn.Module):
    """A basic ResNet block; its shortcut projects, pads with zero channels, or does nothing."""

    inner: int
    channels: int
    shortcut: str = "identity"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, side, side, channels], the side halved unless an identity."""
        strides = (1, 1) if self.shortcut == "identity" else (2, 2)
        y = _Conv(self.inner, strides=strides, use_bias=False)(x)
        y = nn.relu(normalise(_BatchNorm(), y))
        y = normalise(_BatchNorm(), _Conv(self.channels, use_bias=False)(y))
        if self.shortcut == "project":
            x = nn.Conv(self.channels, (1, 1), strides, use_bias=False)(x)
            x = normalise(_BatchNorm(), x)
        elif self.shortcut == "pad":
            x = x[:, ::2, ::2]
            x = jnp.pad(x, ((0, 0),) * 3 + ((0, self.channels - x.shape[-1]),))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem and two stages, the second at half the side."""

    channels: tuple[int, int]
    inner: tuple[int, int]
    shortcut: str
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        x = nn.relu(normalise(_BatchNorm(), _Conv(self.channels[0], use_bias=False)(x)))
        x = Residual(self.inner[0], self.channels[0])(x)
        x = Residual(self.inner[1], self.channels[1], self.shortcut)(x)
        return nn.Dense(self.out, name="readout")(x.mean((1, 2)))


class UNet(nn.Module):
    """Two levels down, a bottom, two up, the features of the way down concatenated."""

    down: tuple[int, int]
    bottom: int
    up: tuple[int, int]
    out: int
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, side, side, out]."""
        skips = []
        for channels in self.down:
            x = self._block(channels, x)
            skips.append(x)
            x = max_pool(x)
        x = self._block(self.bottom, x)
        for channels, skip in zip(self.up, reversed(skips), strict=True):
            x = nn.ConvTranspose(channels, (2, 2), (2, 2))(x)
            x = self._block(channels, jnp.concatenate([x, skip], axis=-1))
        return nn.Conv(self.out, (1, 1), name="readout")(x)

    def _block(self, channels: int, x: jax.Array) -> jax.Array:
        return nn.silu(normalise(self.norm(), _Conv(channels)(x)))


class WeightNormMLP(nn.Module):
    """Dense layers whose kernels have columns of a learned length."""

    widths: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.WeightNorm(nn.Dense(width, name=f"dense_{i}"))(x))
        return nn.WeightNorm(nn.Dense(self.out, name="readout"))(x)


def _model(
    name: str, hidden: Sizes, make: Callable[[Sizes], nn.Module], free: tuple[str, ...] = ()
) -> Model:
    """Return a model on images; without ``free`` every hidden size is."""

    def build(sizes: Sizes) -> Built:
        shape = (sizes["batch"], sizes["side"], sizes["side"], sizes["colours"])
        return built(make(sizes), floats(*shape))

    return Model(name, IMAGE | dict(hidden), build, free or tuple(hidden), {"out": "output"})


def _cnn(kind: str, norm: Layer, pool: Callable[..., jax.Array], flat: bool = False) -> Model:
    def make(s: Sizes) -> nn.Module:
        return CNN((s["channels_0"], s["channels_1"]), (norm, norm), pool, s["out"], flat)

    return _model(f"cnn {kind}", {"channels_0": 7, "channels_1": 9}, make)


def _cnn_train() -> Model:
    """Return a network that normalises by the batch, its running statistics dropped."""

    def build(sizes: Sizes) -> Built:
        channels, norms = (sizes["channels_0"], sizes["channels_1"]), (_BatchNormTrain,) * 2
        module = CNN(channels, norms, max_pool, sizes["out"])
        inputs = floats(sizes["batch"], sizes["side"], sizes["side"], sizes["colours"])
        params = built(module, inputs).params
        return Built(lambda p, x: module.apply(p, x, mutable=["batch_stats"])[0], params, (inputs,))

    names = {"channels_0": 7, "channels_1": 9}
    return Model("cnn batch norm train", IMAGE | names, build, tuple(names), {"out": "output"})


def _cnn_groups() -> Model:
    def make(s: Sizes) -> nn.Module:
        groups = s["groups_0"], s["groups_1"]
        channels = groups[0] * s["per_group_0"], groups[1] * s["per_group_1"]
        return CNN(channels, (*map(_group_norm, groups),), avg_pool, s["out"])

    sizes = {"groups_0": 3, "per_group_0": 7, "groups_1": 6, "per_group_1": 8}
    return _model("cnn group norm", sizes, make)


def _layers(name: str, hidden: Sizes, make: Callable[[Sizes], tuple[Layer, ...]]) -> Model:
    return _model(name, hidden, lambda s: Layers(make(s), s["out"]))


def _depthwise(s: Sizes) -> tuple[Layer, ...]:
    channels, width = s["channels_0"], s["channels_0"] * s["multiplier"]
    depthwise = partial(_Conv, width, feature_group_count=channels)
    return partial(_Conv, channels), depthwise, partial(nn.Conv, s["channels_1"], (1, 1))


def _grouped(s: Sizes) -> tuple[Layer, ...]:
    groups = s["groups"]
    widths = groups * s["in_per_group"], groups * s["out_per_group"]
    grouped = partial(_Conv, widths[1], feature_group_count=groups)
    return partial(nn.Conv, widths[0], (1, 1)), grouped


def _shuffled(s: Sizes) -> tuple[Layer, ...]:
    return *_grouped(s), partial(Shuffle, s["groups"]), partial(_Conv, s["channels"])


def _resnet(s: Sizes) -> nn.Module:
    channels = s["channels_0"], s["channels_1"]
    return ResNet(channels, (s["inner_0"], s["inner_1"]), "project", s["out"])


def _padded_resnet(s: Sizes) -> nn.Module:
    channels = s["channels"], s["channels"] + s["extra"]
    return ResNet(channels, (s["inner_0"], s["inner_1"]), "pad", s["out"])


def _unet(s: Sizes) -> nn.Module:
    down, up = (s["down_0"], s["down_1"]), (s["up_1"], s["up_0"])
    return UNet(down, s["bottom"], up, s["out"], nn.LayerNorm)


def _grouped_unet(s: Sizes) -> nn.Module:
    norm = _group_norm(s["groups"])
    a, b, bottom, c, d = (s["groups"] * s[name] for name in _LEVELS)
    return UNet((a, b), bottom, (c, d), s["out"], norm)


def _weight_norm() -> Model:
    def build(sizes: Sizes) -> Built:
        module = WeightNormMLP((sizes["width_0"], sizes["width_1"]), sizes["out"])
        return built(module, floats(sizes["batch"], sizes["features"]))

    sizes = {"batch": 4, "features": 5, "width_0": 7, "width_1": 9, "out": 3}
    return Model("weight norm", sizes, build, ("width_0", "width_1"), {"out": "output"})


MODELS = (
    _cnn("batch norm", _BatchNorm, max_pool),
    _cnn_train(),
    _cnn("layer norm", nn.LayerNorm, avg_pool),
    _cnn("instance norm", nn.InstanceNorm, avg_pool),
    _cnn("flat", nn.LayerNorm, max_pool, flat=True),
    _cnn("flat batch norm", _BatchNorm, avg_pool, flat=True),
    _cnn_groups(),
    _layers("depthwise", {"channels_0": 7, "multiplier": 3, "channels_1": 9}, _depthwise),
    _layers("grouped conv", {"groups": 3, "in_per_group": 7, "out_per_group": 9}, _grouped),
    _layers(
        "channel shuffle",
        {"groups": 3, "in_per_group": 7, "out_per_group": 8, "channels": 9},
        _shuffled,
    ),
    _layers(
        "squeeze excite",
        {"channels": 7, "squeezed": 3},
        lambda s: (partial(_Conv, s["channels"]), partial(SqueezeExcite, s["squeezed"])),
    ),
    _layers(
        "convnext",
        {"channels": 7, "hidden": 9},
        lambda s: (partial(nn.Conv, s["channels"], (2, 2), (2, 2)), partial(ConvNeXt, s["hidden"])),
    ),
    _layers(
        "dilated conv",
        {"channels_0": 6, "channels_1": 7, "channels_2": 9},
        lambda s: (*(partial(_Conv, s[f"channels_{i}"], kernel_dilation=2**i) for i in range(3)),),
    ),
    _model("resnet", {"channels_0": 6, "inner_0": 7, "channels_1": 8, "inner_1": 9}, _resnet),
    # The padded shortcut joins two axes, so `extra` may grow without `channels`.
    _model("resnet pad", {"channels": 6, "extra": 3, "inner_0": 7, "inner_1": 8}, _padded_resnet),
    _model("unet layer norm", _LEVELS, _unet),
    _model("unet group norm", {"groups": 10, **_LEVELS}, _grouped_unet),
    _weight_norm(),
)
