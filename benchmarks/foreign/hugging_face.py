"""The Flax models of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.foreign.registry import floating
from benchmarks.zoo.registry import Built, Model, Sizes, floats, tokens

REQUIRES = ("transformers",)

TEXT = {"batch": 2, "length": 5, "vocabulary": 11}
IMAGE = {"batch": 2, "side": 16, "colours": 3, "labels": 5}
CAPTURED = "numbers that the function closes over"
Options = Callable[[Sizes], dict[str, Any]]


def _ids(s: Sizes) -> tuple[np.ndarray, ...]:
    return (tokens(s["batch"], s["length"], vocabulary=s["vocabulary"]),)


def _two_texts(s: Sizes) -> tuple[np.ndarray, ...]:
    later = tokens(s["batch"], s["length"] - 1, vocabulary=s["vocabulary"], seed=1)
    return *_ids(s), later


def _pixels(s: Sizes) -> tuple[np.ndarray, ...]:
    return (floats(s["batch"], s["colours"], s["side"], s["side"]),)


def _model(
    name: str,
    kind: str,
    sizes: Sizes,
    options: Options,
    inputs: Callable[[Sizes], tuple[np.ndarray, ...]] = _ids,
    *,
    config: str = "",
    free: str,
    fixed: Mapping[str, str],
    positional: tuple[str, ...] = (),
) -> Model:
    """Return a model of class ``Flax<kind>``; ``positional`` names the inputs where needed."""

    def build(s: Sizes) -> Built:
        import transformers

        settings = getattr(transformers, config or f"{name}Config")(**options(s))

        def make() -> Any:
            model = getattr(transformers, f"Flax{kind}")
            return model(settings, dtype=floating(), _do_init=False)

        def apply(params: Any, *args: Any) -> Any:
            named = dict(zip(positional, args, strict=False))
            rest = args[len(named) :]
            return make()(*rest, **named, params=params)[0]

        arrays = inputs(s)
        model = make()
        shapes = jax.eval_shape(
            lambda: model.init_weights(jax.random.key(0), model.input_shape or arrays[0].shape)
        )
        return Built(apply, shapes, arrays)

    return Model(f"transformers {name}", sizes, build, tuple(free.split()), fixed)


def _gpt2(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "n_positions": s["places"],
        "n_embd": s["heads"] * s["head_dim"],
        "n_head": s["heads"],
        "n_inner": s["inner"],
        "n_layer": 2,
    }


def _gpt_neo(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": s["places"],
        "hidden_size": s["heads"] * s["head_dim"],
        "num_heads": s["heads"],
        "intermediate_size": s["inner"],
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 3,
    }


def _gptj(s: Sizes) -> dict[str, Any]:
    return _gpt2(s) | {"rotary_dim": 4, "n_inner": s["inner"]}


def _opt(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": s["places"],
        "hidden_size": s["heads"] * s["head_dim"],
        "word_embed_proj_dim": s["heads"] * s["head_dim"],
        "num_attention_heads": s["heads"],
        "ffn_dim": s["inner"],
        "num_hidden_layers": 2,
    }


def _bloom(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "hidden_size": s["heads"] * s["head_dim"],
        "n_head": s["heads"],
        "n_layer": 2,
    }


def _llama(s: Sizes) -> dict[str, Any]:
    heads = s["kv_heads"] * s["per_kv"]
    return {
        "vocab_size": s["vocabulary"],
        "hidden_size": heads * s["head_dim"],
        "num_attention_heads": heads,
        "num_key_value_heads": s["kv_heads"],
        "intermediate_size": s["inner"],
        "num_hidden_layers": 2,
        "max_position_embeddings": s["places"],
    }


def _gemma(s: Sizes) -> dict[str, Any]:
    sizes = {"hidden_size": s["hidden"], "head_dim": s["head_dim"]}
    return _llama(s) | sizes | {"hidden_activation": "gelu_pytorch_tanh"}


def _xglm(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": s["places"],
        "d_model": s["heads"] * s["head_dim"],
        "attention_heads": s["heads"],
        "ffn_dim": s["inner"],
        "num_layers": 2,
    }


def _bert(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": s["places"],
        "hidden_size": s["heads"] * s["head_dim"],
        "num_attention_heads": s["heads"],
        "intermediate_size": s["inner"],
        "num_hidden_layers": 2,
    }


def _embedded_bert(s: Sizes) -> dict[str, Any]:
    return _bert(s) | {"embedding_size": s["embedded"]}


def _distilbert(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": s["places"],
        "dim": s["heads"] * s["head_dim"],
        "n_heads": s["heads"],
        "hidden_dim": s["inner"],
        "n_layers": 2,
    }


def _big_bird(s: Sizes) -> dict[str, Any]:
    return _bert(s) | {"attention_type": "original_full"}


def _bart(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": s["places"],
        "d_model": s["heads"] * s["head_dim"],
        "encoder_attention_heads": s["heads"],
        "decoder_attention_heads": s["heads"],
        "encoder_ffn_dim": s["inner"],
        "decoder_ffn_dim": s["outer"],
        "encoder_layers": 2,
        "decoder_layers": 2,
        "pad_token_id": 1,
        "decoder_start_token_id": 2,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
    }


def _whisper(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "num_mel_bins": s["mels"],
        "max_source_positions": s["frames"] // 2,
        "max_target_positions": s["places"],
        "d_model": s["heads"] * s["head_dim"],
        "encoder_attention_heads": s["heads"],
        "decoder_attention_heads": s["heads"],
        "encoder_ffn_dim": s["inner"],
        "decoder_ffn_dim": s["outer"],
        "encoder_layers": 2,
        "decoder_layers": 2,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "begin_suppress_tokens": None,
    }


def _wav2vec2(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s["vocabulary"],
        "hidden_size": s["heads"] * s["head_dim"],
        "num_attention_heads": s["heads"],
        "intermediate_size": s["inner"],
        "num_hidden_layers": 2,
        "conv_dim": (s["conv_0"], s["conv_1"]),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
        "mask_time_prob": 0.0,
    }


def _clip(s: Sizes) -> dict[str, Any]:
    text = {
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": s["places"],
        "hidden_size": s["text_heads"] * s["text_head_dim"],
        "num_attention_heads": s["text_heads"],
        "intermediate_size": s["text_inner"],
        "num_hidden_layers": 2,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "image_size": s["side"],
        "patch_size": 8,
        "hidden_size": s["heads"] * s["head_dim"],
        "num_attention_heads": s["heads"],
        "intermediate_size": s["inner"],
        "num_hidden_layers": 2,
    }
    return {"text_config": text, "vision_config": vision, "projection_dim": s["projected"]}


def _vit(s: Sizes) -> dict[str, Any]:
    return {
        "image_size": s["side"],
        "num_channels": s["colours"],
        "patch_size": 8,
        "hidden_size": s["heads"] * s["head_dim"],
        "num_attention_heads": s["heads"],
        "intermediate_size": s["inner"],
        "num_hidden_layers": 2,
        "num_labels": s["labels"],
    }


def _beit(s: Sizes) -> dict[str, Any]:
    return _vit(s) | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}


def _dino(s: Sizes) -> dict[str, Any]:
    width = s["heads"] * s["head_dim"]
    return _vit({**s, "inner": 0}) | {"mlp_ratio": s["inner_per_width"], "hidden_size": width}


def _resnet(s: Sizes) -> dict[str, Any]:
    return {
        "num_channels": s["colours"],
        "embedding_size": s["stem"],
        "hidden_sizes": [s["stage_0"], s["stage_1"]],
        "depths": [1, 2],
        "layer_type": "basic",
        "num_labels": s["labels"],
    }


def _regnet(s: Sizes) -> dict[str, Any]:
    return {
        "num_channels": s["colours"],
        "embedding_size": s["stem"],
        "hidden_sizes": [s["per_group"] * s["groups_0"], s["per_group"] * s["groups_1"]],
        "groups_width": s["per_group"],
        "depths": [1, 2],
        "layer_type": "y",
        "num_labels": s["labels"],
    }


_HEADS = {"places": 17, "heads": 3, "head_dim": 4, "inner": 21}
_GROUPED = {"places": 40, "kv_heads": 3, "per_kv": 4, "head_dim": 8, "inner": 21}
_OUT = {"vocabulary": "output"}
_LABELS = {"labels": "output"}
_VISION = {"heads": 4, "head_dim": 6, "inner": 21}
_SPEECH = {"batch": 2, "mels": 6, "frames": 10, "length": 5, "vocabulary": 11, "outer": 25}


def _text(name: str, kind: str, sizes: Sizes, options: Options, free: str, **more: str) -> Model:
    return _model(name, kind, TEXT | dict(sizes), options, free=free, fixed=_OUT | more)


def _bart_like(name: str, kind: str, free: str, **fixed: str) -> Model:
    names = ("input_ids", "decoder_input_ids")
    sizes = TEXT | _HEADS | {"outer": 25}
    fixed = _OUT | fixed
    return _model(name, kind, sizes, _bart, _two_texts, free=free, fixed=fixed, positional=names)


def _images(name: str, kind: str, sizes: Sizes, options: Options, free: str) -> Model:
    sizes = IMAGE | dict(sizes)
    return _model(name, kind, sizes, options, _pixels, free=free, fixed=_LABELS)


MODELS = (
    _text("GPT2", "GPT2LMHeadModel", _HEADS, _gpt2, "heads head_dim inner"),
    _text("GPTNeo", "GPTNeoForCausalLM", _HEADS, _gpt_neo, "heads head_dim inner"),
    _text("GPTJ", "GPTJForCausalLM", _HEADS | {"head_dim": 6}, _gptj, "heads inner"),
    _text("OPT", "OPTForCausalLM", _HEADS, _opt, "heads head_dim inner"),
    _text(
        "Bloom",
        "BloomForCausalLM",
        {"heads": 4, "head_dim": 3},
        _bloom,
        "head_dim",
        heads="counts it",
    ),
    _text(
        "Llama", "LlamaForCausalLM", _GROUPED, _llama, "kv_heads per_kv inner", head_dim=CAPTURED
    ),
    _text(
        "Mistral",
        "MistralForCausalLM",
        _GROUPED,
        _llama,
        "kv_heads per_kv inner",
        head_dim=CAPTURED,
    ),
    _text(
        "Gemma",
        "GemmaForCausalLM",
        _GROUPED | {"hidden": 15},
        _gemma,
        "hidden kv_heads per_kv inner",
        head_dim=CAPTURED,
    ),
    _text("XGLM", "XGLMForCausalLM", _HEADS, _xglm, "inner", heads=CAPTURED),
    _text("Bert", "BertForMaskedLM", _HEADS, _bert, "heads head_dim inner"),
    _text("Roberta", "RobertaForMaskedLM", _HEADS, _bert, "heads head_dim inner"),
    _text(
        "RobertaPreLayerNorm",
        "RobertaPreLayerNormForMaskedLM",
        _HEADS,
        _bert,
        "heads head_dim inner",
    ),
    _text("DistilBert", "DistilBertForMaskedLM", _HEADS, _distilbert, "heads head_dim inner"),
    _text(
        "Albert",
        "AlbertForMaskedLM",
        _HEADS | {"embedded": 14},
        _embedded_bert,
        "heads head_dim inner embedded",
    ),
    _text(
        "Electra",
        "ElectraForMaskedLM",
        _HEADS | {"embedded": 14},
        _embedded_bert,
        "heads head_dim inner embedded",
    ),
    _text("BigBird", "BigBirdForMaskedLM", _HEADS, _big_bird, "heads head_dim inner"),
    _bart_like("Bart", "BartForConditionalGeneration", "heads head_dim inner outer"),
    _bart_like("Pegasus", "PegasusForConditionalGeneration", "inner outer", heads=CAPTURED),
    _bart_like("Marian", "MarianMTModel", "inner outer", heads=CAPTURED),
    _bart_like("Blenderbot", "BlenderbotForConditionalGeneration", "heads head_dim inner outer"),
    _model(
        "Whisper",
        "WhisperForConditionalGeneration",
        _SPEECH | _HEADS,
        _whisper,
        lambda s: (
            floats(s["batch"], s["mels"], s["frames"]),
            tokens(s["batch"], s["length"], vocabulary=s["vocabulary"]),
        ),
        free="heads head_dim inner outer",
        fixed=_OUT,
        positional=("input_features", "decoder_input_ids"),
    ),
    _model(
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        {"batch": 2, "samples": 90, "vocabulary": 11, "conv_0": 7, "conv_1": 9}
        | {"heads": 3, "head_dim": 6, "inner": 21},
        _wav2vec2,
        lambda s: (floats(s["batch"], s["samples"]),),
        free="conv_0 conv_1 heads head_dim inner",
        fixed=_OUT,
    ),
    _model(
        "CLIP",
        "CLIPModel",
        TEXT
        | {"places": 17, "side": 16, "text_heads": 3, "text_head_dim": 8, "text_inner": 27}
        | {**_VISION, "projected": 14},
        _clip,
        lambda s: (*_ids(s), floats(s["batch"], 3, s["side"], s["side"])),
        free="text_heads text_head_dim text_inner heads head_dim inner projected",
        fixed={},
        positional=("input_ids", "pixel_values"),
    ),
    _images("ViT", "ViTForImageClassification", _VISION, _vit, "heads head_dim inner"),
    _images("Beit", "BeitForImageClassification", _VISION, _beit, "heads head_dim inner"),
    _images(
        "Dinov2",
        "Dinov2ForImageClassification",
        {"heads": 4, "head_dim": 6, "inner_per_width": 7},
        _dino,
        "heads head_dim inner_per_width",
    ),
    _images(
        "ResNet",
        "ResNetForImageClassification",
        {"stem": 7, "stage_0": 9, "stage_1": 13},
        _resnet,
        "stem stage_0 stage_1",
    ),
    _images(
        "RegNet",
        "RegNetForImageClassification",
        {"stem": 9, "per_group": 4, "groups_0": 6, "groups_1": 7},
        _regnet,
        "stem per_group groups_0 groups_1",
    ),
)
