"""The configuration of a model directory, with other sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from uscale_jax._hf_program import installed
from uscale_jax.trace.layers import Depth, sources

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""What a factor of width multiplies; the size of heads stays, as rotary embeddings ask for."""

_OTHER_NAMES = {"intermediate_size": ("ffn_dim", "n_inner", "d_ff", "ffn_hidden_size")}
"""Where transformers' own ``attribute_map`` says nothing."""

_EQUAL = {"word_embed_proj_dim": "hidden_size"}
"""Fields that mean another size as long as they are equal to it (OPT)."""

_DEPTH = "num_hidden_layers"


class Resized(NamedTuple):
    """A configuration and the same with other sizes."""

    old: Any
    new: Any
    raw: Mapping[str, Any]
    """The new ``config.json``."""
    sizes: Mapping[str, tuple[int | None, int]]
    """What changes, by field, from and to; from None where it was derived from another size."""

    def hidden(self) -> tuple[int, int]:
        """Return the width of the hidden states in both; (0, 0) of models that do not say."""
        both = [getattr(config, "hidden_size", 0) or 0 for config in (self.old, self.new)]
        return both[0], both[1]


def read_config(source: Path) -> dict[str, Any]:
    """Returns what is in ``config.json``.

    Raises:
      ValueError: there is none, or it is of a quantised model.
    """
    file = source / "config.json"
    if not file.is_file():
        raise ValueError(
            f"source={str(source)!r} is no model directory: it has no 'config.json'. Expected: "
            "what `save_pretrained` of transformers writes. Fix: the directory of one model."
        )
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "quantization_config" in raw:
        raise ValueError(
            f"the model in {str(source)!r} is quantised ('quantization_config' in config.json): "
            "its weights are numbers times scales of their own. Expected: plain weights of any "
            "dtype, float8 included. Fix: dequantise it first."
        )
    return raw


def class_of(raw: Mapping[str, Any], architecture: str | None) -> Any:
    """Returns the class of the model.

    Raises:
      ValueError: the configuration names none, or one that transformers has not.
    """
    name = architecture or next(iter(raw.get("architectures") or ()), None)
    found = getattr(installed("transformers"), name or "", None)
    if found is None:
        raise ValueError(
            f"the model's class is {name!r}, which transformers does not have. Expected: the class "
            "whose outputs are to stay, such as 'LlamaForCausalLM'. Fix: architecture=..., or "
            "'architectures' in config.json."
        )
    return found


def resized(
    raw: Mapping[str, Any], kind: Any, sizes: Mapping[str, Any], width: Any, depth: Depth
) -> Resized:
    """Returns a configuration with other sizes.

    Args:
      raw: what is in ``config.json``.
      kind: the class of the model.
      sizes: new sizes by field, under the names of this or of most configurations.
      width: what to multiply ``WIDTHS`` by, or None.
      depth: which layers new ones are copies of, see :func:`plan`.

    Raises:
      ValueError: there is no such field, a size is none, or the format cannot express it.
    """
    old = kind.config_class.from_dict(dict(raw))
    wanted = _widened(old, width) | {_field(old, name): size for name, size in sizes.items()}
    for field, other in _EQUAL.items():
        if getattr(old, field, None) == getattr(old, other, ...) and other in wanted:
            wanted.setdefault(field, wanted[other])
    given = {field: (_present(old, field), size) for field, size in wanted.items()}
    changes = {field: both for field, both in given.items() if both[0] != both[1]}
    _check(changes)
    new_raw = {**raw, **wanted}
    new_raw |= _head_size(old, new_raw) | _with_layers(new_raw, old, depth)
    found = Resized(old, kind.config_class.from_dict(dict(new_raw)), new_raw, changes)
    _check_heads(found)
    for config in (found.old, found.new):
        config.use_cache = False  # keys and values of earlier tokens are no outputs of the function
    return found


def _widened(config: Any, width: Any) -> dict[str, int]:
    if width is None:
        return {}
    factor = Fraction(width).limit_denominator(10_000)
    found = {}
    for name in WIDTHS:
        field = _field(config, name, missing_is_none=True)
        size = getattr(config, field, None) if field else None
        if not isinstance(size, int):  # no such thing, or derived from another size
            continue
        if (size * factor).denominator != 1 or size * factor < 1:
            raise ValueError(
                f"width={width} would make {field} {float(size * factor):g}, which is no whole "
                f"number. Expected: a factor that fits {field} = {size}. Fix: another one, or name "
                "sizes one by one."
            )
        found[field] = int(size * factor)
    return found


def _field(config: Any, name: str, missing_is_none: bool = False) -> str:
    """What the configuration calls a size."""
    candidates = (config.attribute_map.get(name, name), *_OTHER_NAMES.get(name, ()))
    found = next((f for f in candidates if hasattr(config, f) or f == "head_dim"), "")
    if found or missing_is_none:
        return found
    whole = [n for n, x in config.to_dict().items() if type(x) is int and not n.endswith("_id")]
    raise ValueError(
        f"{type(config).__name__} has no field {name!r}. Expected: one of {', '.join(whole)}. Fix: "
        "spell it as config.json does."
    )


def _present(config: Any, field: str) -> Any:
    """A size as it is; many classes read ``head_dim`` though their configuration has none."""
    return getattr(config, field, None) or (_size_of_heads(config) if field == "head_dim" else None)


def _check(changes: Mapping[str, tuple[Any, Any]]) -> None:
    if not changes:
        raise ValueError(
            "no size changes. Expected: another size of at least one field. Fix: for example "
            "intermediate_size=2 * the present one."
        )
    for field, (old, new) in changes.items():
        if type(new) is not int or new < 1:
            raise ValueError(
                f"{field}={new!r} is no size. Expected: a whole number, 1 or more. Fix: pass one."
            )
        if type(old) is not int and old is not None:
            raise ValueError(
                f"{field} is {old!r} in config.json, which is no size. Fix: another field."
            )
    known = {field: both for field, both in changes.items() if both[0] is not None}
    larger = [field for field, (old, new) in known.items() if new > old]
    if larger and len(larger) < len(known):
        smaller = [field for field in known if field not in larger]
        raise ValueError(
            f"some sizes grow ({', '.join(larger)}) and some shrink ({', '.join(smaller)}). "
            "Expected: one of both. Fix: do it in two steps."
        )


def _head_size(old: Any, raw: Mapping[str, Any]) -> dict[str, int]:
    """The size of heads, where the format has a field for it that else goes by other sizes."""
    size = getattr(old, "head_dim", None)
    field = old.attribute_map.get("head_dim", "head_dim")
    if not isinstance(size, int) or "head_dim" in old.attribute_map or raw.get(field):
        return {}
    hidden = raw.get("hidden_size", 0)
    return {} if hidden == size * raw.get("num_attention_heads", 0) else {field: size}


def _check_heads(found: Resized) -> None:
    """Refuses heads whose size would change the other way round than sizes do."""
    sizes = [_size_of_heads(config) for config in (found.old, found.new)]
    if sizes[0] is None or sizes[1] is None:
        return
    hidden, heads = found.new.hidden_size, found.new.num_attention_heads
    if hidden % heads:
        raise ValueError(
            f"hidden_size = {hidden} cannot be cut into {heads} heads. Fix: a multiple of {heads}."
        )
    known = [(old, new) for old, new in found.sizes.values() if old is not None]
    if known and (known[0][1] > known[0][0]) != (sizes[1] > sizes[0]) and sizes[0] != sizes[1]:
        name = type(found.new).__name__
        raise ValueError(
            f"heads would be of size {sizes[1]} instead of {sizes[0]}: in {name} it is hidden_size "
            f"/ num_attention_heads = {hidden} / {heads}, unless config.json has a 'head_dim' and "
            f"the class reads it. Fix: change both alike, as width= does, or try "
            f"head_dim={sizes[0]}."
        )


def _size_of_heads(config: Any) -> int | None:
    """The size of heads where no field says it."""
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return None
    return None if getattr(config, "head_dim", None) else hidden // heads


def layers_of(config: Any) -> int | None:
    """Returns how many layers there are, None where the configuration does not say."""
    found = getattr(config, _DEPTH, None)
    return found if isinstance(found, int) else None


def _with_layers(raw: Mapping[str, Any], old: Any, depth: Depth) -> dict[str, Any]:
    """Lists with an entry per layer, such as ``layer_types``, for the new model's layers."""
    before, after = layers_of(old), raw.get(old.attribute_map.get(_DEPTH, _DEPTH))
    if before is None or after is None or before == after:
        return {}
    family = sources(depth, "layers", min(before, after), max(before, after))
    layers = family.sources if after > before else family.kept
    lists = {n: x for n, x in old.to_dict().items() if "layer" in n and isinstance(x, list)}
    return {n: [x[i] for i in layers] for n, x in lists.items() if len(x) == before}


def write_config(raw: Mapping[str, Any], path: Path) -> None:
    """Writes ``config.json``."""
    text = json.dumps(dict(raw), indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
