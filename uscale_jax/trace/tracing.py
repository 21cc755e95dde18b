"""From the user's functions to one flat program with names for its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from uscale_jax import _jax, _tree
from uscale_jax._jax import ClosedJaxpr
from uscale_jax._types import Apply, Key, Tree
from uscale_jax.trace.axes import Structure, analyse
from uscale_jax.trace.inline import program
from uscale_jax.trace.known import with_tables
from uscale_jax.trace.program import Program


class Model(NamedTuple):
    """A function and its parameters, or their shapes."""

    apply: Apply
    params: Tree


class Traced(NamedTuple):
    """A program whose axes are known, and what its inputs and outputs are called."""

    structure: Structure
    keys: list[Key]
    leaves: list[Any]
    treedef: Any
    outputs: Any
    """The tree of output shapes (of the first model)."""
    closed: Sequence[ClosedJaxpr] = ()
    """The jaxprs it was read off."""


def trace(models: Sequence[Model], inputs: Sequence[Any], *, rotary: bool = False) -> Traced:
    """Returns the program of one model, or of a small and a big one together.

    With ``rotary``, axes may grow along which tables of numbers nest (``trace.rotary``).

    Raises:
      ValueError: the models' parameter trees, their programs or their outputs differ.
    """
    shapes = [jax.tree.map(_shape, (model.params, *inputs)) for model in models]
    _check_trees(models)
    closed, outputs = zip(
        *(_jax.closed_jaxpr(m.apply, *s) for m, s in zip(models, shapes, strict=True)), strict=True
    )
    _check_outputs(outputs)
    return traced(closed, models[0].params, inputs, outputs[0], rotary=rotary)


def traced(
    closed: Sequence[ClosedJaxpr],
    params: Tree,
    inputs: Sequence[Any],
    outputs: Tree,
    *,
    rotary: bool = False,
) -> Traced:
    """Returns the program of jaxprs whose first inputs are the leaves of ``params``.

    Raises:
      ValueError: the jaxprs differ in more than sizes.
    """
    keys, leaves, treedef = _tree.flatten_named(params)
    names = [f"input {'/'.join(key)}" for key in _tree.flatten_named(tuple(inputs))[0]]
    both = _with_tables(closed) if rotary else program(closed)
    structure = analyse(both, names, output_names(outputs))
    return Traced(structure, keys, leaves, treedef, outputs, closed)


def _with_tables(closed: Sequence[ClosedJaxpr]) -> Program:
    programs, sources = with_tables(closed)
    return replace(program(programs), tables=sources)


def output_names(outputs: Tree) -> list[str]:
    """Returns what to call each output: ``output logits``, or ``the output`` of one."""
    keys = _tree.flatten_named(outputs)[0]
    return [f"output {'/'.join(key)}" if key else "the output" for key in keys]


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.eval_shape(lambda: jax.numpy.asarray(leaf))


def _check_trees(models: Sequence[Model]) -> None:
    small, big = (_tree.flatten_named(m.params)[0] for m in (models[0], models[-1]))
    if small == big:
        return _check_leaves(models)
    lines = ["the two models have different parameters."]
    lines += [f"  only the small one has {_tree.name(k)!r}" for k in small if k not in set(big)][:8]
    lines += [f"  only the big one has {_tree.name(k)!r}" for k in big if k not in set(small)][:8]
    lines.append(
        "Expected: the same tree with other sizes. Fix: build both from one definition; if the big "
        "one has more layers, say so to `plan`: depth='interleave'."
    )
    raise ValueError("\n".join(lines))


def _check_leaves(models: Sequence[Model]) -> None:
    flat = [_tree.flatten_named(jax.tree.map(_shape, m.params))[:2] for m in models]
    keys, small, big = flat[0][0], flat[0][1], flat[-1][1]
    for key, a, b in zip(keys, small, big, strict=True):
        if len(a.shape) != len(b.shape) or a.dtype != b.dtype:
            raise ValueError(
                f"parameter {_tree.name(key)!r} is {_tree.describe(a)} in the small model and "
                f"{_tree.describe(b)} in the big one. Expected: the same rank and dtype. Fix: "
                "build both from one definition."
            )


def _check_outputs(outputs: Sequence[Any]) -> None:
    small, big = (_tree.flatten_named(out) for out in (outputs[0], outputs[-1]))
    if small[0] != big[0]:
        names = [output_names(out) for out in (outputs[0], outputs[-1])]
        raise ValueError(
            f"the two models return different trees of outputs: {names[0]} (small) and {names[1]} "
            "(big). Expected: the same outputs. Fix: build both from one definition."
        )
    for name, a, b in zip(output_names(outputs[0]), small[1], big[1], strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"{name} is {_tree.describe(a)} in the small model and {_tree.describe(b)} in the "
                "big one. Expected: the same shape, for it is to be the same function. Fix: keep "
                "the size of the output, such as the vocabulary."
            )
