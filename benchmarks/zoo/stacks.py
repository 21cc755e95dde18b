"""Scanned and rematerialised stacks, loops, branches, custom derivatives, sums along time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats, tokens
from benchmarks.zoo.vision import normalise

_normal = nn.initializers.normal(0.5)
TABLE = {"batch": 4, "features": 5, "out": 3}
SEQUENCE = {"batch": 2, "time": 6, "features": 4, "out": 5}
VOCABULARY = 11


class Feedforward(nn.Module):
    """A pre-norm residual multilayer perceptron, in the form that ``nn.scan`` takes."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Return an array like ``x``, and nothing."""
        y = nn.gelu(nn.Dense(self.hidden, name="up")(normalise(nn.LayerNorm(), x)))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


class Attention(nn.Module):
    """A pre-norm transformer layer, in the form that ``nn.scan`` takes."""

    heads: int
    head_dim: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Return an array like ``x``, and nothing."""
        attend = nn.MultiHeadDotProductAttention(
            self.heads, qkv_features=self.heads * self.head_dim, deterministic=True
        )
        x = x + attend(normalise(nn.LayerNorm(), x))
        return Feedforward(self.hidden)(x, None)


class Scanned(nn.Module):
    """Layers of one kind, their parameters stacked on a first axis."""

    block: Callable[..., nn.Module]
    arguments: tuple[int, ...]
    layers: int
    width: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the leading shape of ``x`` and ``out`` features."""
        scan = nn.scan(
            self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x = nn.Dense(self.width, name="embed")(x)
        x, _ = scan(*self.arguments, name="layers")(x, None)
        return nn.Dense(self.out, name="readout")(normalise(nn.LayerNorm(), x))


class Unrolled(nn.Module):
    """Rematerialised layers of different hidden widths, one after the other."""

    hidden: tuple[int, ...]
    width: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        x = nn.Dense(self.width, name="embed")(x)
        for i, hidden in enumerate(self.hidden):
            x, _ = nn.remat(Feedforward)(hidden, name=f"layer_{i}")(x, None)
        return nn.Dense(self.out, name="readout")(x)


class Equilibrium(nn.Module):
    """One layer applied again and again: a fixed number of times, or until little changes."""

    width: int
    out: int
    until_still: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        drive = nn.Dense(self.width, name="drive")(x)
        kernel = self.param("kernel", _normal, (self.width, self.width), x.dtype)

        def step(z: jax.Array) -> jax.Array:
            return 0.5 * z + 0.5 * jnp.tanh(z @ kernel + drive)

        start = jnp.zeros_like(drive)
        if self.until_still:
            z = _until_still(step, start)
        else:
            z = jax.lax.fori_loop(0, 4, lambda _, z: step(z), start)
        return nn.Dense(self.out, name="readout")(z)


def _until_still(step: Callable[[jax.Array], jax.Array], start: jax.Array) -> jax.Array:
    """Return the last iterate, after 50 steps or a step that changes no unit by 1%."""

    def going(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, before, z = state
        return (count < 50) & (jnp.max(jnp.abs(z - before)) > 0.01)

    def body(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        count, _, z = state
        return count + 1, z, step(z)

    return jax.lax.while_loop(going, body, (jnp.int32(0), start, step(start)))[2]


class Branches(nn.Module):
    """A wide or a deep branch, by flags in the inputs: one output a flag."""

    width: int
    wide: int
    deep: tuple[int, int]
    out: int

    @nn.compact
    def __call__(self, x: jax.Array, flags: jax.Array) -> list[jax.Array]:
        """Return float[batch, out] for every flag."""
        x = nn.relu(nn.Dense(self.width, name="embed")(x))
        shapes = {"wide": (self.width, self.wide, self.out), "deep": (self.width, *self.deep)}
        shapes["deep"] += (self.out,)
        kernels = {
            branch: tuple(
                self.param(f"{branch}_{i}", _normal, shape, x.dtype)
                for i, shape in enumerate(itertools.pairwise(widths))
            )
            for branch, widths in shapes.items()
        }
        wide, deep = (partial(chain, kernels[branch]) for branch in ("wide", "deep"))
        return [jax.lax.cond(flag, wide, deep, x) for flag in flags]


def chain(kernels: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    """Return ``x`` through linear layers with tanh between them."""
    x = x @ kernels[0]
    for kernel in kernels[1:]:
        x = jnp.tanh(x) @ kernel
    return x


class OneHot(nn.Module):
    """Token vectors by a product with one-hot rows, and their mean over time."""

    vocabulary: int
    embedding: int
    out: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        table = self.param("table", _normal, (self.vocabulary, self.embedding), jnp.float32)
        x = jax.nn.one_hot(ids, self.vocabulary, dtype=table.dtype) @ table
        return nn.Dense(self.out, name="readout")(nn.relu(x).mean(1))


class Cumulative(nn.Module):
    """Running means over time, then the step that an input names for each row."""

    width: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array, last: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        x = jnp.cumsum(nn.tanh(nn.Dense(self.width, name="embed")(x)), axis=1)
        x = x / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return nn.Dense(self.out, name="readout")(x)


class Ordered(nn.Module):
    """A hidden layer summed up along its own units."""

    width: int
    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float[batch, out]."""
        x = nn.tanh(nn.Dense(self.hidden, name="hidden")(x))
        x = jnp.cumsum(nn.softplus(nn.Dense(self.width, name="steps")(x)), axis=-1)
        return nn.Dense(self.out, name="readout")(nn.tanh(x))


@jax.custom_jvp
def softclip(x: jax.Array) -> jax.Array:
    """Return ``x / (1 + |x|)``, with a derivative given by hand."""
    return x / (1.0 + jnp.abs(x))


@softclip.defjvp
def _softclip_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the value and its tangent."""
    return softclip(*primals), tangents[0] / (1.0 + jnp.abs(primals[0])) ** 2


@jax.custom_vjp
def bounded(x: jax.Array) -> jax.Array:
    """Return ``tanh(x)``, with a gradient that never vanishes."""
    return jnp.tanh(x)


bounded.defvjp(lambda x: (bounded(x), x), lambda x, g: (g / (1.0 + x**2),))


def custom_mlp(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return a plain network's outputs, its activations with derivatives of their own."""
    x = softclip(x @ params["kernel_0"] + params["bias_0"][None])
    x = bounded(x @ params["kernel_1"] + params["bias_1"][None])
    return x @ params["kernel_2"]


def _table(name: str, hidden: Sizes, build: Callable[[Sizes], Built], **fixed: str) -> Model:
    """Return a model whose hidden sizes are all free but those in ``fixed``."""
    free = tuple(size for size in hidden if size not in fixed)
    return Model(name, TABLE | dict(hidden), build, free, {"out": "output", **fixed})


def _custom() -> Model:
    def build(s: Sizes) -> Built:
        widths = s["features"], s["width_0"], s["width_1"], s["out"]
        shapes = {f"kernel_{i}": widths[i : i + 2] for i in range(3)}
        shapes |= {f"bias_{i}": widths[i + 1 : i + 2] for i in range(2)}
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        return Built(custom_mlp, params, (floats(s["batch"], s["features"]),))

    return _table("custom derivatives", {"width_0": 7, "width_1": 9}, build)


def _simple(name: str, hidden: Sizes, make: Callable[[Sizes], nn.Module], **fixed: str) -> Model:
    def build(s: Sizes) -> Built:
        return built(make(s), floats(s["batch"], s["features"]))

    return _table(name, hidden, build, **fixed)


def _branches() -> Model:
    def build(s: Sizes) -> Built:
        module = Branches(s["width"], s["wide"], (s["deep_0"], s["deep_1"]), s["out"])
        return built(module, floats(s["batch"], s["features"]), np.array([True, False]))

    return _table("cond", {"width": 6, "wide": 7, "deep_0": 8, "deep_1": 9}, build)


def _scan_feedforward(s: Sizes) -> nn.Module:
    return Scanned(Feedforward, (s["hidden"],), s["layers"], s["width"], s["out"])


def _scan_attention() -> Model:
    """Return a scanned transformer, each layer computed again for the gradient."""
    hidden = {"width": 7, "heads": 8, "head_dim": 9, "hidden": 11}

    def build(s: Sizes) -> Built:
        block = nn.remat(Attention, prevent_cse=False)
        sizes = s["heads"], s["head_dim"], s["hidden"]
        module = Scanned(block, sizes, s["layers"], s["width"], s["out"])
        return built(module, floats(s["batch"], s["time"], s["features"]))

    fixed = {"layers": "scan", "out": "output"}
    sizes = SEQUENCE | hidden | {"layers": 3}
    return Model("scan remat attention", sizes, build, tuple(hidden), fixed)


def _one_hot() -> Model:
    sizes = {"batch": 4, "time": 6, "vocabulary": VOCABULARY, "embedding": 7, "out": 5}

    def build(s: Sizes) -> Built:
        ids = tokens(s["batch"], s["time"], vocabulary=VOCABULARY)
        return built(OneHot(s["vocabulary"], s["embedding"], s["out"]), ids)

    # `vocabulary` is in neither: more rows keep the function of the ids there were.
    return Model("one-hot tokens", sizes, build, ("embedding",), {"out": "output"})


def _cumulative() -> Model:
    def build(s: Sizes) -> Built:
        last = np.arange(s["batch"], dtype=np.int32) + 3
        x = floats(s["batch"], s["time"], s["features"])
        return built(Cumulative(s["width"], s["out"]), x, last)

    return Model("cumulative", SEQUENCE | {"width": 7}, build, ("width",), {"out": "output"})


MODELS = (
    _simple("scan", {"width": 7, "hidden": 9, "layers": 6}, _scan_feedforward, layers="scan"),
    _scan_attention(),
    _simple(
        "remat",
        {"width": 7, "hidden_0": 8, "hidden_1": 9},
        lambda s: Unrolled((s["hidden_0"], s["hidden_1"]), s["width"], s["out"]),
    ),
    _simple("fori loop", {"width": 7}, lambda s: Equilibrium(s["width"], s["out"], False)),
    _simple("while loop", {"width": 7}, lambda s: Equilibrium(s["width"], s["out"], True)),
    _branches(),
    _custom(),
    _one_hot(),
    _cumulative(),
    _simple(
        "ordered units",
        {"hidden": 7, "width": 9},
        lambda s: Ordered(s["width"], s["hidden"], s["out"]),
        width="cumsum",
    ),
)
