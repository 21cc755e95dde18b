"""Pairs of an operation of ``uscale_jax.numerics`` and the one of PyTorch's ``unit-scaling``.

Both of a pair take the same arrays, in the layouts used here; where PyTorch's differ, its side
turns them within what is differentiated.  Where the two are not the same function, a pair says
why, and by what factor each tensor is larger here: from formulas, not from what came out.

``unit_scaling`` is imported where it is used, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BINARY = (None, "to_output_scale", "to_grad_input_scale", "gmean", "hmean", "amean")
"""The constraints of an output and one gradient."""
TERNARY = (*BINARY[:2], "to_left_grad_scale", "to_right_grad_scale", *BINARY[3:])
MULTS = (0.25, 1.0, 4.0)

REASONS = {
    "bias": "theirs is inside of the factor s, y = s(xW + b), here outside: a b of theirs that is "
    "1/s times the one here gives the same function",
    "activation": "factors are blended there between those of small and of large mult, here they "
    "are computed by quadrature",
    "softmax": "factors are blended there between those of flat and of hard predictions, here they "
    "are computed by quadrature for every number of classes",
    "attention": "the factor is blended there between those of flat and of hard predictions, here "
    "it is computed by quadrature of normal logits",
    "values": "theirs divides logits by the size of values, here they are divided by that of "
    "queries: theirs with mult·d_V/d differs by the factor alone",
    "borders": "products with padding, and windows cut off at the end, count there and not here",
    "module": "Conv1d there does not pass its constraint on: None is to_output_scale",
    "broadcast": "the gradient of an operand that a whole batch uses is a sum over the batch: that "
    "counts here, not there",
}

Call = Callable[..., Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """One operation in both packages.

    ``ratios`` are by how much "output", or the gradient of an operand, is larger here; 1 where not
    named.  ``given`` multiplies operands before they are given to theirs, and ``adapted`` is called
    in place of ``there``, for the comparison in which all that differs is ``ratios``.
    """

    of: str
    """The function of ``unit_scaling.functional``."""
    name: str
    shapes: Shapes
    here: Call
    there: Call
    reason: str = ""
    """A key of ``REASONS``, empty where the two are the same function."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    given: Mapping[str, float] = field(default_factory=dict)
    adapted: Call | None = None
    masked: bool = False
    """Whether both make zeros at random: what either made zero is not compared."""
    judged: tuple[str, ...] = ()
    """The tensors that both mean to bring to scale one."""
    centred: bool = False
    """Whether the scale of the output is meant about its mean."""


def graphcore(name: str, **options: Any) -> Call:
    """Return a function of ``unit_scaling.functional``, looked up when it is called."""

    def call(*tensors: Any) -> Any:
        import unit_scaling.functional as functional

        return getattr(functional, name)(*tensors, **options)

    return call


def turned(f: Call, x: Any, w: Any, b: Any = None) -> Any:
    """Return what a linear layer of PyTorch does: its kernels have outputs first."""
    return f(x, w.T, b)


def blend(weight: float, lower: float, upper: float) -> float:
    """Return what lies between two limits, by ratio: the empirical models of unit-scaling."""
    return upper**weight * lower ** (1 - weight)


def judged(constraint: Any, *free: str) -> tuple[str, ...]:
    """Return what has a factor of its own; under to_output_scale gradients follow the output's."""
    return {None: ("output", *free), "to_output_scale": ("output",)}.get(constraint, ())
