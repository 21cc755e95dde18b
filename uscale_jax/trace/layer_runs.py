"""What each layer does to what flows through it, and the model without it, run on real inputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uscale_jax import _jax, _tree
from uscale_jax._jax import ClosedJaxpr
from uscale_jax._types import Key
from uscale_jax.trace import layers
from uscale_jax.trace.cut import Chain, chain, without
from uscale_jax.trace.deepening import common
from uscale_jax.trace.flat import constants, used
from uscale_jax.trace.flat import flattened as flattened
from uscale_jax.trace.layers import Named
from uscale_jax.trace.stacked import Stack, shortened, stacks


class Run(NamedTuple):
    """A program, and how its inputs are made from those of the whole model."""

    closed: ClosedJaxpr
    dims: Mapping[int, int]
    """By the place of an input, its axis of layers, of which only ``kept`` are taken."""
    kept: tuple[int, ...]

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """Return the outputs."""
        at = jnp.asarray(self.kept, int)
        cut = [jnp.take(x, at, self.dims[i]) if i in self.dims else x for i, x in enumerate(args)]
        return _jax.evaluate(self.closed, *cut)


class Layers(NamedTuple):
    """Families of layers of the big program, which is ``closed`` without calls."""

    closed: ClosedJaxpr
    chains: Mapping[str, Chain]
    stacks: Mapping[str, Stack]
    follows: Mapping[str, str]
    """Families whose layers go with those of another, as norms in a list of their own do."""

    def count(self, name: str) -> int:
        """Return how many layers a family has."""
        return self.stacks[name].big if name in self.stacks else max(self.chains[name].streams)

    def influences(self, args: Sequence[Any]) -> dict[str, jax.Array]:
        """Return the mean of 1 − cos of what goes into each layer and comes out; 1 of the first."""
        found = {name: self._of_stack(stack, args) for name, stack in self.stacks.items()}
        for name, each in self.chains.items():
            found[name] = self._of_chain(each, args)
        return found

    def _of_chain(self, chain: Chain, args: Sequence[Any]) -> jax.Array:
        last = max(chain.streams)
        streams = [v for k in range(1, last + 1) for v in chain.streams[k]]
        consts = constants(self.closed)
        seen = _jax.with_equations(self.closed, self.closed.jaxpr.eqns, consts, outvars=streams)
        values, width = _jax.evaluate(seen, *args), len(chain.streams[1])
        by_layer = [values[i : i + width] for i in range(0, len(values), width)]
        pairs = itertools.pairwise(by_layer)
        return jnp.stack([jnp.ones((), jnp.float32), *(_apart(a, b) for a, b in pairs)])

    def _of_stack(self, stack: Stack, args: Sequence[Any]) -> jax.Array:
        """Runs the program, its scans with what they carry looked at in every turn."""
        env: dict[Any, Any] = constants(self.closed)
        env.update(zip(self.closed.jaxpr.invars, args, strict=True))
        found = []
        for eqn in self.closed.jaxpr.eqns:
            values = [v.val if isinstance(v, _jax.Literal) else env[v] for v in eqn.invars]
            if any(eqn is scan for scan in stack.scans):
                outs, apart = _looked_at(eqn, values)
                found.append(apart)
            else:
                outs = _jax.bound(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return jnp.mean(jnp.stack(found), 0).at[0].set(1.0)

    def without(self, name: str, layer: int) -> Run:
        """Return the program without one layer, never the first."""
        if name in self.chains:
            return Run(without(self.closed, self.chains[name], [layer]), {}, ())
        stack = self.stacks[name]
        kept = tuple(i for i in range(stack.big) if i != layer)
        cut = shortened(self.closed, [replace(stack, small=stack.big - 1)], [kept])
        places = {v: i for i, v in enumerate(self.closed.jaxpr.invars)}
        dims = {places[v]: dim for v, dim in stack.dims.items() if v in places}
        return Run(cut, dims, kept)


def _looked_at(eqn: _jax.JaxprEqn, values: Sequence[Any]) -> tuple[list[Any], jax.Array]:
    """A scan's results, and 1 − cos of what it carries before and after every turn."""
    params = eqn.params
    n, c = _jax.scan_counts(params)

    def step(state: Any, x: Any) -> Any:
        outs = _jax.evaluate(params["jaxpr"], *values[:n], *state, *x)
        return outs[:c], (outs[c:], _apart(state, outs[:c]))

    reverse, length = params["reverse"], params["length"]
    carry, xs = list(values[n : n + c]), list(values[n + c :])
    state, (ys, apart) = jax.lax.scan(step, carry, xs, length=length, reverse=reverse)
    return [*state, *ys], apart


def _apart(before: Sequence[Any], after: Sequence[Any]) -> jax.Array:
    """1 − cos along the last axis, the mean over everything else."""
    found = [
        jnp.mean(1 - _cosine(a.astype(jnp.float32), b.astype(jnp.float32)))
        for a, b in zip(before, after, strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim
    ]
    return jnp.mean(jnp.stack(found)) if found else jnp.ones((), jnp.float32)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    sizes = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, -1) / jnp.maximum(sizes, jnp.finfo(jnp.float32).tiny)


def find(
    small: ClosedJaxpr, big: ClosedJaxpr, small_keys: Sequence[Key], big_keys: Sequence[Key]
) -> Layers:
    """Returns the families of layers that the big program has more of, both without calls.

    Raises:
      ValueError: layers of a family are not a chain, or names do not correspond.
    """
    names = dict(zip(big_keys, big.jaxpr.invars, strict=False))
    chains: dict[str, Chain] = {}
    follows: dict[str, str] = {}
    for named in layers.correspondence(small_keys, big_keys).families:
        leader = next((n for n in chains if _goes_with(big, chains[n], named, names)), None)
        if leader is not None:
            follows[named.name] = leader
            continue
        layer_of = {names[key]: i for i, layer in enumerate(named.big) for key in layer.values()}
        chains[named.name] = chain(big, layer_of, len(named.big), named.name)
    keys = {v: key for key, v in names.items()}
    found = {}
    for stack in stacks(small, big, [*keys]):
        of = [keys[v] for v in stack.dims if v in keys]
        found[_tree.name(common(*of)) if common(*of) else "the stacked leaves"] = stack
    return Layers(big, chains, found, follows)


def _goes_with(big: ClosedJaxpr, leader: Chain, named: Named, names: Mapping[Key, Any]) -> bool:
    """Whether without the leader's last layer nothing reads the last one of a family."""
    if max(leader.streams) != len(named.big):
        return False
    left = used(without(big, leader, [len(named.big) - 1]))
    return left.isdisjoint(names[key] for key in named.big[-1].values())
