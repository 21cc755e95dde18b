"""Which models of other packages can be built here, and what is missing for the others."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.zoo.registry import Built, Model


def foreign_models() -> tuple[dict[str, Model], dict[str, str]]:
    """Return the models whose packages are installed, and the missing package of the others."""
    package = importlib.import_module("benchmarks.foreign")
    found: dict[str, Model] = {}
    missing: dict[str, str] = {}
    for name in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        module = importlib.import_module(f"benchmarks.foreign.{name}")
        listed = {model.name: model for model in getattr(module, "MODELS", ())}
        absent = [r for r in getattr(module, "REQUIRES", ()) if not importlib.util.find_spec(r)]
        if absent:
            missing |= dict.fromkeys(listed, absent[0])
        else:
            found |= listed
    return found, missing


def floating() -> Any:
    """Return the widest floating dtype that is switched on, to compute in."""
    return jax.dtypes.canonicalize_dtype(float)


def by_name(tree: Any, call: Callable[..., Any], *inputs: Any) -> Built:
    """Return a model whose parameters are the floating leaves of ``tree``, by their path.

    ``call(tree, *inputs)`` is the function.  The definitions that some packages keep in the
    structure of their trees, sizes among them, are so kept out of the parameters.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    leaves = [leaf for _, leaf in flat]
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in zip(names, leaves, strict=True)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }

    def apply(params: dict[str, Any], *args: Any) -> Any:
        given = [params.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        return call(jax.tree.unflatten(treedef, given), *args)

    return Built(apply, shapes, inputs)
