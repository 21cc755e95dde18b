"""What a model of the zoo is: a builder from named sizes, and which sizes should be free."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

Sizes = Mapping[str, int]


class Built(NamedTuple):
    """A model at given sizes."""

    apply: Callable[..., Any]
    """``apply(params, *inputs)``, pure, any pytree of outputs."""
    params: Any
    """The parameter tree, as shapes (``jax.eval_shape`` of an initialiser)."""
    inputs: tuple[Any, ...]
    """NumPy arrays, the same whatever the sizes that may grow."""


@dataclass(frozen=True)
class Model:
    """A family of models over named sizes.

    Every size named in ``free`` can be multiplied, alone or with others, with the function kept
    by replicating units and rescaling leaves.  For a size in ``fixed`` that is impossible, and
    the words say why (they occur in the reason the tracer gives).  A size in neither is chosen by
    the data (sequence length, image side).
    """

    name: str
    sizes: Sizes
    build: Callable[[Sizes], Built]
    free: tuple[str, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)


def models() -> dict[str, Model]:
    """Return every model that a module of this package lists in ``MODELS``, by name."""
    package = importlib.import_module("benchmarks.zoo")
    found: dict[str, Model] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        listed = getattr(importlib.import_module(f"benchmarks.zoo.{module}"), "MODELS", ())
        found |= {model.name: model for model in listed}
    return found


def built(module: nn.Module, *inputs: np.ndarray, **options: object) -> Built:
    """Return a linen module with its parameter shapes; ``options`` go to every call."""
    params = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **options), *inputs)
    return Built(lambda p, *args: module.apply(p, *args, **options), params, inputs)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    """Return normal float32 inputs."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(*shape: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Return random token ids."""
    return np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)
