"""Whether two equations are the same up to sizes, and what to say where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn

# Parameters that are sizes, or say how and where to compute, not what.
_NOT_COMPARED = frozenset(
    (
        "shape",
        "new_sizes",
        "sizes",
        "reps",
        "slice_sizes",
        "start_indices",
        "limit_indices",
        "padding_config",
        "feature_group_count",
        "batch_group_count",
        "fft_lengths",
        "sharding",
        "out_sharding",
        "in_shardings",
        "out_shardings",
        "in_layouts",
        "out_layouts",
        "resource_env",
        "donated_invars",
        "unroll",
        "name",
        "jvp_jaxpr_fun",
        "jvp_jaxpr_thunk",
        "bwd",
        "ft_in",
        "ft_out",
        "fwd",
        "fwd_jaxpr_thunk",
        "out_trees",
        "policy",
        "ctx_mesh",
        "compiler_options_kvs",
        "inline",
        "keep_unused",
        "rule",
        "in_tree",
        "out_tree",
        "linear",
    )
)

# Programs that are walked in step, so that there is no need to compare them as parameters.
_WALKED = frozenset(
    (
        "body_jaxpr",
        "branches",
        "call",
        "call_jaxpr",
        "cond_jaxpr",
        "fun_jaxpr",
        "jaxpr",
        "jaxprs",
    )
)

_ADVICE = (
    "Expected: the same operations in the same order. Fix: build both models from one "
    "definition, avoid Python branches on sizes (such as `if heads == kv_heads`), and give "
    "`jnp.einsum` of three or more arrays an `optimize=` path of its own, because it else "
    "chooses one by the sizes."
)


def same_params(eqns: Sequence[JaxprEqn | None]) -> bool:
    """Returns whether equations of one primitive agree in every parameter that is no size."""
    first, *others = eqns
    return all(
        first is not None
        and other is not None
        and len(first.invars) == len(other.invars)
        and same_kinds(first.outvars, other.outvars)
        and len(first.params.get("branches", ())) == len(other.params.get("branches", ()))
        and not disagreeing(first, other)
        for other in others
    )


def same_kinds(variables: Sequence[Any], others: Sequence[Any]) -> bool:
    """Returns whether variables of two programs agree in number, rank and dtype."""
    kinds = [[(len(v.aval.shape), v.aval.dtype) for v in side] for side in (variables, others)]
    return kinds[0] == kinds[1]


def disagreeing(small: JaxprEqn, big: JaxprEqn) -> list[str]:
    """Returns the parameters in which two equations of one primitive differ, sizes apart."""
    a, b = small.params, big.params
    skipped = _NOT_COMPARED | (_WALKED if _jax.is_inlined(small) else frozenset())
    return [
        key
        for key in sorted(a.keys() | b.keys())
        if key not in skipped and not (key in a and key in b and _equal(a[key], b[key]))
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | jax.Array) or isinstance(b, np.ndarray | jax.Array):
        return np.array_equal(a, b)
    if isinstance(a, Jaxpr | ClosedJaxpr):  # of a kernel, say
        return str(a) == str(b)
    both_nan = a != a and b != b
    return bool(a == b) or bool(both_nan)


def structure_error(
    eqns: Sequence[JaxprEqn | None],
    names: Sequence[str | None],
    sources: Sequence[Any],
    rewired: Sequence[int] = (),
) -> ValueError:
    """Returns the refusal for the first place where two programs differ in more than sizes.

    ``rewired`` are the operands that are other values in the one than in the other.
    """
    lines: list[str] = []
    for which, eqn, name, source in zip(("small", "big"), eqns, names, sources, strict=True):
        lines.append(f"  {which}: " + (_describe(eqn, name, source) if eqn else "ends here"))
    if names[0] == names[-1] and eqns[0] is not None and eqns[-1] is not None:
        a, b = eqns[0].params, eqns[-1].params
        keys = disagreeing(eqns[0], eqns[-1])
        lines += [f"  {key}: {a.get(key)} (small), {b.get(key)} (big)" for key in keys]
        if "length" in keys:
            lines.append("  if its steps are layers, say so to `plan`: depth='interleave'")
    lines += [f"  operand {i} comes from elsewhere in the big one" for i in rewired]
    return different(lines)


def different(lines: Sequence[str]) -> ValueError:
    """Returns the refusal of two programs that differ in more than sizes; ``lines`` say how."""
    first = "the two models are different programs, not one program at two sizes."
    return ValueError("\n".join([first, *lines, _ADVICE]))


def _describe(eqn: JaxprEqn, name: str | None, source: Any) -> str:
    operands = ", ".join(str(v.aval.str_short()) for v in eqn.invars)
    return f"`{name}` of {operands} at {source}"
