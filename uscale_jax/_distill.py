"""distillation_loss: what a shrunk model is trained on, with the big model as its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from uscale_jax import _factors, _jax, _tree
from uscale_jax._types import Factor, Tree


def distillation_loss(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: Factor = 1.0,
    where: ArrayLike | None = None,
    hidden: Tree = (),
    teacher_hidden: Tree = (),
    hidden_weight: Factor = 1.0,
    labels: ArrayLike | None = None,
    label_weight: Factor = 0.0,
    axis: int = -1,
) -> jax.Array:
    r"""Returns how far a model (the student) is from another (the teacher), as a loss to train on.

    .. math::

       L = (1 - \lambda)\, T^2 \,\Big\langle \sum_c p_c \log\frac{p_c}{q_c} \Big\rangle
           + \lambda \,\big\langle -\log \operatorname{softmax}(z)_y \big\rangle
           + \mu \,\frac{1}{n} \sum_{i=1}^n
             \frac{\langle (h_i - h_i^*)^2 \rangle}{\langle (h_i^*)^2 \rangle}, \qquad
       q = \operatorname{softmax}(z / T), \quad p = \operatorname{softmax}(z^* / T)

    with logits z and hidden states h of the student, those with a star of the teacher, and
    ⟨·⟩ the mean over the positions where ``where`` is true.  T² keeps gradients of one size for
    every temperature.  No gradient reaches the teacher.

    Classes that are −inf in both are left out, of the gradient too; one that only the student rules
    out makes the loss infinite.  Positions at which the teacher's logits are all −inf hold no
    target and do not count in the first term.  What stands where ``where`` is false, NaN too, has
    no influence.

    Args:
      logits: the student's, floating, of shape (..., classes): the dimensions but for ``axis`` are
        the positions.
      teacher_logits: the teacher's, of the same shape.
      temperature: T, positive; it may be traced.
      where: booleans that broadcast to the positions; None for all.  Where all are false,
        the mean is 0.
      hidden: hidden states of the student: an array, a sequence of them or any pytree.
      teacher_hidden: those of the teacher, under the same names and of the same shapes; of a wider
        teacher, the units that stayed: ``jnp.take(states, jnp.asarray(kept), axis=-1)``.  States
        whose leading dimensions are the positions are averaged where ``where`` is true, others
        as a whole; of states that are 0 throughout, the difference is not divided.
      hidden_weight: μ, at least 0.
      labels: integer classes in the shape of the positions.  One that is no class makes their term
        NaN: let ``where`` leave out padding.
      label_weight: λ, from 0 to 1; needs ``labels``.
      axis: the dimension of classes.

    Returns:
      L, a scalar: in float64 where a term is so, else in float32, whatever narrower dtypes come in.

    Raises:
      ValueError: shapes do not fit (of logits, ``where``, ``labels`` or hidden states), hidden
        states are not those of the teacher by name or number, ``temperature`` or a weight is out
        of its range (traced ones are not looked at), there is a ``label_weight`` without
        ``labels``.
      TypeError: logits or hidden states are not floating, ``labels`` not integers, ``where`` not
        booleans.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> logits = jnp.array([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]])
      >>> teacher_logits = jnp.array([[2.5, 0.0, -1.0], [0.0, 1.0, 3.0]])
      >>> print(f"{us.distillation_loss(logits, teacher_logits, temperature=2.0):.4f}")
      0.0430
      >>> float(us.distillation_loss(teacher_logits, teacher_logits))
      0.0

      To train, with the hidden units of the teacher that the student has kept:

      >>> def apply(params, x):
      ...     h = jnp.tanh(x @ params["up"])
      ...     return h @ params["down"], h
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> x, kept = normal(0, 2, 5), jnp.array([0, 2, 3])
      >>> big = {"up": normal(1, 5, 7), "down": normal(2, 7, 3)}
      >>> small = {"up": big["up"][:, kept], "down": big["down"][kept]}
      >>> def loss(params):
      ...     (logits, h), (targets, states) = apply(params, x), apply(big, x)
      ...     return us.distillation_loss(
      ...         logits, targets, hidden=h, teacher_hidden=jnp.take(states, kept, axis=-1)
      ...     )
      >>> gradient = jax.grad(loss)(small)

    References:
      Hinton, Vinyals & Dean, *Distilling the knowledge in a neural network*, 2015
      (arXiv:1503.02531), Section 2: Eq. 2 to 4 say why T² is there; logits alone as targets after
      pruning, and hidden states with them: Muralidharan et al., *Compact language models via
      pruning and knowledge distillation*, 2024 (arXiv:2407.14679).
    """
    student, teacher, axis = _checked_logits(logits, teacher_logits, axis)
    positions = student.shape[:axis] + student.shape[axis + 1 :]
    keep = _checked_where(where, positions)
    named = _checked_labels(labels, positions, label_weight)
    pairs = _checked_hidden(hidden, teacher_hidden)
    warmth = _checked_number(temperature, "temperature", lambda t: 0 < t < np.inf, "0 < T < inf")
    mix = _checked_number(label_weight, "label_weight", lambda w: 0 <= w <= 1, "0 to 1")
    weight = _checked_number(hidden_weight, "hidden_weight", lambda w: 0 <= w < np.inf, "0 or more")
    terms: list[tuple[Any, Callable[[], jax.Array]]] = [
        (1 - mix, partial(_divergence, student, teacher, keep, axis, warmth))
    ]
    if named is not None:
        terms.append((mix, partial(_cross_entropy, student, named, keep, axis)))
    if pairs:
        terms.append((weight, partial(_hidden_error, pairs, keep)))
    return _weighted_sum(terms)


def _weighted_sum(terms: Sequence[tuple[Any, Callable[[], jax.Array]]]) -> jax.Array:
    # What has no weight is not computed: 0 times an infinite term would be NaN.
    found = [(w, term()) for w, term in terms if _jax.is_traced(w) or w != 0]
    dtype = _widest(*(term for _, term in found))
    weighted = [jnp.asarray(w).astype(dtype) * term.astype(dtype) for w, term in found]
    return sum(weighted[1:], weighted[0])


def _divergence(
    student: jax.Array, teacher: jax.Array, keep: jax.Array, axis: int, temperature: Factor
) -> jax.Array:
    """T² times the mean divergence of the student from the teacher."""
    warmth = jnp.asarray(temperature).astype(student.dtype)
    keep = keep & jnp.any(teacher != -jnp.inf, axis)
    every = jnp.expand_dims(keep, axis)
    q, p = (_log_softmax(_blanked(x, every), axis, warmth) for x in (student, teacher))
    return jnp.square(warmth) * _mean(jnp.sum(_relative_entropy(q, p), axis), keep)


def _log_softmax(logits: jax.Array, axis: int, temperature: jax.Array) -> jax.Array:
    # −inf / T would make the gradient with respect to T NaN.
    ruled_in = logits != -jnp.inf
    return jax.nn.log_softmax(_blanked(logits, ruled_in) / temperature, axis, where=ruled_in)


def _relative_entropy(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """Terms p·log(p/q) − p + q of the divergence, from logarithms.

    −p and q sum to nothing, and make every term at least 0.  In p·log(p/q) alone terms of the
    first order in log(q/p) cancel between classes: in float32, at T = 20 and students near their
    teacher, the sum (as in ``optax.losses.kl_divergence_with_log_targets``) is all rounding and
    often negative.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    possible = p != 0  # elsewhere the logarithms may both be −inf
    d = _blanked(log_q, possible) - _blanked(log_p, possible)
    near = possible & (jnp.abs(d) < 1)
    # expm1 of a large d, over a p that is not flushed to 0, would overflow.
    return jnp.where(near, p * (jnp.expm1(_blanked(d, near)) - d), q - p - p * d)


def _cross_entropy(student: jax.Array, labels: jax.Array, keep: jax.Array, axis: int) -> jax.Array:
    """The mean cross entropy of hard labels, at temperature 1."""
    exists = (labels >= 0) & (labels < student.shape[axis])  # a −1 would count from the end
    each = optax.losses.softmax_cross_entropy_with_integer_labels(
        _blanked(student, jnp.expand_dims(keep, axis)), _blanked(labels, exists), axis=axis
    )
    return _mean(jnp.where(exists, each, jnp.nan), keep)


def _hidden_error(pairs: Sequence[tuple[jax.Array, jax.Array]], keep: jax.Array) -> jax.Array:
    errors = [_relative_error(state, target, keep) for state, target in pairs]
    dtype = _widest(*errors)
    return jnp.mean(jnp.stack([error.astype(dtype) for error in errors]))


def _relative_error(state: jax.Array, target: jax.Array, keep: jax.Array) -> jax.Array:
    """The mean squared difference over the mean square of the target."""
    if state.shape[: keep.ndim] != keep.shape:
        keep = jnp.asarray(True)
    inner = tuple(range(keep.ndim, state.ndim))
    every = jnp.expand_dims(keep, inner)
    state, target = _blanked(state, every), _blanked(target, every)
    error, size = (
        _mean(jnp.mean(jnp.square(x), axis=inner), keep) for x in (state - target, target)
    )
    return error / jnp.where(size == 0, 1, size)


def _blanked(x: jax.Array, keep: jax.Array) -> jax.Array:
    """``x`` with 0 where it is not kept, before it is used: NaN times 0 is NaN in gradients."""
    return jnp.where(keep, x, jnp.zeros((), x.dtype))


def _mean(x: jax.Array, keep: jax.Array) -> jax.Array:
    """The mean over what is kept; 0 of nothing."""
    count = jnp.maximum(jnp.sum(keep), 1)
    return jnp.sum(_blanked(x, keep)) / count.astype(x.dtype)


def _widest(*arrays: jax.Array) -> Any:
    """The dtype to compute in: the widest, at least float32."""
    return max((_factors.compute_dtype(x.dtype) for x in arrays), key=lambda d: d.itemsize)


def _checked_logits(
    logits: ArrayLike, teacher_logits: ArrayLike, axis: int
) -> tuple[jax.Array, jax.Array, int]:
    """Both in the dtype to compute in, the teacher's as constants, and which dimension is meant."""
    student, teacher = _floating(logits, "logits"), _floating(teacher_logits, "teacher_logits")
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits have shape {student.shape}, teacher_logits {teacher.shape}. Expected: equal "
            "shapes, the same positions and the same classes. Fix: run both models on the same "
            "inputs; if one pads its vocabulary, slice the padding off."
        )
    if not -student.ndim <= axis < student.ndim:
        raise ValueError(
            f"axis={axis} is no dimension of logits of shape {student.shape}. Fix: pass the "
            "dimension of classes, -1 for the last."
        )
    dtype = _widest(student, teacher)
    constant = jax.lax.stop_gradient(teacher)
    return student.astype(dtype), constant.astype(dtype), axis % student.ndim


def _floating(x: Any, what: str) -> jax.Array:
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{what} must be floating, got {_tree.describe(x)}. Fix: cast it to float.")
    return array


def _checked_where(where: ArrayLike | None, positions: tuple[int, ...]) -> jax.Array:
    """Booleans in the shape of the positions."""
    if where is None:
        return jnp.ones(positions, bool)
    mask = jnp.asarray(where)
    if mask.dtype != bool:
        raise TypeError(
            f"where must be booleans, got {_tree.describe(where)}. Fix: pass where=mask > 0."
        )
    fits = mask.ndim <= len(positions) and all(
        size in (1, wanted) for size, wanted in zip(mask.shape[::-1], positions[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"where has shape {mask.shape}. Expected: what broadcasts to the positions, the shape "
            f"{positions} of logits without the dimension of classes. Fix: index or reshape it."
        )
    return jnp.broadcast_to(mask, positions)


def _checked_labels(
    labels: ArrayLike | None, positions: tuple[int, ...], weight: Factor
) -> jax.Array | None:
    if labels is None:
        if _jax.is_traced(weight) or weight != 0:
            raise ValueError(
                f"label_weight={weight!r} needs labels. Fix: pass labels= as integer classes, or "
                "leave label_weight at 0."
            )
        return None
    classes = jnp.asarray(labels)
    if not jnp.issubdtype(classes.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {_tree.describe(labels)}.")
    if classes.shape != positions:
        raise ValueError(
            f"labels have shape {classes.shape}. Expected: {positions}, that of logits without the "
            "dimension of classes. Fix: pass one integer a position, not one-hot vectors."
        )
    return classes.astype(jnp.int32)


def _checked_number(
    value: Factor, what: str, valid: Callable[[float], bool], range_words: str
) -> Any:
    """A float, or the traced value."""
    if np.shape(value) != ():
        raise ValueError(f"{what} must be a scalar, got shape {np.shape(value)}.")
    if _jax.is_traced(value):
        return value
    number = float(value)
    if not valid(number):
        raise ValueError(f"{what} must be in the range {range_words}, got {number}.")
    return number


def _checked_hidden(hidden: Tree, teacher_hidden: Tree) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs of states in the dtype to compute in, the teacher's as constants."""
    keys, states, _ = _tree.flatten_named(hidden)
    teacher_keys, targets, _ = _tree.flatten_named(teacher_hidden)
    if set(keys) != set(teacher_keys):
        names, others = (", ".join(map(_tree.name, k[:8])) for k in (keys, teacher_keys))
        raise ValueError(
            f"hidden holds {len(keys)} states ({names or 'none'}), teacher_hidden "
            f"{len(teacher_keys)} ({others or 'none'}). Expected: a state of the teacher for every "
            "one of the student, under the same name or at the same place. Fix: pass two "
            "sequences of equal length; where layers were dropped, those of the teacher's that "
            "stayed."
        )
    teachers = dict(zip(teacher_keys, targets, strict=True))
    return [
        _checked_pair(_tree.name(key), state, teachers[key])
        for key, state in zip(keys, states, strict=True)
    ]


def _checked_pair(name: str, state: Any, target: Any) -> tuple[jax.Array, jax.Array]:
    student = _floating(state, f"hidden state {name!r}")
    teacher = _floating(target, f"teacher_hidden state {name!r}")
    if student.shape != teacher.shape:
        raise _misfit(name, student.shape, teacher.shape)
    dtype = _widest(student, teacher)
    return student.astype(dtype), jax.lax.stop_gradient(teacher).astype(dtype)


def _misfit(name: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> ValueError:
    advice = "run both models on the same inputs and take the same states."
    if len(student) == len(teacher):
        sizes = enumerate(zip(student, teacher, strict=True))
        apart = [dim for dim, (small, big) in sizes if small != big]
        if len(apart) == 1 and student[apart[0]] < teacher[apart[0]]:
            advice = (
                f"take the {student[apart[0]]} units of the teacher that the student has kept, "
                f"jnp.take(state, jnp.asarray(kept), axis={apart[0]}); a plan of chosen units "
                "says which under plan.kept."
            )
    return ValueError(
        f"hidden state {name!r} has shape {student}, that of the teacher {teacher}. Expected: "
        f"equal shapes. Fix: {advice}"
    )
