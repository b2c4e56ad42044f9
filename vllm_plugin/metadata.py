"""What attention needs to know of a step, built once and shared by the layers of a KV-cache group."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

import lite_attention
from vllm_plugin.graphs import query_len_of_tile
from vllm_plugin.register import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = init_logger(f"vllm.{__name__}")  # below "vllm", whose handlers and level vLLM configures


@dataclass
class LiteAttentionMetadata(AttentionMetadata):
    """One step's batch, its rows in the order of this step. Tensors are int32 views of vLLM's persistent buffers."""

    num_actual_tokens: int  # without the padding of query, key, value and output
    max_query_len: int  # chooses the kernel's tile; may be less than the longest query in CUDA graphs (graphs.py)
    query_start_loc: torch.Tensor  # (num_reqs + 1,)
    max_seq_len: int  # an upper bound where the host does not know the lengths; the model's limit in CUDA graphs
    seq_lens: torch.Tensor  # (num_reqs,), context and query; 0 in rows that pad a CUDA graph's batch
    block_table: torch.Tensor  # (num_reqs, max_blocks); entries beyond a request's pages are arbitrary
    slot_mapping: torch.Tensor  # (num_tokens,), int64 in spite of the above
    causal: bool
    scheduler_metadata: torch.Tensor | None = None  # the kernel's schedule for this step; without, each call plans
    planned_for: tuple[object, ...] | None = None  # `StepSchedule.shape` of the schedule


class LiteAttentionMetadataBuilder(AttentionMetadataBuilder[LiteAttentionMetadata]):
    """Copies nothing and never waits for the device, so that a step can be built while the one before it runs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_update_block_table: bool = True

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.schedule = None
        self.on_gpu = not current_platform.is_cpu()
        if self.on_gpu:
            from vllm_plugin.schedule import StepSchedule

            self.schedule = StepSchedule.for_layers(layer_names, kv_cache_spec.block_size, vllm_config, device)
        logger.info_once(
            "%s %s computes attention by %s: %d layers from %s, %d KV heads, head size %d, %s, pages of %d tokens.",
            NAME,
            lite_attention.__version__,
            "the CPU path" if current_platform.is_cpu() else f"the kernel for {current_platform.get_device_name()}",
            len(layer_names),
            layer_names[0] if layer_names else "none",
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            str(kv_cache_spec.dtype).removeprefix("torch."),
            kv_cache_spec.block_size,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LiteAttentionMetadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError(
                f"{NAME} has one causal mask for all requests of a batch: causal must be True or False, not a tensor."
            )
        max_query_len = query_len_of_tile(common, self.vllm_config) if self.on_gpu else common.max_query_len
        return LiteAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            scheduler_metadata=self.schedule and self.schedule.plan(common, max_query_len),
            planned_for=self.schedule and self.schedule.shape,
        )

    def update_block_table(
        self, metadata: LiteAttentionMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> LiteAttentionMetadata:
        """The same step for another KV-cache group: other pages, the same lengths."""
        other = copy.copy(metadata)
        other.block_table = blk_table
        other.slot_mapping = slot_mapping
        if self.schedule is None or self.schedule.shape != metadata.planned_for:
            other.scheduler_metadata = None  # the plan of layers with other heads, window or pages
        return other

    def use_cascade_attention(self, *args: object, **kwargs: object) -> bool:  # 0.26 - 0.31
        return False
