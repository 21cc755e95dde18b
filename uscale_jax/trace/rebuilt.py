"""Equations that hold programs, bound again around another way to run these.

What rewrites a program equation by equation enters calls and loops.  Two kinds of them say more
than what is computed, rematerialisation and manual sharding, and are made anew with what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _jax
from uscale_jax._jax import JaxprEqn
from uscale_jax._types import Apply

REMATERIALISED = ("checkpoint", "remat", "remat2")
SHARDED = "shard_map"


def is_entered(eqn: JaxprEqn) -> bool:
    """Returns whether the programs of an equation may be run in its place, one by one.

    Rules of the user's own, for derivatives and batches, would be lost: those are left as they are.
    """
    name = _jax.primitive_name(eqn)
    if name.startswith("custom_"):
        return False
    return name in _jax.CALLS or name in ("cond", "scan", "while", SHARDED)


def rematerialised(eqn: JaxprEqn, run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``run`` with what a ``jax.checkpoint`` says of keeping and recomputing."""
    settings = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
    return jax.checkpoint(run, **settings)


def sharded(
    eqn: JaxprEqn, run: Callable[..., Any], more_in: Any = (), more_out: Any = ()
) -> Callable[..., Any]:
    """Returns ``run`` over the mesh of a ``shard_map``.

    ``run`` returns a tuple of the equation's results.  ``more_in`` are specifications of operands
    after those of the equation, ``more_out`` of results after its results.
    """
    params = eqn.params
    return jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=(*params["in_specs"], *more_in),
        out_specs=(*params["out_specs"], *more_out),
        axis_names=set(_jax.manual_axes(params)),
        check_vma=params["check_vma"],
    )


def by_arrays(
    apply: Apply, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[jax.Array], Callable[[Sequence[Any]], Any]]:
    """Returns the arrays in the arguments, and ``apply`` as a function of them alone."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def call(arrays: Sequence[Any]) -> Any:
        given = dict(zip(places, arrays, strict=True))
        again = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, again)
        return apply(*args, **kwargs)

    return [jnp.asarray(leaves[i]) for i in places], call


def is_array(leaf: Any) -> bool:
    """Returns whether a leaf is traced; Python numbers and other objects are passed on."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)
