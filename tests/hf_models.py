"""Small models of transformers with random weights, in directories; needs PyTorch."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 53,
    "n_positions": 40,
    "n_embd": 24,
    "n_head": 6,
    "n_inner": 44,
    "n_layer": 2,
}
OPT = {**SIZES, "ffn_dim": 44, "word_embed_proj_dim": 24}
del OPT["intermediate_size"]

IDS = np.arange(21).reshape(3, 7) * 5 % 53


class Kind(NamedTuple):
    """A class of transformers and how to make a small one."""

    name: str
    config: str
    sizes: dict[str, Any]

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("LlamaForCausalLM", "LlamaConfig", GROUPED),
    Kind("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 5}),
    Kind("Qwen2ForCausalLM", "Qwen2Config", GROUPED | {"tie_word_embeddings": True}),
    Kind("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
    Kind("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 10}),
    Kind("GPT2LMHeadModel", "GPT2Config", GPT2),
    Kind("OPTForCausalLM", "OPTConfig", OPT),
    Kind("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | {"rotary_pct": 0.5}),
    Kind("OlmoForCausalLM", "OlmoConfig", GROUPED),
    Kind("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    Kind("BertForMaskedLM", "BertConfig", SIZES),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def made(kind: Kind, **more: Any) -> Any:
    """A model with random weights, of which none is zero or one."""
    import torch
    import transformers

    sizes = kind.sizes | more
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, kind.config)(**sizes, **special)
    torch.manual_seed(7)
    model = getattr(transformers, kind.name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    return model


def saved(kind: Kind, folder: Path, **more: Any) -> Path:
    """A directory of it."""
    shards = {"max_shard_size": more.pop("max_shard_size")} if "max_shard_size" in more else {}
    dtype = more.pop("dtype", None)
    model = made(kind, **more)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, **shards)
    return folder


def outputs(kind: Kind, folder: Path) -> np.ndarray:
    """The first output in PyTorch, in float32; refuses tensors that are missing or too many."""
    import torch
    import transformers

    model, info = getattr(transformers, kind.name).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS))[0].numpy()
