"""Plans from smaller models to zoo models and others, and what is chosen of the big ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import uscale_jax as us
from benchmarks.zoo.registry import Built
from tests import resizing
from tests.zoo import ZOO

Readers = Sequence[tuple[str, int]]


class Chosen:
    """A big model, a small one, random scores, and what is chosen by them, in float64."""

    def __init__(self, small: Built, big: Built, seed: int = 0, **how: Any) -> None:
        self.small, self.big = small, big
        with jax.enable_x64(True):
            self.inputs = resizing.as_double(tuple(big.inputs))
            self.shapes = [resizing.as_double(each.params) for each in (small, big)]
            self.params = resizing.random_params(self.shapes[1], seed)
            models = (small.apply, self.shapes[0], big.apply, self.shapes[1])
            self.plan = us.plan(*models, *self.inputs, exact=False, **how)
            self.scores = random_scores(self.plan, seed)
            self.selected = us.select(self.plan, self.scores)
            self.shrunk = us.shrink(self.params, self.selected)

    def outputs(self) -> list[np.ndarray]:
        """The small model's."""
        assert shapes(self.shrunk) == jax.tree.map(lambda x: x.shape, self.shapes[0])
        return run(self.small.apply, self.shrunk, self.inputs)

    def big_outputs(self, params: Any) -> list[np.ndarray]:
        return run(self.big.apply, params, self.inputs)

    def switched_off(self, readers: Readers = ()) -> Any:
        """The big model's parameters, with zeros where removed units are read.

        That is where roles say "switch", and in ``readers``: ends of names, and dimensions.
        """
        leaves, treedef = jax.tree.flatten(self.params)
        pairs = zip(leaves, self.selected.leaves.values(), strict=True)
        return jax.tree.unflatten(treedef, [off(x, plan, readers) for x, plan in pairs])


def run(apply: Any, params: Any, inputs: Any) -> list[np.ndarray]:
    with jax.enable_x64(True):
        return resizing.compiled(apply, params, inputs)(params)


def off(leaf: np.ndarray, plan: us.LeafPlan, readers: Readers = ()) -> np.ndarray:
    leaf = np.array(leaf)
    named = {dim for end, dim in readers if plan.name.endswith(end)}
    for dim, (places, role) in enumerate(zip(plan.maps, plan.roles, strict=True)):
        if places is not None and (role == "switch" or dim in named):
            np.moveaxis(leaf, dim, 0)[places < 0] = 0
    return leaf


def random_scores(plan: us.Plan, seed: int = 0) -> dict[str, np.ndarray]:
    """Different numbers for all units of all axes that change."""
    rng = np.random.default_rng(seed)
    changing = [axis for axis in plan.axes if axis.small != axis.big]
    return {axis.name: rng.permutation(axis.big) + 1.0 for axis in changing}


def best(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """The places of the highest scores, in order."""
    return (*sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count]),)


def zoo_pair(name: str, sizes: tuple[str, ...]) -> tuple[Built, Built]:
    """A zoo model with some sizes at about two thirds, and as it is."""
    old: Mapping[str, int] = ZOO[name].sizes
    new = {**old, **{size: max(1, old[size] * 2 // 3) for size in sizes}}
    return ZOO[name].build(new), ZOO[name].build(old)


def shapes(tree: Any) -> Any:
    return jax.tree.map(np.shape, tree)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def axis(plan: us.Plan, leaf: str, dim: int) -> str:
    """The name of the axis along a dimension of a leaf."""
    (name,) = {axis.name for axis in plan.axes if (leaf, dim) in axis.places}
    return name


def narrowed(params: Any, **sizes: Sequence[tuple[int, int]]) -> Any:
    """Shapes of the small model: of a plain dict, the sizes that are not as they were."""

    def shape(name: str, x: np.ndarray) -> jax.ShapeDtypeStruct:
        size = list(x.shape)
        for dim, small in sizes.get(name, ()):
            size[dim] = small
        return jax.ShapeDtypeStruct((*size,), x.dtype)

    return {name: shape(name, x) for name, x in params.items()}


def mlp(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["up"] + p["bias"][None])
    h = jax.nn.gelu(h @ p["middle"] + p["shift"][None])
    return h @ p["down"]


MLP = {"up": (5, 8), "bias": (8,), "middle": (8, 9), "shift": (9,), "down": (9, 3)}


def attention(p: Any, x: jax.Array) -> jax.Array:
    """Heads of keys of one size and values of another, from and to one stream."""
    q, k, v = (jnp.einsum("btw,whd->bthd", x, p[name]) for name in ("q", "k", "v"))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
    return jnp.einsum("bqhd,hdw->bqw", mixed, p["out"])


ATTENTION = {"q": (7, 5, 4), "k": (7, 5, 4), "v": (7, 5, 3), "out": (5, 3, 6)}


def lstm(p: Any, x: jax.Array) -> jax.Array:
    """States over float[batch, time, features], and a readout of each."""

    def step(carry: Any, x: jax.Array) -> Any:
        c, h = carry
        i, f, g, o = jnp.split(x @ p["in"] + h @ p["state"] + p["bias"][None], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    start = jnp.zeros((x.shape[0], p["state"].shape[0]), x.dtype)
    _, h = jax.lax.scan(step, (start, start), x.swapaxes(0, 1))
    return h.swapaxes(0, 1) @ p["read"]


LSTM = {"in": (4, 24), "state": (6, 24), "bias": (24,), "read": (6, 3)}


def conv(p: Any, x: jax.Array) -> jax.Array:
    """Two convolutions, of other strides, dilations and paddings along both sides."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, p["first"], (1, 1), "SAME", dimension_numbers=dims)
    return jax.lax.conv_general_dilated(
        jnp.tanh(x),
        p["second"],
        window_strides=(2, 1),
        padding=((1, 0), (2, 1)),
        rhs_dilation=(1, 2),
        dimension_numbers=dims,
    )


CONV = {"first": (3, 3, 2, 6), "second": (2, 3, 6, 4)}


def layers(p: Any, x: jax.Array) -> jax.Array:
    """A scan through stacked layers on a stream."""
    step = lambda x, p: (x + jnp.tanh(x @ p[0]) @ p[1], None)  # noqa: E731
    return jax.lax.scan(step, x, (p["up"], p["down"]))[0]


def shared_layers(p: Any, x: jax.Array, shared_first: bool) -> jax.Array:
    """The same with a second kernel, of all layers, that reads what each layer's own one reads."""

    def step(x: jax.Array, own: Any) -> Any:
        h = jnp.tanh(x @ own[0])
        if shared_first:
            return x + (h @ p["shared"] + h @ own[1]), None
        return x + (h @ own[1] + h @ p["shared"]), None

    return jax.lax.scan(step, x, (p["up"], p["down"]))[0]


LAYERS = {"up": (3, 4, 7), "down": (3, 7, 4)}


def siamese(p: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two towers of the same weights."""
    return jnp.tanh(x @ p["up"]) @ p["down"], jnp.tanh(y @ p["up"]) @ p["down"]


SIAMESE = {"up": (5, 8), "down": (8, 3)}


def whole_and_part(p: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two towers, the second with some columns of the kernel of the first."""
    return jnp.tanh(x @ p["up"]) @ p["down"], jnp.tanh(3 * y @ p["up"]) @ p["down"][:, :2]


def dense_inputs(apply: Any, params: Any, inputs: Any) -> dict[str, list[np.ndarray]]:
    """What Dense layers are called with, as rows, by the name of their kernel, by Flax itself."""
    seen: dict[str, list[np.ndarray]] = {}

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.Dense | nn.DenseGeneral) and context.method_name == "__call__":
            kernel = module.variables["params"]["kernel"]
            used = np.ndim(kernel) - len(np.atleast_1d(module.features))
            places = int(np.prod(kernel.shape[:used]))
            path = "/".join(("params", *module.path, "kernel"))
            seen.setdefault(path, []).append(np.asarray(args[0]).reshape(-1, places))
        return next_fun(*args, **kwargs)

    with jax.enable_x64(True), nn.intercept_methods(note):
        apply(params, *inputs)
    return seen


def draw(sizes: Any, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: 0.7 * normal(seed + i, *size) for i, (name, size) in enumerate(sizes.items())}


def gated_layers(p: Any, x: jax.Array) -> jax.Array:
    """A scan through layers whose units are on or off by integers."""

    def step(x: jax.Array, p: Any) -> Any:
        h = jnp.tanh(x @ p["up"]) * p["on"][None].astype(x.dtype)
        return x + h @ p["down"], None

    return jax.lax.scan(step, x, p)[0]


def experts(p: Any, x: jax.Array) -> jax.Array:
    """Soft experts of kernels of their own, not added up."""
    h = jax.nn.relu(jnp.einsum("bw,ewh->ebh", x, p["up"]))
    return jnp.einsum("ebh,eho->beo", h, p["down"])


EXPERTS = {"up": (3, 5, 8), "down": (3, 8, 4)}


def tied(p: Any, ids: jax.Array) -> jax.Array:
    """Token vectors that read out as well, and a residual perceptron."""
    x = p["table"][ids]
    x = x + jnp.tanh(x @ p["up"]) @ p["down"]
    return x @ p["table"].T


TIED = {"table": (11, 8), "up": (8, 6), "down": (6, 8)}
