"""Which rows of a step decode, and which pages a step fills: worked out once for the layers of a KV-cache group."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder

from lite_attention.pages import PAGE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


def longest_decode(vllm_config: VllmConfig) -> int:
    """The most query tokens of a decoding row, 1 and the speculative ones, by the rule that vLLM has for builders."""
    asks = SimpleNamespace(vllm_config=vllm_config)  # a layer needs it before there is a builder
    AttentionMetadataBuilder._init_reorder_batch_threshold(asks, 1, supports_spec_as_decode=True)
    return asks.reorder_batch_threshold


@dataclass
class Decoding:
    """The leading rows of a step that decode from lists. Tensors are views of persistent buffers."""

    tokens: int  # of these rows; those of the step's other rows come after
    max_query_len: int
    query_start_loc: torch.Tensor  # int32 (rows + 1,)
    seq_lens: torch.Tensor  # int32 (rows,); 0 in rows that pad a CUDA graph's batch
    block_table: torch.Tensor  # int32 (rows, blocks)
    whole: torch.Tensor  # bool (rows,): part of a prompt as short as a decode step, attended to densely
    scheduler_metadata: torch.Tensor | None = None  # the plan of these rows; without, each layer makes its own


class DecodingSplit:
    """Owns what CUDA graphs read, at one address: the pages that fill, and which rows are whole."""

    def __init__(self, decode_len: int, vllm_config: VllmConfig, device: torch.device) -> None:
        """`decode_len`: the most query tokens of a decoding row, 1 and the speculative ones."""
        self.decode_len = decode_len
        scheduler = vllm_config.scheduler_config
        # A step of a draft model has more tokens by a few for each request.
        tokens = scheduler.max_num_batched_tokens + decode_len * scheduler.max_num_seqs
        self._filled = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        self._whole = torch.zeros(scheduler.max_num_seqs, dtype=torch.bool, device=device)
        self._some_whole = False

    def room(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        """Where `find_filled` puts what it finds of so many slots."""
        return self._filled[: slot_mapping.shape[0]]

    @staticmethod
    def find_filled(slot_mapping: torch.Tensor, filled: torch.Tensor) -> None:
        """For each token of a step the page that it completes, or -1. Slots are int64, negative where there is none."""
        page = slot_mapping.div(PAGE, rounding_mode="floor")
        filled.copy_(page.where(slot_mapping.remainder(PAGE) == PAGE - 1, -1))

    def leading(self, common: CommonAttentionMetadata) -> Decoding | None:
        """The rows at the head of the batch with no more than `decode_len` tokens, where vLLM puts them."""
        rows = self._leading_rows(common)
        if rows == 0 or not common.causal:
            return None
        all_rows = rows == common.num_reqs
        return Decoding(
            tokens=common.num_actual_tokens if all_rows else int(common.query_start_loc_cpu[rows]),
            max_query_len=self.decode_len,
            query_start_loc=common.query_start_loc[: rows + 1],
            seq_lens=common.seq_lens[:rows],
            block_table=common.block_table_tensor[:rows],
            whole=self._mark_whole(common.is_prefilling, rows),
        )

    def _leading_rows(self, common: CommonAttentionMetadata) -> int:
        if common.max_query_len <= self.decode_len:
            return common.num_reqs
        longer = (common.query_start_loc_cpu.diff() > self.decode_len).nonzero()
        return int(longer[0]) if longer.numel() else common.num_reqs

    def _mark_whole(self, is_prefilling: torch.Tensor | None, rows: int) -> torch.Tensor:
        """Marks rows that are part of a prompt: whether a token is decoded mustn't depend on how vLLM cuts prompts."""
        some = is_prefilling is not None and bool(is_prefilling[:rows].any())
        if some or self._some_whole:
            self._whole.zero_()
        if some:
            marks = is_prefilling[:rows]
            self._whole[: marks.shape[0]].copy_(marks, non_blocking=True)
        self._some_whole = some
        return self._whole[:rows]


def after(common: CommonAttentionMetadata, decoding: Decoding) -> CommonAttentionMetadata | None:
    """The rows that are not in `decoding`, as a batch of their own; None where there are none."""
    rows = decoding.seq_lens.shape[0]
    if rows == common.num_reqs:
        return None
    others = copy.copy(common)
    others.num_reqs = common.num_reqs - rows
    others.num_actual_tokens = common.num_actual_tokens - decoding.tokens
    others.query_start_loc = common.query_start_loc[rows:] - decoding.tokens
    others.query_start_loc_cpu = common.query_start_loc_cpu[rows:] - decoding.tokens
    others.seq_lens = common.seq_lens[rows:]
    others.block_table_tensor = common.block_table_tensor[rows:]
    others.slot_mapping = common.slot_mapping[decoding.tokens :]
    return others
