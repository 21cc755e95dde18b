"""Torch-Pruning, asked what it couples, what it keeps, and how long it takes.

PyTorch and Torch-Pruning are imported inside the functions, for neither needs to be here.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Place: TypeAlias = "tuple[str, int]"
Importance: TypeAlias = "Callable[[Any], Any]"


@dataclass(frozen=True)
class Group:
    """What Torch-Pruning prunes together."""

    root: Place
    """A place whose units ``scores`` and ``gone`` count."""
    places: tuple[Place, ...]
    """Every leaf and dimension that became smaller when the group was pruned."""
    scores: np.ndarray
    gone: tuple[int, ...]

    def kept(self, units: int) -> tuple[int, ...]:
        """Return the units that stay of an axis of so many, which repeats along the root."""
        return tuple(sorted({i % units for i in range(len(self.scores)) if i not in self.gone}))


@dataclass(frozen=True)
class Pruned:
    """A pruned module, how, and the seconds of each step."""

    module: Any
    groups: tuple[Group, ...]
    building: float
    scoring: float
    pruning: float


@contextmanager
def quiet() -> Any:
    """Without Torch-Pruning's warnings on parameters that are of no layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def built(
    module: Any,
    inputs: np.ndarray,
    importance: Importance,
    share: float,
    fixed: Sequence[str] = (),
    heads: Mapping[str, int] | None = None,
) -> Any:
    """Return Torch-Pruning's pruner of the same share of units in every group."""
    import torch
    import torch_pruning

    layers = dict(module.named_modules())
    # Empty dictionaries, because its defaults are shared by all pruners of a process.
    return torch_pruning.pruner.BasePruner(
        module,
        torch.tensor(inputs),
        importance=importance,
        pruning_ratio=share,
        ignored_layers=[layers[name] for name in fixed],
        num_heads={layers[name]: count for name, count in (heads or {}).items()},
        in_channel_groups={},
        out_channel_groups={},
    )


def pruned(
    module: Any,
    inputs: np.ndarray,
    importance: Importance,
    share: float,
    fixed: Sequence[str] = (),
    heads: Mapping[str, int] | None = None,
) -> Pruned:
    """Return the module pruned in place."""
    scores: dict[Any, Any] = {}

    def remembered(group: Any) -> Any:
        scores[_root(group)] = found = importance(group)
        return found

    start = time.perf_counter()
    with quiet():
        pruner = built(module, inputs, remembered, share, fixed, heads)
    building = time.perf_counter() - start
    start = time.perf_counter()
    steps = pruner.step(interactive=True)
    group = next(steps, None)  # all groups are scored before the first one is pruned
    scoring = time.perf_counter() - start
    found, pruning = [], 0.0
    while group is not None:
        before, root = shapes(module), _root(group)
        gone = tuple(sorted(int(i) for i in group[0][1]))
        start = time.perf_counter()
        group.prune()
        following = next(steps, None)
        pruning += time.perf_counter() - start
        places = _changed(before, shapes(module))
        name = next(name for name, layer in module.named_modules() if layer is root[0])
        place = (f"{name}.weight", 0 if root[1] else 1)
        found.append(Group(place, places, np.asarray(scores[root]), gone))
        group = following
    return Pruned(module, tuple(found), building, scoring, pruning)


def _root(group: Any) -> tuple[Any, bool]:
    """The layer whose channels a group counts, and whether by its outputs."""
    dep = group[0][0]
    return dep.target.module, "out" in dep.handler.__name__


def shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters and buffers."""
    return {name: tuple(leaf.shape) for name, leaf in module.state_dict().items()}


def _changed(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]
) -> tuple[Place, ...]:
    return tuple(
        (name, dim)
        for name, shape in sorted(before.items())
        for dim, size in enumerate(shape)
        if after[name][dim] != size
    )


def outputs(module: Any, inputs: np.ndarray) -> np.ndarray:
    """Return what a module makes of inputs."""
    import torch

    with torch.no_grad():
        return module(torch.tensor(inputs)).numpy()


def own_magnitude() -> Importance:
    """Return Torch-Pruning's sum of squares: of weights and biases of the layers it knows.

    It leaves out running statistics, depthwise kernels, and parameters that are of no layer.
    """
    import torch_pruning

    return torch_pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer=None, bias=True
    )


def every_leaf(group: Any) -> Any:
    """Return the sum of squares of all that belongs to each unit of a group, whatever it is."""
    import torch

    total = torch.zeros(len(group[0].idxs), dtype=torch.float64)
    for item in (group[i] for i in range(len(group))):
        for leaf, dim, groups in _leaves(item.dep):
            own = leaf.detach().double().square().movedim(dim, 0)
            own = own.reshape(len(own), -1).sum(1)
            # A kernel in groups has the inputs of one group only.  Each group is given its equal
            # part, for Torch-Pruning takes the mean over groups.
            own = (own.repeat(groups) / groups)[torch.tensor(item.idxs)]
            total.index_add_(0, torch.tensor(item.root_idxs), own)
    return total


def _leaves(dep: Any) -> list[tuple[Any, int, int]]:
    """Leaves of what a dependency prunes, the dimension that goes, and how often it repeats."""
    import torch
    from torch import nn

    layer = dep.layer
    if isinstance(layer, torch.nn.Parameter):
        return [(layer, dep.target.pruning_dim, 1)]
    out = "out" in dep.handler.__name__
    if isinstance(layer, nn.Conv2d | nn.Linear) and not out:
        return [(layer.weight, 1, getattr(layer, "groups", 1))]
    if not isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm):
        return []
    names = ("weight", "bias", "running_mean", "running_var")
    found = (getattr(layer, name, None) for name in names)
    return [(leaf, 0, 1) for leaf in found if leaf is not None]
