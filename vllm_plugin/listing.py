"""Decoding from listed pages in one layer, and the memory that layers share for it."""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

from lite_attention.pages import PAGE, PageLists, decode_pages, select_scratch_bytes, write_sketch
from lite_attention.pages.hopper import MAX_QUERIES
from lite_attention.skip.bits import words
from vllm_plugin import connectors, sketches
from vllm_plugin.decoding import longest_decode
from vllm_plugin.settings import KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugin.decoding import Decoding
    from vllm_plugin.settings import PageSettings
    from vllm_plugin.tally import Tally


class ListMemory:
    """Room for the lists of one layer: layers of the same shape use it one after the other.

    It is made with the first of them, while the model loads, so that vLLM counts it before it plans the KV cache; and
    it stays at its address, because CUDA graphs write there.
    """

    def __init__(self, rows: int, heads_k: int, blocks: int, device: str) -> None:
        """For `rows` requests of at most `blocks` pages."""
        self.heads_k, self.blocks = heads_k, blocks
        self._bits = torch.zeros(rows * heads_k * words(blocks), dtype=torch.int32, device=device)
        self._indices = torch.zeros(rows * heads_k * blocks, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self._bits.nbytes + self._indices.nbytes

    def lists(self, rows: int, blocks: int, counts: torch.Tensor, left_out: torch.Tensor) -> PageLists:
        """Lists for a batch with a block table (rows, blocks), with `counts` and `left_out` in memory of the caller."""
        bits, indices = (rows, self.heads_k, words(blocks)), (rows, self.heads_k, blocks)
        return PageLists(
            bits=self._bits[: math.prod(bits)].view(bits),
            indices=self._indices[: math.prod(indices)].view(indices),
            counts=counts,
            left_out=left_out,
        )


shared = functools.lru_cache(maxsize=None)(ListMemory)


def layer_index(layer_name: str) -> int:
    """The first number in a layer's name, "model.layers.3.self_attn.attn"."""
    return int(re.search(r"\d+", layer_name).group())


class Listing:
    """A layer that decodes from lists.

    Attributes:
        settings: the engine's.
        memory: where lists are written.
        scratch_bytes: what a step takes of the allocator while it makes the lists, at most; 0 on the CPU.
        tally: counts what the layers of a KV-cache group read; the layer's place in it is `slot`.
        eps: of this layer: a number of the host, which CUDA graphs keep as they were captured.
            The metadata builder gives these three by `join`: it knows which layer this is.
    """

    def __init__(
        self, settings: PageSettings, vllm_config: VllmConfig, num_heads: int, num_kv_heads: int, head_size: int
    ) -> None:
        self.settings = settings
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.layers = vllm_config.model_config.get_total_num_hidden_layers()
        blocks = -(-vllm_config.model_config.max_model_len // PAGE)
        device = vllm_config.device_config.device_type
        rows = vllm_config.scheduler_config.max_num_seqs
        self.memory = shared(rows, num_kv_heads, blocks, device)
        self.scratch_bytes = 0
        if not current_platform.is_cpu() and blocks * PAGE >= settings.min_context:
            of_rows = num_heads, num_kv_heads, longest_decode(vllm_config)
            self.scratch_bytes = select_scratch_bytes(rows, *of_rows, blocks)
        self.tally: Tally | None = None
        self.slot = 0
        self.eps = settings.eps

    def join(self, tally: Tally, slot: int, layer: int) -> None:
        """Makes this the model's layer of that index, and of that place in the tally."""
        self.tally, self.slot = tally, slot
        own = self.settings.own_eps(layer, self.layers)
        self.eps = self.settings.eps if own is None else own

    @property
    def leads(self) -> bool:
        """Whether this is the first of its group's layers, which works out what all of them need of a step."""
        return self.slot == 0

    def check(self, vllm_config: VllmConfig, decode_len: int) -> None:
        """Raises NotImplementedError where an engine does what lists can't. `decode_len`: tokens a request a step."""
        works = f"needs none, or additional_config[{KEY!r}] with 'pages' false"
        connectors.check(vllm_config)
        if vllm_config.parallel_config.use_ubatching:
            raise NotImplementedError(f"enable_dbo: got micro batches, which would write the same lists; {works}")
        group = self.num_heads // self.num_kv_heads
        if not current_platform.is_cpu() and decode_len * group > MAX_QUERIES:
            raise NotImplementedError(
                f"num_speculative_tokens: got {decode_len} tokens a step and {group} query heads to a KV head; needs a "
                f"product of at most {MAX_QUERIES}, or additional_config[{KEY!r}] with 'pages' false"
            )

    def wants(self, layer_name: str) -> bool:
        """Whether the layer of that name is one of the model, not of a draft, and not left dense by the operator."""
        index = layer_index(layer_name)
        if index >= self.layers or layer_name.startswith(
            "draft_model."
        ):  # vLLM numbers a draft's layers on, or names it
            return False
        return not {index, index - self.layers} & set(self.settings.dense_layers)

    def take_scratch(self, layer_name: str, device: torch.device) -> None:
        """Has the scratch of the largest step in the peak of the run by which vLLM measures memory.

        In that run layers attend to nothing, so that the kernels take none there. This covers steps that aren't in a
        CUDA graph: those with prompts, and those of more requests than the largest graph has. A graph's scratch is in
        the pool of graphs. vLLM 0.32 measures that by graphs that it captures and throws away before it plans the KV
        cache, and the kernels are in these with tables as wide as when serving; model runner V2 of 0.26 measures no
        graphs, so that theirs comes on top of `gpu_memory_utilization`, as all that graphs take does there. Not covered
        is an engine that is told not to measure: `kv_cache_memory_bytes`, or VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=0
        for the graphs. Nor is what the allocator keeps of steps of fewer requests, and can't use for one of more.
        """
        if self.wants(layer_name):
            torch.empty(self.scratch_bytes, dtype=torch.uint8, device=device)

    def write_sketches(self, key_cache: torch.Tensor, kv_cache: torch.Tensor, filled: torch.Tensor) -> None:
        """Writes the sketches of full pages from their keys; int32, negative for none."""
        write_sketch(key_cache, self._sketches(kv_cache), filled)

    def decode(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: Decoding,
        output: torch.Tensor,
        *,
        filled: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None,
        num_splits: int,
        k_descale: torch.Tensor | None = None,
        v_descale: torch.Tensor | None = None,
    ) -> None:
        """Attention of the step's decoding rows, query (tokens, num_heads, head_size), into output of its shape.

        Before that it writes the sketches of all pages that the step filled, with its other rows too.
        """
        batch = rows.seq_lens.shape[0]
        table = rows.block_table[:, : self.memory.blocks]
        lists = self.memory.lists(batch, table.shape[1], *self.tally.of_layer(self.slot, batch))
        decode_pages(
            query,
            key_cache,
            value_cache,
            self._sketches(kv_cache),
            rows.query_start_loc,
            rows.seq_lens,
            table,
            rows.max_query_len,
            eps=self.eps,
            filled=filled,
            min_context=self.settings.min_context,
            newest=self.settings.newest,
            softmax_scale=scale,
            sinks=sinks,
            k_descale=k_descale,
            v_descale=v_descale,
            lists=lists,
            whole=rows.whole,
            scheduler_metadata=rows.scheduler_metadata,
            out=output,
            num_splits=num_splits,
        )
        if self.slot == self.tally.layers - 1:
            self.tally.add(rows)

    def _sketches(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return sketches.view(kv_cache, self.head_size, self.settings.sketch_bits)
