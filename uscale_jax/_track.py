"""track_scales: how large every value and gradient of a model is, and what a format makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from uscale_jax import _jax, _track_numbers, _track_rows
from uscale_jax._track_report import Scales
from uscale_jax._track_rows import INPUTS, TrackedValue
from uscale_jax._types import Apply
from uscale_jax.numerics import _formats
from uscale_jax.numerics._formats import Format, FormatLike
from uscale_jax.trace import rebuilt
from uscale_jax.trace.woven import Out, Woven

Slots: TypeAlias = dict[int, jax.Array]


def track_scales(
    apply: Apply,
    fmt: FormatLike = "float8_e4m3fn",
    *,
    backward: FormatLike | None = None,
    where: Callable[[TrackedValue], bool] | None = None,
) -> Tracked:
    r"""Returns ``apply`` as a function that also says how large all its tensors are.

    Of every parameter, input and intermediate value x, and of its gradient
    :math:`\partial L / \partial x`:

    .. math::

       \mathrm{rms}(x) = \sqrt{\textstyle\frac1n \sum_i x_i^2}, \qquad \max_i |x_i|, \qquad
       \frac{\#\{i : x_i \ne 0,\; Q(x_i) = 0\}}{\#\{i : x_i \ne 0\}}, \qquad
       \frac{\#\{i : |x_i| > \max Q\}}{n}

    with Q the rounding to a format.  All of it is taken in the pass that computes ``apply`` (and
    its gradient) anyway, by sums over tensors that are there; nothing is computed twice, and what
    comes out is a few numbers a tensor, in float32.

    **What is tracked** are the results of all operations that do more than lay out (reshape,
    transpose, cast, slice) what they are given, by the name of the module they are in
    (:class:`TrackedValue`), in calls, branches, ``jax.checkpoint``, ``shard_map`` and loops;
    turns of a ``scan`` are kept apart, those of a ``while`` loop, which has no gradients, are not.
    **Not looked into** are functions with rules of their own (``custom_vjp``, ``custom_jvp``,
    ``custom_vmap``), linear solvers and kernels: those run as they are, so gradients are those of
    the untracked function, and their results are tracked.

    Args:
      apply: a pure function; the leaves of its first argument are called parameters.  For gradients
        a loss, ``loss(params, batch)``.
      fmt: the format that values are held against, a name (``"float8_e4m3fn"``), a dtype or a
        :class:`~uscale_jax.numerics.Format`.
      backward: that of gradients: by default ``"float8_e5m2"`` for formats of 8 bits, else ``fmt``.
      where: which :class:`TrackedValue` to track, of all by default:
        ``where=lambda value: value.kind == "product"``.

    Returns:
      A :class:`Tracked`, to call in three ways, under ``jax.jit`` or not:
      ``tracked(*args)`` gives ``(outputs, scales)``;
      ``tracked.value_and_grad(argnums=0, has_aux=False)(*args)`` gives ``(value, grads, scales)``
      with gradients in ``scales`` too;
      ``jax.value_and_grad(tracked, has_aux=True)`` works, with values alone.
      ``scales`` is a :class:`Scales`: a table (``print``), a picture (``plot``), numbers by name.

    Raises:
      ValueError: a format is not known.
      TypeError: from JAX, in ``value_and_grad``, if ``apply`` does not return a scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def loss(params, x):
      ...     h = jax.nn.relu(x @ params["up"]) @ params["down"]
      ...     return jnp.mean(jnp.square(h))
      >>> x, up, down = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(3))
      >>> params = {"up": up / 8, "down": down / 1000}  # 64 ** -0.5, and too small
      >>> tracked = us.track_scales(loss)
      >>> value, grads, scales = jax.jit(tracked.value_and_grad())(params, x)
      >>> print(scales)
      float8_e4m3fn for values, float8_e5m2 for gradients
      <BLANKLINE>
      name              at    ...
      >>> sizes = scales.values["down"], scales.gradients["up"]
      >>> print("of down {:.0%} underflow, of the gradient of up {:.0%}".format(
      ...     *(each.underflow for each in sizes)))
      of down 67% underflow, of the gradient of up 100%

    References:
      Blake et al., *u-μP*, 2024 (arXiv:2407.17465), which shows such scales to tell which tensors
      fit a format; Blue, *A portable Fortran program to find the Euclidean norm of a vector*, 1978,
      for sums of squares that do not overflow.
    """
    forward, behind = _formats.both_ways(fmt, backward)
    return Tracked(apply, forward, behind, where)


@dataclass(frozen=True, eq=False)
class Tracked:
    """What :func:`track_scales` returns: a function of the arguments of ``apply``."""

    apply: Apply
    forward: Format
    """What values are held against."""
    backward: Format
    """What gradients are."""
    where: Callable[[TrackedValue], bool] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Scales]:
        """Return what ``apply`` returns, and the scales of its values."""
        program = _Program(self, args, kwargs, frozenset())
        outputs, kept = program.run(program.arrays, {})
        return outputs, self._scales(program, kept, {})

    def value_and_grad(
        self, argnums: int | Sequence[int] = 0, has_aux: bool = False
    ) -> Callable[..., tuple[Any, Any, Scales]]:
        """Return a function that returns value, gradients and the scales of both.

        Arguments are those of ``jax.value_and_grad``, and so are values: ``(value, aux)`` with
        ``has_aux``.
        """

        def run(*args: Any, **kwargs: Any) -> tuple[Any, Any, Scales]:
            over = [argnums] if isinstance(argnums, int) else [*argnums]
            program = _Program(self, args, kwargs, {i % len(args) for i in over})

            def apply(slots: Slots, *args: Any) -> tuple[Any, Any]:
                arrays, _ = rebuilt.by_arrays(self.apply, args, kwargs)
                outputs, kept = program.run(arrays, slots)
                value, aux = outputs if has_aux else (outputs, None)
                return value, (aux, kept)

            both = jax.value_and_grad(apply, (0, *(_behind(i) for i in over)), has_aux=True)
            (value, (aux, kept)), (back, *grads) = both(program.slots(), *args)
            scales = self._scales(program, kept, back)
            found = grads[0] if isinstance(argnums, int) else (*grads,)
            return (value, aux) if has_aux else value, found, scales

        return run

    def _scales(self, program: _Program, kept: Out, back: Mapping[int, Any]) -> Scales:
        rows = program.found.rows
        of = lambda found, row: found[row.visit][..., row.place, :]  # noqa: E731
        values = [of(kept, row) for row in rows]
        gradients = [
            of(back, row) if row.visit in back and program.has_gradient(row) else None
            for row in rows
        ]
        return Scales((*values,), (*gradients,), rows, self.forward, self.backward)


def everything(
    apply: Apply, args: tuple[Any, ...], objective: Callable[[Any], Any] | None = None
) -> Scales:
    """Returns the scales of all values of a call, and of all gradients, those of inputs too.

    ``objective`` is what is differentiated; else it is a scalar output, or, of any others, their
    sum with standard normal weights.
    """
    tracked = track_scales(apply)

    program = _Program(tracked, args, {}, frozenset(range(len(args))))

    def run(arrays: Sequence[Any]) -> Scales:
        def value(slots: Slots) -> tuple[Any, Out]:
            outputs, kept = program.run(arrays, slots)
            return (objective or _standard_objective)(outputs), kept

        back, kept = jax.grad(value, has_aux=True)(program.slots())
        return tracked._scales(program, kept, back)

    return jax.jit(run)(program.arrays)


def _standard_objective(outputs: Any) -> Any:
    real = [x for x in jax.tree.leaves(outputs) if _track_rows.is_measured(jax.typeof(x))]
    if len(real) == 1 and real[0].shape == ():
        return real[0]
    keys = jax.random.split(jax.random.key(0), max(len(real), 1))
    terms = [
        jnp.vdot(jax.random.normal(k, x.shape, x.dtype), x).real
        for k, x in zip(keys, real, strict=True)
    ]
    return sum((term.astype(jnp.float32) for term in terms), jnp.float32(0))


def _behind(argnum: int) -> int:
    """The place of an argument behind one more; negative ones count from the end."""
    return argnum + 1 if argnum >= 0 else argnum


class _Program:
    """A call of ``apply``: its program, and what of it is tracked."""

    def __init__(
        self, tracked: Tracked, args: tuple[Any, ...], kwargs: dict[str, Any], over: Set[int]
    ) -> None:
        """Trace ``apply``; ``over`` are the arguments that gradients are taken of."""
        self.tracked = tracked
        self.arrays, call = rebuilt.by_arrays(tracked.apply, args, kwargs)
        self.closed, outputs = _jax.closed_jaxpr(call, self.arrays)
        self.structure = jax.tree.structure(outputs)
        names = _track_rows.input_names(tracked.apply, args, kwargs)
        self.found = _track_rows.find(self.closed, names, tracked.where)
        self.places: dict[int, list[int]] = {}
        for row in self.found.rows:
            self.places.setdefault(row.visit, []).append(row.place)
        # Of an input that nobody takes the gradient of, it would have to be computed for us.
        self.passive = {i for i, name in enumerate(names) if name.argument not in over}
        visits = [visit for visit in self.places if visit != INPUTS]
        self.woven = Woven(visits, self._at, _track_numbers.merged)

    def slots(self) -> Slots:
        """Return what goes in so that its gradients are the scales of gradients."""
        turns = {v: spot.turns for v, spot in self.found.spots.items() if not spot.whiles}
        turns |= {INPUTS: ()} if INPUTS in self.places else {}
        return {v: self._empty(v, lead) for v, lead in turns.items()}

    def has_gradient(self, row: TrackedValue) -> bool:
        """Return whether gradients of a value are computed."""
        return not self._is_passive(row.visit, row.place)

    def _is_passive(self, visit: int, place: int) -> bool:
        return visit == INPUTS and place in self.passive

    def _empty(self, visit: int, lead: tuple[int, ...] = ()) -> jax.Array:
        return jnp.zeros((*lead, max(self.places[visit]) + 1, _track_numbers.FIELDS))

    def run(self, arrays: Sequence[Any], slots: Slots) -> tuple[Any, Out]:
        """Return outputs and what is kept."""
        kept: Out = {}
        if INPUTS in self.places:
            arrays, kept[INPUTS] = self._at(INPUTS, arrays, slots.get(INPUTS))
        flat, out = self.woven.closed(self.closed, arrays, slots)
        return jax.tree.unflatten(self.structure, flat), {**kept, **out}

    def _at(
        self, visit: int, values: Sequence[Any], slot: jax.Array | None
    ) -> tuple[list[Any], jax.Array]:
        outs = [*values]
        kept = [*self._empty(visit)]
        for i in self.places[visit]:
            kept[i] = _track_numbers.measured(jax.lax.stop_gradient(outs[i]), self.tracked.forward)
            if slot is not None and not self._is_passive(visit, i):
                outs[i] = _track_numbers.tapped(outs[i], slot[i], self.tracked.backward)
        return outs, jnp.stack(kept)
