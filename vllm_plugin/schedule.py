"""The kernels' schedule of a step: planned once on the GPU, read by every layer of a KV-cache group.

Its memory stays at one address, because CUDA graphs read it at every replay.
"""

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

    from vllm_plugin.decoding import Decoding
    from vllm_plugin.impl import LiteAttentionImpl

logger = init_logger(f"vllm.{__name__}")


class StepSchedule:
    """Owns the memory that holds the plan of dense attention."""

    def __init__(self, impl: LiteAttentionImpl, page_size: int, vllm_config: VllmConfig, device: torch.device) -> None:
        self.heads = (impl.num_heads, impl.num_kv_heads, impl.head_size)
        self.window_left = impl.window_left
        self.num_splits = impl.num_splits
        self.page_size = page_size
        self.kv_dtype = FP8 if impl.fp8_kv else None
        # What a plan holds for, besides the lengths.
        self.shape = (*self.heads, self.window_left, page_size, self.kv_dtype)
        # The longest query chooses between the tiles for decode and for prefill: there must be room for either's plan.
        longest = 1, vllm_config.scheduler_config.max_num_batched_tokens
        self.metadata = _room(self.heads, longest, vllm_config, device)

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


class DecodingSchedule:
    """Owns the memory that holds the plan of the rows that decode from lists: a step may have both plans."""

    def __init__(
        self,
        layers: StepSchedule,
        decode_len: int,
        min_context: int,
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """For the layers of that schedule; `decode_len`: the most query tokens of a decoding row."""
        self.layers = layers
        self.min_context = min_context
        self.metadata = _room(layers.heads, (decode_len,), vllm_config, device)

    def plan(self, rows: Decoding) -> torch.Tensor:
        """Plans attention of these rows, on the current stream and without waiting. Layers may differ in their eps."""
        return get_scheduler_metadata(
            rows.seq_lens.shape[0],
            rows.max_query_len,
            rows.block_table.shape[1] * self.layers.page_size,
            *self.layers.heads,
            cu_seqlens_q=rows.query_start_loc,
            total_q=rows.tokens,
            seqused_k=rows.seq_lens,
            causal=True,
            num_splits=self.layers.num_splits,
            page_size=self.layers.page_size,
            kv_dtype=self.layers.kv_dtype,
            out=self.metadata,
            min_context=self.min_context,
            whole=rows.whole,
        )


def _room(
    heads: tuple[int, int, int], longest: tuple[int, ...], vllm_config: VllmConfig, device: torch.device
) -> torch.Tensor:
    """Memory for the plan of any step whose longest query is one of these."""
    scheduler = vllm_config.scheduler_config
    step = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    index = torch.device(device).index or 0
    words = max(scheduler_metadata_size(*step, each, *heads, index) for each in longest)
    return torch.zeros(words, dtype=torch.int32, device=device)
