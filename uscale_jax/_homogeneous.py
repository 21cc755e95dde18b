"""The exponents of a chain of homogeneous layers, in closed form."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

from uscale_jax import _tree
from uscale_jax._exponents import Exponents
from uscale_jax._types import Key, LayerExponents, Tree


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
    :func:`trace_exponents` reads exponents off the program of any model instead.

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
