"""unit_scale: any model, its values and gradients held in units in which they are of size one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from uscale_jax import _jax, _track, _tree
from uscale_jax._jax import ClosedJaxpr, JaxprEqn
from uscale_jax._track_report import Scales
from uscale_jax._track_rows import INPUTS
from uscale_jax._types import Apply, Tree
from uscale_jax._unit_result import Traced, UnitScaled
from uscale_jax._unit_rules import PRODUCTS
from uscale_jax._unit_units import Units
from uscale_jax.trace.spots import Spot, spots
from uscale_jax.trace.tapped import bodies


def unit_scale(
    apply: Apply,
    params: Tree,
    *inputs: Any,
    objective: Callable[[Any], Any] | None = None,
    rounded: bool = True,
    strict: bool = True,
) -> UnitScaled:
    r"""Returns a model that computes the same, whose tensors are all of size one at the start.

    Every value x of the model, parameters included, is held as x' and every gradient as g':

    .. math::

       x = s\,x', \qquad \frac{\partial L}{\partial x'} = \rho\,g', \qquad
       \mathrm{rms}(x') = \mathrm{rms}(g') = 1

    by factors s and ρ a tensor, measured in one pass of ``apply`` and its gradient on ``inputs``
    and constant from then on.  Operations take and give what is held: what is homogeneous
    (products, sums, norms, roots) is multiplied once by what its unit is off, forward and backward
    apart; a nonlinearity gets x itself.  So narrow formats hold every operand of a product, in
    both directions, with no scale to keep, no loss to scale, and no change to the model: it
    computes the same function, and gradients are the true ones in known units.

    Factors are those of the unit-scaling papers where their assumptions hold: fan_in^-½ behind
    products of independent numbers.  Where they do not (correlated values, an embedding of 0.02,
    a skip connection that grows), the model decides, and keeps the function that it has: also one
    that was trained, with all it has learned.

    **Training** goes on as that of the model, with ``us.scale_optimizer(tx, unit)``: the
    optimizer sees the model's own gradients and parameters, and learning rates are divided by s.

    Args:
      apply: ``apply(params, *inputs)``, any pure function; to train, a loss, so that gradients are
        of size one too.  Of other outputs the gradients are assumed to be standard normal.
      params: initial parameters, or trained ones; floating leaves.
      *inputs: a typical batch.  Other batches may have other sizes.
      objective: of what ``apply`` returns, the scalar that is to be differentiated:
        ``lambda outputs: outputs[0]`` of ``(loss, aux)``.
      rounded: take powers of two, so that no factor rounds: what is computed is the same to the
        last bit in the order of operations, and sizes are from 0.71 to 1.41.  Else they are 1.
      strict: refuse products that stay as they are; else leave them so.

    Returns:
      A :class:`UnitScaled`: ``apply`` and ``params``, ``restore(params)`` back to the model's,
      ``scales`` as measured.

    Raises:
      ValueError: a product is in a ``while`` loop, in a function with derivatives of its own, in a
        solver or kernel, and ``strict``; parameters, outputs or gradients are not finite; or, on
        another batch, the program is another.
      TypeError: ``objective`` does not return a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import uscale_jax as us
      >>> def loss(params, x):
      ...     h = jax.nn.gelu(x @ params["up"]) @ params["down"]
      ...     return jnp.mean(jnp.square(h - jnp.sin(x[:, :3])))
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> params = {"up": 0.01 * normal(0, 64, 128), "down": 0.01 * normal(1, 128, 3)}
      >>> x = normal(2, 32, 64)
      >>> unit = us.unit_scale(loss, params, x)
      >>> bool(jnp.allclose(unit.apply(unit.params, x), loss(params, x), rtol=1e-6))
      True
      >>> grads = jax.grad(unit.apply)(unit.params, x)
      >>> for name in params:
      ...     print(f"{jnp.std(unit.params[name]):.1f} {jnp.std(grads[name]):.1f}")
      1.3 0.8
      1.3 0.8
      >>> tx = us.scale_optimizer(optax.adam(1e-3), unit)  # the model's own training
      >>> state = tx.init(unit.params)

    References:
      Blake et al., *Unit scaling*, 2023 (arXiv:2303.11257); that a change of units of values and
      of gradients is exact where each has one: Section 4 and Appendix E there, on cut edges.
    """
    program = Traced(apply, (params, *inputs), {})
    if strict:
        _refuse_hidden_products(program.closed)
    scales = _track.everything(apply, (params, *inputs), objective)
    _refuse_not_finite(scales)
    keys, _, _ = _tree.flatten_named(params)
    units = Units(scales, rounded)
    return UnitScaled(apply, params, keys, units, scales, program.signature)


# What is refused

_OPAQUE = ("pallas_call", "ffi_call", "custom_call", "triton_kernel_call", "mosaic_gpu")


def _refuse_hidden_products(closed: ClosedJaxpr) -> None:
    lines = [f"  {_jax.primitive_name(s.eqn)} at {s.source}" for s in spots(closed) if _hides(s)]
    if lines:
        raise ValueError(
            "\n".join(
                [
                    "unit_scale cannot reach products that are inside",
                    *lines[:8],
                    _HIDDEN_ADVICE,
                ]
            )
        )


_HIDDEN_ADVICE = (
    "Expected: products in the open, in calls, scans, branches and checkpoints. Fix: a scan in "
    "place of a while loop, the function without rules of its own; or unit_scale(..., "
    "strict=False), which leaves their operands in the model's own units."
)


def _hides(spot: Spot) -> bool:
    name = _jax.primitive_name(spot.eqn)
    if spot.whiles:
        return name in PRODUCTS
    return name.startswith(_OPAQUE) or any(map(_has_products, bodies(spot.eqn)))


def _has_products(body: Any) -> bool:
    jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    return any(_is_product(eqn) for eqn in jaxpr.eqns)


def _is_product(eqn: JaxprEqn) -> bool:
    return _jax.primitive_name(eqn) in PRODUCTS or any(map(_has_products, bodies(eqn)))


def _refuse_not_finite(scales: Scales) -> None:
    values, gradients = jax.device_get((scales.values, scales.gradients))
    own = [row for row in scales.tracked if row.visit == INPUTS]
    lines = [
        f"  {what} {row.kind} {row.name!r}: root mean square {float(found[row.name].rms)}"
        for row in own
        for what, found in (("the", values), ("the gradient of", gradients))
        if row.name in found and not np.isfinite(found[row.name].rms)
    ]
    if lines:
        raise ValueError(
            "\n".join(
                [
                    "unit_scale measures sizes, and these are none:",
                    *lines[:8],
                    _FINITE_ADVICE,
                ]
            )
        )


_FINITE_ADVICE = (
    "Expected: finite parameters, inputs and gradients. Fix: us.track_scales shows where NaN and "
    "infinity come from; take another batch, or float32."
)
