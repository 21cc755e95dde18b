"""importance: which units of the axes that shrink matter to a model, measured on real batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from uscale_jax import _calibration, _criteria, _factors, _jax, _layer_scores
from uscale_jax._calibration import Calibration, Wanted
from uscale_jax._criteria import Scores, Vector
from uscale_jax._duplicates import Duplicates, duplicates
from uscale_jax._elimination import Merging, Readers
from uscale_jax._plan import Models, Plan
from uscale_jax._planning import Remade, remade
from uscale_jax._types import Apply, Tree
from uscale_jax.trace import readings
from uscale_jax.trace.readings import Reading

READ = {"activation": "square", "mean": "abs", "variance": "spread", "wanda": "energy"}
"""Methods by what is read, and what is taken of it."""
SOLVED: Mapping[str, type[Readers] | type[Merging]] = {
    "reconstruction": Readers,
    "merging": Merging,
}
"""Methods by what the others can make up for, and how."""
METHODS = ("magnitude", *READ, "taylor", *SOLVED, "random")

Loss = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Importance:
    """How much units and layers matter; what :func:`shrink` and :func:`select` choose by."""

    plan: Plan
    """The plan it was measured for, layers chosen."""
    method: str
    scores: Mapping[str, np.ndarray[Any, Any]]
    """By axis, named as in the plan: one number a unit of the big model; the highest stay."""
    layers: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """By family of layers: one number a layer of the big model."""
    calibration: Calibration | None = field(default=None, repr=False)
    """What was read, with which least squares refit what reads the units that stay."""
    duplicates: Duplicates | None = field(default=None, repr=False)
    """Which units are equal, and which nothing reads."""
    notes: tuple[str, ...] = ()
    """What was not as it usually is, such as axes that no product reads."""

    @property
    def data_free(self) -> bool:
        """Return whether it looks at parameters alone."""
        return self.method in ("magnitude", "random") and self.calibration is None


def importance(
    apply: Apply,
    params: Tree,
    batches: Iterable[Any],
    plan: Plan,
    *,
    method: str = "reconstruction",
    layers: str = "influence",
    loss: Loss | None = None,
    refit: bool | None = None,
    key: jax.Array | None = None,
) -> Importance:
    r"""Returns how much every unit matters, of every axis that is smaller in the small model.

    The model runs once over the batches, as it is, in one compiled program per shape of batch.
    While it runs, what its products read is added up: matrix products and convolutions whose one
    side is an activation, found by tracing; so no names are looked at and nothing is hooked.

    With X what a product reads (a row a token, say), w what it is read by, and sums over all
    elements that belong to unit j, the score of the unit is

    ====================  ========================================================================
    ``"magnitude"``       :math:`\sqrt{\sum w^2}` over all leaves; without data
    ``"mean"``            :math:`\sum |X|`
    ``"activation"``      :math:`\sum X^2`, as Minitron's L2
    ``"variance"``        :math:`\sum (X - \bar X)^2 w^2`, as FLAP
    ``"wanda"``           :math:`\sum X^2 w^2`
    ``"taylor"``          :math:`\sum_{\mathrm{batches}} (\sum g\,w)^2` with g the gradient of
                          ``loss``
    ``"reconstruction"``  :math:`\mathrm{tr}\,W_j^T [(X^TX)^{-1}_{jj}]^{-1} W_j`, what the product
                          loses *when the other units make up for it*, units going a few at a
                          time; streams, of which more becomes than what is read, as
                          ``"activation"``
    ``"merging"``         :math:`\min_i (\sum X_j^2 - (\sum X_i X_j)^2 / \sum X_i^2)\, w_j^2`, what
                          is lost when the one unit most like it makes up for it, as it then
                          does; streams again as ``"activation"``
    ``"random"``          random numbers, to compare with
    ====================  ========================================================================

    Several readings of an axis count equally, each as shares of its sum.

    **Refit.**  After ``"reconstruction"`` (or with ``refit=True``), :func:`shrink` lets what reads
    the units that stay take over what the others did, so that products come as close to the big
    model's as they can: least squares on what was read.

    **Layers.**  Where the plan drops layers (``depth=``, any list), they are chosen first: by
    ``"influence"``, :math:`1 - \mathrm{E} \cos(x_l, x_{l+1})` of what goes into a layer and what
    comes out, or by ``"loss"``, how much the loss rises without the layer alone.  The first layer
    always stays.  Units are then measured in the model of the layers that stay.

    Args:
      apply: the plan's big model, ``apply(params, *inputs)``.
      params: its parameters.
      batches: inputs, or tuples of inputs, as many as the plan was made with.  What follows in a
        tuple (labels, say) is for ``loss`` alone.  Few shapes mean few compilations.
      plan: what :func:`plan` returned; with ``exact=False`` where growing would be refused.
      method: one of the above.
      layers: ``"influence"`` or ``"loss"``.
      loss: ``loss(outputs, *batch)``, a scalar; for ``"taylor"`` and ``layers="loss"``.
      refit: whether to keep the grams :math:`X^TX` that refitting takes; None for
        ``"reconstruction"`` and ``"merging"`` only.
      key: for ``"random"``.

    Returns:
      :class:`Importance`: ``scores`` by axis, ``layers`` by family of layers.

    Raises:
      ValueError: the plan was read from JSON (it does not know its models), or nothing is smaller
        in its small model; there are no batches, or the model does not take them; a score is NaN;
        ``method`` or ``layers`` is none of the above, or needs a loss.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> big = {"up": normal(0, 5, 8) * jnp.arange(8), "down": normal(1, 8, 3)}
      >>> shapes = {"up": jnp.zeros((5, 6)), "down": jnp.zeros((6, 3))}
      >>> batches = [normal(seed, 7, 5) for seed in range(4)]
      >>> plan = us.plan(apply, shapes, apply, big, batches[0])
      >>> scores = us.importance(apply, big, batches, plan, method="activation")
      >>> {axis: int(values.argmin()) for axis, values in scores.scores.items()}
      {'a': 0}

    References:
      Activations and layers: Muralidharan et al., *Minitron*, 2024 (arXiv:2407.14679), Sec. 2.2;
      Men et al., *ShortGPT*, 2024 (arXiv:2403.03853), Eq. 1.  Variance: An et al., *FLAP*, 2023
      (arXiv:2312.11983).  Sun et al., *Wanda*, 2023 (arXiv:2306.11695), Eq. 1.  Taylor: Molchanov
      et al., 2019 (arXiv:1906.10771), Eq. 8.  Reconstruction: Hassibi & Stork, *Optimal brain
      surgeon*, 1993, for blocks as in Kurtić et al., *ZipLM*, 2023 (arXiv:2302.04089), Eq. 3.
    """
    models = _models(plan, apply)
    _check_words(method, layers, loss, models)
    given = batches if isinstance(batches, Sequence) else [*batches]
    influence: Mapping[str, Vector] = {}
    if models.depth is not None:
        influence = _layer_scores.layer_scores(plan, models, params, given, layers, loss)
        depth = _layer_scores.chosen(_families(plan, models), influence)
        models = models._replace(depth=depth)
    work = _Work(plan, models, params, given)
    keep = method in SOLVED if refit is None else refit
    found = work.scores(method, loss, key, keep)
    if keep and work.calibration is None:
        work.calibrated(_with_grams)
    scores, notes = work.completed(found)
    _check_finite({**scores, **influence})
    kept = work.calibration if keep else None
    chosen = replace(plan, models=models)
    return Importance(chosen, method, scores, influence, kept, work.duplicates, notes)


class _Work:
    """One measurement."""

    def __init__(self, plan: Plan, models: Models, params: Tree, batches: Sequence[Any]) -> None:
        self.plan, self.models, self.params, self.batches = plan, models, params, batches
        self.calibration: Calibration | None = None
        self.made = remade(plan, models._replace(rotary=False))
        self.leaves = _calibration.big_leaves(self.made, params)
        self.duplicates = duplicates(self.made, self.leaves)

    def scores(self, method: str, loss: Loss | None, key: jax.Array | None, keep: bool) -> Scores:
        """Returns the scores of a method, of the axes that it has any for."""
        if method == "random":
            return self._random(key)
        if method == "magnitude":
            return _criteria.by_magnitude(self.made, self.leaves)
        if method == "taylor":
            assert loss is not None
            return self._taylor(loss)
        if method in SOLVED:
            seen, classes = self.calibrated(_with_grams), self.duplicates.classes
            return _criteria.by_reconstruction(seen, self.leaves, classes, SOLVED[method])
        seen = self.calibrated(_with_grams if keep else _energies)
        return _criteria.of_readings(seen, READ[method])

    def calibrated(self, take: _calibration.Take) -> Calibration:
        """Returns what is read over all batches, and keeps it."""
        self.calibration = _calibration.calibrate(
            self.plan, self.models, self.params, self.batches, _touched, take
        )
        return self.calibration

    def _random(self, key: jax.Array | None) -> Scores:
        keys = jax.random.key(0) if key is None else key
        axes = enumerate(self.made.atoms.items())
        return {
            name: np.asarray(jax.random.uniform(jax.random.fold_in(keys, i), atom.size[-1:]))
            for i, (name, atom) in axes
        }

    def _taylor(self, loss: Loss) -> Scores:
        made, count = self.made, len(self.models.inputs)

        @jax.jit
        def products(params: Tree, batch: Sequence[Any]) -> Any:
            cost = lambda p: loss(self.models.big(p, *batch[:count]), *batch)  # noqa: E731
            gradient = jax.tree.map(_slope, jax.grad(cost, allow_int=True)(params), params)
            leaves, slopes = (_calibration.big_leaves(made, t) for t in (params, gradient))
            both = zip(leaves, slopes, strict=True)
            real = [x * g if _factors.is_scaled(x) else x for x, g in both]
            return _criteria.along_dimensions(real)

        total: dict[str, Vector] = {}
        for batch in self.batches:
            given = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            sums = _jax.fetched(products(self.params, given))
            for name, each in _criteria.of_leaves(made, sums).items():
                total[name] = total.get(name, 0.0) + np.square(np.sum(each, 0))
        if not total:
            raise ValueError(_calibration.NO_BATCH)
        return total

    def completed(self, found: Scores) -> tuple[Scores, tuple[str, ...]]:
        """Returns scores of all axes, by magnitude where the method has none."""
        missing = [name for name in self.made.atoms if name not in found]
        if not missing:
            return found, ()
        instead = _criteria.by_magnitude(self.made, self.leaves)
        note = f"no product reads axes {', '.join(missing)}, which are scored by magnitude"
        return {**found, **{name: instead[name] for name in missing}}, (note,)


def _slope(gradient: Any, leaf: Any) -> Any:
    """A gradient as an array: integers have none."""
    return leaf if gradient.dtype == jax.dtypes.float0 else gradient


def _touched(made: Remade) -> Wanted:
    atoms = set(made.atoms.values())
    return lambda reading: bool(reading.atoms() & atoms)


def _energies(reading: Reading, operands: Sequence[Any]) -> dict[str, jax.Array]:
    return readings.energies(reading, operands)


def _with_grams(reading: Reading, operands: Sequence[Any]) -> dict[str, jax.Array]:
    found = readings.energies(reading, operands)
    if reading.first == reading.visit and reading.fits:
        found["gram"] = readings.gram(reading, operands)
    return found


def _families(plan: Plan, models: Models) -> dict[str, int]:
    deepened = remade(plan, models).deepened
    return {} if deepened is None else {f.name: f.small for f in deepened.families}


def _models(plan: Plan, apply: Apply) -> Models:
    if plan.models is None:
        raise ValueError(
            "this plan was read from JSON, and does not know its models. Expected: the plan that "
            "us.plan returned. Fix: make it anew."
        )
    if all(leaf.small == leaf.big for leaf in plan.leaves.values()) and plan.models.depth is None:
        raise ValueError(
            "no axis is smaller in this plan's small model. Expected: a plan from a smaller model "
            "to this one. Fix: us.plan(small.apply, small_shapes, big.apply, big_params, ...)."
        )
    return plan.models._replace(big=apply)


def _check_words(method: str, layers: str, loss: Loss | None, models: Models) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}. Expected: one of {', '.join(METHODS)}.")
    if layers not in ("influence", "loss"):
        raise ValueError(f"layers is {layers!r}. Expected: 'influence' or 'loss'.")
    if loss is None and (method == "taylor" or (layers == "loss" and models.depth is not None)):
        what = "method='taylor'" if method == "taylor" else "layers='loss'"
        raise ValueError(
            f"{what} needs a loss. Expected: loss(outputs, *batch), a scalar. Fix: pass loss=."
        )


def _check_finite(scores: Scores) -> None:
    for name, each in scores.items():
        bad = np.flatnonzero(np.isnan(each))
        if len(bad):
            raise ValueError(
                f"scores of {name} are NaN, of unit {bad[0]} first and of {len(bad)} of "
                f"{len(each)}. Expected: numbers. Fix: look for NaN in parameters and batches."
            )
