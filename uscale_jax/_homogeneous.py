"""Value scaling that keeps what a homogeneous model says: exponents, and the way back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uscale_jax import _factors, _tree
from uscale_jax._types import Apply, Factor, Key, LayerExponents, Tree


class Exponents(NamedTuple):
    """Which power of k each parameter takes, and which power the output then has."""

    params: Tree
    """Tree like the parameters, one float a leaf: leaf p is multiplied by k**params[p]."""
    output: Any
    """The output is multiplied by k**output (a float, or a tree prefix of the outputs)."""


def _named_bias(leaf_name: str) -> bool:
    return leaf_name.rpartition("/")[2] == "bias"


def homogeneous_exponents(
    params: Tree,
    layers: Sequence[str] | LayerExponents,
    *,
    is_bias: Callable[[str], bool] = _named_bias,
) -> Exponents:
    r"""Returns the exponents under which a sequential homogeneous net stays what it is.

    For layers :math:`h_l = \phi(h_{l-1} W_l + b_l)` with :math:`\phi(ch) = c\,\phi(h)` for c > 0
    (linear, ReLU, leaky ReLU, max and average pooling), in order from the input,

    .. math:: W_l \to k^{e_l} W_l,\quad b_l \to k^{e_1 + \dots + e_l}\, b_l
              \quad\Rightarrow\quad f \to k^{e_1 + \dots + e_L} f .

    With every :math:`e_l = 1`: :math:`b_l \to k^l b_l` and :math:`f \to k^L f`; for a fixed
    output cotangent weight gradients take :math:`k^{L-1}`, bias gradients :math:`k^{L-l}`.  With
    exponents that add up to 0 the function is unchanged.

    This is the closed form: it trusts you that the net is such a chain.  A residual stream,
    softmax attention, GELU, SiLU, tanh or a norm with gain and bias is not homogeneous.

    Args:
      params: the parameter tree (arrays or shapes; only names are used).
      layers: the layers' names in order from the input, as path prefixes such as
        ``'params/Dense_0'``; or an ordered mapping from them to the exponents :math:`e_l`.
      is_bias: tells biases from kernels by leaf name; by default the last part is ``'bias'``.

    Returns:
      :class:`Exponents`, for ``scale_params(params, k, exponents=e.params)`` and
      ``compensate(apply, e, k)``.

    Raises:
      ValueError: a leaf lies in no layer or in two, or a layer holds no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import uscale_jax as us
      >>> params = {"l1": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
      ...           "l2": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
      >>> us.homogeneous_exponents(params, ["l1", "l2"]).params["l2"]
      {'bias': 2.0, 'kernel': 1.0}

    References:
      Positive homogeneity of ReLU nets: Neyshabur et al., *Path-SGD*, 2015 (arXiv:1506.02617).
    """
    keys, _, treedef = _tree.flatten_named(params)
    powers = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, 1.0)
    owners = _owners(keys, [tuple(layer.split("/")) for layer in powers])
    on_kernel = {tuple(layer.split("/")): float(e) for layer, e in powers.items()}
    on_bias = dict(zip(on_kernel, _running_sums(on_kernel.values()), strict=True))
    leaves = [
        (on_bias if is_bias("/".join(key)) else on_kernel)[owner]
        for key, owner in zip(keys, owners, strict=True)
    ]
    return Exponents(jax.tree.unflatten(treedef, leaves), sum(on_kernel.values()))


def _running_sums(values: Iterable[float]) -> list[float]:
    sums, total = [], 0.0
    for value in values:
        sums.append(total := total + value)
    return sums


def _owners(keys: Sequence[Key], layers: Sequence[Key]) -> list[Key]:
    owners = [[layer for layer in layers if key[: len(layer)] == layer] for key in keys]
    wrong = [
        f"  leaf {_tree.name(key)!r} lies in {len(found) or 'none'} of the layers"
        for key, found in zip(keys, owners, strict=True)
        if len(found) != 1
    ]
    empty = set(layers) - {layer for found in owners for layer in found}
    wrong += [f"  layer {_tree.name(layer)!r} holds no leaf" for layer in sorted(empty)]
    if wrong:
        raise ValueError(
            "\n".join(["layers must cover every leaf exactly once.", *wrong[:8]])
            + f"\nGot layers {[_tree.name(layer) for layer in layers]}. Fix: list every layer that "
            "holds parameters, from the input to the output, by the prefix of its leaves' names."
        )
    return [found[0] for found in owners]


def compensate(apply: Apply, exponents: Exponents | Any, k: Factor) -> Apply:
    r"""Returns an apply function whose outputs are those of the model before scaling.

    .. math:: \hat f(p, x) = k^{-e} f(p, x)

    where e is the power of k that the outputs of the scaled model carry.  Parameters scaled by
    ``scale_params(params, k, exponents=exponents.params)`` then say what they said before, to
    rounding, and bit for bit where k is a power of two and nothing over- or underflows: training
    and inference read the same inputs and give the same outputs.

    Args:
      apply: ``apply(params, *inputs) -> outputs``, any pytree of outputs.
      exponents: :class:`Exponents`, or its ``output`` alone: a number, or a tree prefix of the
        outputs with a number per subtree (0 for what does not scale, such as a count).
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
    powers = exponents.output if isinstance(exponents, Exponents) else exponents

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
