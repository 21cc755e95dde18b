"""coordinate_check: how large activations are and how far they move, against width."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uscale_jax import _coordinate_modules, _jax, _tree
from uscale_jax._coordinate_modules import ACTIVATIONS, OUTPUT, Module
from uscale_jax._coordinate_report import CoordinateCheck, Row
from uscale_jax._types import Apply, Tree
from uscale_jax.trace.tracing import output_names

Loss: TypeAlias = Callable[..., Any]
Batch: TypeAlias = tuple[Any, ...]
Squares: TypeAlias = "np.ndarray[Any, Any]"
"""Mean squares of one module: (steps + 1, [of its output, of its change], *layers)."""

TOLERANCE = 0.25
"""Measured from widths of 32 or 40 to 8 times that: rules that hold stay below 0.2 (readouts start
with 1/√n, and what that adds to their changes fades), wrong factors show as 0.35 or more."""


class Width(NamedTuple):
    """A model of one width and how it is trained, for :func:`coordinate_check`."""

    apply: Apply
    """``apply(params, *inputs)``; of rules with multipliers, ``rule.apply(apply)``."""
    params: Tree | Callable[[jax.Array], Tree]
    """Initial parameters, such as ``rule.start(params)``, or a function of a key that returns
    them."""
    tx: optax.GradientTransformation
    """The optimizer, such as ``us.scale_optimizer(tx, rule)``."""


def coordinate_check(
    models: Mapping[int, Width | tuple[Any, Any, Any]],
    batches: Sequence[Any],
    loss: Loss,
    *,
    steps: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
    inputs: int = 1,
    tolerance: float = TOLERANCE,
) -> CoordinateCheck:
    r"""Returns how large activations are, and how far a few steps move them, at several widths.

    Under μP training is alike at all widths: what every module adds changes by as much in a step.
    Whether a rule of transfer, an optimizer and a model do so together is seen in a few steps of
    small models.  With :math:`y_t(n)` the output of a module after t steps at width n,

    .. math::
      \mathrm{rms}(y_0) \propto n^{a}, \qquad \mathrm{rms}(y_t - y_0) \propto n^{b}, \qquad
      |b| \le \tau, \quad -\tau \le a \le \tau

    with exponents fitted to logarithms over all widths, b after the last step, and nowhere above
    τ before.  Readouts, attention scores (products that sum over more at larger widths) and
    outputs of the model may start smaller, :math:`a < -\tau`; scores may change by √n less.

    **Modules** are found by tracing, and nothing is hooked or named: products with a parameter
    (matrix products, einsums, convolutions) and lookups in one, products of two activations, and
    the outputs of the model.  Gains, biases and constant factors that follow a product are part
    of it.  Layers of a scan are modules of their own; loops through time count all their turns.
    A module that only products read may be large or small in its own units (queries and keys,
    where a rule has put the 1/√d of their scores in them): it is judged by what reads it.

    **Choosing steps.**  A few steps of Adam show most, at a learning rate that training is stable
    with: what saturates moves no further.  Under SGD, queries and keys of fresh models get
    gradients that are smaller by √n, which passes: some 30 steps see them move.

    Args:
      models: by width :class:`Width`, or tuples ``(apply, params, tx)``; best four widths or
        more, from 32 on.
      batches: inputs, or tuples of inputs, in turns one a step.  What follows the inputs in a tuple
        (labels, say) is for ``loss`` alone.  Measured is on the first one.
      loss: ``loss(outputs, *batch)``, a scalar.
      steps: how many steps to train.
      seeds: of the keys for ``params``, over which squares are averaged, where they are functions.
      inputs: how many entries of a batch are the model's: ``apply(params, *batch[:inputs])``.
      tolerance: τ.

    Returns:
      A :class:`CoordinateCheck`: ``sizes`` and ``changes`` by module, (widths, steps + 1) each;
      ``slopes``, the exponents a and b; ``ok`` and ``failures``; ``raise_if_failed()`` for tests,
      ``print`` for a table, ``plot(path)`` for a picture.

    Raises:
      ValueError: there are fewer than two widths, or no batches, steps or seeds; a model or a batch
        is not as above; the loss is no scalar; the models do not have the same modules; an output
        is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(jnp.tanh(x @ params["in"]) @ params["mid"]) @ params["out"]
      >>> def init(n):
      ...     shapes = {"in": (5, n), "mid": (n, n), "out": (n, 3)}
      ...     keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 3)))
      ...     draw = lambda name, shape: jax.random.normal(keys[name], shape) / shape[0] ** 0.5
      ...     return {name: draw(name, shape) for name, shape in shapes.items()}
      >>> x = jax.random.normal(jax.random.key(1), (7, 5))
      >>> def width(n, name):
      ...     rule = us.transfer(us.plan(apply, init(32), apply, init(n), x), name)
      ...     tx = us.scale_optimizer(optax.adam(1e-3), rule)
      ...     return us.Width(apply, rule.start(init(n)), tx)
      >>> loss = lambda y, x: jnp.mean(jnp.square(y - jnp.sin(x[:, :3])))
      >>> us.coordinate_check({n: width(n, "mup") for n in (32, 128)}, [x], loss).ok
      True
      >>> check = us.coordinate_check({n: width(n, "standard") for n in (32, 128)}, [x], loss)
      >>> check.raise_if_failed()
      Traceback (most recent call last):
      ...
      ValueError: 4 of 4 modules do not train alike at widths 32 to 128.
        'mid' (product at ...): its change after step 1 grows with width, as width^+0...
      ...

    References:
      Yang et al., *Tensor Programs V*, 2022 (arXiv:2203.03466), Appendix D.1, and
      ``mup.coord_check`` of its authors, which plots mean absolute values of the outputs of
      PyTorch modules and leaves it to the reader to judge them.
    """
    given = [tuple(batch) if isinstance(batch, tuple | list) else (batch,) for batch in batches]
    _check_arguments(models, given, steps, seeds, inputs, tolerance)
    runs: list[_Run] = []
    squares: list[list[Squares]] = []
    for width in sorted(models):
        model = _checked_model(width, models[width])
        first = _start(model, seeds[0])
        runs.append(_Run(width, model, first, loss, given, inputs))
        _check_same(runs[0], runs[-1])
        others = (_start(model, seed) for seed in seeds[1:] if _is_drawn(model))
        each = [runs[-1].trained(params, steps) for params in itertools.chain([first], others)]
        squares.append([np.mean(of_module, 0) for of_module in zip(*each, strict=True)])
    return _assembled(runs, squares, tolerance)


def _assembled(
    runs: Sequence[_Run], squares: Sequence[Sequence[Squares]], tolerance: float
) -> CoordinateCheck:
    rows: dict[str, Row] = {}
    sizes, changes = {}, {}
    for i, module in enumerate(runs[0].modules):
        each = np.sqrt(np.stack([of_width[i] for of_width in squares]))
        for layer in np.ndindex(each.shape[3:]):
            name = _of_layer(module.name, layer)
            rows[name] = _row(runs[0].modules, module, runs[-1].modules[i], layer)
            sizes[name], changes[name] = (each[:, :, k, *layer] for k in (0, 1))
    widths = tuple(run.width for run in runs)
    return CoordinateCheck(widths, rows, sizes, changes, tolerance, runs[0].notes)


def _of_layer(name: str, layer: Sequence[int]) -> str:
    return f"{name}[{','.join(map(str, layer))}]" if layer else name


def _row(modules: Sequence[Module], small: Module, big: Module, layer: Sequence[int]) -> Row:
    alone = small.size == big.size or small.kind == ACTIVATIONS
    readers = [modules[i] for i in small.readers]
    alike = all(reader.layers == small.layers for reader in readers)
    return Row(
        kind=small.kind,
        source=small.source,
        rounding=small.rounding,
        fades=alone and (small.sums != big.sums or small.kind == OUTPUT),
        readers=tuple(_of_layer(reader.name, layer) for reader in readers if alike),
    )


# One width


def _is_drawn(model: Width) -> bool:
    # Some models, such as Equinox's, are trees of parameters that can be called as well.
    return callable(model.params) and jax.tree_util.all_leaves([model.params])


def _start(model: Width, seed: int) -> Tree:
    return model.params(jax.random.key(seed)) if _is_drawn(model) else model.params


class _Run:
    """A model of one width: what is measured of it, and how it trains."""

    def __init__(
        self,
        width: int,
        model: Width,
        params: Tree,
        loss: Loss,
        batches: Sequence[Batch],
        inputs: int,
    ) -> None:
        self.width, self.model, self.batches = width, model, batches
        self.given = batches[0][:inputs]
        with _noted(width, inputs):
            closed, outputs = _jax.closed_jaxpr(model.apply, params, *self.given)
        _check_loss(loss, outputs, batches[0])
        keys = _tree.flatten_named(params)[0]
        self.modules, self.notes = _coordinate_modules.find(closed, keys, output_names(outputs))
        self._take = jax.jit(_coordinate_modules.taking(closed, self.modules))
        self._compare = jax.jit(_coordinate_modules.comparing(self.modules))
        self._step = jax.jit(_stepping(model, loss, inputs))

    def trained(self, params: Tree, steps: int) -> list[Squares]:
        """Return the mean squares of every module, from these parameters on."""
        state, first = self.model.tx.init(params), self._take(params, self.given)
        found = [self._compared(first, first, 0)]
        for i in range(steps):
            params, state = self._step(params, state, self.batches[i % len(self.batches)])
            found.append(self._compared(self._take(params, self.given), first, i + 1))
        return [np.stack(of_module) for of_module in zip(*found, strict=True)]

    def _compared(self, now: Any, first: Any, step: int) -> list[Squares]:
        found = [np.asarray(x, np.float64) for x in jax.device_get(self._compare(now, first))]
        for module, each in zip(self.modules, found, strict=True):
            if not np.isfinite(each).all():
                raise ValueError(
                    f"{module} is not finite at width {self.width} after step {step}. Expected: "
                    f"finite outputs at every width. Fix: {_OF_START if step == 0 else _OF_STEPS}."
                )
        return found


_OF_START = "look for NaN and overflow in initial parameters and in the first batch"
_OF_STEPS = "lower the learning rate for all widths; if this one alone diverges, the rule is wrong"


def _stepping(model: Width, loss: Loss, inputs: int) -> Callable[..., Any]:
    def step(params: Tree, state: Any, batch: Batch) -> tuple[Tree, Any]:
        cost = lambda p: loss(model.apply(p, *batch[:inputs]), *batch)  # noqa: E731
        slopes = jax.tree.map(_slope, jax.grad(cost, allow_int=True)(params), params)
        updates, state = model.tx.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _slope(gradient: Any, leaf: Any) -> Any:
    """A gradient as an array: integers have none."""
    return jnp.zeros_like(leaf) if gradient.dtype == jax.dtypes.float0 else gradient


# What is refused


@contextlib.contextmanager
def _noted(width: int, inputs: int) -> Iterator[None]:
    """Says in errors of the user's model how it was called."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"coordinate_check calls apply(params, *batch[:{inputs}]) of width {width}. Fix: say "
            "with inputs= how many entries of a batch are for apply, the others are for loss."
        )
        raise


def _check_arguments(
    models: Mapping[int, Any],
    batches: Sequence[Batch],
    steps: int,
    seeds: Sequence[int],
    inputs: int,
    tolerance: float,
) -> None:
    whole = all(isinstance(width, int | np.integer) and width > 0 for width in models)
    if len(models) < 2 or not whole:
        raise ValueError(
            f"models are of widths {[*models]}. Expected: models by width, of two widths or more, "
            "which are positive integers. Fix: {32: us.Width(apply, params, tx), 64: ...}."
        )
    if not batches or min(map(len, batches)) < max(inputs, 1):
        raise ValueError(
            f"there are {len(batches)} batches, of {[*map(len, batches)][:8]} entries, and apply "
            f"takes {inputs}. Expected: batches of inputs, and what the loss takes besides. Fix: "
            "coordinate_check(models, [(x, y), ...], loss)."
        )
    if steps < 1 or not len(seeds) or inputs < 1 or not tolerance > 0:
        raise ValueError(
            f"{steps=}, {seeds=}, {inputs=}, {tolerance=}. Expected: one or more of each, and a "
            "positive tolerance. Fix: leave them at their defaults."
        )


def _checked_model(width: int, model: Any) -> Width:
    parts = tuple(model) if isinstance(model, tuple) else ()
    if len(parts) != 3 or not callable(parts[0]) or not hasattr(parts[2], "update"):
        raise ValueError(
            f"the model of width {width} is {model!r:.80}. Expected: us.Width(apply, params, tx), "
            "a function, its parameters (or a function of a key) and an optax optimizer. Fix: name "
            "them in this order."
        )
    return Width(*parts)


def _check_loss(loss: Loss, outputs: Tree, batch: Batch) -> None:
    if not callable(loss):
        raise ValueError(
            f"loss is {loss!r:.80}. Expected: a function of outputs and a batch that returns a "
            "scalar. Fix: loss=lambda outputs, x, y: ..."
        )
    found = jax.eval_shape(loss, outputs, *batch)
    if getattr(found, "shape", None) != () or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"loss(outputs, *batch) is {_tree.describe(found)}. Expected: a floating scalar. Fix: "
            "take the mean."
        )


def _check_same(first: _Run, other: _Run) -> None:
    lines = [
        f"  {module} of width {run.width} only"
        for run, against in ((first, other), (other, first))
        for module in run.modules
        if module.role not in {each.role for each in against.modules}
    ]
    if not lines:
        return
    head = f"the models of widths {first.width} and {other.width} do not have the same modules."
    advice = (
        "Expected: one model at several sizes. Fix: build all from one definition, with as many "
        "layers; heads that grow in number must be a dimension of arrays."
    )
    raise ValueError("\n".join([head, *lines[:8], advice]))
