"""All contact with what JAX does not promise to keep: one function a need.

Everything else in the package uses documented names only.  Each function says what it relies on
and is exercised by ``tests/test_jax_contact.py`` on every JAX release the project is tested with.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from operator import attrgetter
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr as ClosedJaxpr
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import Var, jaxpr_as_fun, primitives


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


def closed_jaxpr(fun: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Returns the program of ``fun`` and the tree of its outputs' shapes; computes nothing."""
    closed, outputs = jax.make_jaxpr(fun, return_shape=True)(*args)
    return closed, outputs


@cache
def _own_primitives(modules: int) -> frozenset[int]:
    """Ids of the primitives that JAX's loaded modules define (``modules`` renews the cache)."""
    del modules
    found = [
        value
        for name, module in list(sys.modules.items())
        if module is not None and name.startswith("jax.")
        for value in vars(module).values()
        if type(value).__name__.endswith("Primitive")
    ]
    return frozenset(map(id, found))


def primitive_name(eqn: JaxprEqn) -> str:
    """Returns the name of an equation's primitive; one that is not JAX's own is marked as such.

    Rules are found by this name.  A primitive of somebody else that is called ``add`` must not
    meet the rule of JAX's ``add``, so the object decides (names: JAX 0.8 to 0.12).
    """
    own = id(eqn.primitive) in _own_primitives(len(sys.modules))
    return eqn.primitive.name if own else f"{eqn.primitive.name} (not JAX's own)"


# Primitives that call a program, by the parameter that holds it.  JAX 0.8 to 0.12; some names are
# those of older releases, which programs of other packages still use.
CALLS = {
    "call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "composite": "jaxpr",  # JAX 0.12: call_jaxpr
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


# Primitives of loops, branches and the like, whose programs are walked too.
_CONTROL = frozenset(("cond", "custom_linear_solve", "scan", "shard_map", "while"))


def is_inlined(eqn: JaxprEqn) -> bool:
    """Returns whether the programs of an equation are walked in its place."""
    return eqn.primitive.name in CALLS or eqn.primitive.name in _CONTROL


def called_program(name: str, params: Mapping[str, Any]) -> Any:
    """Returns the program that an equation calls."""
    key = CALLS[name]
    return params[key] if key in params else params["call_jaxpr"]


def refers_to_memory(eqn: JaxprEqn) -> bool:
    """Returns whether an equation reads or writes a mutable array (``jax.new_ref``).

    Its values are of a type that holds the type of the array (JAX 0.8 to 0.12: inner_aval).
    """
    return any(hasattr(v.aval, "inner_aval") for v in (*eqn.invars, *eqn.outvars))


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many of a scan's operands are constants, and how many are carried."""
    if "num_consts" in params:  # JAX 0.8 to 0.10
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(constants), len(carried)


def frames(eqn_source: Any) -> list[tuple[str, str, int]]:
    """Returns (file, function, line) of the calls that made an equation, innermost first."""
    traceback = getattr(eqn_source, "traceback", None)
    found = [] if traceback is None else traceback.frames
    return [(frame.file_name, frame.function_name, frame.line_num) for frame in found]


def scopes(eqn_source: Any) -> str:
    """Returns the names of scopes around an equation, ``model/layer_0`` (``jax.named_scope``).

    Within programs that others call they begin at the call (JAX 0.9 to 0.12: ``name_stack``).
    """
    return str(getattr(eqn_source, "name_stack", ""))


def is_explicit(mesh: Any) -> bool:
    """Returns whether shardings over a mesh are part of types (JAX 0.9 to 0.12: axis_types)."""
    return any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)


def spec_axes(spec: Any, ndim: int) -> list[tuple[str, ...]]:
    """Returns the axes of the mesh that each of ``ndim`` dimensions is cut over."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    return [e if isinstance(e, tuple) else () if e is None else (e,) for e in entries]


def shard_counts(spec: Any, ndim: int, mesh: Any) -> list[int]:
    """Returns into how many shards ``spec`` cuts each of ``ndim`` dimensions over ``mesh``."""
    axes = spec_axes(spec, ndim)
    return [math.prod(mesh.shape[axis] for axis in names) for names in axes]


def named_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """Returns how an array is cut over a mesh; of a traced one only where its type says it.

    Types of traced arrays tell of Explicit axes, over a mesh without devices (JAX 0.9 to 0.12:
    ``jax.typeof(x).sharding``).
    """
    found = jax.typeof(x).sharding if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(found, jax.sharding.NamedSharding):
        return None
    return found if not is_traced(x) or is_explicit(found.mesh) else None


def fetched(tree: Any) -> Any:
    """Returns a tree on the host; what other processes have parts of is gathered from them."""

    def here(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(here, tree))


def new_variable(aval: Any, resized: Mapping[int, int] | None = None) -> Any:
    """Returns a variable that no program has yet, of a type but for the sizes in ``resized``.

    Variables are told apart by identity and made from their type alone (JAX 0.9 to 0.12:
    ``Var(aval)``); ``aval.update`` keeps what else a type says (dtype, weak type, sharding).
    """
    if resized:
        shape = [resized.get(dim, size) for dim, size in enumerate(aval.shape)]
        aval = aval.update(shape=(*shape,))
    return Var(aval)


def rebuilt(eqn: JaxprEqn, **parts: Any) -> JaxprEqn:
    """Returns an equation with other ``invars``, ``outvars``, ``params`` or ``source_info``.

    What is left out stays (JAX 0.9 to 0.12: ``JaxprEqn.replace``); its types are not checked.
    """
    return eqn.replace(**parts)


def with_equations(
    closed: ClosedJaxpr, eqns: Sequence[JaxprEqn], consts: Mapping[Any, Any], **parts: Any
) -> ClosedJaxpr:
    """Returns a program of other equations, and of other ``invars`` or ``outvars`` where given.

    ``consts`` are its constants by variable (JAX 0.9 to 0.12: ``Jaxpr.replace``).
    """
    jaxpr = closed.jaxpr.replace(eqns=[*eqns], constvars=[*consts], **parts)
    return ClosedJaxpr(jaxpr, [*consts.values()])


def bound(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Returns the results of one equation on other operands, calls and loops in it as they are."""
    with as_made(eqn):
        return rebound(eqn, args)


def rebound(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Returns the same; its line and scopes are those of the caller (:func:`as_made`).

    As JAX evaluates jaxprs itself (``get_bind_params`` gives functions and parameters in JAX 0.9,
    parameters alone in 0.10 to 0.12; ``ctx`` is what was set around the equation).
    """
    given = eqn.primitive.get_bind_params(eqn.params)
    functions, params = given if isinstance(given, tuple) else ((), given)
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*functions, *args, **params)
    return list(found) if eqn.primitive.multiple_results else [found]


def as_made(eqn: JaxprEqn) -> AbstractContextManager[None]:
    """Within it, operations get the line of an equation, and its scopes behind those around."""
    info: Any = eqn.source_info
    scopes = source_info_util.current_name_stack() + info.name_stack
    found: AbstractContextManager[None] = source_info_util.user_context(
        info.traceback, name_stack=scopes
    )
    return found


def evaluate(closed: ClosedJaxpr, *args: Any) -> list[Any]:
    """Returns the outputs of a program, as a list."""
    return list(jaxpr_as_fun(closed)(*args))


def varying(x: jax.Array) -> frozenset[str]:
    """Returns the manual axes of a mesh that an array varies over (JAX 0.9: ``vma``)."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def spread(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Returns an array that varies over these manual axes, as ``pcast`` makes those that do not."""
    missing = (*(axis for axis in axes if axis not in varying(x)),)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def manual_axes(params: Mapping[str, Any]) -> frozenset[str]:
    """Returns the axes that a ``shard_map`` is over (JAX 0.9: ``manual_axes``, then newly so)."""
    [axes] = (value for key, value in params.items() if key.endswith("manual_axes"))
    return frozenset(axes)
