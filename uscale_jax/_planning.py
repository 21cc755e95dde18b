"""plan: reads off two programs how the larger model is made from the smaller one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from uscale_jax._axes import named_axes
from uscale_jax._plan import LeafPlan, Models, Plan, PlanAxis
from uscale_jax._types import Apply, Tree
from uscale_jax.trace import keep
from uscale_jax.trace.growth import LeafGrowth, leaf_growths
from uscale_jax.trace.program import Value
from uscale_jax.trace.sizes import changing, places
from uscale_jax.trace.tracing import Model, Traced, trace
from uscale_jax.trace.uneven import Role, roles


def plan(
    small_apply: Apply, small_params: Tree, big_apply: Apply, big_params: Tree, *inputs: Any
) -> Plan:
    r"""Returns how a larger model is made from a smaller one so that it is the same function.

    Both models are traced (nothing is computed, shapes are enough) and compared equation by
    equation.  Every axis that grows repeats its units; the factors under which the function is
    the same are the solution of linear equations in their logarithms, one per primitive
    (:func:`trace_exponents`).  Per leaf

    .. math:: W' = m\,W[\mathrm{maps}],\qquad g' = \frac{g[\mathrm{maps}]}{m\,n}

    with m the factor, n the number of copies of every element, g the gradient.  Hence, for the
    large model to follow the small one's training exactly,

    =======================  ==========================================
    Adam, Lion, RMSProp      learning rate :math:`\alpha m`, that is α/k for a kernel whose input
                             axis grew k-fold; ε/(m n); decoupled decay λ/m
    SGD                      learning rate :math:`\alpha m^2 n`
    first moments            :math:`[\mathrm{maps}]/(m n)`
    second moments           :math:`[\mathrm{maps}]/(m n)^2`
    =======================  ==========================================

    which :func:`scale_optimizer` and :func:`resize_state` do.

    Sizes need not be multiples: units are then repeated unequally often, which is exact wherever
    no mean is taken over them with equal weights (and under RMSNorm, with other factors).

    Args:
      small_apply: ``small_apply(params, *inputs)``, any pure function that JAX can trace.
      small_params: its parameters: arrays or ``jax.ShapeDtypeStruct``.
      big_apply: the same for the larger model, built from the same definition.
      big_params: its parameters or their shapes.
      *inputs: inputs that both take: arrays or ``jax.ShapeDtypeStruct``.  Sizes that are equal by
        accident (batch and width, say) can be taken for one axis: use sizes that all differ.

    Returns:
      :class:`Plan`: index maps, factors m, numbers of copies n and learning-rate factors per
      leaf; sizes per axis, and why an axis cannot change.  Plain data, except that it remembers
      the two models for :func:`grow` to verify with; ``Plan.to_json`` keeps all but those.

    Raises:
      ValueError: the trees or the programs differ in more than sizes; a size is smaller in the
        big model, or cannot change (with the source line that says so); no factors keep the
        function (the few equations that clash, in words, with source lines).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]
      >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> shapes = lambda n: {"bias": f32(n), "down": f32(n, 3), "up": f32(5, n)}
      >>> print(us.plan(apply, shapes(7), apply, shapes(14), f32(2, 5)))
      leaf  small  big     factor  copies  lr (Adam)  lr (SGD)
      bias  7      14      1       2       1          2
      down  7 × 3  14 × 3  1/2     2       1/2        1/2
      up    5 × 7  5 × 14  1       2       1          2
      <BLANKLINE>
      axis  small  big         places                    why
      a     7      14   free   bias[0], down[0], up[1]
      B     3      3    fixed  down[1]                   is an axis of the output
      C     5      5    fixed  up[0]                     is an axis of input 0

    References:
      Replication: Chen et al., *Net2Net*, 2016 (arXiv:1511.05641), Eq. 3 and 4.  With the
      optimizer: Ma et al., *μP upscaling*, 2026 (arXiv:2602.10545); the learning rates are those
      of Yang et al., *Tensor Programs V*, 2022 (arXiv:2203.03466), Table 3.
    """
    traced = trace([Model(small_apply, small_params), Model(big_apply, big_params)], inputs)
    solution = keep.solve(traced)
    growths = leaf_growths(solution)
    leaves = [
        _leaf(traced, i, growth, role)
        for i, (growth, role) in enumerate(
            zip(growths, roles(traced, frozenset(changing(traced))), strict=True)
        )
    ]
    return Plan(
        leaves={leaf.name: leaf for leaf in leaves},
        axes=_axes(traced),
        notes=_notes(leaves),
        precision=_precision(traced),
        treedef=jax.tree.structure(big_params),
        small_treedef=traced.treedef,
        small_keys=tuple(traced.keys),
        models=Models(small_apply, big_apply, inputs),
    )


def _leaf(traced: Traced, i: int, growth: LeafGrowth, role: Sequence[Role]) -> LeafPlan:
    value, key = traced.structure.program.inputs[i], traced.keys[i]
    return LeafPlan(
        key=key,
        source=key,
        small=_shape(value, 0),
        big=_shape(value, -1),
        dtype=str(value.dtype),
        maps=growth.maps,
        factors=growth.factors,
        copies=growth.copies,
        shift=growth.shift,
        partners=tuple(
            None if old is None else mate
            for old, mate in zip(growth.maps, growth.partners, strict=True)
        ),
        roles=tuple(each.value for each in role),
        words=growth.words,
    )


def _shape(value: Value, program: int) -> tuple[int, ...]:
    return tuple(size[program] for size in value.shape)


def _axes(traced: Traced) -> tuple[PlanAxis, ...]:
    named = named_axes(places(traced))
    return tuple(
        PlanAxis(axis.name, atom.size[0], atom.size[-1], axis.free, axis.why, axis.places)
        for atom, axis in named.items()
    )


def _notes(leaves: Sequence[LeafPlan]) -> tuple[str, ...]:
    """What a reader of the plan should know and the tables do not say."""
    untouched = [leaf.name for leaf in leaves if not leaf.floating]
    if not untouched:
        return ()
    return (f"without factor or learning rate, being no floating leaves: {', '.join(untouched)}",)


def _precision(traced: Traced) -> str:
    """The narrowest floating dtype that the program computes in."""
    program = traced.structure.program
    values = [*program.inputs, *(v for eqn in program.equations for v in eqn.outputs)]
    dtypes: Mapping[Any, float] = {
        v.dtype: float(jnp.finfo(v.dtype).eps) for v in values if v.scales
    }
    return str(max(dtypes, key=lambda d: dtypes[d])) if dtypes else "float32"
