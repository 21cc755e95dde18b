"""The tour: train small language models on real text, scale them, train on, and compare."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import uscale_jax as us
from benchmarks import data
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.lstm import LSTM, LSTMConfig
from benchmarks.models.transformer import Transformer
from benchmarks.models.transformer_linen import Transformer as LinenTransformer
from benchmarks.registry import Benchmark, Case, Options, Progress, Result
from benchmarks.suite._tour_growth import Growth, doubled
from benchmarks.suite._tour_report import report
from benchmarks.suite._tour_shrink import Shrinking, halved
from benchmarks.training import (
    LanguageModel,
    Setting,
    Trainer,
    TrainState,
    linen_model,
    nnx_model,
    optimizer,
    rescale_moments,
)

# Adam answers a constant factor from its first step on; more steps would only cost time.
FACTOR_STEPS = 8


@dataclass(frozen=True)
class Branch:
    """A way to continue from the trained model.

    ``kind`` tells the report which claims apply. Stored weights are multiplied by ``weights``
    and read times ``read_scale``; the learning rate is divided by ``lr_divisor``. Where that
    makes the gradients ``gradient_divisor`` times smaller, Adam's moments and ε have to follow.
    """

    kind: Literal["unchanged", "alone", "exact", "wrong order", "right order"]
    name: str
    weights: float = 1.0
    read_scale: float = 1.0
    lr_divisor: float = 1.0
    gradient_divisor: float = 1.0
    scale_eps: bool = True
    scale_first: bool = False

    def setting(self, base: Setting) -> Setting:
        """Return the training numbers of this branch."""
        eps = base.eps / self.gradient_divisor if self.scale_eps else base.eps
        return Setting(base.learning_rate, self.lr_divisor, self.read_scale, eps)


def value_scaling(k: float) -> Branch:
    """Scale the values alone: W' = kW and α/k, read as they are."""
    name = f"W' = kW, α/k (k={k:g})"
    return Branch("alone", name, weights=k, lr_divisor=k)


def exact_scaling(k: float) -> Branch:
    """Scale the storage only: W' = kW read as W'/k, so gradients are g/k and Adam needs αk."""
    name = f"W' = kW, read W'/k, αk (k={k:g})"
    return Branch("exact", name, weights=k, read_scale=1 / k, lr_divisor=1 / k, gradient_divisor=k)


def wrong_order(k: float) -> Branch:
    """Divide before Adam, as if from the first step on: Adam saw only gradients g/k.

    Without the rescaled moments its memory of unscaled gradients would hide the mistake for the
    thousand steps that Adam remembers.
    """
    name = f"α/k before Adam: wrong (k={k:g})"
    return Branch(
        "wrong order",
        name,
        lr_divisor=k,
        gradient_divisor=k,
        scale_eps=False,
        scale_first=True,
    )


def right_order(k: float) -> Branch:
    """Divide after Adam: the weights stay, the learning rate is α/k."""
    return Branch("right order", f"α/k after Adam (k={k:g})", lr_divisor=k)


BRANCHES = (
    Branch("unchanged", "unchanged"),
    value_scaling(2.0),
    value_scaling(0.5),
    exact_scaling(2.0),
    exact_scaling(0.5),
    wrong_order(2.0),
    right_order(2.0),
)


@dataclass(frozen=True)
class Size:
    """A model's sizes and its training schedule; steps are multiples of ``chunk``."""

    model: TransformerConfig | LSTMConfig
    learning_rate: float
    batch: int
    seq: int
    steps: int
    branch_steps: int
    chunk: int
    eval_batches: int


def _nnx_transformer(config: Any) -> LanguageModel:
    return nnx_model(lambda rngs: Transformer(config, rngs))


def _nnx_lstm(config: Any) -> LanguageModel:
    return nnx_model(lambda rngs: LSTM(config, rngs))


def _linen_transformer(config: Any) -> LanguageModel:
    return linen_model(LinenTransformer(config))


@dataclass(frozen=True)
class Contestant:
    """A model of the tour in both sizes."""

    build: Callable[[Any], LanguageModel]
    quick: Size
    full: Size

    def size(self, options: Options) -> Size:
        """Return the size the options ask for."""
        return self.full if options.full else self.quick


_TRANSFORMERS = {
    "quick": TransformerConfig(
        vocab=data.VOCAB, hidden=80, layers=2, heads=12, kv_heads=3, head_dim=8, mlp=176
    ),
    "full": TransformerConfig(
        vocab=data.VOCAB, hidden=384, layers=6, heads=12, kv_heads=4, head_dim=40, mlp=1040
    ),
}
_FULL_TRANSFORMER = Size(_TRANSFORMERS["full"], 1e-3, 48, 320, 3000, 500, 100, 8)
CONTESTANTS = {
    "transformer-nnx": Contestant(
        _nnx_transformer,
        quick=Size(_TRANSFORMERS["quick"], 4e-3, 7, 72, 240, 48, 24, 11),
        full=_FULL_TRANSFORMER,
    ),
    "lstm-nnx": Contestant(
        _nnx_lstm,
        quick=Size(LSTMConfig(data.VOCAB, 72, 136, 1), 6e-3, 10, 56, 240, 48, 24, 13),
        full=Size(LSTMConfig(data.VOCAB, 192, 640, 2), 2e-3, 56, 224, 2000, 300, 100, 9),
    ),
    "transformer-linen": Contestant(
        _linen_transformer,
        quick=Size(_TRANSFORMERS["quick"], 4e-3, 7, 72, 240, 48, 24, 11),
        full=_FULL_TRANSFORMER,
    ),
}


class Tour:
    """One model's way through the tour."""

    def __init__(self, contestant: Contestant, options: Options, progress: Progress) -> None:
        """Load the corpus and prepare the programs."""
        self.size = contestant.size(options)
        self.seed = options.seed
        self.progress = progress
        self.build = contestant.build
        self.trainer = Trainer(contestant.build(self.size.model))
        self.base = Setting(self.size.learning_rate)
        self.lr_factors: dict[tuple[float, bool], float] = {}
        self.corpus = data.load_corpus(options.data, options.seed)
        shape = (self.size.eval_batches, self.size.batch)
        self.held_out = data.spread_windows(self.corpus.held_out, shape, self.size.seq + 1)

    def train(
        self, state: TrainState, setting: Setting, steps: int, stage: int, scale_first: bool
    ) -> tuple[TrainState, list[float]]:
        """Train on the batches of ``stage``, which are the same at every call."""
        rng = np.random.default_rng([self.seed, stage])
        losses: list[float] = []
        for _ in range(steps // self.size.chunk):
            shape = (self.size.chunk, self.size.batch)
            windows = data.random_windows(self.corpus.train, shape, self.size.seq + 1, rng)
            state, bits = self.trainer.train(state, setting, windows, scale_first)
            losses += bits
            self.progress.advance(self.size.chunk, f"{bits[-1]:.2f} bits/byte")
        return state, losses

    def lr_factor(self, setting: Setting, scale_first: bool, params: Any) -> float:
        """Return what the optimizer really makes of its factor, measured once per optimizer."""
        key = (setting.lr_divisor, scale_first)
        if key not in self.lr_factors:
            tx = optimizer(setting, scale_first)
            measured = us.effective_lr_scale(tx, params, steps=FACTOR_STEPS)
            self.lr_factors[key] = float(measured.scale)
        return self.lr_factors[key]

    def branch(self, branch: Branch, trained: TrainState, logits: jax.Array) -> Result:
        """Apply the branch's change to the trained state, continue, and return the outcome."""
        setting = branch.setting(self.base)
        params = us.scale_params(trained.params, branch.weights)
        lr_factor = self.lr_factor(setting, branch.scale_first, params)
        just_after, changed = self.trainer.evaluate(params, branch.read_scale, self.held_out)
        moments = trained.opt_state[::-1] if branch.scale_first else trained.opt_state
        state = TrainState(params, rescale_moments(moments, branch.gradient_divisor))
        steps = self.size.branch_steps
        state, losses = self.train(state, setting, steps, 2, branch.scale_first)
        after, _ = self.trainer.evaluate(state.params, branch.read_scale, self.held_out)
        return {
            "name": branch.name,
            "kind": branch.kind,
            "lr_factor": lr_factor,
            "max_logit_change": float(jnp.abs(changed - logits).max()),
            "bits_just_after": just_after,
            "bits_after": after,
            "losses": losses,
        }

    def grow(self, trained: TrainState, bits: float) -> Result:
        """Grow the trained model twofold and train it on, on the branches' batches."""
        rng = np.random.default_rng([self.seed, 2])
        shape = (self.size.branch_steps, self.size.batch)
        batches = data.random_windows(self.corpus.train, shape, self.size.seq + 1, rng)
        big = self.build(doubled(self.size.model))
        growth = Growth(self.trainer.model, big, self.base.learning_rate, self.held_out)
        found = growth.run(TrainState(trained.params, trained.opt_state[0]), batches, bits)
        self.progress.advance(self.size.branch_steps, "grown")
        return found

    def shrink(self, trained: TrainState, bits: float) -> Result:
        """Cut the trained model down, and train it on, on the branches' batches."""
        rng = np.random.default_rng([self.seed, 2])
        shape = (self.size.branch_steps, self.size.batch)
        batches = data.random_windows(self.corpus.train, shape, self.size.seq + 1, rng)
        calibration = data.random_windows(
            self.corpus.train, (8, self.size.batch), self.size.seq, rng
        )
        small = self.build(halved(self.size.model))
        rate = self.base.learning_rate
        cut = Shrinking(self.trainer.model, small, rate, self.held_out, calibration)
        found = cut.run(TrainState(trained.params, trained.opt_state[0]), batches, bits)
        self.progress.advance(self.size.branch_steps, "shrunk")
        return found

    def run(self) -> Result:
        """Return everything the report needs about this model."""
        start = time.perf_counter()
        state = self.trainer.init(self.seed, self.base)
        untrained, _ = self.trainer.evaluate(state.params, 1.0, self.held_out)
        state, losses = self.train(state, self.base, self.size.steps, 1, False)
        trained, logits = self.trainer.evaluate(state.params, 1.0, self.held_out)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            branches = [self.branch(branch, state, logits) for branch in BRANCHES]
            growth = self.grow(state, trained)
            shrinking = self.shrink(state, trained)
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "size": asdict(self.size),
            "unigram_bits": data.unigram_bits(self.corpus.held_out),
            "bits_untrained": untrained,
            "bits_trained": trained,
            "max_logit": float(jnp.abs(logits).max()),
            "losses": losses,
            "branches": branches,
            "growth": growth,
            "shrinking": shrinking,
            "warnings": sorted({str(w.message) for w in caught}),
            "seconds": time.perf_counter() - start,
        }


def _run_case(contestant: Contestant, options: Options, progress: Progress) -> Result:
    size = contestant.size(options)
    steps = size.steps + (len(BRANCHES) + 2) * size.branch_steps
    progress.start(steps, "steps")
    return Tour(contestant, options, progress).run()


def cases(options: Options) -> Sequence[Case]:
    """Return one case per model."""
    return [Case(name, partial(_run_case, one)) for name, one in CONTESTANTS.items()]


def config(options: Options) -> Mapping[str, Any]:
    """Return the corpus and each model's sizes."""
    corpus = data.load_corpus(options.data, options.seed)
    return {
        "corpus": {
            "sha256": corpus.sha256,
            "train_files": len(corpus.train_files),
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "held_out_files": corpus.held_out_files,
        },
        "models": {name: asdict(one.size(options)) for name, one in CONTESTANTS.items()},
    }


BENCHMARK = Benchmark(
    name="tour",
    summary="train language models on real text, scale weights and learning rate, compare",
    cases=cases,
    report=report,
    needs_data=True,
    config=config,
)
