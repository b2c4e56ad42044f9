"""Turns a Llama-architecture GGUF file into a Hugging Face model directory.

vLLM and transformers load such a directory as they load any model of the hub. transformers' own GGUF loader is not
used: it drops the digit splitting of SmolLM2's tokenizer, and it needs a package that vLLM does not bring.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_reader import GGUFError, GGUFFile
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


def rope_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows of a query or key projection from llama.cpp's RoPE to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + head_dim / 2), as in GPT-NeoX.
    `weight` is (num_heads * head_dim, hidden_size).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _hf_name(name: str) -> str:
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    prefix, *parts = name.split(".")
    if prefix != "blk" or len(parts) != 3 or parts[1] not in _LAYER_NAMES:
        raise GGUFError(f"tensor {name} has no place in a Llama model")
    layer, module, kind = parts
    return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"


def model_weights(gguf: GGUFFile) -> dict[str, torch.Tensor]:
    """All weights in bfloat16, under their Hugging Face names."""
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    weights = {}
    for name in gguf.tensors:
        array = gguf.tensor(name)
        module = name.split(".")[-2]
        if module in heads:
            array = rope_halves(array, gguf.metadata[heads[module]])
        weights[_hf_name(name)] = torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16)
    return weights


def model_config(gguf: GGUFFile) -> dict[str, Any]:
    """The content of config.json."""

    def value(key: str) -> Any:
        return gguf.metadata[f"llama.{key}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(gguf.metadata["tokenizer.ggml.tokens"]),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": round(value("attention.layer_norm_rms_epsilon"), 12),  # undo the float32 rounding: 1e-05
        "rope_theta": value("rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "bfloat16",
        **_special_token_ids(gguf),
    }


def _special_token_ids(gguf: GGUFFile) -> dict[str, int]:
    return {
        "bos_token_id": gguf.metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": gguf.metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": gguf.metadata["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(gguf: GGUFFile) -> Tokenizer:
    """The byte-level BPE tokenizer: control tokens are matched first, and every digit is a token of its own."""
    kind = (gguf.metadata["tokenizer.ggml.model"], gguf.metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise GGUFError(f"tokenizer {kind} is not supported, only ('gpt2', 'smollm') is")
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in gguf.metadata["tokenizer.ggml.merges"]]
    result = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    result.decoder = decoders.ByteLevel()
    types = gguf.metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return result


def tokenizer_config(gguf: GGUFFile) -> dict[str, Any]:
    """The content of tokenizer_config.json, with the chat template."""
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    ids = {**_special_token_ids(gguf), "unk_token_id": gguf.metadata["tokenizer.ggml.unknown_token_id"]}
    named = {key.removesuffix("_id"): tokens[i] for key, i in ids.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": gguf.metadata["tokenizer.chat_template"],
        **named,
    }


def convert(source: str | Path, directory: str | Path) -> None:
    """Writes the model of the GGUF file `source` into the existing `directory`, in bfloat16.

    Raises GGUFError where the file is damaged, not a Llama model, or holds a tensor type or a tokenizer that is not
    supported.
    """
    directory = Path(directory)
    with GGUFFile(source) as gguf:
        architecture = gguf.metadata.get("general.architecture")
        if architecture != "llama":
            raise GGUFError(f"architecture {architecture!r} is not supported, only 'llama' is")
        weights = directory / "model.safetensors"
        save_file(model_weights(gguf), weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors leaves it to its owner alone, but a container serves it as another user
        tokenizer(gguf).save(str(directory / "tokenizer.json"))
        for name, content in {
            "config.json": model_config(gguf),
            "generation_config.json": _special_token_ids(gguf),
            "tokenizer_config.json": tokenizer_config(gguf),
        }.items():
            (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
