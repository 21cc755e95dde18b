"""Convolutions at scale one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from uscale_jax.numerics._constraints import Constraint
from uscale_jax.numerics._products import term_factors, weighted
from uscale_jax.numerics._scale import floating


def conv(
    lhs: ArrayLike,
    rhs: ArrayLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    *,
    constraint: Constraint = "to_output_scale",
) -> jax.Array:
    r"""Returns a convolution at scale one, as ``jax.lax.conv_general_dilated``.

    .. math:: s = (C K)^{-1/2}, \qquad b = (N / \text{size of lhs})^{-1/2}, \qquad
              b_W = (N / \text{size of rhs})^{-1/2}

    with C the input channels of a group, K the size of the window over that of ``lhs_dilation``,
    and N the number of products that the convolution consists of, those with padding left out.
    So s does not depend on the size of images, and no function changes with it.  Inside an image
    b is Graphcore's (stride·groups / (C_out·K))^½; counting makes it right at borders too.

    It goes where Flax takes a ``conv_general_dilated=``.

    Args:
      lhs: activations.
      rhs: the kernel, of scale one.  Its gradient's factor is not constrained.
      window_strides: as in ``jax.lax.conv_general_dilated``, like all below.
      padding: "SAME", "VALID", "SAME_LOWER", or pairs.
      lhs_dilation: steps between inputs.
      rhs_dilation: steps between kernel elements.
      dimension_numbers: the layout.
      feature_group_count: groups of channels.
      batch_group_count: groups of examples.
      precision: passed on.
      preferred_element_type: passed on.
      out_sharding: passed on.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      The convolution.

    Raises:
      TypeError: an operand is not floating; from JAX, shapes do not fit.
      ValueError: there is no such constraint; from JAX, as above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> images = jax.random.normal(jax.random.key(0), (2, 8, 20, 20))
      >>> kernel = jax.random.normal(jax.random.key(1), (16, 8, 3, 3))
      >>> print(f"{jnp.std(un.conv(images, kernel, (1, 1), 'VALID')):.1f}")
      1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Appendix E.
    """
    x, w = floating(lhs, "conv's lhs"), floating(rhs, "conv's rhs")
    f = partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    out = jax.eval_shape(f, x, w)  # refuses what does not fit
    layout = lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers)
    ones = (1,) * len(window_strides)
    window = _Window(
        inputs=_spatial(x.shape, layout.lhs_spec),
        kernel=_spatial(w.shape, layout.rhs_spec),
        outputs=_spatial(out.shape, layout.out_spec),
        strides=tuple(window_strides),
        lhs_dilation=tuple(lhs_dilation or ones),
        rhs_dilation=tuple(rhs_dilation or ones),
    )
    channels = w.shape[layout.rhs_spec[1]]
    seen = channels * math.prod(window.kernel) / math.prod(window.lhs_dilation)
    positions = math.prod(window.outputs)
    terms = out.size // max(positions, 1) * channels * window.pairs(padding)
    _, b, weight = term_factors(terms, out.size, x.size, w.size)
    return weighted(f, x, w, (seen**-0.5, b, weight), constraint)


def _spatial(shape: Sequence[int], spec: Sequence[int]) -> tuple[int, ...]:
    """The sizes of the spatial dimensions, which come after batch and features in a layout."""
    return tuple(shape[dim] for dim in spec[2:])


class _Window(NamedTuple):
    """The spatial part of a convolution, a number for each dimension."""

    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    outputs: tuple[int, ...]
    strides: tuple[int, ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]

    def pairs(self, padding: str | Sequence[tuple[int, int]]) -> int:
        """How many pairs there are of an output and a kernel element that meets an input."""
        spans = [(n - 1) * d + 1 for n, d in zip(self.kernel, self.rhs_dilation, strict=True)]
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(self.inputs, spans, self.strides, padding)
        sides = [low for low, _ in padding]
        return math.prod(_pairs(*each) for each in zip(sides, *self, strict=True))


def _pairs(
    low: int, inputs: int, kernel: int, outputs: int, stride: int, lhs_step: int, rhs_step: int
) -> int:
    """The same in one dimension."""
    at = np.arange(outputs)[:, None] * stride + np.arange(kernel) * rhs_step - low
    return int(np.sum((at >= 0) & (at < inputs * lhs_step) & (at % lhs_step == 0)))
