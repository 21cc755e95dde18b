"""All contact with what JAX does not promise to keep: one function a need.

Everything else in the package uses documented names only.  Each function says what it relies on
and is exercised by ``tests/test_jax_contact.py`` on every JAX release the project is tested with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, primitives


def is_traced(x: Any) -> bool:
    """Returns whether ``x`` is a tracer, so that its value cannot be looked at."""
    return isinstance(x, jax.core.Tracer)


def dtypes(leaves: Sequence[Any]) -> list[Any]:
    """Returns the dtype of every leaf, None for what has none.

    ``Array.dtype`` is a Python property over ``aval.dtype``, which takes a third of its time;
    trees have thousands of leaves.
    """
    try:
        return [*map(attrgetter("aval.dtype"), leaves)]
    except AttributeError:
        return [getattr(leaf, "dtype", None) for leaf in leaves]


def committed_devices(x: Any) -> frozenset[jax.Device] | None:
    """Returns the devices an array was put on, or None where JAX may choose (or it is traced)."""
    if is_traced(x) or not getattr(x, "committed", False):
        return None
    return frozenset(x.sharding.device_set)


def with_weak_type(x: jax.Array, like: Any) -> jax.Array:
    """Returns ``x`` weakly typed where ``like`` is (Python scalars give weakly typed arrays).

    No public function turns a strongly typed array into a weakly typed one; the primitive behind
    ``lax.convert_element_type`` can (JAX 0.8 to 0.12: parameters new_dtype, weak_type, sharding).
    """
    if not getattr(like, "weak_type", False):
        return x
    weak: jax.Array = primitives.convert_element_type_p.bind(
        x, new_dtype=np.dtype(x.dtype), weak_type=True, sharding=None
    )
    return weak


@contextmanager
def concretely() -> Iterator[None]:
    """Within it, operations on concrete values give concrete values, in the middle of a trace."""
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        yield


def stage(fun: Callable[..., Any], *shapes: Any) -> Callable[..., Any]:
    """Returns ``fun`` as a function of concrete values, to be called under ``concretely``.

    ``fun`` may close over tracers of the user's trace (a learning rate, say).  They become
    constants of its jaxpr and are replaced here by ones, so that the result is concrete.
    """
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*shapes)
    consts = [_concrete(c) for c in closed.consts]
    run = jax.jit(jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts)))
    structure = jax.tree.structure(out)
    return lambda *args: jax.tree.unflatten(structure, run(*jax.tree.leaves(args)))


def _concrete(const: Any) -> Any:
    return np.ones(const.shape, const.dtype) if is_traced(const) else const
