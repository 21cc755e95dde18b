"""The plan of a model directory with other sizes, from its config.json and its PyTorch program."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax._hf_config import Resized, class_of, layers_of, read_config, resized
from uscale_jax._hf_files import Stored, name_like, names_in_files, other_files, read_directory
from uscale_jax._hf_program import HFModel, hf_model, key_of
from uscale_jax._plan import Plan
from uscale_jax._planning import plan as plan_models
from uscale_jax._safetensors import DTYPES, StoredTensor
from uscale_jax._types import Key
from uscale_jax.trace.layers import Depth


@dataclass(frozen=True)
class ModelPlan:
    """How a model directory becomes one with other sizes; ``print`` shows it."""

    plan: Plan
    """Between the two models; its names are those of the model's state."""
    source: Path
    grows: bool
    """Whether the directory is of the plan's small model."""
    sizes: Mapping[str, tuple[int | None, int]]
    """The fields of config.json that change, from and to; from None where it was derived."""
    config: Mapping[str, Any]
    """The new config.json."""
    notes: tuple[str, ...]
    """What is left out, and what else to know."""
    stored: Stored = field(repr=False)
    names: Mapping[Key, str] = field(repr=False)
    """Under which name every tensor of the model is in its files."""
    copied: tuple[str, ...] = field(repr=False)
    """Names in the files of tensors that stay as they are, such as counters."""

    def tensor(self, key: Key) -> StoredTensor:
        """Return where a tensor of the model is."""
        return self.stored.tensors[self.names[key]]

    def __str__(self) -> str:
        """Return the sizes that change, the plan, and what to know."""
        lines = [f"{name}: {old} → {new}" for name, (old, new) in self.sizes.items()]
        return "\n".join([*lines, "", str(self.plan), *self.notes])


def plan(
    source: str | os.PathLike[str],
    *,
    width: Any = None,
    depth: Depth = "interleave",
    new_layers: str = "identity",
    inputs: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    **sizes: int,
) -> ModelPlan:
    r"""Returns how the model of a directory of Hugging Face's transformers changes its sizes.

    The model's class is built twice from its configuration, as it is and with the new sizes, both
    without storage for parameters.  PyTorch exports the two programs, they are run by JAX on
    shapes, and :func:`uscale_jax.plan` compares them:

    .. math:: W' = m\,(c + W)[\mathrm{maps}] - c

    So nothing here knows of single models.  Factors are part of the weights; no field of the
    configuration changes but sizes (and lists with an entry per layer).

    Args:
      source: a directory as ``save_pretrained`` writes it: ``config.json`` and safetensors, in one
        file or several.
      width: what to multiply the sizes of hidden states, MLPs and the numbers of heads by, a whole
        number or a fraction; the size of heads stays.
      depth: which layers new ones are copies of, see :func:`uscale_jax.plan`.
      new_layers: "identity" or "copy", see :func:`uscale_jax.plan`.
      inputs: arrays by the names of the model's arguments, to run it on; by default token ids, or
        pixels, of sizes that occur nowhere else in the model.
      architecture: the class of transformers whose outputs are to stay, where that is not the one
        that config.json names.
      **sizes: new sizes by the fields of config.json, or by the names most models have:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
        num_key_value_heads, head_dim.

    Returns:
      :class:`ModelPlan`.

    Raises:
      ModuleNotFoundError: PyTorch or transformers is not installed.
      ValueError: the directory is none, is incomplete or quantised; there is no such field; some
        sizes grow and others shrink; the format cannot express the sizes, or no factors keep the
        function (see :func:`uscale_jax.plan`).

    Example:
      >>> import uscale_jax as us
      >>> planned = us.hf.plan("models/llama", width=2, num_hidden_layers=24)  # doctest: +SKIP
      >>> print(planned)  # doctest: +SKIP

    References:
      The format: https://huggingface.co/docs/safetensors.
    """
    path = Path(source).resolve()
    raw = read_config(path)
    stored = read_directory(path)
    kind = class_of(raw, architecture)
    config = resized(raw, kind, sizes, width, depth)
    given = _inputs(kind, config) if inputs is None else inputs
    old, new = (hf_model(kind, each, given) for each in (config.old, config.new))
    shapes = {".".join(key): shape for key, shape in _flat(old).items()}
    files = {old.renamed(name): name for name in stored.tensors}
    found = names_in_files(shapes, old.tied, list(files), kind.base_model_prefix)
    names = {name: files[file] for name, file in found.items()}
    _check_stored(shapes, names, stored)
    grows = _size(new) > _size(old)
    return ModelPlan(
        plan=_planned(config, old, new, grows, depth, new_layers, given),
        source=path,
        grows=grows,
        sizes=config.sizes,
        config=config.raw,
        notes=_notes(path, config, stored, names, old),
        stored=stored,
        names={key_of(name): file for name, file in names.items()},
        copied=_copied(old, new, stored),
    )


def _flat(model: HFModel) -> dict[Key, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    return {tuple(part.key for part in path): leaf.shape for path, leaf in leaves}


def _size(model: HFModel) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.params))


def _planned(
    config: Resized,
    old: HFModel,
    new: HFModel,
    grows: bool,
    depth: Depth,
    new_layers: str,
    inputs: Any,
) -> Plan:
    small, big = (old, new) if grows else (new, old)
    sizes = config.hidden() if grows else config.hidden()[::-1]
    same = layers_of(config.old) == layers_of(config.new)
    return plan_models(
        _readable(small, big, sizes, 0),
        small.params,
        _readable(small, big, sizes, 1),
        big.params,
        *(jnp.asarray(x) for x in inputs.values()),
        depth=None if same else depth,
        new_layers=new_layers,
        rotary=True,
        exact=grows,
    )


def _readable(small: HFModel, big: HFModel, hidden: tuple[int, int], which: int) -> Any:
    """The function of one of two models, with outputs of equal shapes.

    Hidden states are an output of models without a head.  They repeat their units as the hidden
    size does, which is what it means that their products with each other stay as they are.
    """
    pairs = zip(small.shapes, big.shapes, strict=True)
    states = [a != b and (a[-1:], b[-1:]) == ((hidden[0],), (hidden[1],)) for a, b in pairs]
    apply = (small, big)[which].apply
    return partial(_read_out, apply=apply, states=tuple(states)) if any(states) else apply


def _read_out(params: Any, *inputs: Any, apply: Any, states: tuple[bool, ...]) -> list[Any]:
    outputs = apply(params, *inputs)
    return [_products(x) if each else x for x, each in zip(outputs, states, strict=True)]


def _products(x: jax.Array) -> jax.Array:
    """The means over units of products of hidden states."""
    return jnp.einsum("...ti,...si->...ts", x, x) / x.shape[-1]


# Inputs

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _inputs(kind: Any, config: Resized) -> dict[str, Any]:
    """Token ids or pixels, of sizes that the model has not."""
    taken = {x for c in (config.old, config.new) for x in c.to_dict().values() if type(x) is int}
    batch, length = [n for n in _PRIMES[1:] if n not in taken][:2]
    name = kind.main_input_name
    if name == "input_ids":
        ids = np.arange(batch * length, dtype=np.int32) % min(config.old.vocab_size, 31)
        return {name: ids.reshape(batch, length)}
    side = getattr(config.old, "image_size", None)
    if name == "pixel_values" and isinstance(side, int):
        shape = batch, config.old.num_channels, side, side
        return {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    raise ValueError(
        f"what {kind.__name__} takes is not known here: its main input is {name!r}. Expected: "
        "token ids or square images. Fix: inputs={name: array, ...}."
    )


# What is in the files


def _check_stored(
    shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], stored: Stored
) -> None:
    lines = []
    for name, shape in shapes.items():
        tensor = stored.tensors[names[name]]
        if tensor.shape != shape:
            lines.append(f"  {tensor.name!r} is {tensor.shape}, config.json makes it {shape}")
        elif not jnp.issubdtype(DTYPES[tensor.dtype], jnp.floating):
            lines.append(f"  {tensor.name!r} is {tensor.dtype}: quantised, or packed")
        elif tensor.dtype == "F64" and not jax.config.read("jax_enable_x64"):
            lines.append(f"  {tensor.name!r} is F64: jax.config.update('jax_enable_x64', True)")
    if lines:
        fix = "Expected: plain weights of this configuration. Fix: see the lines above."
        raise ValueError("\n".join(["the files do not fit config.json.", *lines[:8], fix]))


def _copied(old: HFModel, new: HFModel, stored: Stored) -> tuple[str, ...]:
    kept = [name for name, shape in old.others.items() if new.others.get(name) == shape]
    return tuple(name for name in stored.tensors if _is_any_of(old.renamed(name), kept))


def _is_any_of(name: str, names: Iterable[str]) -> bool:
    """Whether it is one of them, with or without the base model's prefix."""
    return any(a == b or a.endswith(f".{b}") for x in names for a, b in ((name, x), (x, name)))


def _notes(
    source: Path, config: Resized, stored: Stored, names: Mapping[str, str], model: HFModel
) -> tuple[str, ...]:
    used = {*names.values()}
    known = [*model.tied, *model.others]
    unread = [
        n for n in stored.tensors if n not in used and not _is_any_of(model.renamed(n), known)
    ]
    notes = []
    if unread:
        notes.append(f"left out, for the model's class does not read them: {_some(unread)}")
    if others := other_files(source)[1]:
        notes.append(f"left out, being weights of the old size: {_some(map(str, others))}")
    if (source / "1_Pooling").is_dir() and config.hidden()[0] != config.hidden()[1]:
        notes.append("1_Pooling/config.json is copied and says the old word_embedding_dimension")
    return tuple(notes)


def _some(names: Any) -> str:
    listed = list(names)
    more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    return ", ".join(listed[:6]) + more


def stored_names(planned: ModelPlan, pairs: Mapping[Key, Key]) -> dict[Key, str]:
    """Returns what new tensors are called in files, by the tensor that each is made from."""
    name = ".".join
    return {
        key: name_like(name(key), name(source), planned.names[source])
        for key, source in pairs.items()
    }
