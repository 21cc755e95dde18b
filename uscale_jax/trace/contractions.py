"""Primitives that sum over products: matrix products and convolutions, window reductions."""

from __future__ import annotations

from collections.abc import Sequence

from uscale_jax.trace.atoms import Dim, fresh
from uscale_jax.trace.description import LINEAR, PRODUCT, UNSCALED, Description, Labelled, Scale
from uscale_jax.trace.primitives import Rule, define, immovable, labels
from uscale_jax.trace.program import Equation


def _dot_general(eqn: Equation) -> Labelled:
    (left_sum, right_sum), (left_batch, right_batch) = eqn.param("dimension_numbers")
    left, right = labels(eqn.inputs[0]), labels(eqn.inputs[1])
    for i, j in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        right[j] = left[i]
    batch = [left[i] for i in left_batch]
    free_left = [d for i, d in enumerate(left) if i not in (*left_sum, *left_batch)]
    free_right = [d for i, d in enumerate(right) if i not in (*right_sum, *right_batch)]
    summed = [atom for i in left_sum for atom in left[i]]
    rest = [labels(value) for value in eqn.inputs[2:]]
    return Labelled(
        [left, right, *rest], [[*batch, *free_left, *free_right]], PRODUCT, summed=summed
    )


def _ragged_dot_general(eqn: Equation) -> Description:
    """Rows of the left operand in groups, each with a matrix of its own."""
    numbers = eqn.param("ragged_dot_dimension_numbers")
    (left_sum, right_sum), (left_batch, right_batch) = numbers.dot_dimension_numbers
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if not groups or set(ragged) & {*left_sum, *left_batch}:
        return immovable(eqn, "`ragged_dot_general` groups", UNSCALED)
    left, right = labels(eqn.inputs[0]), labels(eqn.inputs[1])
    for i, j in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        right[j] = left[i]
    used = {*right_sum, *right_batch, *groups}
    result = [left[i] for i in left_batch]
    result += [d for i, d in enumerate(left) if i not in (*left_sum, *left_batch)]
    result += [d for i, d in enumerate(right) if i not in used]
    sizes = labels(eqn.inputs[2])
    held = [left[i] for i in ragged] + [right[i] for i in groups] + sizes
    summed = [atom for i in left_sum for atom in left[i]]
    why = "`ragged_dot_general` groups rows"
    return Labelled(
        [left, right, sizes], [result], PRODUCT, summed, fixed=[(dim, why) for dim in held]
    )


def _conv(eqn: Equation) -> Description:
    if any(n != 1 for n in eqn.number("batch_group_count")):
        return immovable(eqn, "a convolution groups its batch", UNSCALED)
    numbers = eqn.param("dimension_numbers")
    value, kernel = eqn.inputs
    groups = fresh(eqn.number("feature_group_count"))
    fan_in = fresh(kernel.shape[numbers.rhs_spec[1]])
    per_group = _quotient(kernel.shape[numbers.rhs_spec[0]], eqn.number("feature_group_count"))
    fan_out = fresh(per_group)
    batch = fresh(value.shape[numbers.lhs_spec[0]])
    spatial = [_spatial(eqn, i) for i in range(len(numbers.lhs_spec) - 2)]
    why = "a convolution slides over neighbours"
    fixed = [(dim, why) for three, slides in spatial if slides for dim in three]
    window = [atom for (_, of_kernel, _), _ in spatial for atom in of_kernel]
    left = _placed(numbers.lhs_spec, batch, (*groups, *fan_in), [s[0][0] for s in spatial])
    right = _placed(numbers.rhs_spec, (*groups, *fan_out), fan_in, [s[0][1] for s in spatial])
    out = _placed(numbers.out_spec, batch, (*groups, *fan_out), [s[0][2] for s in spatial])
    return Labelled([left, right], [out], PRODUCT, (*fan_in, *window), fixed)


def _quotient(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(m // n for m, n in zip(a, b, strict=True))


def _spatial(eqn: Equation, i: int) -> tuple[tuple[Dim, Dim, Dim], bool]:
    """Templates of the i-th spatial dimension of input, kernel and output; whether it slides."""
    numbers = eqn.param("dimension_numbers")
    sizes = (
        eqn.inputs[0].shape[numbers.lhs_spec[2 + i]],
        eqn.inputs[1].shape[numbers.rhs_spec[2 + i]],
        eqn.outputs[0].shape[numbers.out_spec[2 + i]],
    )
    still = (
        all(n == 1 for n in sizes[1])
        and eqn.param("window_strides")[i] == 1
        and eqn.param("lhs_dilation")[i] == 1
        and tuple(eqn.param("padding")[i]) == (0, 0)
    )
    image = fresh(sizes[0])
    return (image, fresh(sizes[1]), image if still else fresh(sizes[2])), not still


def _placed(spec: Sequence[int], first: Dim, second: Dim, spatial: Sequence[Dim]) -> list[Dim]:
    """Lays dimensions out as a convolution's specification says."""
    dims: list[Dim] = [()] * len(spec)
    for place, dim in zip(spec, (first, second, *spatial), strict=True):
        dims[place] = dim
    return dims


def _window(scale: Scale) -> Rule:
    """Returns the rule of a reduction over windows; dimensions it leaves alone pass through."""

    def rule(eqn: Equation) -> Labelled:
        dims, held = labels(eqn.inputs[0]), []
        result: list[Dim] = []
        for i, dim in enumerate(dims):
            if _untouched(eqn, i):
                result.append(dim)
            else:
                result.append(fresh(eqn.outputs[0].shape[i]))
                held += [dim, result[-1]]
        why = "windows slide over neighbours"
        return Labelled([dims], [result], scale, fixed=[(dim, why) for dim in held])

    return rule


def _untouched(eqn: Equation, i: int) -> bool:
    dilations = [eqn.param("base_dilation"), eqn.param("window_dilation")]
    return (
        eqn.param("window_dimensions")[i] == 1
        and eqn.param("window_strides")[i] == 1
        and tuple(eqn.param("padding")[i]) == (0, 0)
        and all(d is None or d[i] == 1 for d in dilations)
    )


define("dot_general", _dot_general)
define("ragged_dot_general", _ragged_dot_general)
define("conv_general_dilated", _conv)
define("reduce_window_sum reduce_window_max reduce_window_min", _window(LINEAR))
