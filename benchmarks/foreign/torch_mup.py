"""The Transformer of ``transfer_twin`` with the package ``mup``, and what that does to it.

PyTorch and ``mup`` are imported where they are used, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np

import uscale_jax as us
from benchmarks.foreign.transfer_twin import (
    BASE,
    FEATURES,
    HEADS,
    LENGTH,
    SETTINGS,
    STEPS,
    TARGET,
    VOCABULARY,
    Form,
    Ratios,
    Sizes,
    fresh,
    inputs,
    model,
    shapes,
    starts,
    trained,
    wanted,
)

REASONS = {
    "Table 3": "the rule 'mup' is the form without multipliers: their 1/r is in what readouts "
    "start with and in their rates, and training is the same",
    "scores": "mup leaves attention's 1/d to the user; where a model divides by √d, what is "
    "missing is a multiplier of queries or keys here",
    "tied": "MuSharedReadout multiplies what it reads by 1/r; here gain and bias of the norm "
    "before it are multiplied",
    "tied start": "set_base_shapes rescales the weight of a MuSharedReadout as if it started with "
    "1/√fan_in, but it is an embedding, which starts alike at all widths",
    "bias start": "PyTorch's biases start with 1/√fan_in, which set_base_shapes takes back; here "
    "they are taken to start alike, and with initial=(base, target) the factor is mup's",
    "no ε": "mup has no rule for what is compared with gradients: ε, and the L2 term of MuAdam, "
    "which it multiplies like decoupled decay",
    "layout": "mup takes a matrix's last dimension for its inputs, whatever the program sums over",
}


# PyTorch's modules


def torch_module(form: Form, sizes: Sizes) -> Any:
    """Return PyTorch's module; base shapes are not set."""
    import torch
    from mup import MuReadout, MuSharedReadout
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, sizes.hidden)
            self.positions = nn.Embedding(LENGTH, sizes.hidden)
            self.context = nn.Linear(FEATURES, sizes.hidden)
            self.layers = nn.ModuleList(_block(form, sizes) for _ in range(sizes.layers))
            self.norm = nn.LayerNorm(sizes.hidden)
            if form.tied:
                self.head = MuSharedReadout(self.embed.weight, bias=False)
            else:
                self.head = MuReadout(sizes.hidden, VOCABULARY)

        def forward(self, tokens: Any, context: Any) -> Any:
            x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
            x = x + self.context(context)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    return Transformer()


def _block(form: Form, sizes: Sizes) -> Any:
    from torch import nn

    hidden, inner = sizes.hidden, HEADS * sizes.head

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.q, self.v = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
            self.k, self.o = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden)
            self.up = (_across if form.across else nn.Linear)(hidden, sizes.mlp)
            self.down = nn.Linear(sizes.mlp, hidden)

        def forward(self, x: Any) -> Any:
            y = self.norm1(x)
            parts = (self.q(y), self.k(y), self.v(y))
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
            # μP's 1/d is for the user to write; mup's own examples do it like this.
            scores = (q @ k.mT * (math.sqrt(BASE.head) / sizes.head)).softmax(-1)
            x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    return Block()


def _across(into: int, out: int) -> Any:
    """A linear layer whose kernel is stored as (in, out)."""
    import torch
    from torch import nn

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(into, out).uniform_(-1, 1) / math.sqrt(into))
            self.bias = nn.Parameter(torch.zeros(out))

        def forward(self, x: Any) -> Any:
            return x @ self.weight + self.bias

    return Across()


@cache
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


# What mup does


def factors(form: Form, optimizer: str) -> dict[str, dict[str, float]]:
    """Return what ``mup`` makes of every parameter of the target, read off its objects."""
    import mup

    module, own = _based(form), dict(_based(form, rescale=False).named_parameters())
    decoupled = mup.MuAdamW if optimizer == "adam" else mup.MuSGD
    groups = of_groups(module, decoupled(module.parameters(), lr=1.0, weight_decay=1.0))
    coupled = of_groups(module, mup.MuAdam(module.parameters(), lr=1.0, weight_decay=1.0))
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
        found[name]["start by default"] = found[name]["start"]
        found[name]["init"] = _drawn(p)
    return found


def of_groups(module: Any, optimizer: Any) -> dict[str, dict[str, float]]:
    """Return an optimizer's settings by the name of the parameter."""
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


# Why it differs


def reasons(
    form: Form, rule: str, optimizer: str, multipliers: Mapping[str, float], name: str
) -> Ratios:
    """Return why factors of a leaf here differ from mup's, and by how much; some may be 1.

    Of queries and keys one takes what scores need: ``multipliers`` here say which.
    """
    base, target = (shapes(form, sizes)[name] for sizes in (BASE, TARGET))
    grown = [b / a for a, b in zip(base, target, strict=True)]
    wide, power = TARGET.hidden / BASE.hidden, 1 if optimizer == "adam" else 2
    is_across = form.across and name.endswith("up.weight")
    found = [_of_gradients(grown[::-1] if is_across else grown), _of_bias(form, name)]
    if rule == "mup" and name == "head.weight":
        moved = dict.fromkeys(("init", "start", "start by default"), 1 / wide)
        rates = {"lr": wide**-power, "weight decay": wide**power, "ε": wide, "L2": wide**2}
        found.append(("Table 3", {"multiplier": wide, **moved, **rates}))
    if form.roots and (".q." in name or ".k." in name) and multipliers[name] != 1:
        found.append(("scores", {"multiplier": (TARGET.head / BASE.head) ** -0.5}))
    if form.tied and name.startswith("norm."):
        found.append(("tied", {"multiplier": 1 / wide}))
    if form.tied and name == "embed.weight":
        found.append(("tied start", dict.fromkeys(("start", "start by default"), wide**-0.5)))
    if is_across:
        turned = grown[1] / grown[0]
        rates = {"lr": turned**power, "weight decay": turned**-power, "L2": 1 / turned}
        found.append(("layout", {"init": turned**0.5, **rates}))
    return found


def _of_gradients(grown: list[float]) -> tuple[str, dict[str, float]]:
    """Gradients fall with the outputs' width; those of readouts with the inputs'."""
    falls = 1 / next((x for x in grown if x != 1), 1.0)
    return "no ε", {"ε": falls, "L2": falls}


def _of_bias(form: Form, name: str) -> tuple[str, dict[str, float]]:
    sizes = [starts(form, each)[name] for each in (BASE, TARGET)]
    is_bias = name.endswith("bias") and all(sizes)
    return "bias start", {"start by default": sizes[1] / sizes[0] if is_bias else 1.0}


# Steps of both


def stepped(plan: us.Plan, form: Form, rule: str, optimizer: str) -> dict[str, float]:
    """Return how far both targets are apart before and after some steps from the same weights.

    The weights of mup's model are those here, times by what its form of the rule starts larger.
    """
    found, there = us.transfer(plan, rule, optimizer=optimizer), factors(form, optimizer)
    init = {name: values["init"] for name, values in there.items()}
    larger = {name: init[name] / leaf.factors.init for name, leaf in found.leaves.items()}
    start = found.start({name: jnp.asarray(x) for name, x in fresh(form, TARGET).items()})
    weights = {name: np.asarray(x) * np.float32(larger[name]) for name, x in start.items()}
    before, after, later = _trained(form, weights, optimizer)
    own_before, own_after, own_later = trained(found, model(form), start, optimizer)
    return {
        "outputs": _apart(own_before, before),
        "weights": max(_apart(larger[name] * own_after[name], x) for name, x in after.items()),
        "later": _apart(own_later, later),
        "moved": _apart(later, before),
    }


def _apart(found: Any, wanted: Any) -> float:
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


def _trained(form: Form, weights: Mapping[str, np.ndarray], optimizer: str) -> tuple[Any, Any, Any]:
    """Outputs before, and weights and outputs after steps of ``mup``'s AdamW or SGD."""
    import mup
    import torch

    module = _based(form)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.tensor(weights[name]))
    tokens, context, aim = (torch.tensor(x) for x in (*inputs(), wanted()))
    make = mup.MuAdamW if optimizer == "adam" else mup.MuSGD
    tx = make(module.parameters(), **SETTINGS[optimizer])
    before = module(tokens.long(), context).detach().numpy()
    for _ in range(STEPS):
        tx.zero_grad()
        (module(tokens.long(), context) - aim).square().mean().backward()
        tx.step()
    after = {name: p.detach().numpy() for name, p in module.named_parameters()}
    return before, after, module(tokens.long(), context).detach().numpy()
