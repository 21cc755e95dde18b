"""resize_state: the state of an optimizer, for the larger or the smaller model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from uscale_jax import _factors, _grow, _jax, _tree
from uscale_jax._frame import UnitScaleFrameWarning
from uscale_jax._places import (
    FACTORED,
    Form,
    Place,
    Places,
    grows,
    is_absent,
    numbers,
    part_of,
    places,
    prefixes,
    reduced,
    without,
)
from uscale_jax._plan import LeafPlan, Plan
from uscale_jax._powers import Power, Terms, measure, terms
from uscale_jax._state_arrays import copies_along, grown, run, shrunk, zeros
from uscale_jax._types import Key
from uscale_jax._work import Work, placements


def resize_state(
    opt_state: optax.OptState,
    plan: Plan,
    *,
    optimizer: optax.GradientTransformation | None = None,
    new_layers: str = "mapped",
    shardings: Any = None,
) -> optax.OptState:
    r"""Returns the state of an optimizer for the other model of a plan: training goes on from it.

    As it is, for :func:`scale_optimizer`, whose state is in the small model's frame: every array
    that is like a leaf of the parameters is copied where the leaf is, and nothing is multiplied.
    With ``optimizer=tx``, for this optimizer without a frame:

    .. math::
      S' = S[\mathrm{maps}]\;(m\,n)^{-p}\,m^{q}

    where S is multiplied by :math:`a^p b^q` as gradients are by a and parameters by b: p = 1 for
    momentum and Adam's first moment, 2 for its second moment, q = 1 for averages of parameters.
    The powers are measured, by running the optimizer for the small model; norms, which copies add
    to, are not seen.  It then still needs its learning rate per leaf (``Plan.lr_factors``,
    ``Plan.sgd_lr_factors``), ε and weight decay.

    Counts, keys, hyper-parameters and schedules stay.  Adafactor's rows and columns are copied
    along the dimension they have.

    Args:
      opt_state: the state of any optimizer of optax, updated or not, in chains, masks, partitions
        and wrappers, bare or as ``nnx.state(optimizer)``; or any other tree that has trees like the
        parameters in it.  The small model's grows, the big one's shrinks, to the mean over copies:
        shapes say which it is.
      plan: what :func:`plan` returned, or ``Plan.from_json``.
      optimizer: the optimizer, where it is to go on without :func:`scale_optimizer`.
      new_layers: what layers that the plan adds start with: "mapped", the state of the layer they
        are made from, or "zeros".
      shardings: where arrays of the result are to be that are like leaves of the parameters: a
        ``NamedSharding``, a tree prefix of them, or a function of an array's name in the state and
        its ``jax.ShapeDtypeStruct`` (None for the default).  By default an array has the mesh and
        the spec of the one it is made from.

    Returns:
      The state, with the structure that the optimizer's ``init`` gives for the other model.  Arrays
      keep dtype and weak type; those narrower than float32 are computed in float32 and rounded
      once.  Under ``jax.jit`` arrays may be traced.

    Raises:
      TypeError: a sharding is no ``NamedSharding``.
      ValueError: arrays are named or shaped like no leaf of the plan, or hold NaN; with
        ``optimizer``, an array scales with no power, so that only the frame is exact; sizes cannot
        be cut into as many parts as shardings say.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import uscale_jax as us
      >>> apply = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> shapes = lambda n: {"up": jnp.ones((5, n)), "down": jnp.ones((n, 3))}
      >>> plan = us.plan(apply, shapes(7), apply, shapes(14), jnp.ones((2, 5)))
      >>> adam = optax.scale_by_adam()
      >>> _, state = adam.update(shapes(7), adam.init(shapes(7)))
      >>> grown = us.resize_state(state, plan)
      >>> grown.mu["down"].shape, float(state.mu["down"][0, 0]), float(grown.mu["down"][0, 0])
      ((14, 3), 0.1..., 0.1...)
      >>> bare = us.resize_state(state, plan, optimizer=adam)  # up: m = 1, n = 2
      >>> [round(float(moment["up"][0, 0]), 5) for moment in (state.nu, bare.nu)]
      [0.001, 0.00025]

    References:
      Ma et al., *μP upscaling*, 2026 (arXiv:2602.10545): moments are divided by (m n) and its
      square.
    """
    resizing = resizing_of(opt_state, plan, optimizer, new_layers)
    _check_finite(resizing.arrays)
    if optimizer is None:
        warn_of_numbers(resizing.arrays, plan, stacklevel=3)
    tree = replace(resizing, do=_Later).tree(opt_state)
    keys, nodes, treedef = _tree.flatten_named(tree)
    pairs = zip(keys, nodes, strict=True)
    later = {key: node for key, node in pairs if isinstance(node, _Later)}
    works = [node.work._replace(key=key) for key, node in later.items()]
    others = [key for key in keys if key not in later]
    sources = [node.x for node in later.values()]
    places = placements(works, sources, shardings, "resize_state", others)
    done = {
        each.key: each.run(x, place) for each, x, place in zip(works, sources, places, strict=True)
    }
    made = [done.get(key, node) for key, node in zip(keys, nodes, strict=True)]
    return jax.tree.unflatten(treedef, made)


@dataclass(frozen=True, eq=False)
class _Later:
    """An array of the other model's state, before its place is known."""

    x: Any
    work: Work


def resizing_of(
    opt_state: Any, plan: Plan, optimizer: optax.GradientTransformation | None, new_layers: str
) -> Resizing:
    """Returns the way from a state to that of the other model; shapes and dtypes will do.

    Raises:
      ValueError: see :func:`resize_state`.
    """
    if new_layers not in ("mapped", "zeros"):
        raise ValueError(f"new_layers={new_layers!r} is neither 'mapped' nor 'zeros'.")
    keys, leaves, _ = _tree.flatten_named(opt_state)
    arrays = {k: x for k, x in zip(keys, leaves, strict=True) if hasattr(x, "dtype")}
    found = places(arrays, plan)
    powers = None if optimizer is None else measure(optimizer, plan, part_of(found))
    return Resizing(plan, arrays, found, grows(found), new_layers == "zeros", powers)


def warn_of_numbers(arrays: Mapping[Key, Any], plan: Plan, *, stacklevel: int) -> None:
    """A number per leaf may be a sum over its elements, which copies add to, or no such sum."""
    floating = {key: x for key, x in arrays.items() if _factors.is_scaled(x)}
    kept = [_tree.name(key) for key in numbers(floating, plan)]
    if kept:
        warnings.warn(
            f"this state keeps one number a leaf, {kept[0]!r} for example, which stays as it is. "
            "If it is a sum over the elements of the leaf (NovoGrad's second moment) it is too "
            "small for the big model until it has followed. Fix: an elementwise optimizer.",
            UnitScaleFrameWarning,
            stacklevel=stacklevel,
        )


def _check_finite(arrays: Mapping[Key, Any]) -> None:
    """Refuses NaN before it is copied all over a larger state."""
    concrete = {k: x for k, x in arrays.items() if not _jax.is_traced(x) and _factors.is_scaled(x)}
    flags = jax.device_get([_grow.has_nan(x) for x in concrete.values()])
    bad = [_tree.name(key) for key, flag in zip(concrete, flags, strict=True) if flag]
    if bad:
        raise ValueError(
            f"the state holds NaN: {', '.join(bad[:8])}. Expected: finite values. Fix: go back to "
            "a checkpoint from before the divergence."
        )


@dataclass(frozen=True)
class Resizing:
    """The way from a state of one model to that of the other."""

    plan: Plan
    arrays: Mapping[Key, Any]
    places: Mapping[Key, Places]
    grows: bool
    zeros: bool
    powers: Mapping[Key, Power | None] | None
    do: Callable[[Any, Work], Any] = lambda x, work: work.run(x)
    """What becomes of an array and of how the other model's is made from it."""

    def tree(self, state: Any) -> Any:
        """Returns the state of the other model."""
        if any(leaf.key != leaf.source for leaf in self.plan.leaves.values()):
            return self._node((), state)
        keys, nodes, treedef = _tree.flatten_named(state)
        pairs = zip(keys, nodes, strict=True)
        return jax.tree.unflatten(treedef, [self._array(key, x) for key, x in pairs])

    def _node(self, path: tuple[Any, ...], node: Any) -> Any:
        """One node of a state, where trees of the two models have other leaves."""
        flatten = jax.tree_util.tree_flatten_with_path
        pairs, treedef = flatten(node, is_leaf=lambda x: x is not node)
        if jax.tree_util.treedef_is_leaf(treedef):
            return self._array(_tree.leaf_key(path), node)
        keys, leaves, _ = _tree.flatten_named(node, is_leaf=is_absent)
        for prefix in prefixes(leaf.key for leaf in self.plan.leaves.values()):
            if set(keys) == self._names(prefix):
                values = dict(zip(keys, leaves, strict=True))
                return self._model(_tree.leaf_key(path), prefix, values)
        return jax.tree.unflatten(treedef, [self._node((*path, *step), x) for step, x in pairs])

    def _names(self, prefix: Key) -> set[Key]:
        """How the leaves of a part of the model are named in trees of it."""
        leaves = self.plan.leaves.values()
        keys = self.plan.small_keys if self.grows else [leaf.key for leaf in leaves]
        return {key[len(prefix) :] for key in keys if key[: len(prefix)] == prefix}

    def _model(self, at: Key, prefix: Key, values: Mapping[Key, Any]) -> Any:
        """A tree like the other model's parameters, or a part of them, from one like this one's."""

        def value(leaf: LeafPlan) -> Any:
            own = (leaf.source if self.grows else leaf.key)[len(prefix) :]
            node = values.get(own)
            if is_absent(node):
                return node
            name = (*at, *leaf.source[len(prefix) :])
            return self._array((*at, *own), node, leaf, name)

        leaves = list(self.plan.leaves.values())
        if self.grows:
            whole = self.plan.unflatten([value(leaf) for leaf in leaves])
        else:
            kept = {leaf.source: value(leaf) for leaf in leaves if not leaf.new}
            whole = self.plan.unflatten_small(kept)
        return whole[prefix[0]] if prefix else whole

    def _array(self, key: Key, x: Any, owner: LeafPlan | None = None, name: Key = ()) -> Any:
        """One leaf of the state.

        ``owner`` is the plan's leaf, where several are made from this one, and ``name`` its key in
        the small model's state.
        """
        both = self.places.get(key)
        place = None if both is None else both.small if self.grows else both.big
        power = self._power(name or key, x)
        if place is None or place.form.mark:
            return x if power in (None, (0, 0)) else self._refuse(key)
        leaf = owner or place.leaf
        x, form = self._source(key, x, place, leaf)
        factors = self._factors(key, power, leaf, form)
        shape = (*x.shape[: form.lead], *without(self._shape(leaf), form.missing))
        maps = leaf.maps_of(new_layers=self.grows and not self.zeros)
        maps = (*[None] * form.lead, *without(maps, form.missing))
        if not self.grows:
            copies = [copies_along(old, size) for old, size in zip(maps, shape, strict=True)]
            return self._do(key, x, shrunk, shape, tuple(copies), factors)
        if leaf.new and self.zeros:
            return self._do(key, x, zeros, shape)
        means = leaf.averages or ((),) * len(leaf.small)
        means = (*[()] * form.lead, *without(means, form.missing))
        return self._do(key, x, grown, shape, maps, means, factors)

    def _do(self, key: Key, x: Any, program: Any, shape: tuple[int, ...], *args: Any) -> Any:
        making = partial(run, program=program, args=args, shape=shape)
        return self.do(x, Work(key, key, shape, making))

    def _power(self, key: Key, x: Any) -> Power | None:
        """With what the array scales; None where it does not matter."""
        if self.powers is None or not hasattr(x, "dtype") or not _factors.is_scaled(x):
            return None
        ends = [key[start:] for start in range(len(key) + 1)]
        end = next((end for end in ends if end in self.powers), None)
        power = None if end is None else self.powers[end]
        if power is None and (end is not None or _jax.is_traced(x) or np.any(jax.device_get(x))):
            self._refuse(key)
        return power

    def _factors(self, key: Key, power: Power | None, leaf: LeafPlan, form: Form) -> Terms:
        """What the array of a leaf is multiplied by besides."""
        if power is None or not leaf.floating:
            return ()
        if leaf.shift and power.q:
            self._refuse(key)
        sign = 1 if self.grows else -1
        found = []
        for term in terms(leaf, m=sign * (power.q - power.p), n=-sign * power.p):
            size = np.shape(term)
            if size and form.missing is not None and size[form.missing] != 1:
                self._refuse(key)
            kept = (*[1] * form.lead, *without(size, form.missing)) if size else ()
            found.append(np.reshape(term, kept) if size else term)
        return tuple(found)

    def _refuse(self, key: Key) -> Any:
        raise ValueError(
            f"resize_state(..., optimizer=tx): {_tree.name(key)!r} does not scale with a power of "
            "the gradients and of the parameters, leaf by leaf, so that it has no value for the "
            "big model under this optimizer. Fix: keep the state in the small model's frame, "
            "resize_state(state, plan), and train with us.scale_optimizer(tx, plan)."
        )

    def _shape(self, leaf: LeafPlan) -> tuple[int, ...]:
        return leaf.big if self.grows else leaf.small

    def _source(self, key: Key, x: Any, place: Place, leaf: LeafPlan) -> tuple[Any, Form]:
        """What the array is made from: rows may be columns where another dimension is larger."""
        field, form = place.field(key), place.form
        if form.missing is None or field not in FACTORED:
            return x, form
        wanted = reduced(self._shape(leaf), field)
        if wanted == form.missing:
            return x, form
        other = "v_col" if field == "v_row" else "v_row"
        partner = (*key[: -len(place.name) - 1], other, *place.name)
        if reduced(leaf.small if self.grows else leaf.big, other) == wanted:
            return self.arrays[partner], Form(missing=wanted)
        raise ValueError(
            f"{_tree.name(key)!r} is a mean over dimension {form.missing} of a leaf that is "
            f"{leaf.small} in the small model and {leaf.big} in the big one, where optax would "
            f"keep that over dimension {wanted}. Fix: start Adafactor's state anew, with init."
        )
