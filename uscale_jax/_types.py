"""The few type names the package speaks in."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import chex

Tree: TypeAlias = Any
"""Any JAX pytree: dict, ``FrozenDict``, ``nnx.State``, a registered class, a bare array."""

Factor: TypeAlias = chex.Numeric
"""A positive finite real scalar: Python, NumPy or JAX; traced values are allowed."""

Key: TypeAlias = tuple[str, ...]
"""Where a leaf stands in its tree, as strings: ``('params', 'Dense_0', 'kernel')``."""

Where: TypeAlias = Callable[[str, Any], bool]
"""Chooses leaves by name (``'params/Dense_0/kernel'``) and by the leaf itself."""

Apply: TypeAlias = Callable[..., Any]
"""A model as a pure function ``apply(params, *inputs)``."""

LayerExponents: TypeAlias = Mapping[str, float]
"""Layer name (a path prefix such as ``'params/Dense_0'``) to the power of k on its kernel."""
