"""A small Llama of random weights, whose attention is neither flat nor a single peak: for what needs no real text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

VOCABULARY = 1000


def write(
    folder: Path,
    *,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    context: int = 2048,
    vocabulary: int = VOCABULARY,
) -> str:
    """Writes the model in bfloat16; returns its path."""
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
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


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
