"""compensate: the outputs of a model before its parameters were scaled."""

from typing import Any

import jax
import jax.numpy as jnp

from uscale_jax import _factors, _tree
from uscale_jax._exponents import Exponents, TracedExponents
from uscale_jax._types import Apply, Factor, Key, Tree


def compensate(apply: Apply, exponents: Exponents | TracedExponents | Any, k: Factor) -> Apply:
    r"""Returns an apply function whose outputs are those of the model before scaling.

    .. math:: \hat f(p, x) = k^{-e} f(p, x)

    where e is the power of k that the outputs of the scaled model carry.  Parameters scaled by
    ``scale_params(params, k, exponents=exponents.params)`` then say what they said before, to
    rounding, and bit for bit where k is a power of two and nothing over- or underflows: training
    and inference read the same inputs and give the same outputs.

    Args:
      apply: ``apply(params, *inputs) -> outputs``, any pytree of outputs.
      exponents: what :func:`trace_exponents` (any model) or :func:`homogeneous_exponents` returns,
        or the ``output`` of either alone: a number, or a tree prefix of the outputs with a number
        per subtree (0 for what does not scale, such as a count).
      k: the factor the parameters were scaled by; traced values are allowed.

    Returns:
      A function with the signature of ``apply``; outputs keep their dtypes.

    Raises:
      TypeError, ValueError: ``k`` is not a positive finite real scalar, or the exponents do not
        fit the outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.maximum(x @ params["w1"], 0) @ params["w2"]
      >>> params = {"w1": jnp.array([[1.0, -2.0]]), "w2": jnp.array([[3.0], [4.0]])}
      >>> x = jnp.array([[5.0]])
      >>> doubled = us.scale_params(params, 2.0)
      >>> apply(params, x), apply(doubled, x), us.compensate(apply, 2, 2.0)(doubled, x)
      (Array([[15.]], dtype=float32), Array([[60.]], dtype=float32), Array([[15.]], dtype=float32))

    References:
      Homogeneity, and why an output multiplier undoes it: see :func:`homogeneous_exponents` and
      *µnit Scaling*, 2025 (arXiv:2502.05967), Eq. 16.
    """
    checked = _factors.check_factor(k)
    powers = exponents.output if isinstance(exponents, Exponents | TracedExponents) else exponents

    def compensated(params: Tree, *inputs: Any, **options: Any) -> Any:
        return _divide_outputs(apply(params, *inputs, **options), powers, checked)

    return compensated


def _divide_outputs(outputs: Any, powers: Any, k: Factor) -> Any:
    keys, leaves, treedef = _tree.flatten_named(outputs)
    per_leaf = _tree.broadcast_prefix(powers, outputs, keys, what="exponents of the outputs")
    return jax.tree.unflatten(
        treedef,
        [
            _divide_output(leaf, power, k, key)
            for leaf, power, key in zip(leaves, per_leaf, keys, strict=True)
        ],
    )


def _divide_output(leaf: Any, power: float, k: Factor, key: Key) -> Any:
    if power == 0:
        return leaf
    leaf = jnp.asarray(leaf)
    if not _factors.is_scaled(leaf):
        raise TypeError(
            f"output {_tree.name(key)!r} is {_tree.describe(leaf)}, which cannot carry a power of "
            f"k, got exponent {power}. Fix: give it exponent 0."
        )
    return _factors.multiply(leaf, _factors.power(k, -power))
