"""A small Llama of random weights, whose attention is neither flat nor a single peak: for what needs no real text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

VOCABULARY = 1000
# Of an engine that serves such a model on a GPU beside others: prompts in chunks, logits to compare.
SMALL_ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "seed": 0,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 28,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "logprobs_mode": "raw_logits",
}


def write(
    folder: Path,
    *,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    context: int = 2048,
    vocabulary: int = VOCABULARY,
    by_head: bool = False,
    window: int | None = None,
) -> str:
    """Writes the model in bfloat16; returns its path.

    With `window` each token attends to that many only in every other layer, from the first on.

    With `by_head` keys and values of a KV head are far from 1, up or down, and what reads them makes up for it: all by
    powers of two, so that it is the same model. With the scales that the checkpoint has for each head an FP8 cache
    holds the same bytes, too; with any other ones it overflows.
    """
    from safetensors.torch import save_file

    hidden, inner = 512, 1024
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * spread / columns**0.5).bfloat16()

    weights = {"model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator).bfloat16()}
    for layer in range(layers):
        weights |= {
            f"model.layers.{layer}.{name}.weight": weight
            for name, weight in {
                "self_attn.q_proj": matrix(heads * head_dim, hidden, 1.5),
                "self_attn.k_proj": matrix(kv_heads * head_dim, hidden, 1.5),
                "self_attn.v_proj": matrix(kv_heads * head_dim, hidden),
                "self_attn.o_proj": matrix(hidden, heads * head_dim),
                "mlp.gate_proj": matrix(inner, hidden),
                "mlp.up_proj": matrix(inner, hidden),
                "mlp.down_proj": matrix(hidden, inner),
                "input_layernorm": torch.ones(hidden).bfloat16(),
                "post_attention_layernorm": torch.ones(hidden).bfloat16(),
            }.items()
        }
    weights |= {"model.norm.weight": torch.ones(hidden).bfloat16(), "lm_head.weight": matrix(vocabulary, hidden, 3.0)}
    quantisation = {}
    if by_head:
        for layer in range(layers):
            _scale_heads(weights, f"model.layers.{layer}.self_attn", heads, kv_heads)
        quantisation = {"quantization_config": FP8_BY_HEAD}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if window is not None:
        kinds = ["sliding_attention", "full_attention"]
        config |= {"sliding_window": window, "layer_types": [kinds[layer % 2] for layer in range(layers)]}
    (folder / "config.json").write_text(json.dumps(config | quantisation))
    return str(folder)


# As llm-compressor writes it for an FP8 KV cache alone.
FP8_BY_HEAD = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": [],
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "float",
        "strategy": "attn_head",
        "symmetric": True,
        "dynamic": False,
    },
}


def _scale_heads(weights: dict[str, torch.Tensor], attention: str, heads: int, kv_heads: int) -> None:
    """Multiplies keys by 2^8 and values by 2^-8 in even KV heads, the other way round in odd ones."""
    keys = torch.tensor([2.0**8, 2.0**-8]).repeat(kv_heads)[:kv_heads]
    for name, factors in (("k", keys), ("v", 1 / keys)):
        weights[f"{attention}.{name}_proj.weight"] = _times(weights[f"{attention}.{name}_proj.weight"], factors)
        weights[f"{attention}.{name}_scale"] = factors[:, None, None].clone()
    of_queries = keys.repeat_interleave(heads // kv_heads)
    weights[f"{attention}.q_proj.weight"] = _times(weights[f"{attention}.q_proj.weight"], 1 / of_queries)
    weights[f"{attention}.o_proj.weight"] = _times(weights[f"{attention}.o_proj.weight"].T, of_queries).T.contiguous()


def _times(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Rows of each head times its factor."""
    return (weight.unflatten(0, (len(factors), -1)) * factors[:, None, None].to(weight.dtype)).flatten(0, 1)


def write_with_tokenizer(folder: Path, model: str, **shape: int) -> str:
    """The same with the tokenizer of `model`, so that prompts can be text. What follows on them is none."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model, name), folder)
    vocabulary = json.loads(Path(model, "config.json").read_text())["vocab_size"]
    return write(folder, vocabulary=vocabulary, **shape)


def prompts(*lengths: int) -> list[list[int]]:
    """Token ids, the same each time."""
    return [[(17 + 7919 * i + 101 * t * t) % VOCABULARY for t in range(n)] for i, n in enumerate(lengths)]


def logits_apart(first: dict, second: dict) -> float:
    """Mean difference of the logits of two runs' rounds, at the first new token of each prompt, of tokens in both."""
    differences = []
    for (left,), (right,) in zip(first["best"], second["best"], strict=True):
        both = left[0].keys() & right[0].keys()
        differences += [abs(left[0][token] - right[0][token]) for token in both]
    return sum(differences) / len(differences)
