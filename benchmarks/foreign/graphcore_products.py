"""Linear layers, matrix products and convolutions here and in ``unit-scaling``."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.foreign.graphcore_pairs import BINARY, TERNARY, Pair, Shapes, graphcore, turned
from uscale_jax import numerics as un

FAN_IN, FAN_OUT = 20, 28
WINDOW = 3
FITTING: Shapes = {"x": (4, 6, 7 * WINDOW), "w": (10, 6, WINDOW)}
"""No window overlaps, if the stride is as wide, and none is cut off: nothing is at a border."""


def products() -> list[Pair]:
    """Return the pairs of operations that sum products."""
    linear = [
        pair
        for of, power in (("linear", 0.5), ("linear_readout", 1.0))
        for constraint in BINARY
        for pair in _linear(of, power, constraint)
    ]
    return [*linear, *_matmul(), *_fitting(), *_bordered(), _module()]


def _linear(of: str, power: float, constraint: Any) -> list[Pair]:
    """Without a bias and with one."""
    shapes = {"x": (3, 11, FAN_IN), "w": (FAN_IN, FAN_OUT)}
    here = partial(getattr(un, of), constraint=constraint)
    there = partial(turned, graphcore(of, constraint=constraint))
    s, _ = un.constrained(constraint, FAN_IN**-power, FAN_OUT**-0.5)
    name, biased = f"{of}, {constraint}", {**shapes, "b": (FAN_OUT,)}
    return [
        Pair(of, name, shapes, here, there),
        Pair(of, f"{name}, with a bias", biased, here, there, "bias", given={"b": 1 / s}),
    ]


def _matmul() -> list[Pair]:
    batch, right = 3, (14, 22)
    shapes = {"left": (batch, 9, 14), "right": (batch, *right)}
    both = {
        c: (partial(un.matmul, constraint=c), graphcore("matmul", constraint=c)) for c in TERNARY
    }
    return [
        *(Pair("matmul", f"matmul, {c}", shapes, *both[c]) for c in TERNARY),
        Pair(
            "matmul",
            "matmul, None, one right for the batch",
            shapes | {"right": right},
            *both[None],
            "broadcast",
            {"right": batch**-0.5},
            judged=("right",),
        ),
    ]


def _fitting() -> list[Pair]:
    return [
        Pair(
            "conv1d",
            f"conv1d, {c}, stride as wide as the window",
            FITTING,
            partial(_convolved, WINDOW, 0, 1, c),
            graphcore("conv1d", stride=WINDOW, constraint=c),
        )
        for c in BINARY
    ]


def _bordered() -> list[Pair]:
    shapes: Shapes = {"x": (4, 6, 23), "w": (10, 3, 5)}
    stride, padding, groups = 2, 1, 2
    ratios = _border_ratios(shapes, stride, padding, groups)
    made = []
    for c, free in ((None, ("x", "w")), ("to_output_scale", ("w",))):
        there = graphcore("conv1d", stride=stride, padding=padding, groups=groups, constraint=c)
        made.append(
            Pair(
                "conv1d",
                f"conv1d, {c}, stride 2, padding, groups",
                shapes,
                partial(_convolved, stride, padding, groups, c),
                there,
                "borders",
                {tensor: ratios[tensor] for tensor in free},
                judged=free,
            )
        )
    return made


def _border_ratios(shapes: Shapes, stride: int, padding: int, groups: int) -> dict[str, float]:
    """Of the gradients: the products there are, counted one by one, against those counted there."""
    (*_, length), (outputs, _, window) = shapes["x"], shapes["w"]
    starts = range(-padding, length + padding - window + 1, stride)
    pairs = sum(0 <= start + i < length for start in starts for i in range(window))
    inside = stride * groups / (outputs * window)
    uses = outputs * pairs / (groups * length)
    return {"x": (uses * inside) ** -0.5, "w": (pairs / (len(starts) * window)) ** -0.5}


def _module() -> Pair:
    (_, inputs, _), (outputs, *_) = FITTING["x"], FITTING["w"]
    s, b = (inputs * WINDOW) ** -0.5, outputs**-0.5  # each input goes into one of a channel's
    return Pair(
        "conv1d",
        "Conv1d, the module, None",
        FITTING,
        partial(_convolved, WINDOW, 0, 1, None),
        partial(_conv_module, None),
        "module",
        {"x": b / s},
        judged=("x",),
    )


def _convolved(stride: int, padding: int, groups: int, constraint: Any, x: Any, w: Any) -> Any:
    pads = [(padding, padding)]
    return un.conv(x, w, (stride,), pads, feature_group_count=groups, constraint=constraint)


def _conv_module(constraint: Any, x: Any, w: Any) -> Any:
    import torch
    import unit_scaling

    outputs, inputs, window = w.shape
    module = unit_scaling.Conv1d(inputs, outputs, window, stride=window, constraint=constraint)
    return torch.func.functional_call(module, {"weight": w}, (x,))
