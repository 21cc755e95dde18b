"""The Transformer of ``transfer_twin`` with the layers of ``unit-scaling``, and what they do to it.

PyTorch and ``unit_scaling`` are imported where they are used, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from benchmarks.foreign import transfer_twin
from benchmarks.foreign.torch_mup import of_groups, probed, ratio
from benchmarks.foreign.transfer_twin import (
    BASE,
    FEATURES,
    HEADS,
    LENGTH,
    PLAIN,
    SMALL,
    VOCABULARY,
    Ratios,
    Sizes,
    inputs,
    shapes,
    wanted,
)

WIDE = BASE.times(3)
"""All widths grow alike: how gradients fall where they do not, unit-scaling does not follow."""
DEEP = WIDE._replace(layers=2 * BASE.layers)

Factors: TypeAlias = "Mapping[str, Mapping[str, float]]"

STEP = 1e-4
"""Of finite differences."""

REASONS = {
    "bias": "unit-scaling multiplies biases as it does their kernels, by 1/√fan_in, by 1/fan_in in "
    "LinearReadout; here biases have no multiplier",
    "input kernel": "to unit-scaling a kernel whose inputs do not grow is one like those inside: "
    "Adam's rate is 1/√fan_in, a constant, and SGD's does not grow with its outputs",
    "depth": "rates in residual branches are over √layers there; here, relative to the base, over "
    "the root of by how much these grow",
    "branch": "what residual branches are multiplied by is in residual_add there, here in what "
    "they end with",
}


def torch_module(sizes: Sizes, constraint: str | None = None) -> Any:
    """Return PyTorch's module; the constraint is that of the readout."""
    import torch
    import unit_scaling as uu
    import unit_scaling.functional as scaled
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = uu.Embedding(VOCABULARY, sizes.hidden)
            self.positions = uu.Embedding(LENGTH, sizes.hidden)
            self.context = uu.Linear(FEATURES, sizes.hidden, bias=True)
            self.layers = uu.DepthModuleList([_block(sizes, i) for i in range(sizes.layers)])
            self.norm = uu.LayerNorm(sizes.hidden, elementwise_affine=True)
            self.head = uu.LinearReadout(sizes.hidden, VOCABULARY, bias=True, constraint=constraint)

        def forward(self, tokens: Any, context: Any) -> Any:
            places = torch.arange(tokens.shape[1]).expand(*tokens.shape)
            x = scaled.add(self.embed(tokens), self.positions(places))
            x = scaled.add(x, self.context(context))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    return Transformer()


def _block(sizes: Sizes, i: int) -> Any:
    import unit_scaling as uu
    import unit_scaling.functional as scaled
    from torch import nn

    hidden, inner = sizes.hidden, HEADS * sizes.head
    weights = uu.core.functional.transformer_residual_scaling_rule()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tau = [weights(2 * i + j, 2 * sizes.layers) for j in (0, 1)]
            self.norm1 = uu.LayerNorm(hidden, elementwise_affine=True)
            self.norm2 = uu.LayerNorm(hidden, elementwise_affine=True)
            self.q, self.v = (uu.Linear(hidden, inner, bias=True) for _ in "qv")
            self.k, self.o = uu.Linear(hidden, inner), uu.Linear(inner, hidden, bias=True)
            self.up = uu.Linear(hidden, sizes.mlp, bias=True)
            self.down = uu.Linear(sizes.mlp, hidden, bias=True)

        def forward(self, x: Any) -> Any:
            y, skip = scaled.residual_split(x, self.tau[0])
            y = self.norm1(y)
            parts = (self.q(y), self.k(y), self.v(y))
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
            y = scaled.scaled_dot_product_attention(q, k, v, is_causal=False)
            x = scaled.residual_add(self.o(y.transpose(1, 2).flatten(2)), skip, self.tau[0])
            y, skip = scaled.residual_split(x, self.tau[1])
            y = self.down(scaled.gelu(self.up(self.norm2(y))))
            return scaled.residual_add(y, skip, self.tau[1])

    return Block()


def factors(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return what ``unit-scaling`` makes of every parameter under AdamW, read off its objects."""
    import unit_scaling as uu

    module = torch_module(sizes)
    rates = of_groups(module, uu.optim.AdamW(module.parameters(), lr=1.0, weight_decay=1.0))
    multipliers = probed(module)
    found = {}
    for name, p in module.named_parameters():
        lr, decay = (rates[name][each] for each in ("lr", "weight_decay"))
        found[name] = {
            "init": _drawn(module, name, p),
            "multiplier": multipliers[name],
            "lr": lr,
            "weight decay": decay,
            "decay of a step": lr * decay,
        }
    return found


def _drawn(module: Any, name: str, p: Any) -> float:
    """The deviation that a parameter starts with; 1 of gains and of biases, which stay alike."""
    import torch

    if p.ndim == 1:
        return 1.0
    layer = module.get_submodule(name.rpartition(".")[0])
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    return ratio(p, torch.randn(p.shape))


def gradients(sizes: Sizes, optimizer: str) -> dict[str, dict[str, float]]:
    """Return what stands for ε, or for SGD's learning rate, where gradients are true ones.

    The backward pass of ``unit-scaling`` multiplies gradients, leaf by leaf, and with them what
    is compared with ε or subtracted by SGD.
    """
    import unit_scaling as uu

    constraint = None if optimizer == "adam" else "to_output_scale"
    module = torch_module(sizes, constraint).double()
    larger = _larger(module)
    if optimizer == "adam":
        return {name: {"ε": 1 / larger[name]} for name in larger}
    own = uu.optim.SGD(module.parameters(), lr=1.0, readout_constraint=constraint)
    rates = of_groups(module, own)
    return {name: {"lr": rates[name]["lr"] * larger[name]} for name in larger}


def _larger(module: Any) -> dict[str, float]:
    """By what gradients are larger than those of the function, from finite differences."""
    import torch

    tokens, context, aim = (torch.tensor(x) for x in (*inputs(), wanted()))

    def loss() -> Any:
        return (module(tokens.long(), context.double()) * aim.double()).sum()

    loss().backward()
    found = {}
    with torch.no_grad():
        for name, p in module.named_parameters():
            along = p.grad / p.grad.norm()
            ends = []
            for step in (STEP, -2 * STEP):
                p.add_(step * along)
                ends.append(float(loss()))
            p.add_(STEP * along)
            true = (ends[0] - ends[1]) / (2 * STEP)
            found[name] = float(p.grad.norm()) / true
    return found


def here(target: Sizes, optimizer: str) -> dict[str, dict[str, float]]:
    """Return every factor of every leaf of a target here; those of the base are from a smaller."""
    smaller = SMALL if target == BASE else BASE
    return transfer_twin.here(PLAIN, smaller, target, "u_mup", optimizer)


def over(wide: Factors, base: Factors) -> dict[str, dict[str, float]]:
    """Return by what factors grow."""
    return {
        name: {each: value / base[name][each] for each, value in values.items()}
        for name, values in wide.items()
    }


def reasons(target: Sizes, name: str) -> Ratios:
    """Return why factors of a leaf of a target differ here, and by how much."""
    layer, found = name.rpartition(".")[0], []
    if (fan_in := _fan_in(target, name)) is not None:
        found.append(("bias", {"multiplier": float(fan_in) if layer == "head" else fan_in**0.5}))
    if name == "context.weight":
        found.append(("input kernel", {"lr": FEATURES**0.5, "weight decay": FEATURES**-0.5}))
    if name.startswith("layers."):
        root = BASE.layers**0.5
        found.append(("depth", {"lr": root, "weight decay": 1 / root}))
    if layer.endswith((".o", ".down")):
        found.append(("branch", {"multiplier": (target.layers / BASE.layers) ** -0.5}))
    return found


def reasons_of_gradients(name: str) -> Ratios:
    """Return the same of what :func:`gradients` gives, from base to the wide target."""
    fans = [_fan_in(sizes, name) for sizes in (BASE, WIDE)]
    if fans[0] is not None and fans[1] is not None:
        falls = (fans[0] / fans[1]) ** (1 if name == "head.bias" else 0.5)
        return [("bias", {"ε": 1 / falls, "lr": falls})]
    if name == "context.weight":
        return [("input kernel", {"lr": WIDE.hidden / BASE.hidden})]
    return []


def _fan_in(sizes: Sizes, name: str) -> int | None:
    """That of the kernel that a bias belongs to; None of other leaves."""
    layer, _, kind = name.rpartition(".")
    is_bias = kind == "bias" and "norm" not in layer
    return shapes(PLAIN, sizes)[f"{layer}.weight"][1] if is_bias else None


def branches(layers: int) -> list[float]:
    """Return how large residual branches are in the last sum, relative to the embedding."""
    from unit_scaling.core.functional import transformer_residual_scaling_rule

    weights = transformer_residual_scaling_rule()
    found, skip = [], 1.0
    for i in range(2 * layers):
        tau = weights(i, 2 * layers)
        found.append(tau / skip)
        skip /= math.sqrt(1 + tau**2)
    return found
