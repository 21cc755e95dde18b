"""Growth in depth: the big program cut down to the layers of the small one.

A big model with more layers is the same function as the small one if every new layer gives out
what it takes in.  Both are proven of the program: cutting says where layers begin and end, zeros
of some leaves are followed through every new layer.  What is left is one program at two sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from uscale_jax import _jax, _tree
from uscale_jax._jax import ClosedJaxpr
from uscale_jax._types import Key, Tree
from uscale_jax.trace.deepening import Deepening, Side, Steps, Zeros
from uscale_jax.trace.flat import constants, flattened
from uscale_jax.trace.layers import Depth, Family
from uscale_jax.trace.tracing import Model, output_names


@dataclass(frozen=True)
class Deepened:
    """A small and a big program with the same number of layers, and how the rest is filled."""

    small: ClosedJaxpr
    """The small program without calls, to be read in step with ``closed``."""
    closed: ClosedJaxpr
    """The big program without its new layers and without calls.

    Its inputs are the leaves in the order of the small model, of the big model's widths, and then
    the inputs of the model.
    """
    outputs: Tree
    """The shapes that both return."""
    families: tuple[Family, ...]
    sources: dict[Key, Key]
    """For every leaf of the big model, the leaf of the small one that it is a copy of."""
    kept: dict[Key, Key]
    """For every leaf of the small model, the leaf of the big one in its place in ``closed``."""
    steps: dict[Key, Steps]
    """For stacked leaves, which slice of its source each slice is a copy of."""
    zero: dict[Key, Zeros]
    """Leaves of new layers, or the new slices of stacked leaves, that are zero instead."""
    exact: bool
    """Whether the big model so filled is the function ``closed`` of what it keeps."""
    why: str
    """Why it is not exact; empty if it is."""


def deepen(
    small: Model,
    big: Model,
    inputs: Sequence[Any],
    depth: Depth,
    new_layers: str = "identity",
) -> Deepened:
    """Returns the big program cut to the layers of the small one, and what new layers hold.

    Args:
      small: a model.
      big: one of the same definition with more layers, in lists whose names end in numbers or
        stacked for a scan; other sizes may differ too.
      inputs: what both are called on, or shapes.
      depth: the layer of the small model that each layer of the big one is a copy of, in order;
        ``"interleave"`` for 0, 0, 1, 1, ..., ``"stack"`` for 0, 1, ..., 0, 1, ..., or such lists
        by the name of the family where several grow (``"params/layers_*"``).
      new_layers: ``"identity"`` where some leaves of every new layer are to be zero, so that it
        adds nothing; ``"copy"`` for plain copies, which are another function.

    Raises:
      ValueError: the models differ in more than layers and sizes, the layers are not a chain, or
        a new layer cannot be the identity.
    """
    if new_layers not in ("identity", "copy"):
        raise ValueError(
            f"new_layers is {new_layers!r}. Expected: 'identity' or 'copy'. Fix: say one of them."
        )
    a, b = _side(small, inputs), _side(big, inputs)
    _check_outputs(a, b)
    work = Deepening(a, b, depth, new_layers == "identity")
    work.cut_numbered()
    work.cut_stacked()
    _check_families(work.families, depth)
    return _result(work)


def _side(model: Model, inputs: Sequence[Any]) -> Side:
    params, *rest = jax.eval_shape(lambda *args: args, model.params, *inputs)
    closed, outputs = _jax.closed_jaxpr(model.apply, params, *rest)
    keys, leaves, _ = _tree.flatten_named(params)
    return Side(dict(zip(keys, leaves, strict=True)), flattened(closed), outputs)


def _check_outputs(small: Side, big: Side) -> None:
    shapes = [
        [f"{name} {_tree.describe(out)}" for name, out in zip(names, leaves, strict=True)]
        for names, leaves in (
            (output_names(side.outputs), jax.tree.leaves(side.outputs)) for side in (small, big)
        )
    ]
    if shapes[0] != shapes[1]:
        odd = [[text for text in a if text not in b] for a, b in (shapes, shapes[::-1])]
        raise ValueError(
            f"the two models return different arrays: {', '.join(odd[0][:8]) or 'fewer'} (small), "
            f"{', '.join(odd[1][:8]) or 'fewer'} (big). Expected: the same outputs, for it is to "
            "be the same function. Fix: return nothing for each layer, and keep output sizes."
        )


def _result(work: Deepening) -> Deepened:
    """Return what was found, with the inputs in the order of the small model."""
    places = {key: place for place, key in enumerate(work.big.leaves)}
    order = [places[work.kept[key]] for key in work.small.leaves]
    invars = work.closed.jaxpr.invars
    chosen = [invars[place] for place in order] + invars[len(places) :]
    return Deepened(
        small=work.small.closed,
        closed=_jax.with_equations(
            work.closed, work.closed.jaxpr.eqns, constants(work.closed), invars=chosen
        ),
        outputs=work.small.outputs,
        families=tuple(work.families),
        sources=work.sources,
        kept=work.kept,
        steps=work.steps,
        zero=work.zero,
        exact=work.identity,
        why="" if work.identity else "copies of layers are not the identity",
    )


def _check_families(families: Sequence[Family], depth: Depth) -> None:
    names = [family.name for family in families]
    if not names:
        raise ValueError(
            "nothing to deepen: the models have equally many layers. Expected: a big model with "
            "more layers, in lists whose names end in numbers or stacked for one `lax.scan`. Fix: "
            "leave out `depth` to grow in width only."
        )
    unknown = sorted(set(depth) - set(names)) if isinstance(depth, Mapping) else []
    if unknown:
        raise ValueError(
            f"depth has entries {unknown} for no family of layers that grows. Expected: entries "
            f"for {names}. Fix: spell the names like this."
        )
