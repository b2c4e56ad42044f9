"""A small model and tokenizer for tests of the quality measurements."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
LAYERS, HEADS, HEADS_K, HEAD_DIM = 3, 4, 2, 32


def write_model(folder: Path, *, sharp: float = 1.0, **changes) -> Path:
    """A random Llama in float32 whose attention is the more peaked, the larger `sharp`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS_K,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        initializer_range=HEAD_DIM**-0.5,
        **changes,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= sharp
            layer.self_attn.v_proj.weight *= 4
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def write_text(path: Path, words: int, seed: int = 0) -> Path:
    dice = random.Random(seed)
    path.write_text(" ".join(f"w{dice.randrange(VOCABULARY):02d}".replace("w0", "w") for _ in range(words)))
    return path
