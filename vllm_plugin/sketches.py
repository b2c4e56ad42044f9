"""Where sketches lie: behind the keys and values of their page, in vLLM's KV cache.

A page that is longer by its sketches is one to vLLM's memory plan, and what shares pages or takes them from a request,
prefix caching and preemption, does so with their sketches. KV connectors may bring keys and values alone: then their
sketches are made here (`arrivals`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from lite_attention.pages import PAGE, sketch_bytes
from vllm_plugin.settings import KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

LINE = 256  # bytes: two lines of the L2 cache


def install() -> None:
    """Wraps `Attention.get_kv_cache_spec`, once, to ask a layer that decodes from lists for the room of its sketches.

    From 0.28 on backends have `customize_spec` for that; it isn't told which layer it is about.
    """
    from vllm.model_executor.layers.attention import Attention

    original = Attention.get_kv_cache_spec
    if hasattr(original, "makes_room_for_sketches"):
        return

    @functools.wraps(original)
    def wrapper(self: Attention, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = original(self, vllm_config)
        listing = getattr(self.impl, "listing", None)
        if listing is None or not listing.wants(self.layer_name):
            return spec
        return with_room(spec, self.layer_name, listing.settings.sketch_bits)

    wrapper.makes_room_for_sketches = True
    Attention.get_kv_cache_spec = wrapper


def with_room(spec: Any, layer_name: str, bits: int) -> FullAttentionSpec:
    """The spec of a layer whose pages have room for sketches of so many bits a channel.

    Raises:
        ValueError: pages of other than 16 tokens.
        NotImplementedError: a layer whose pages have another form.
    """
    if type(spec) is not FullAttentionSpec or spec.page_size_padded is not None or spec.head_size_v != spec.head_size:
        raise NotImplementedError(
            f"additional_config[{KEY!r}]: {layer_name} can't decode from listed pages, its KV cache being {spec}; name "
            "the layer in 'dense_layers', or set 'pages' to false"
        )
    if spec.block_size != PAGE:
        raise ValueError(
            f"block_size: got {spec.block_size}; decoding from listed pages needs {PAGE}: --block-size {PAGE}, or "
            f"additional_config[{KEY!r}] with 'pages' false"
        )
    return dataclasses.replace(spec, page_size_padded=spec.page_size_bytes + room(spec, bits))


def room(spec: FullAttentionSpec, bits: int) -> int:
    """Bytes by which sketches make a page longer: their own, and what lets the next page begin at a multiple of 256.

    Rows of keys of a page that begins elsewhere may lie across cache lines: with pages 8416 bytes apart attention over
    lists took 1.4 times as long as with 8192 (head dimension 64, two KV heads, H200).
    """
    page = dataclasses.replace(spec, page_size_padded=None).page_size_bytes
    return -(-(page + spec.num_kv_heads * sketch_bytes(spec.head_size, bits)) // LINE) * LINE - page


def view(kv_cache: torch.Tensor, head_size: int, bits: int) -> torch.Tensor:
    """The sketches, uint8 (num_blocks, num_kv_heads, bytes), of a cache (num_blocks, num_kv_heads, 16, 2 * head_size).

    The order of heads and tokens in memory doesn't matter: a page is in one piece, and its sketches come after it.
    """
    raw = kv_cache.view(torch.uint8)
    blocks, heads = raw.shape[:2]
    size = sketch_bytes(head_size, bits)
    page = raw[0].numel()
    if raw.stride(0) < page + heads * size:
        raise RuntimeError(f"pages of {page} bytes at a distance of {raw.stride(0)} have no room for {heads} sketches")
    return raw.as_strided((blocks, heads, size), (raw.stride(0), size, 1), raw.storage_offset() + page)
