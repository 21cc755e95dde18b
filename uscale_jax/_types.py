"""The few type names the package speaks in."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import chex
import jax

Tree: TypeAlias = Any
"""Any JAX pytree: dict, ``FrozenDict``, ``nnx.State``, a registered class, a bare array."""

Factor: TypeAlias = chex.Numeric
"""A positive finite real scalar: Python, NumPy or JAX; traced values are allowed."""

Schedule: TypeAlias = Callable[[chex.Numeric], chex.Numeric]
"""A function from the step count (int32 scalar) to a factor."""

Key: TypeAlias = tuple[str, ...]
"""Where a leaf stands in its tree, as strings: ``('params', 'Dense_0', 'kernel')``."""

Leaf: TypeAlias = jax.Array | jax.ShapeDtypeStruct
"""What parameter trees hold; NumPy arrays are taken as well and come back as JAX arrays."""

Where: TypeAlias = Callable[[str, Any], bool]
"""Chooses leaves by name (``'params/Dense_0/kernel'``) and by the leaf itself."""

Apply: TypeAlias = Callable[..., Any]
"""A model as a pure function ``apply(params, *inputs)``."""

LayerExponents: TypeAlias = Mapping[str, float]
"""Layer name (a path prefix such as ``'params/Dense_0'``) to the power of k on its kernel."""
