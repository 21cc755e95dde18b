"""Models in Flax nnx, as pure functions of their parameters and running statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.models.transformer import Transformer, TransformerConfig
from benchmarks.zoo.registry import Built, Model, Sizes, floats, tokens
from benchmarks.zoo.vision import normalise

VOCABULARY = 19
SEQUENCE = {"batch": 3, "time": 7, "features": 10, "out": 8}
TABLE = {"batch": 4, "features": 5, "out": 3}
_WIDTHS = {"width": 11, "heads": 5, "head_dim": 6, "hidden_0": 13, "hidden_1": 17}
_KEPT = (nnx.Param, nnx.BatchStat)

Make: TypeAlias = Callable[[nnx.Rngs], nnx.Module]


def functional(make: Make, *inputs: np.ndarray) -> Built:
    """Return a module with the shapes of its parameters; the states of its rngs are constants."""
    graphdef, params, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), _KEPT, ...)
    rest = jax.jit(lambda: nnx.state(make(nnx.Rngs(0)), nnx.Not(_KEPT)))()
    return Built(lambda p, *args: nnx.merge(graphdef, p, rest)(*args), params, inputs)


class MLP(nnx.Module):
    """Dense layers with a norm, GELU and a dropout that lets everything pass."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Create the layers between consecutive ``widths``."""
        *layers, readout = (nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths))
        self.layers, self.readout = nnx.List(layers), readout
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for width in widths[1:-1]])
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.dropout(nnx.gelu(normalise(norm, layer(x))))
        return self.readout(x)


class Adapted(nnx.Module):
    """Dense layers with low-rank additions, one built in, one wrapped around."""

    def __init__(self, s: Sizes, rngs: nnx.Rngs) -> None:
        """Create both layers and a readout."""
        widths = s["features"], s["width_0"], s["width_1"]
        self.inside = nnx.LoRALinear(*widths[:2], lora_rank=s["rank_0"], rngs=rngs)
        base = nnx.Linear(*widths[1:], rngs=rngs)
        self.around = nnx.LoRA(widths[1], s["rank_1"], widths[2], base_module=base, rngs=rngs)
        self.readout = nnx.Linear(widths[2], s["out"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        return self.readout(nnx.tanh(self.around(nnx.tanh(self.inside(x)))))


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, **_: object) -> jax.Array:
    """Return attention without a mask; JAX's own computes the softmax in float32, always."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(logits), v)


class Layer(nnx.Module):
    """Pre-norm attention and multilayer perceptron."""

    def __init__(self, s: Sizes, hidden: int, plain: bool, rngs: nnx.Rngs) -> None:
        """Create all parts; with JAX's own attention unless it is ``plain``."""
        width, inner = s["width"], s["heads"] * s["head_dim"]
        attention = plain_attention if plain else nnx.dot_product_attention
        self.attend_norm, self.mlp_norm = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attend = nnx.MultiHeadAttention(
            s["heads"], width, inner, attention_fn=attention, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like ``x``."""
        x = x + normalise(self.attend, normalise(self.attend_norm, x))
        return x + self.down(nnx.gelu(self.up(normalise(self.mlp_norm, x))))


class Encoder(nnx.Module):
    """Projected features, layers, and a readout of every step."""

    def __init__(self, s: Sizes, plain: bool, rngs: nnx.Rngs) -> None:
        """Create two layers."""
        self.embed = nnx.Linear(s["features"], s["width"], rngs=rngs)
        self.layers = nnx.List([Layer(s, s[f"hidden_{i}"], plain, rngs) for i in range(2)])
        self.norm = nnx.LayerNorm(s["width"], rngs=rngs)
        self.readout = nnx.Linear(s["width"], s["out"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, time, out]."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.readout(normalise(self.norm, x))


class Scanned(nnx.Module):
    """Layers of one kind, made by ``nnx.vmap``, applied by ``nnx.scan``."""

    def __init__(self, s: Sizes, rngs: nnx.Rngs) -> None:
        """Create all layers at once, their parameters stacked on a first axis."""

        @nnx.split_rngs(splits=s["layers"])
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(s, s["hidden"], True, rngs)

        self.embed = nnx.Linear(s["features"], s["width"], rngs=rngs)
        self.layers = stacked(rngs)
        self.readout = nnx.Linear(s["width"], s["out"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, time, out]."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x: jax.Array, layer: Layer) -> jax.Array:
            return layer(x)

        return self.readout(through(self.embed(x), self.layers))


class CNN(nnx.Module):
    """Convolutions behind a batch, a group and a layer norm, and a readout of the mean."""

    def __init__(self, s: Sizes, rngs: nnx.Rngs) -> None:
        """Create three convolutions and their norms."""
        widths = s["colours"], s["channels_0"], s["groups"] * s["per_group"], s["channels_2"]
        self.convs = nnx.List(
            [nnx.Conv(widths[i], widths[i + 1], (3, 3), rngs=rngs) for i in range(3)]
        )
        self.batch = nnx.BatchNorm(widths[1], use_running_average=True, rngs=rngs)
        self.group = nnx.GroupNorm(widths[2], num_groups=s["groups"], rngs=rngs)
        self.layer = nnx.LayerNorm(widths[3], rngs=rngs)
        self.readout = nnx.Linear(widths[3], s["out"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        for conv, norm in zip(self.convs, (self.batch, self.group, self.layer), strict=True):
            x = nnx.relu(normalise(norm, conv(x)))
        return self.readout(x.mean((1, 2)))


class Recurrent(nnx.Module):
    """Two recurrent layers and a readout of every step."""

    def __init__(self, cell: Callable[..., nnx.RNNCellBase], s: Sizes, rngs: nnx.Rngs) -> None:
        """Create two cells of one kind."""
        widths = s["features"], s["hidden_0"], s["hidden_1"]
        cells = [cell(*widths[i : i + 2], rngs=rngs) for i in range(2)]
        self.layers = nnx.List([nnx.RNN(cell, rngs=False) for cell in cells])
        self.readout = nnx.Linear(widths[2], s["out"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, time, out]."""
        for layer in self.layers:
            x = layer(x, initial_carry=zero_carry(layer.cell, x))
        return self.readout(x)


def zero_carry(cell: nnx.RNNCellBase, x: jax.Array) -> object:
    """Return a carry of zeros in the dtype of ``x``: the cell's own has the parameters'."""
    shape = x.shape[:1] + x.shape[2:]
    carry = jax.eval_shape(lambda: cell.initialize_carry(shape, nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, x.dtype), carry)


def _table(name: str, hidden: Sizes, make: Callable[[Sizes, nnx.Rngs], nnx.Module]) -> Model:
    """Return a model on rows of features in which every hidden size is free."""

    def build(s: Sizes) -> Built:
        return functional(lambda rngs: make(s, rngs), floats(s["batch"], s["features"]))

    return Model(name, TABLE | dict(hidden), build, tuple(hidden), {"out": "output"})


def _sequence(
    name: str, hidden: Sizes, make: Callable[[Sizes, nnx.Rngs], nnx.Module], **fixed: str
) -> Model:
    """Return a model on sequences whose hidden sizes are all free but those in ``fixed``."""

    def build(s: Sizes) -> Built:
        inputs = floats(s["batch"], s["time"], s["features"])
        return functional(lambda rngs: make(s, rngs), inputs)

    free = tuple(size for size in hidden if size not in fixed)
    return Model(name, SEQUENCE | dict(hidden), build, free, {"out": "output", **fixed})


def _cnn() -> Model:
    def build(s: Sizes) -> Built:
        images = floats(s["batch"], s["side"], s["side"], s["colours"])
        return functional(lambda rngs: CNN(s, rngs), images)

    sizes = {"batch": 3, "side": 12, "colours": 4, "out": 5}
    hidden = {"channels_0": 7, "groups": 6, "per_group": 8, "channels_2": 9}
    return Model("nnx cnn", sizes | hidden, build, tuple(hidden), {"out": "output"})


def _transformer() -> Model:
    """Return the benchmarks' own language model; JAX computes its softmax in float32."""
    hidden = {"width": 11, "kv_heads": 5, "groups": 3, "hidden": 17}

    def build(s: Sizes) -> Built:
        heads = s["kv_heads"] * s["groups"]
        config = TransformerConfig(
            s["vocabulary"], s["width"], 2, heads, s["kv_heads"], s["head_dim"], s["hidden"]
        )
        ids = tokens(s["batch"], s["time"], vocabulary=VOCABULARY)
        apply, params, inputs = functional(lambda rngs: Transformer(config, rngs), ids)
        return Built(lambda p, x: normalise(lambda x: apply(p, x), x), params, inputs)

    sizes = {"batch": 4, "time": 7, "vocabulary": VOCABULARY, "head_dim": 12} | hidden
    fixed = {"vocabulary": "output", "head_dim": "iota"}
    return Model("nnx transformer", sizes, build, tuple(hidden), fixed)


MODELS = (
    _table(
        "nnx mlp",
        {"width_0": 7, "width_1": 9},
        lambda s, rngs: MLP((s["features"], s["width_0"], s["width_1"], s["out"]), rngs),
    ),
    _table("nnx lora", {"width_0": 11, "width_1": 13, "rank_0": 7, "rank_1": 9}, Adapted),
    _sequence("nnx encoder", _WIDTHS, lambda s, rngs: Encoder(s, True, rngs)),
    _sequence("nnx encoder jax attention", _WIDTHS, lambda s, rngs: Encoder(s, False, rngs)),
    _sequence(
        "nnx scan",
        {"width": 11, "heads": 5, "head_dim": 6, "hidden": 13, "layers": 9},
        Scanned,
        layers="scan",
    ),
    _cnn(),
    _sequence(
        "nnx lstm",
        {"hidden_0": 9, "hidden_1": 11},
        lambda s, rngs: Recurrent(nnx.LSTMCell, s, rngs),
    ),
    _sequence(
        "nnx gru", {"hidden_0": 9, "hidden_1": 11}, lambda s, rngs: Recurrent(nnx.GRUCell, s, rngs)
    ),
    _transformer(),
)
