"""Models of packages that build on Flax NNX: their trees keep sizes, so parameters go by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.foreign.registry import by_name
from benchmarks.zoo.registry import Built


def nnx_built(module: Any, call: Callable[..., Any], *inputs: Any) -> Built:
    """Return an NNX module; ``call(module, *inputs)`` is the function."""
    from flax import nnx

    graph, state = nnx.split(module)
    return by_name(state, lambda tree, *args: call(nnx.merge(graph, tree), *args), *inputs)
