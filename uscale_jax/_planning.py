"""plan: reads off two programs how the larger model is made from the smaller one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _tree
from uscale_jax._axes import named_axes
from uscale_jax._plan import LeafPlan, Models, Plan, PlanAxis
from uscale_jax._types import Apply, Key, Tree
from uscale_jax.trace import keep, padded, ratios
from uscale_jax.trace.atoms import Atom
from uscale_jax.trace.deepening import Steps, Zeros
from uscale_jax.trace.depth import Deepened, deepen
from uscale_jax.trace.growth import LeafGrowth, leaf_growths
from uscale_jax.trace.layers import Depth
from uscale_jax.trace.program import Value
from uscale_jax.trace.roles import Role, roles
from uscale_jax.trace.sizes import changing, places
from uscale_jax.trace.tracing import Model, Traced, trace
from uscale_jax.trace.tracing import traced as trace_closed
from uscale_jax.trace.units import NEW_ZERO


def plan(
    small_apply: Apply,
    small_params: Tree,
    big_apply: Apply,
    big_params: Tree,
    *inputs: Any,
    depth: Depth | None = None,
    new_layers: str = "identity",
    rotary: bool = False,
    exact: bool = True,
) -> Plan:
    r"""Returns how a larger model is made from a smaller one so that it is the same function.

    Both models are traced (nothing is computed, shapes are enough) and compared equation by
    equation.  Every axis that grows repeats its units; the factors under which the function is
    the same are the solution of linear equations in their logarithms, one per primitive
    (:func:`trace_exponents`).  Per leaf

    .. math:: W' = m\,W[\mathrm{maps}],\qquad g' = \frac{g[\mathrm{maps}]}{m\,n}

    with m the factor, n the number of copies of every element, g the gradient.  Hence, for the
    large model to follow the small one's training exactly,

    =======================  ==========================================
    Adam, Lion, RMSProp      learning rate :math:`\alpha m`, that is α/k for a kernel whose input
                             axis grew k-fold; ε/(m n); decoupled decay λ/m
    SGD                      learning rate :math:`\alpha m^2 n`
    first moments            :math:`[\mathrm{maps}]/(m n)`
    second moments           :math:`[\mathrm{maps}]/(m n)^2`
    =======================  ==========================================

    which :func:`scale_optimizer` and :func:`resize_state` do.

    Sizes need not be multiples: units are then repeated unequally often, which is exact wherever
    no mean is taken over them with equal weights (and under RMSNorm, whose lanes take
    :math:`1/\sqrt{\mathrm{copies}}`).  Under LayerNorm the rest of the lanes are new: they hold
    the mean of the old ones, with factors that keep the variance and ε.

    **Layers** are added with ``depth``: in lists whose names end in numbers (``layers_0``, ...)
    or stacked for a scan.  Each layer of the big model is a copy of one of the small model; the
    first copy is the layer itself.  With ``new_layers="identity"`` some leaves of the others are
    zero, so that a new layer gives out what it takes in: which ones, is read off the program (the
    last kernels of each residual branch, and biases behind them) and proven.  Where no zeros do
    it (post-norm blocks) that is refused.  ``"copy"`` leaves copies as they are, another function;
    the plan then says that it is not exact.

    Args:
      small_apply: ``small_apply(params, *inputs)``, any pure function that JAX can trace.
      small_params: its parameters: arrays or ``jax.ShapeDtypeStruct``.
      big_apply: the same for the larger model, built from the same definition.
      big_params: its parameters or their shapes.
      *inputs: inputs that both take: arrays or ``jax.ShapeDtypeStruct``.  Sizes that are equal by
        accident (batch and width, say) can be taken for one axis: use sizes that all differ.
      depth: None for equally many layers.  Which layer of the small model each layer of the big
        one is a copy of: ``"interleave"`` (0, 0, 1, 1, ...), ``"stack"`` (0, 1, ..., 0, 1, ...),
        a list of numbers, or a dict of lists by family (``"params/layers_*"``).
      new_layers: ``"identity"`` or ``"copy"``.
      rotary: whether heads with rotary embeddings may grow, by a whole factor k.  Pair k·i of the
        big model turns at the rate of pair i of the small one; the pairs between are new, and 0
        for queries or keys.  Holds of any numbers computed from places alone of which those of
        the small model are every k-th of the big one's; others are refused.
      exact: whether to refuse what is not the same function.  With False, for shrinking, a plan
        is made wherever sizes can change: units are repeated as equally as they can be, factors
        go by the ratio of sizes, new layers are copies where they cannot be identities; the plan
        says so in ``exact`` and ``notes``.

    Returns:
      :class:`Plan`: index maps, factors m, numbers of copies n and learning-rate factors per
      leaf; sizes per axis, and why an axis cannot change.  Plain data, except that it remembers
      the two models for :func:`grow` to verify with; ``Plan.to_json`` keeps all but those.

    Raises:
      ValueError: the trees or the programs differ in more than sizes; a size is smaller in the
        big model, or cannot change (with the source line that says so); no factors keep the
        function (the few equations that clash, in words, with source lines).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]
      >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> shapes = lambda n: {"bias": f32(n), "down": f32(n, 3), "up": f32(5, n)}
      >>> print(us.plan(apply, shapes(7), apply, shapes(14), f32(2, 5)))
      leaf  small  big     factor  copies  lr (Adam)  lr (SGD)
      bias  7      14      1       2       1          2
      down  7 × 3  14 × 3  1/2     2       1/2        1/2
      up    5 × 7  5 × 14  1       2       1          2
      <BLANKLINE>
      axis  small  big         places                    why
      a     7      14   free   bias[0], down[0], up[1]
      B     3      3    fixed  down[1]                   is an axis of the output
      C     5      5    fixed  up[0]                     is an axis of input 0

    References:
      Replication: Chen et al., *Net2Net*, 2016 (arXiv:1511.05641), Eq. 3 and 4.  With the
      optimizer: Ma et al., *μP upscaling*, 2026 (arXiv:2602.10545); the learning rates are those
      of Yang et al., *Tensor Programs V*, 2022 (arXiv:2203.03466), Table 3.  New lanes under
      LayerNorm: after the average expansion of Wang et al., *LEMON*, 2023 (arXiv:2310.07999),
      with ε as it is.
    """
    small, big = Model(small_apply, small_params), Model(big_apply, big_params)
    models = Models(small_apply, big_apply, inputs, depth, new_layers, rotary)
    deepened = None if depth is None else _deepened(small, big, models, exact)
    traced = _traced(small, big, models, deepened)
    solution, inexact = _solved(traced, exact)
    leaves = leaf_plans(Remade(traced, deepened, big), leaf_growths(solution), solution.traced)
    return Plan(
        leaves={leaf.name: leaf for leaf in leaves},
        axes=_axes(traced),
        notes=(*_notes(leaves, deepened), *inexact),
        exact=not inexact and (deepened is None or deepened.exact),
        precision=_precision(traced),
        treedef=jax.tree.structure(big_params),
        small_treedef=traced.treedef,
        small_keys=tuple(traced.keys),
        models=models,
    )


class Remade(NamedTuple):
    """The programs of a plan, read once more."""

    traced: Traced
    deepened: Deepened | None
    big: Model

    @property
    def atoms(self) -> dict[str, Atom]:
        """Return the axes that change, by their names in the plan."""
        named = named_axes(places(self.traced))
        return {axis.name: atom for atom, axis in named.items() if len(set(atom.size)) > 1}


def remade(plan: Plan, models: Models, inputs: Sequence[Any] | None = None) -> Remade:
    """Returns the programs of a plan, for other inputs where given."""
    small, big = shapes_of(plan, models)
    models = models if inputs is None else models._replace(inputs=tuple(inputs))
    deepened = None if models.depth is None else _deepened(small, big, models, exact=False)
    return Remade(_traced(small, big, models, deepened), deepened, big)


def shapes_of(plan: Plan, models: Models) -> tuple[Model, Model]:
    """Returns the small and the big model of a plan, with shapes for parameters."""
    shape = lambda size, leaf: jax.ShapeDtypeStruct(size, _dtype(leaf.dtype))  # noqa: E731
    small_shapes = {leaf.source: shape(leaf.small, leaf) for leaf in plan.leaves.values()}
    big_shapes = [shape(leaf.big, leaf) for leaf in plan.leaves.values()]
    small = Model(models.small, plan.unflatten_small(small_shapes))
    return small, Model(models.big, plan.unflatten(big_shapes))


def _dtype(name: str) -> Any:
    """The dtype of a name, that of random keys too."""
    if not name.startswith("key<"):
        return jnp.dtype(name)
    return jax.eval_shape(lambda: jax.random.key(0, impl=name[4:-1])).dtype


def _traced(small: Model, big: Model, models: Models, deepened: Deepened | None) -> Traced:
    if deepened is None:
        return trace([small, big], models.inputs, rotary=models.rotary)
    return _cut(deepened, small, models.inputs, models.rotary)


def _deepened(small: Model, big: Model, models: Models, exact: bool) -> Deepened:
    """With new layers as asked for; copies of others where they need not be identities."""
    assert models.depth is not None
    try:
        return deepen(small, big, models.inputs, models.depth, models.new_layers)
    except ValueError:
        if exact or models.new_layers != "identity":
            raise
        return deepen(small, big, models.inputs, models.depth, "copy")


def _cut(deepened: Deepened, small: Model, inputs: Sequence[Any], rotary: bool) -> Traced:
    programs = [deepened.small, deepened.closed]
    return trace_closed(programs, small.params, inputs, deepened.outputs, rotary=rotary)


def leaf_plans(
    made: Remade, growths: Sequence[LeafGrowth], solved: Traced | None = None
) -> list[LeafPlan]:
    """Returns the leaves of the big model; new lanes are solved for in a trace of their own."""
    traced = made.traced if solved is None else solved
    known = roles(traced, frozenset(changing(traced)))
    pairs = enumerate(zip(growths, known, strict=True))
    leaves = [_leaf(made.traced, i, growth, role) for i, (growth, role) in pairs]
    return leaves if made.deepened is None else _layers(made.deepened, leaves, made.big)


def _solved(traced: Traced, exact: bool) -> tuple[keep.Solution, tuple[str, ...]]:
    """Factors, and what is not exact about them."""
    if exact:
        return _exactly(traced), ()
    try:
        return _exactly(traced), ()
    except ValueError as error:
        why = str(error).splitlines()[0]
    try:
        return ratios.by_size(traced), (f"not the same function, factors by size alone: {why}",)
    except ValueError as error:
        why = "; ".join(line.strip() for line in str(error).splitlines()[1:-1])
        return ratios.by_use(traced), (f"not the same function, factors by use alone: {why}",)


def _exactly(traced: Traced) -> keep.Solution:
    """With copies of units alone; where these must be equally many and cannot, with new units."""
    if traced.structure.strided.atoms:
        return padded.solve(traced)
    try:
        return keep.solve(traced)
    except keep.NotEquallyOften as unequal:
        try:
            return padded.solve(traced)
        except ValueError as error:
            raise ValueError(f"{unequal}\nNor can units be added: {error}") from None


def _leaf(traced: Traced, i: int, growth: LeafGrowth, role: Sequence[Role]) -> LeafPlan:
    value, key = traced.structure.program.inputs[i], traced.keys[i]
    pairs = zip(growth.maps, growth.partners, strict=True)
    return LeafPlan(
        key=key,
        source=key,
        small=_shape(value, 0),
        big=_shape(value, -1),
        dtype=str(value.dtype),
        maps=growth.maps,
        averages=growth.averages,
        factors=growth.factors,
        copies=growth.copies,
        shift=growth.shift,
        roles=tuple(each.value for each in role),
        partners=tuple(None if old is None else mate for old, mate in pairs),
        words=growth.words,
    )


def _layers(deepened: Deepened, leaves: Sequence[LeafPlan], big: Model) -> list[LeafPlan]:
    """The leaves of the big model, layers it has more than the small one included."""
    by_key = {leaf.key: leaf for leaf in leaves}
    kept = set(deepened.kept.values())
    found = []
    for key in _tree.flatten_named(big.params)[0]:
        leaf = by_key[deepened.sources[key]]
        zeros = deepened.zero.get(key, frozenset())
        if key in deepened.steps:
            found.append(_stacked(leaf, key, deepened.steps[key], zeros or frozenset()))
        else:
            found.append(replace(leaf, key=key, zero=zeros is True, new=key not in kept))
    return found


def _stacked(leaf: LeafPlan, key: Key, steps: Steps, zeros: Zeros) -> LeafPlan:
    """A leaf that holds all layers along one of its dimensions."""
    sources = np.asarray(steps.sources, np.int64)
    silent = (
        np.zeros(len(sources), bool)
        if zeros is True
        else np.isin(np.arange(len(sources)), sorted(zeros))
    )
    maps, shape = list(leaf.maps), list(leaf.big)
    maps[steps.dim], shape[steps.dim] = np.where(silent, NEW_ZERO, sources), len(sources)
    return replace(
        leaf,
        key=key,
        big=tuple(shape),
        maps=tuple(maps),
        layer_dim=steps.dim,
        layers=tuple(steps.sources),
    )


def _shape(value: Value, program: int) -> tuple[int, ...]:
    return tuple(int(size[program]) for size in value.shape)


def _axes(traced: Traced) -> tuple[PlanAxis, ...]:
    named = named_axes(places(traced))
    return tuple(
        PlanAxis(axis.name, int(atom.size[0]), int(atom.size[-1]), axis.free, axis.why, axis.places)
        for atom, axis in named.items()
    )


def _notes(leaves: Sequence[LeafPlan], deepened: Deepened | None) -> tuple[str, ...]:
    """What a reader of the plan should know and the tables do not say."""
    notes = []
    untouched = [leaf.name for leaf in leaves if not leaf.floating]
    if untouched:
        names = ", ".join(untouched)
        notes.append(f"without factor or learning rate, being no floating leaves: {names}")
    lanes = [leaf.name for leaf in leaves if any(leaf.averages)]
    if lanes:
        names = ", ".join(lanes[:4]) + (f" and {len(lanes) - 4} more" if len(lanes) > 4 else "")
        notes.append(f"new lanes, means or copies of old ones, which training tells apart: {names}")
    for family in () if deepened is None else deepened.families:
        sources = ", ".join(map(str, family.sources))
        notes.append(f"layers {family.name}: {family.small} → {family.big}, copies of {sources}")
    if deepened is not None and deepened.exact:
        silent = dict.fromkeys(_tree.name(deepened.sources[key]) for key in deepened.zero)
        notes.append(f"zero in new layers, which makes them the identity: {', '.join(silent)}")
    elif deepened is not None:
        notes.append(f"not the same function: {deepened.why}")
    return tuple(notes)


def _precision(traced: Traced) -> str:
    """The narrowest floating dtype that the program computes in."""
    program = traced.structure.program
    values = [*program.inputs, *(v for eqn in program.equations for v in eqn.outputs)]
    dtypes: Mapping[Any, float] = {
        v.dtype: float(jnp.finfo(v.dtype).eps) for v in values if v.scales
    }
    return str(max(dtypes, key=lambda d: dtypes[d])) if dtypes else "float32"
