"""The scheduler metadata: how one step's attention is dealt to the multiprocessors, made once and used by every layer.

Without it each call of the Hopper kernels makes its own, which costs a small launch. What it holds is described in
`csrc/sm90/plan.cuh`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention import hopper
from lite_attention.checks import check_num_splits, wrong
from lite_attention.pages.checks import check_tokens, check_whole
from lite_attention.problem import FP8


def scheduler_metadata_size(
    batch_size: int, total_q: int, max_seqlen_q: int, num_heads: int, num_heads_k: int, head_dim: int, device: int = 0
) -> int:
    """Elements that `get_scheduler_metadata` writes for these shapes; it grows with `batch_size` and `total_q`."""
    return torch.ops.lite_attention.scheduler_metadata_size(
        batch_size, total_q, max_seqlen_q, num_heads, num_heads_k, head_dim, device
    )


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    head_dim: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    total_q: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    num_splits: int = 0,
    page_size: int | None = None,
    kv_dtype: torch.dtype | None = None,
    q_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    min_context: int = 0,
    whole: Tensor | None = None,
) -> Tensor:
    """Plans a step on the GPU, from lengths that are there: nothing waits.

    Pass the result as `scheduler_metadata` to calls with the same lengths, heads, head dim, mask and `max_seqlen_q`;
    which layer's q, k and v they read does not matter. Calls that use one metadata tensor must run one after the
    other: it also holds the counters by which the parts of a split row find each other.

    Args:
        batch_size: sequences in the batch.
        max_seqlen_q: the longest query. It chooses the kernel (decode or prefill), so it must be that of the calls.
        max_seqlen_k: no smaller than the longest key length; the length of all keys where neither `cu_seqlens_k` nor
            `seqused_k` is given.
        num_heads, num_heads_k, head_dim: of the layers.
        cu_seqlens_q: (batch_size + 1,) int32 on the GPU; None where all queries are `max_seqlen_q` long.
        total_q: rows of packed q, or more; needed with `cu_seqlens_q`.
        cu_seqlens_k, seqused_k: (batch_size + 1,), (batch_size,) int32 on the GPU, as in the calls.
        causal, window_size, num_splits: as in the calls.
        page_size: tokens in a page where the calls have a `block_table`; None where they have not.
        kv_dtype: of k and v, where it is not that of q: torch.float8_e4m3fn, whose kernels have other tiles.
        q_dtype: of q, where it is torch.float8_e4m3fn, which has other tiles again; k and v are then the same.
        device: the GPU, where no tensor tells it.
        out: int32 tensor to write to, of at least `scheduler_metadata_size` elements; for CUDA graphs, which read the
            same memory at every replay.
        min_context, whole: as in the calls of `lite_attention.pages.decode_pages` that the plan is for: the sequences
            that list everything are those of fewer keys than `min_context`, and those that `whole`, bool (batch_size,)
            on the GPU, marks. The plan then says whether any sequence of the step decodes from a list at all; where
            none does, `decode_pages` is a dense call under this plan. Other calls leave them out.

    Returns:
        The metadata: int32, one dimension, `out` where given.

    Raises:
        ValueError: `total_q` is missing; `num_splits`, `page_size` or `min_context` is out of range; there is no
            `q_dtype` or no `kv_dtype` like that; `whole` is not of the batch; `out` is too small or no int32 GPU
            tensor.
        RuntimeError: the step may have more tiles than 32 bits count, by `max_seqlen_k` and the window. Over a million
            keys that takes more than 150,000 tiles of queries: so many sequences that decode, or millions of tokens.
    """
    check_num_splits(num_splits)
    if page_size is not None and page_size < 1:
        raise wrong("page_size", page_size, "a positive int, or None where there is no block_table")
    if q_dtype not in (None, FP8, *hopper.DTYPES):
        raise wrong("q_dtype", q_dtype, f"None, {FP8}, or {' or '.join(map(str, hopper.DTYPES))}")
    if q_dtype == FP8 and kv_dtype not in (None, FP8):
        raise wrong("kv_dtype", kv_dtype, f"None or {FP8} beside a q_dtype of {FP8}")
    if kv_dtype not in (None, FP8, *hopper.DTYPES):
        raise wrong("kv_dtype", kv_dtype, f"None, {FP8}, or {' or '.join(map(str, hopper.DTYPES))} like q")
    check_tokens("min_context", min_context, 0)
    if cu_seqlens_q is not None and total_q is None:
        raise wrong("total_q", None, "the number of rows of q, where cu_seqlens_q is given")
    total_q = batch_size * max_seqlen_q if cu_seqlens_q is None else total_q
    tensors = [x for x in (cu_seqlens_q, cu_seqlens_k, seqused_k, whole, out) if isinstance(x, Tensor)]
    place = tensors[0].device if tensors else torch.device(device or "cuda")
    check_whole(whole, batch_size, place)
    index = torch.cuda.current_device() if place.index is None else place.index
    words = scheduler_metadata_size(batch_size, total_q, max_seqlen_q, num_heads, num_heads_k, head_dim, index)
    if out is None:
        out = torch.empty(words, dtype=torch.int32, device=place)
    elif out.dtype != torch.int32 or not out.is_cuda or not out.is_contiguous() or out.numel() < words:
        raise wrong("out", f"{out.dtype} of {out.numel()} on {out.device}", f"contiguous int32 of {words} on the GPU")
    left, right = window_size
    torch.ops.lite_attention.get_scheduler_metadata(
        out, cu_seqlens_q, cu_seqlens_k, seqused_k, batch_size, total_q, max_seqlen_q, max_seqlen_k,
        num_heads, num_heads_k, head_dim, -1 if left < 0 else left, 0 if causal else (-1 if right < 0 else right),
        num_splits, page_size is not None, FP8 in (q_dtype, kv_dtype), q_dtype == FP8, min_context, whole,
    )  # fmt: skip
    return out
