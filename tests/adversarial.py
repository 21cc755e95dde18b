"""Programs written to be grown wrongly, each with the reason why it might be.

A case is a function ``apply(p, x, **sizes)``; its parameters are named with their dimensions, such
as ``up="I H"``, and it is grown from the first to the second of the sizes it names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from uscale_jax.trace.tracing import Model

FIXED = {"B": 5, "T": 6, "I": 4, "O": 3, "two": 2}
TWICE = {"H": (4, 8)}
MLP = {"up": "I H", "down": "H O"}


class Case(NamedTuple):
    fun: Callable[..., Any]
    words: str | None
    """In the text of the refusal; None if growing is exact."""
    params: dict[str, str]
    grown: dict[str, tuple[int, int]]
    inputs: tuple[Any, ...]
    dtypes: dict[str, Any]

    def model(self, program: int) -> Model:
        sizes = FIXED | {name: pair[program] for name, pair in self.grown.items()}
        own = {name: sizes[name] for name in self.grown}
        shapes = {
            name: jax.ShapeDtypeStruct(
                tuple(sizes[d] for d in dims.split()), self.dtypes.get(name, np.float64)
            )
            for name, dims in self.params.items()
        }
        return Model(lambda p, *inputs: self.fun(p, *inputs, **own), shapes)


CASES: dict[str, Case] = {}


def batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape)


X = batch(FIXED["B"], FIXED["I"])
SEQUENCE = batch(FIXED["B"], FIXED["T"], FIXED["I"])


def add(
    name: str,
    fun: Callable[..., Any],
    words: str | None = None,
    *,
    params: dict[str, str] | None = None,
    grown: dict[str, tuple[int, int]] | None = None,
    x: Any = X,
    dtypes: dict[str, Any] | None = None,
) -> None:
    assert name not in CASES, name
    CASES[name] = Case(fun, words, params or MLP, grown or TWICE, (x,), dtypes or {})


def exact(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A program that can be grown, though it may not look so."""
    return refused(None, **options)


def refused(words: str | None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A program that cannot be grown, for a reason in ``words``."""

    def decorate(fun: Callable[..., Any]) -> Callable[..., Any]:
        add(fun.__name__, fun, words, **options)
        return fun

    return decorate


def middle(name: str, fun: Callable[..., Any], words: str | None = None, **options: Any) -> None:
    """``fun(h, n)`` between two layers; ``h`` is bounded, so that no factor can hide in it."""

    def apply(p: Any, x: Any, H: int) -> Any:
        return fun(jax.numpy.tanh(x @ p["up"]), H) @ p["down"]

    add(name, apply, words, **options)
