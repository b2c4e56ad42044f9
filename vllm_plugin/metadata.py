"""What attention needs to know of a step, built once and shared by the layers of a KV-cache group."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

import lite_attention
from vllm_plugin import arrivals, connectors, metrics, settings, sketches, stage, warmup
from vllm_plugin.decoding import Decoding, DecodingSplit, after
from vllm_plugin.graphs import query_len_of_tile
from vllm_plugin.listing import Listing, layer_index
from vllm_plugin.register import NAME
from vllm_plugin.tally import GROUPS, Tally

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_plugin.schedule import DecodingSchedule

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
    # For layers that decode from lists:
    filled: torch.Tensor | None = None  # int32 (num_tokens,), the page that each token completes, or -1
    arrived: torch.Tensor | None = None  # int32 (n,), the pages that requests begin with (arrivals.py)
    decoding: Decoding | None = None  # the rows at the head of the step that decode
    others: LiteAttentionMetadata | None = None  # the step's other rows, as a step
    decoding_schedule: DecodingSchedule | None = None  # plans `decoding`; None where each layer does

    def lead(self) -> None:
        """Works out `filled` and the plan of the rows that decode: by the first layer of the group, in every step.

        In a CUDA graph this is replayed with the layers, and costs the host nothing.
        """
        DecodingSplit.find_filled(self.slot_mapping, self.filled)
        if self.decoding is not None and self.decoding_schedule is not None:
            self.decoding_schedule.plan(self.decoding)


class LiteAttentionMetadataBuilder(AttentionMetadataBuilder[LiteAttentionMetadata]):
    """Copies nothing and never waits for the device, so that a step can be built while the one before it runs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_update_block_table: bool = True

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """With lists, graphs of decode steps alone: one for all steps would not know which of its rows decode."""
        if settings.of(vllm_config).enabled:
            return AttentionCGSupport.UNIFORM_BATCH
        return cls._cudagraph_support

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.schedule = None
        self.on_gpu = not current_platform.is_cpu()
        if self.on_gpu:
            from vllm_plugin.schedule import StepSchedule

            self.schedule = StepSchedule.for_layers(layer_names, kv_cache_spec.block_size, vllm_config, device)
        if place := stage.told(vllm_config):
            logger.info(
                "%s %s computes attention by %s: %d layers from %s (%s); on each worker %d KV heads, head size %d, %s, "
                "pages of %d tokens.",
                NAME,
                lite_attention.__version__,
                f"the kernel for {current_platform.get_device_name()}" if self.on_gpu else "the CPU path",
                len(layer_names),
                layer_names[0] if layer_names else "none",
                place,
                kv_cache_spec.num_kv_heads,
                kv_cache_spec.head_size,
                str(kv_cache_spec.dtype).removeprefix("torch."),
                kv_cache_spec.block_size,
            )
        self.split: DecodingSplit | None = None
        self.decoding_schedule: DecodingSchedule | None = None
        if listed := self._listed_layers():
            self._prepare_lists(listed)

    def _listed_layers(self) -> list[tuple[int, Listing]]:
        """Index and listing of each layer of the group that decodes from lists, in the order of the model."""
        from vllm.model_executor.layers.attention import Attention

        if self.kv_cache_spec.page_size_padded is None:  # no room for sketches
            return []
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        listings = [(layer_index(name), getattr(layer.impl, "listing", None), name) for name, layer in layers.items()]
        found = [(index, listing) for index, listing, name in listings if listing is not None and listing.wants(name)]
        return sorted(found, key=lambda each: each[0])

    def _prepare_lists(self, listed: list[tuple[int, Listing]]) -> None:
        first = listed[0][1]
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        first.check(self.vllm_config, self.reorder_batch_threshold)
        self.supports_update_block_table = False  # pages that fill are worked out from each group's own slots
        self.split = DecodingSplit(self.reorder_batch_threshold, self.vllm_config, self.device)
        self.only_listed = len(listed) == len(self.layer_names)
        self.decoding_schedule = self._decoding_schedule(first.settings.min_context)
        pages = self.vllm_config.cache_config.num_gpu_blocks or 0
        room = sketches.room(self.kv_cache_spec, first.settings.sketch_bits)
        sketch_bytes = len(listed) * pages * room
        self.tally = Tally(
            [min(index * len(GROUPS) // first.layers, len(GROUPS) - 1) for index, _ in listed],
            self.vllm_config.scheduler_config.max_num_seqs,
            first.num_heads,
            first.num_kv_heads,
            first.settings.min_context,
            sketch_bytes,
            self.device,
        )
        for slot, (index, listing) in enumerate(listed):
            listing.join(self.tally, slot, index)
        metrics.publish(self.layer_names[0], self.tally)
        if self.on_gpu:
            warmup.install()
        if connectors.name_of(self.vllm_config) is not None:
            arrivals.install()
        if place := stage.told(self.vllm_config):
            logger.info(
                "%s decodes from listed pages: eps %s, min_context %d, newest %d, dense_layers %s, sketch_bits %d; "
                "%d of %d layers, from %s (%s). On each worker sketches take %.1f MiB, %.2f %% of the KV cache; lists "
                "%.1f MiB, and while they are made up to %.1f MiB more.",
                NAME,
                _eps_told(listed),
                first.settings.min_context,
                first.settings.newest,
                str(list(first.settings.dense_layers)),
                first.settings.sketch_bits,
                len(listed),
                len(self.layer_names),
                self.layer_names[0],
                place,
                sketch_bytes / 2**20,
                100 * room / self.kv_cache_spec.page_size_bytes,
                first.memory.nbytes / 2**20,
                first.scratch_bytes / 2**20,
            )

    def _decoding_schedule(self, min_context: int) -> DecodingSchedule | None:
        """None where each layer plans for itself, and with num_splits=1, with which lists have no use for a plan."""
        if self.schedule is None or self.schedule.num_splits == 1:
            return None
        from vllm_plugin.schedule import DecodingSchedule

        return DecodingSchedule(self.schedule, self.reorder_batch_threshold, min_context, self.vllm_config, self.device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LiteAttentionMetadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError(
                f"{NAME} has one causal mask for all requests of a batch: causal must be True or False, not a tensor."
            )
        if self.split is None:
            return self._step(common)
        if not self.tally.serving and common.is_prefilling is not None and bool(common.is_prefilling.any()):
            self.tally.start()  # the first step with a prompt
        decoding = self.split.leading(common)
        step = self._step(common, plan=decoding is None or not self.only_listed)
        step.filled = self.split.room(common.slot_mapping)
        step.arrived = arrivals.of_step(self.layer_names[0])
        step.decoding = decoding
        step.decoding_schedule = self.decoding_schedule
        if decoding is not None and self.decoding_schedule is not None:
            decoding.scheduler_metadata = self.decoding_schedule.metadata
        if decoding is None:
            step.others = copy.copy(step)
        elif (others := after(common, decoding)) is not None:
            step.others = self._step(others, plan=self.only_listed)
        return step

    def _step(self, common: CommonAttentionMetadata, plan: bool = True) -> LiteAttentionMetadata:
        """All rows of `common` as a step of dense attention. There is room for one such plan: not for two in a step."""
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
            scheduler_metadata=self.schedule.plan(common, max_query_len) if self.schedule and plan else None,
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


def _eps_told(listed: list[tuple[int, Listing]]) -> str:
    """The eps of the layers, and how many have one of their own, for the log."""
    settings, layers = listed[0][1].settings, listed[0][1].layers
    own = [listing.eps for index, listing in listed if settings.own_eps(index, layers) is not None]
    told = f" (layers with their own: {len(own)}, from {min(own):g} to {max(own):g})" if own else ""
    return f"{settings.eps:g}{told}"
