"""How many sequences fit into memory at once."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

CPU_BYTES = 4 << 30
GPU_SHARE = 0.5  # of what is free; the rest is for activations and logits


def most_sequences(model: PreTrainedModel, tokens: int) -> int:
    """Sequences of so many tokens whose caches fit, 1 or more: a half of a GPU's free memory, or 4 GiB of a CPU's."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads_k = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    each = config.num_hidden_layers * 2 * heads_k * head_dim * model.dtype.itemsize * tokens
    return max(1, int(_room(model.device) // each))


def _room(device: torch.device) -> float:
    if device.type == "cpu":
        return CPU_BYTES
    torch.cuda.empty_cache()  # what caches before this one held
    return GPU_SHARE * torch.cuda.mem_get_info(device)[0]
