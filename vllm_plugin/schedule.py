"""The kernel's schedule of a step: planned once on the GPU, read by every layer of a KV-cache group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger

from lite_attention import get_scheduler_metadata, scheduler_metadata_size
from vllm_plugin.quantised import FP8
from vllm_plugin.register import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_plugin.impl import LiteAttentionImpl

logger = init_logger(f"vllm.{__name__}")


class StepSchedule:
    """Owns the memory that holds the plan, at one address, because CUDA graphs read it at every replay."""

    def __init__(self, impl: LiteAttentionImpl, page_size: int, vllm_config: VllmConfig, device: torch.device) -> None:
        self.heads = (impl.num_heads, impl.num_kv_heads, impl.head_size)
        self.window_left = impl.window_left
        self.num_splits = impl.num_splits
        self.page_size = page_size
        self.kv_dtype = FP8 if impl.fp8_kv else None
        # What a plan holds for, besides the lengths.
        self.shape = (*self.heads, self.window_left, page_size, self.kv_dtype)
        scheduler = vllm_config.scheduler_config
        tokens = scheduler.max_num_batched_tokens
        # The longest query chooses between the tiles for decode and for prefill: there must be room for either's plan.
        words = max(
            scheduler_metadata_size(
                scheduler.max_num_seqs, tokens, longest, *self.heads, torch.device(device).index or 0
            )
            for longest in (1, tokens)
        )
        self.metadata = torch.zeros(words, dtype=torch.int32, device=device)

    @classmethod
    def for_layers(
        cls, layer_names: list[str], page_size: int, vllm_config: VllmConfig, device: torch.device
    ) -> StepSchedule | None:
        """A schedule for layers of the same shape, or None where they differ and each call has to plan for itself."""
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names).values()
        impls = [layer.impl for layer in layers]
        shapes = {(impl.num_heads, impl.num_kv_heads, impl.head_size, impl.window_left, impl.fp8_kv) for impl in impls}
        if len(shapes) != 1:
            differ = ", ".join(map(str, sorted(shapes)))  # vLLM tells lines it has logged by their arguments: no list
            logger.info_once("%s plans its work in each layer: the layers of a group differ, %s.", NAME, differ)
            return None
        return cls(impls[0], page_size, vllm_config, device)

    def plan(self, common: CommonAttentionMetadata, max_query_len: int) -> torch.Tensor:
        """Plans the step that `common` describes, on the current stream and without waiting.

        `max_query_len` is that of the layers' calls: with it the kernel's tile is chosen.
        """
        return get_scheduler_metadata(
            common.num_reqs,
            max_query_len,
            common.max_seq_len,
            *self.heads,
            cu_seqlens_q=common.query_start_loc,
            total_q=common.num_actual_tokens,
            seqused_k=common.seq_lens,
            causal=common.causal,
            window_size=(self.window_left, 0 if common.causal else self.window_left),
            num_splits=self.num_splits,
            page_size=self.page_size,
            kv_dtype=self.kv_dtype,
            out=self.metadata,
        )
