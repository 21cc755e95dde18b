"""A Transformer in JAX and, with the package ``mup``, in PyTorch; what that package does to it.

Parameters are a flat dictionary with PyTorch's names, shapes and layouts.  The JAX model knows
nothing of μP.  PyTorch and ``mup`` are imported where they are used, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.foreign.torch_layers import (
    Params,
    Shapes,
    layer_norm,
    layer_norm_shapes,
    linear,
    linear_shapes,
)

HEADS, VOCABULARY, TABLE, FEATURES, BATCH, LENGTH = 2, 23, 13, 7, 3, 11
"""What does not grow: heads, tokens, rows of positions, numbers known of every token, examples."""


class Sizes(NamedTuple):
    """What grows: no two sizes are the same."""

    hidden: int
    head: int
    mlp: int
    layers: int

    def times(self, factor: int) -> Sizes:
        """Return all widths times a number, and as many layers."""
        return Sizes(self.hidden * factor, self.head * factor, self.mlp * factor, self.layers)


BASE = Sizes(12, 5, 26, 2)
TARGET = Sizes(24, 20, 78, 2)
"""Twice as wide, heads four times, the middle of the MLP three times."""


@dataclass(frozen=True)
class Form:
    """How the model is written."""

    name: str
    roots: bool = False
    """Whether scores are over √d, as everywhere but in μP; else over d, the same at the base."""
    tied: bool = False
    """Whether the embedding is the readout too; ``MuSharedReadout`` takes no bias then."""
    across: bool = False
    """Whether the first kernel of the MLP is stored as (in, out)."""


PLAIN = Form("scores over d")
FORMS = (
    PLAIN,
    Form("scores over √d", roots=True),
    Form("tied readout", tied=True),
    Form("a kernel stored as (in, out)", across=True),
)


# JAX


def shapes(form: Form, sizes: Sizes) -> Shapes:
    """Return the shapes of the parameters by name."""
    hidden, inner = sizes.hidden, HEADS * sizes.head
    made = {
        "embed.weight": (VOCABULARY, hidden),
        "positions.weight": (TABLE, hidden),
        **linear_shapes("context", hidden, FEATURES),
    }
    for i in range(sizes.layers):
        at = f"layers.{i}"
        made |= layer_norm_shapes(f"{at}.norm1", hidden) | linear_shapes(f"{at}.q", inner, hidden)
        # No bias: no score depends on one, and Adam would make steps of rounding errors.
        made |= {f"{at}.k.weight": (inner, hidden)} | linear_shapes(f"{at}.v", inner, hidden)
        made |= linear_shapes(f"{at}.o", hidden, inner) | layer_norm_shapes(f"{at}.norm2", hidden)
        made |= linear_shapes(f"{at}.up", sizes.mlp, hidden)
        made |= linear_shapes(f"{at}.down", hidden, sizes.mlp)
        if form.across:
            made[f"{at}.up.weight"] = (hidden, sizes.mlp)
    made |= layer_norm_shapes("norm", hidden)
    return made if form.tied else made | linear_shapes("head", VOCABULARY, hidden)


def structs(form: Form, sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes as JAX's."""
    made = shapes(form, sizes).items()
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in made}


@cache
def model(form: Form) -> Callable[..., jax.Array]:
    """Return ``apply(params, tokens, context)``; always the same function."""
    return partial(_apply, form)


def _apply(form: Form, params: Params, tokens: jax.Array, context: jax.Array) -> jax.Array:
    """The scores of the tokens."""
    positions = params["positions.weight"][jnp.arange(tokens.shape[1])]
    x = params["embed.weight"][tokens] + positions[None] + linear(params, "context", context)
    for i in range(sum(name.endswith("norm1.weight") for name in params)):
        at = f"layers.{i}"
        x = x + _attention(form, params, at, layer_norm(params, f"{at}.norm1", x))
        y = _up(form, params, f"{at}.up", layer_norm(params, f"{at}.norm2", x))
        x = x + linear(params, f"{at}.down", jax.nn.gelu(y, approximate=False))
    x = layer_norm(params, "norm", x)
    if form.tied:
        return jnp.einsum("bsh,vh->bsv", x, params["embed.weight"])
    return linear(params, "head", x)


def _attention(form: Form, params: Params, at: str, x: jax.Array) -> jax.Array:
    keys = jnp.einsum("bsh,oh->bso", x, params[f"{at}.k.weight"])
    parts = (linear(params, f"{at}.q", x), keys, linear(params, f"{at}.v", x))
    q, k, v = (part.reshape(*part.shape[:2], HEADS, -1) for part in parts)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * _scale(form, q.shape[-1])
    y = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores, axis=-1), v)
    return linear(params, f"{at}.o", y.reshape(*y.shape[:2], -1))


def _scale(form: Form, d: int) -> float:
    return 1 / math.sqrt(d) if form.roots else math.sqrt(BASE.head) / d


def _up(form: Form, params: Params, name: str, x: jax.Array) -> jax.Array:
    if not form.across:
        return linear(params, name, x)
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"].reshape(1, 1, -1)


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens, and what is known of every one of them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    return tokens, rng.normal(size=(BATCH, LENGTH, FEATURES)).astype(np.float32)


def wanted(seed: int = 1) -> np.ndarray:
    """Return random scores to train towards."""
    drawn = np.random.default_rng(seed).normal(size=(BATCH, LENGTH, VOCABULARY))
    return drawn.astype(np.float32)


def fresh(form: Form, sizes: Sizes, seed: int = 2) -> dict[str, np.ndarray]:
    """Return random initial values: variances of 1/fan_in, gains about 1, biases of 1/10."""
    rng, made = np.random.default_rng(seed), {}
    for name, shape in shapes(form, sizes).items():
        fan_in = shape[0] if form.across and "up" in name else shape[-1]
        size = 1 / math.sqrt(fan_in) if len(shape) == 2 else 0.1
        is_gain = "norm" in name and name.endswith("weight")
        made[name] = (is_gain + size * rng.normal(size=shape)).astype(np.float32)
    return made


def starts(form: Form, sizes: Sizes) -> dict[str, float]:
    """Return the standard deviations that PyTorch's layers start with, by its documentation."""
    own = shapes(form, sizes)
    found = {}
    for name in own:
        layer = name.rpartition(".")[0]
        if "norm" in layer or (form.across and name.endswith("up.bias")):
            found[name] = 0.0
        elif layer in ("embed", "positions"):
            found[name] = 1.0
        else:
            fan_in = own[f"{layer}.weight"][0 if form.across and layer.endswith("up") else 1]
            found[name] = 1 / math.sqrt(3 * fan_in)
    return found


def started(form: Form, sizes: Sizes) -> dict[str, np.ndarray]:
    """Return initial values that have these deviations to the last digit."""
    made, own = {}, starts(form, sizes)
    for name, shape in shapes(form, sizes).items():
        values = np.linspace(-1, 1, math.prod(shape)).reshape(shape)
        made[name] = values / values.std() * own[name]
    return made


# PyTorch


def torch_module(form: Form, sizes: Sizes) -> Any:
    """Return PyTorch's module; base shapes are not set."""
    import torch
    from mup import MuReadout, MuSharedReadout
    from torch import nn

    hidden, inner = sizes.hidden, HEADS * sizes.head

    class Across(nn.Module):
        def __init__(self, into: int, out: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(into, out).uniform_(-1, 1) / math.sqrt(into))
            self.bias = nn.Parameter(torch.zeros(out))

        def forward(self, x: Any) -> Any:
            return x @ self.weight + self.bias

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.q, self.v = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
            self.k, self.o = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden)
            self.up = (Across if form.across else nn.Linear)(hidden, sizes.mlp)
            self.down = nn.Linear(sizes.mlp, hidden)

        def forward(self, x: Any) -> Any:
            y = self.norm1(x)
            parts = (self.q(y), self.k(y), self.v(y))
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
            # μP's 1/d is for the user to write; mup's own examples do it like this.
            scores = (q @ k.mT * (math.sqrt(BASE.head) / sizes.head)).softmax(-1)
            x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, hidden)
            self.positions = nn.Embedding(TABLE, hidden)
            self.context = nn.Linear(FEATURES, hidden)
            self.layers = nn.ModuleList(Block() for _ in range(sizes.layers))
            self.norm = nn.LayerNorm(hidden)
            if form.tied:
                self.head = MuSharedReadout(self.embed.weight, bias=False)
            else:
                self.head = MuReadout(hidden, VOCABULARY)

        def forward(self, tokens: Any, context: Any) -> Any:
            x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
            x = x + self.context(context)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    return Transformer()


def sampled(form: Form, sizes: Sizes, seeds: int = 40) -> float:
    """Return how far deviations over some seeds are from those documented, relative to them."""
    import torch

    squares: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, p in torch_module(form, sizes).named_parameters():
            squares.setdefault(name, []).append(float(p.detach().square().mean()))
    own = starts(form, sizes)
    found = {name: math.sqrt(np.mean(squares[name])) / size for name, size in own.items() if size}
    return max(abs(ratio - 1) for ratio in found.values())


def _based(form: Form, rescale: bool = True) -> Any:
    import torch
    from mup import set_base_shapes

    torch.manual_seed(0)
    module = torch_module(form, TARGET)
    return set_base_shapes(module, torch_module(form, BASE), rescale_params=rescale)


def factors(form: Form, optimizer: str) -> dict[str, dict[str, float]]:
    """Return what ``mup`` makes of every parameter of the target, read off its objects."""
    import mup

    module, own = _based(form), dict(_based(form, rescale=False).named_parameters())
    decoupled = mup.MuAdamW if optimizer == "adam" else mup.MuSGD
    groups = _of_groups(module, decoupled(module.parameters(), lr=1.0, weight_decay=1.0))
    coupled = _of_groups(module, mup.MuAdam(module.parameters(), lr=1.0, weight_decay=1.0))
    multipliers = probed(module)
    found = {}
    for name, p in module.named_parameters():
        lr, decay = (groups[name][each] for each in ("lr", "weight_decay"))
        found[name] = {
            "multiplier": multipliers[name],
            "start": ratio(p, own[name]),
            "lr": lr,
            "weight decay": decay,
            "decay of a step": lr * decay,
        }
        if optimizer == "adam":
            found[name]["ε"] = groups[name]["eps"] / 1e-8
            found[name]["L2"] = coupled[name]["weight_decay"]
    for name, p in module.named_parameters():
        found[name]["init"] = _drawn(p)
    return found


def _of_groups(module: Any, optimizer: Any) -> dict[str, dict[str, float]]:
    own = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: own[id(p)] for name, p in module.named_parameters()}


def _drawn(p: Any) -> float:
    """By what mup's normal_ multiplies the deviation that it is asked for."""
    import mup.init
    import torch

    torch.manual_seed(1)
    plain = torch.nn.init.normal_(torch.empty_like(p))
    torch.manual_seed(1)
    return ratio(mup.init.normal_(p), plain)


def ratio(x: Any, plain: Any) -> float:
    """Return the number that one array is times another; 1 where both are zero.

    Raises:
      ValueError: it is no multiple.
    """
    x, plain = (each.detach().double().flatten() for each in (x, plain))
    if not x.any() and not plain.any():
        return 1.0
    found = float(x @ plain / (plain @ plain))
    if float((x - found * plain).norm()) > 1e-5 * float(x.norm()):
        raise ValueError("this is not the plain layer times a number")
    # What single precision lets be known of it.
    return float(f"{found:.6g}")


def probed(module: Any) -> dict[str, float]:
    """Return by what layers multiply their parameters, from what comes out of them.

    All other parameters of the layer are zero meanwhile.
    """
    import torch

    found = {}
    with torch.no_grad():
        for name, layer in module.named_modules():
            own = dict(layer.named_parameters(recurse=False))
            kept = {each: p.clone() for each, p in own.items()}
            for each, p in own.items():
                for other in own.values():
                    other.zero_()
                p.normal_()
                found[f"{name}.{each}"] = _multiplier(layer)
            for each, p in own.items():
                p.copy_(kept[each])
    return found


def _multiplier(layer: Any) -> float:
    import torch
    from torch.nn import functional

    weight, bias = layer.weight, getattr(layer, "bias", None)
    if isinstance(layer, torch.nn.Embedding):
        rows = torch.arange(len(weight))
        return ratio(layer(rows), functional.embedding(rows, weight))
    if isinstance(layer, torch.nn.LayerNorm):
        x = torch.randn(5, len(weight), dtype=weight.dtype)
        return ratio(layer(x), functional.layer_norm(x, weight.shape, weight, bias))
    kernel = weight if isinstance(layer, torch.nn.Linear) else weight.T
    x = torch.randn(5, kernel.shape[1], dtype=weight.dtype)
    return ratio(layer(x), functional.linear(x, kernel, bias))


class Trained(NamedTuple):
    """A model before and after some steps."""

    outputs: np.ndarray
    weights: Mapping[str, np.ndarray]
    """After the steps."""
    later: np.ndarray
    """Outputs after the steps."""


def trained(
    form: Form, weights: Mapping[str, np.ndarray], optimizer: str, steps: int, **settings: float
) -> Trained:
    """Return what steps of ``mup``'s AdamW or SGD make of a target with these weights."""
    import mup
    import torch

    module = _based(form)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.tensor(weights[name]))
    tokens, context, aim = (torch.tensor(x) for x in (*inputs(), wanted()))
    make = mup.MuAdamW if optimizer == "adam" else mup.MuSGD
    tx = make(module.parameters(), **settings)
    before = module(tokens.long(), context).detach().numpy()
    for _ in range(steps):
        tx.zero_grad()
        (module(tokens.long(), context) - aim).square().mean().backward()
        tx.step()
    after = {name: p.detach().numpy() for name, p in module.named_parameters()}
    return Trained(before, after, module(tokens.long(), context).detach().numpy())
