"""The FP8 KV cache: vLLM keeps it as bytes, E4M3, each value divided by its layer's scale.

The scales are tensors of the layer, `_k_scale` and `_v_scale`: one value, 1 where the checkpoint has none, or one for
each KV head, where the checkpoint has those.
"""

from __future__ import annotations

import torch

FP8_KV_CACHE = ("fp8", "fp8_e4m3")  # two names of vLLM's for the same
FP8 = torch.float8_e4m3fn


def is_fp8(kv_cache_dtype: str) -> bool:
    return kv_cache_dtype in FP8_KV_CACHE


def quantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (tokens, heads, head_size) as it goes into the cache: E4M3, what lies beyond its range at its ends.

    scale: (), (1,) or (heads,).
    """
    largest = torch.finfo(FP8).max
    return (x.float() / scale.reshape(-1, 1)).clamp(-largest, largest).to(FP8)
