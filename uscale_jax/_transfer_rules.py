"""The rules of hyper-parameter transfer: arithmetic on what is known of one leaf, and no more.

A leaf is read by the model as A·W, starts B times as large as the base model's did, and learns C
times as fast under Adam.  Training is the same under A/θ, B·θ, C·θ, ε/θ, λ/θ for any θ (*Tensor
Programs V*, Lemma J.1): that is how one form of a rule becomes another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

Factor: TypeAlias = Any
"""A float, or an array that broadcasts against the leaf: parts of a fused kernel may differ."""

HIDDEN, OUTPUT, INPUT, VECTOR, FIXED = "hidden", "output", "input", "vector", "fixed"


class Fan(NamedTuple):
    """A number of inputs, of outputs or of layers, in the base and in the target model."""

    base: float
    target: float

    @property
    def ratio(self) -> float:
        """Return by how much it grew."""
        return self.target / self.base


class Facts(NamedTuple):
    """What a rule knows of a leaf."""

    role: str
    fan_in: Fan
    fan_out: Fan
    n: Factor
    """Of how many elements each became."""
    gauge: Factor = 1.0
    """What growth by copies asks for beyond 1/fan_in of what is summed: what the model's own
    constants call for, such as the 1/√d of attention where heads grow."""
    layers: Fan = Fan(1, 1)
    """How many layers its family has; 1 outside residual branches."""
    last: bool = False
    """Whether it is what a residual branch ends with: the branch is zero where it is."""
    lookup: bool = False
    """Whether rows of it are picked by numbers."""
    matrix: bool = True
    """Whether it is known along which dimensions it is a matrix."""
    parts_in: Factor | None = None
    """By how much fan-in grew where that differs by parts of the leaf."""

    @property
    def summed(self) -> bool:
        """Return whether products sum over inputs that grew."""
        return self.role in (HIDDEN, OUTPUT)

    @property
    def r_in(self) -> Factor:
        """Return by how much what it sums over grew."""
        if not self.summed:
            return 1.0
        return self.fan_in.ratio if self.parts_in is None else self.parts_in

    @property
    def m(self) -> Factor:
        """Return the factor of growth by copies: 1/r for a kernel whose inputs grew r-fold."""
        return self.gauge / self.r_in


@dataclass(frozen=True)
class Factors:
    """What a leaf of the target takes, relative to the base model."""

    multiplier: Factor = 1.0
    """A: what the model reads is A·W."""
    init: Factor = 1.0
    """B: of the standard deviation at the start."""
    lr: Factor = 1.0
    """C: of the learning rate of Adam."""
    eps: Factor = 1.0
    """Of Adam's ε: what gradients are larger by."""
    weight_decay: Factor = 1.0
    """Of decay per unit of learning rate."""

    def moved(self, theta: Factor) -> Factors:
        """Return the same training with A/θ in place of A."""
        return Factors(
            self.multiplier / theta,
            self.init * theta,
            self.lr * theta,
            self.eps / theta,
            self.weight_decay / theta,
        )


Rule: TypeAlias = Callable[[Facts], Factors]


# Width


def mup(leaf: Facts) -> Factors:
    """μP in the form of Table 3.

    Learning rate m, ε/(m n) and decay λ/m are those of growth by copies.  A fresh kernel is no
    copy: sums over inputs that know nothing of each other grow by √r and not by r, so that hidden
    kernels start √r times larger than m.
    """
    root = leaf.r_in**0.5 if leaf.role == HIDDEN else 1.0
    return Factors(1.0, leaf.m * root, leaf.m, 1 / (leaf.m * leaf.n), 1 / leaf.m)


def standard(leaf: Facts) -> Factors:
    """What is done without a rule: variances of 1/fan_in, one learning rate for all."""
    return Factors(init=leaf.r_in**-0.5)


def _standard_lr(power: float) -> Rule:
    def rule(leaf: Facts) -> Factors:
        lr = leaf.r_in**-power
        # Behind all but readouts is a readout of n^-½, and with it their gradients fall.
        eps = 1.0 if leaf.role in (OUTPUT, FIXED) else 1 / math.sqrt(leaf.fan_out.ratio)
        return Factors(init=leaf.r_in**-0.5, lr=lr, eps=eps, weight_decay=1 / lr)

    return rule


def spectral(leaf: Facts) -> Factors:
    """‖W‖ and ‖ΔW‖ are √(fan_out/fan_in): μP but for the norm of a fresh matrix, σ(√m + √n)."""
    found = mup(leaf)
    if not leaf.summed:
        return found
    base, target = (_of_norm(leaf.fan_in[i], leaf.fan_out[i]) for i in (0, 1))
    return replace(found, init=leaf.gauge * target / base)


def _of_norm(fan_in: float, fan_out: float) -> float:
    """The σ of a fresh matrix whose norm is √(fan_out/fan_in)."""
    return math.sqrt(fan_out / fan_in) / (math.sqrt(fan_in) + math.sqrt(fan_out))


def u_mup(leaf: Facts) -> Factors:
    """u-μP: all weights start at 1, behind multipliers; widths are the target's own.

    It is μP over a base of one input and one output a kernel, moved until B is 1.  New is the
    learning rate 1/√d of what is looked up.  Of depth it is relative to the base.
    """
    fan_in, fan_out = leaf.fan_in.target, leaf.fan_out.target
    root, depth = math.sqrt(fan_in), math.sqrt(leaf.layers.ratio)
    a, c, eps = {
        HIDDEN: (1 / root, 1 / root, 1 / (fan_out * root)),
        OUTPUT: (1 / fan_in, 1.0, 1 / fan_in),
        INPUT: (1 / root, 1 / math.sqrt(fan_out) if leaf.lookup else 1.0, 1 / fan_out),
        VECTOR: (1.0, 1.0, 1 / fan_out),
        FIXED: (1 / root, 1.0, 1.0),
    }[leaf.role]
    a = a / depth if leaf.last else a
    # A gauge makes gradients larger where it stands, and smaller by as much where it was.
    return Factors(leaf.gauge * a, 1.0, c / depth, eps / depth, depth / c)


# Depth


def _deep(alpha: float) -> Rule:
    """μP with residual branches of L^-α: what they end with takes that, learns and starts so."""

    def rule(leaf: Facts) -> Factors:
        found, depth = mup(leaf), leaf.layers.ratio
        branch = depth**-alpha
        inside = replace(found, lr=found.lr * depth ** (alpha - 1), eps=found.eps * branch)
        return replace(inside, multiplier=branch).moved(branch) if leaf.last else inside

    return rule


# Forms


def _apart(rule: Rule, alpha: float = 0.0) -> Rule:
    """A rule in the form of Table 8: what is neither 1 nor 1/fan_in stands in multipliers."""

    def moved(leaf: Facts) -> Factors:
        theta = (leaf.r_in if leaf.role == OUTPUT else 1.0) / leaf.gauge
        return rule(leaf).moved(theta * leaf.layers.ratio**alpha if leaf.last else theta)

    return moved


class Named(NamedTuple):
    """A rule, what it says in a line, and where it is from."""

    rule: Rule
    says: str
    source: str
    absolute: bool = False
    """Whether factors are those of the target alone, and not relative to the base."""
    deep: bool = False
    """Whether it says anything of depth."""
    plain: bool = False
    """Whether readouts stay as they are."""


_TP5 = "Yang et al., Tensor Programs V (arXiv:2203.03466)"
_TP6 = "Yang et al., Tensor Programs VI (arXiv:2310.02244)"
_COMPLETE = "Dey et al., CompleteP (arXiv:2505.01618), Table 1"
_EVERETT = "Everett et al., Scaling Exponents (arXiv:2407.05872), Table 1"

RULES: Mapping[str, Named] = {
    "mup": Named(mup, "μP in initial values and learning rates alone", f"{_TP5}, Table 3"),
    "mup_multipliers": Named(_apart(mup), "μP with a multiplier on readouts", f"{_TP5}, Table 8"),
    "u_mup": Named(
        u_mup,
        "weights of scale 1 behind multipliers",
        "Blake et al., u-μP (arXiv:2407.17465), Table 2",
        absolute=True,
        deep=True,
    ),
    "depth_mup": Named(_deep(0.5), "μP with residual branches of L^-½", _TP6, deep=True),
    "completep": Named(_deep(1.0), "μP with residual branches of 1/L", _COMPLETE, deep=True),
    "completep_multipliers": Named(
        _apart(_deep(1.0), 1.0), "the same, in multipliers", _COMPLETE, deep=True
    ),
    "spectral": Named(
        spectral,
        "norms of √(fan_out/fan_in)",
        "Yang et al., A Spectral Condition (arXiv:2310.17813)",
    ),
    "standard": Named(
        standard, "variances of 1/fan_in, one learning rate", "common practice", plain=True
    ),
    "standard_lr": Named(
        _standard_lr(1.0),
        "standard, with a learning rate per layer, full alignment",
        _EVERETT,
        plain=True,
    ),
    "standard_lr_none": Named(
        _standard_lr(0.5),
        "standard, with a learning rate per layer, no alignment",
        _EVERETT,
        plain=True,
    ),
}


# Optimizers


def _adam(leaf: Facts, found: Factors) -> Factor:
    return found.lr


def _sgd(leaf: Facts, found: Factors) -> Factor:
    """Its updates are as large as gradients."""
    return found.lr / found.eps


def _adafactor(leaf: Facts, found: Factors) -> Factor:
    """Its updates are as large as weights."""
    return found.lr / found.init


def _muon(leaf: Facts, found: Factors) -> Factor:
    """Its update of a matrix has the norm √max(1, fan_out/fan_in); Adam's is √(fan_in·fan_out)."""
    norms = [math.sqrt(max(1.0, leaf.fan_out[i] / leaf.fan_in[i])) for i in (0, 1)]
    return _of_matrix(leaf, found, norms[1] / norms[0])


def _muon_rms(leaf: Facts, found: Factors) -> Factor:
    """With ``consistent_rms`` it is √max(fan_in, fan_out)."""
    norms = [math.sqrt(max(leaf.fan_out[i], leaf.fan_in[i])) for i in (0, 1)]
    return _of_matrix(leaf, found, norms[1] / norms[0])


def _of_matrix(leaf: Facts, found: Factors, grown: float) -> Factor:
    if leaf.role != HIDDEN or not leaf.matrix:  # Adam's
        return found.lr
    return found.lr * math.sqrt(leaf.fan_in.ratio * leaf.fan_out.ratio) / grown


class Family(NamedTuple):
    """Optimizers whose updates are homogeneous alike: of degree p in gradients, q in weights."""

    lr: Callable[[Facts, Factors], Factor]
    p: int
    q: int


OPTIMIZERS: Mapping[str, Family] = {
    "adam": Family(_adam, 0, 0),
    "lion": Family(_adam, 0, 0),
    "sgd": Family(_sgd, 1, 0),
    "adafactor": Family(_adafactor, 0, 1),
    "muon": Family(_muon, 0, 0),
    "muon_rms": Family(_muon_rms, 0, 0),
}


# Batches and duration


class Schedule(NamedTuple):
    """How many times as many examples a batch has, and tokens the whole training."""

    batch: float = 1.0
    tokens: float = 1.0

    def of(self, found: Factors) -> Factors:
        """Return factors for a training of that length, by the SDE that Adam approximates."""
        root = math.sqrt(self.batch / self.tokens)
        return replace(
            found,
            lr=found.lr * root,
            eps=found.eps / root,
            weight_decay=found.weight_decay * root,
        )

    def beta(self, beta: float) -> float:
        """Return 1 − (1 − β)·batch/tokens."""
        return 1 - (1 - beta) * self.batch / self.tokens
