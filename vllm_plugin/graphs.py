"""Which tile of the kernel a step takes where one CUDA graph serves prefill and decode steps alike.

The host chooses the tile by the longest query. A graph keeps the tile it was captured with, and a plan made for another
one is refused on the device. In cudagraph_mode FULL vLLM replays one graph for every batch that fits into its tokens: a
decode step with one token a request, a prefill of all of them, and mixtures. It captures the graph with queries of
other lengths, as many as it likes. What capture and replay have in common is the number of tokens with their padding,
so that alone chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


def query_len_of_tile(common: CommonAttentionMetadata, vllm_config: VllmConfig) -> int:
    """The query length that chooses the tile of a step; in every other mode the longest there is.

    There graphs are captured for decode steps alone, whose longest query is the same at capture and replay.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    if compilation.cudagraph_mode.mixed_mode() != CUDAGraphMode.FULL:
        return common.max_query_len
    tokens = common.num_actual_tokens
    if tokens > compilation.max_cudagraph_capture_size:
        return common.max_query_len  # never replayed
    # Where all requests can be decoding, most steps are decode steps, for which the tile of prefill takes up to a sixth
    # longer. The tile of decoding computes longer queries too: 256 over 8192 keys take an eighth longer.
    decode_len = 1 + vllm_config.num_speculative_tokens
    return decode_len if tokens <= scheduler.max_num_seqs * decode_len else tokens
