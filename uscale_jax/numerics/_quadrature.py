"""Expectations over normal numbers, in float64 NumPy: what the factors are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _jax

_Array: TypeAlias = np.ndarray[Any, Any]

_REACH = 12.0
"""In standard deviations; what lies beyond weighs 1e-32."""
_PANELS, _ORDER = 256, 16
"""Panels a standard deviation, and nodes a panel.

A polynomial rule over the whole line (Gauss-Hermite) sees a kink only as well as its nodes are
dense: ReLU's derivative with an error of 1e-2 at 64 of them.  On panels, kinks at multiples of
1/256 cost nothing, and those elsewhere less than 1e-4.
"""
_STEP = 0.25
"""Of the trapezoidal rule, on integrands as smooth as exp(x − exp(x)): an error of exp(−4π²)."""
_HARD = 40.0
"""Logits of a larger standard deviation: what is left between classes falls as its inverse."""
_HEADS, _COUNTS = 32, 48
"""Causal rows taken one by one, and how many of the rest."""


class Moments(NamedTuple):
    """Of y = f(x) and its derivative, over x ~ N(0, 1)."""

    variance: float
    square: float
    """⟨y²⟩."""
    slope: float
    """⟨f'(x)²⟩."""


class SoftmaxMoments(NamedTuple):
    """Of p = softmax of normal logits; times the number of logits, so that flat ones give 1."""

    square: float
    """n·⟨Σp²⟩."""
    spread: float
    """n·⟨Σ p²(1 − 2p + Σp²)⟩, of Σ p(u − Σpu) for u of variance 1: what a gradient sums up."""


@cache
def _nodes() -> tuple[_Array, _Array]:
    """Nodes and weights of the standard normal distribution."""
    t, w = np.polynomial.legendre.leggauss(_ORDER)
    left = np.arange(-_REACH, _REACH, 1 / _PANELS)[:, None]
    x = (left + (t + 1) / (2 * _PANELS)).ravel()
    return x, np.tile(w, len(left)) / (2 * _PANELS) * _density(x)


def _density(x: _Array) -> _Array:
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


@lru_cache(maxsize=512)
def function_moments(f: Callable[..., Any], mult: float) -> Moments:
    """Returns the moments of f(mult·x), its slope with respect to f's own argument."""
    x, weights = _nodes()
    values, slopes = _evaluated(f, mult * x)
    mean, square, slope = weights @ values, weights @ values**2, weights @ slopes**2
    variance = square - mean**2
    # Where f is constant, rounding is what is left of the variance.
    if not (variance > 1e-12 * square and slope > 0):
        raise ValueError(
            f"{f} has no scale: over normal numbers times {mult:g} its variance is "
            f"{variance:.3g}, its mean squared derivative {slope:.3g}. Expected: both positive. "
            "Fix: pass a function by element that is not constant; for steps, one that defines a "
            "gradient (jax.custom_jvp)."
        )
    return Moments(float(variance), float(square), float(slope))


def _evaluated(f: Callable[..., Any], x: _Array) -> tuple[_Array, _Array]:
    """The function and its derivative; in the middle of a trace too."""
    with _jax.concretely():
        found = jax.jit(jax.vmap(jax.value_and_grad(f)))(jnp.asarray(x))
    values, slopes = (np.asarray(y, np.float64) for y in found)
    finite = np.isfinite(values) & np.isfinite(slopes)
    if not finite.all():
        raise ValueError(
            f"{f} or its derivative is not finite at {x[np.argmin(finite)]:.3g}. Expected: a "
            "function of all real numbers (12 standard deviations of its argument are looked at). "
            "Fix: clip its argument."
        )
    return values, slopes


@lru_cache(maxsize=4096)
def softmax_moments(n: int, std: float) -> SoftmaxMoments:
    r"""Returns the moments of softmax over n independent logits of standard deviation ``std``.

    With z = exp(logit) and S = Σz, 1/Sᵏ is an integral over exponentials, under which the logits
    are independent:

    .. math:: \langle {\textstyle\sum} p^k \rangle = \int_0^\infty \frac{t^{k-1}}{(k-1)!}\,
              n A_k(t) A_0(t)^{n-1}\, dt, \qquad A_k(t) = \langle z^k e^{-tz} \rangle

    and likewise for products of two.  So every n and ``std`` is exact, where the usual limits
    (exp(std²)/n, and 1) hold for flat predictions of many classes, or for hard ones.
    """
    if std > _HARD:
        square, spread = softmax_moments(n, _HARD)
        return SoftmaxMoments(n - (n - square) * _HARD / std, spread * _HARD / std)
    x = _grid(-_REACH, _REACH, min(_STEP, _STEP / std))
    weights = _density(x) * (x[1] - x[0])
    weights /= weights.sum()
    # log t: beyond both ends exp(−tS) is 1 or 0, whatever the logits.
    u = _grid(-_REACH * std - math.log(n) - 15, _REACH * std + 4, _STEP)
    log_tz = u[:, None] + std * x
    tz = np.exp(np.minimum(log_tz, 700))
    power = [np.exp(k * log_tz - tz) @ weights for k in range(5)]  # tᵏ A_k
    # log A_0, for A_0 near 1 too; what is below 1e-16 would be 0.
    log_rest = np.log1p(np.maximum(np.expm1(-tz) @ weights, -1 + 1e-16))
    one, two = (np.exp(max(n - held, 0) * log_rest) * _STEP for held in (1, 2))
    square, cube, fourth = (n * (power[k] @ one) / math.factorial(k - 1) for k in (2, 3, 4))
    pairs = n * (n - 1) * (power[2] ** 2 @ two) / 6
    return SoftmaxMoments(float(n * square), float(n * (square - 2 * cube + fourth + pairs)))


def _grid(start: float, stop: float, step: float) -> _Array:
    return start + step * np.arange(math.ceil((stop - start) / step) + 1)


@lru_cache(maxsize=512)
def attention_moments(queries: int, keys: int, std: float, causal: bool) -> SoftmaxMoments:
    """Returns the mean over queries, times the number of keys, of which causal ones see a part.

    Query i sees keys 0 to i; what softmax gives varies slowly with their number, and is
    interpolated between 80 of them.
    """
    if not causal:
        return softmax_moments(keys, std)
    seen = np.minimum(np.arange(queries) + 1, keys)
    top = int(seen[-1])
    some = np.geomspace(_HEADS, max(top, _HEADS), _COUNTS).astype(int)
    counts = np.unique(np.minimum(np.concatenate([np.arange(_HEADS) + 1, some]), top))
    known = np.array([softmax_moments(int(n), std) for n in counts])
    square, spread = (
        float(np.mean(np.interp(np.log(seen), np.log(counts), column) / seen)) * keys
        for column in known.T
    )
    return SoftmaxMoments(square, spread)
