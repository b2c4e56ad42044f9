"""Small models of random weights with what a Llama's attention hasn't: a softcap, sliding windows, sinks.

Attention is neither flat nor a single peak, and each of these moves the logits by many times what rounding does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from random_model import VOCABULARY

LAYERS, HIDDEN, INNER = 4, 512, 1024
KINDS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "layer_types": KINDS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_gemma2(folder: Path, *, softcap: float = 4.0, window: int = 256) -> str:
    """Writes a model of Gemma-2's kind in bfloat16; returns its path."""
    heads, kv_heads, head_dim = 8, 4, 256
    random = _random()

    def norm(value: float) -> torch.Tensor:
        return torch.full((HIDDEN,), value - 1).bfloat16()  # one more than stored

    # Embeddings are also what logits are made with: layers add more than an embedding has, or each token would be
    # followed by itself.
    weights = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": norm(3.0)}
    for layer in range(LAYERS):
        weights |= {
            f"model.layers.{layer}.{name}.weight": weight
            for name, weight in {
                "self_attn.q_proj": random(heads * head_dim, HIDDEN, spread=2.0),
                "self_attn.k_proj": random(kv_heads * head_dim, HIDDEN, spread=2.0),
                "self_attn.v_proj": random(kv_heads * head_dim, HIDDEN),
                "self_attn.o_proj": random(HIDDEN, heads * head_dim),
                "mlp.gate_proj": random(INNER, HIDDEN),
                "mlp.up_proj": random(INNER, HIDDEN),
                "mlp.down_proj": random(HIDDEN, INNER),
                "input_layernorm": norm(1.0),
                "post_attention_layernorm": norm(12.0),
                "pre_feedforward_layernorm": norm(1.0),
                "post_feedforward_layernorm": norm(12.0),
            }.items()
        }
    config = SHAPE | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": window,
        "attn_logit_softcapping": softcap,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    return _write(folder, config, weights)


def write_gpt_oss(folder: Path, *, sinks: bool = True, window: int = 128) -> str:
    """Writes a model of gpt-oss's kind in bfloat16, experts too; returns its path.

    All experts take part for each token: a choice among them, which rounding may turn, would move logits by more.
    """
    heads, kv_heads, head_dim, experts = 64, 8, 64, 4
    random = _random()
    weights = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN, spread=HIDDEN**0.5),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": random(VOCABULARY, HIDDEN, spread=3.0),
    }
    for layer in range(LAYERS):
        # About the logarithm of what keys sum up to: sinks take half of the mass, in some heads more than in others.
        drawn = 6.5 + 2.0 * random(1, heads).flatten() * heads**0.5
        weights |= {
            f"model.layers.{layer}.{name}": weight
            for name, weight in {
                "self_attn.q_proj.weight": random(heads * head_dim, HIDDEN, spread=1.5),
                "self_attn.q_proj.bias": random(1, heads * head_dim).flatten(),
                "self_attn.k_proj.weight": random(kv_heads * head_dim, HIDDEN, spread=1.5),
                "self_attn.k_proj.bias": random(1, kv_heads * head_dim).flatten(),
                "self_attn.v_proj.weight": random(kv_heads * head_dim, HIDDEN),
                "self_attn.v_proj.bias": random(1, kv_heads * head_dim).flatten(),
                "self_attn.o_proj.weight": random(HIDDEN, heads * head_dim, spread=2.0),
                "self_attn.o_proj.bias": random(1, HIDDEN).flatten(),
                "self_attn.sinks": drawn if sinks else torch.full((heads,), -1e4).bfloat16(),
                "mlp.router.weight": random(experts, HIDDEN),
                "mlp.router.bias": random(1, experts).flatten(),
                "mlp.experts.gate_up_proj": random(experts, 2 * INNER, HIDDEN).transpose(1, 2).contiguous(),
                "mlp.experts.gate_up_proj_bias": random(experts, 2 * INNER),
                "mlp.experts.down_proj": random(experts, HIDDEN, INNER).transpose(1, 2).contiguous(),
                "mlp.experts.down_proj_bias": random(experts, HIDDEN),
                "input_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
                "post_attention_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
            }.items()
        }
    config = SHAPE | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_local_experts": experts,
        "num_experts_per_tok": experts,
        "sliding_window": window,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 1024,
        },
        "tie_word_embeddings": False,
    }
    return _write(folder, config, weights)


def _random() -> Callable[..., torch.Tensor]:
    """Makes matrices whose product with a vector has the spread of the vector, times `spread`."""
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * spread / shape[-1] ** 0.5).bfloat16()

    return matrix


def _write(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> str:
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
