"""The public functions: FlashAttention's signatures and semantics."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention import ops
from lite_attention.checks import prepare


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    problem = prepare(
        q,
        k,
        v,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k.shape[1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        out=out,
    )
    ops.launch(problem, backend)
    return (problem.out, problem.lse) if return_softmax_lse else problem.out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    problem = prepare(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        scheduler_metadata=scheduler_metadata,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        out=out,
    )
    ops.launch(problem, backend)
    return (problem.out, problem.lse) if return_softmax_lse else problem.out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    batch = q.shape[0]
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if k is not None and v is not None:
        appended = k.shape[1]
        position = cache_seqlens[:, None].long() + torch.arange(appended, device=q.device)
        if block_table is None:
            first = torch.arange(batch, device=q.device)[:, None].expand_as(position)
            second = position
        else:
            page_size = k_cache.shape[1]
            first = block_table.long().gather(1, position // page_size)
            second = position % page_size
        k_cache[first, second] = k
        v_cache[first, second] = v
        cache_seqlens = cache_seqlens + appended
    problem = prepare(
        q,
        k_cache,
        v_cache,
        seqused_k=cache_seqlens,
        block_table=block_table,
        scheduler_metadata=scheduler_metadata,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k_cache.shape[1] * (1 if block_table is None else block_table.shape[1]),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        out=out,
    )
    ops.launch(problem, backend)
    return (problem.out, problem.lse) if return_softmax_lse else problem.out
