"""The public functions. Signatures and semantics are FlashAttention's, as its users know them.

Common to all three:

- Query head h reads key head `h // (num_heads // num_heads_k)` (GQA; MQA has num_heads_k = 1).
- Causal masks and windows are aligned to the bottom right: with `p = i + seqlen_k - seqlen_q`, query row i sees key j
  where `p - left <= j <= p + right`. A negative side of the window is unbounded; `causal=True` sets `right = 0`.
- A score is `softmax_scale * q.k`, then `softcap * tanh(score / softcap)` where softcap > 0, then `- slope * |p - j|`
  where ALiBi slopes are given. Softmax and its product with v accumulate in float32.
- A row that sees no key (as when its sequence has none) gives zeros, with an lse of -inf.
- Keys and values may be FP8 E4M3 (`torch.float8_e4m3fn`), as in a quantised KV cache, and then queries too. What is
  stored times its `q_descale`, `k_descale` or `v_descale` is the value. Nothing else becomes FP8: queries of FP8 are
  multiplied with keys of FP8, all other products are of values of 16 bits, to which FP8 converts exactly.
- Memory that no row sees never reaches the result, whatever it holds: unused pages, keys past a sequence's end, unused
  entries of `block_table`.
- The same call gives the same bits each time.

Method: FlashAttention (arXiv 2205.14135), FlashAttention-2 (arXiv 2307.08691), FlashAttention-3 (arXiv 2407.08608).
Paged KV: PagedAttention (arXiv 2309.06180). ALiBi: arXiv 2108.12409. Sinks: a learned logit a head, as in gpt-oss
(arXiv 2508.10925); the idea is of arXiv 2309.17453.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention import ops
from lite_attention.checks import Problem, check_append, check_inference, prepare, wrong
from lite_attention.problem import as_bytes
from lite_attention.values import check_values, readable


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
    num_splits: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a batch of sequences of one length.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), bfloat16 or float16; float32 too on the CPU and for the reference;
            float8_e4m3fn where k and v are. Its last dimension must have stride 1, here and in k, v and out; the other
            strides are free.
        k, v: (batch, seqlen_k, num_heads_k, head_dim), device of q, and dtype of q or both float8_e4m3fn; num_heads_k
            divides num_heads.
        dropout_p: only 0.0; this is inference.
        softmax_scale: factor on q.k, positive; None is 1 / sqrt(head_dim).
        causal: row i sees no key after its own position (bottom right, as the module says).
        window_size: (left, right), how many keys before and after its own position a row sees; a negative one is
            unbounded.
        alibi_slopes: float32, (num_heads,) or (batch, num_heads).
        deterministic: accepted; the forward pass always is.
        softcap: bound on the scores in units of the scaled score; 0.0 is none.
        sinks: float32, (num_heads,): logits of a key without a value, `exp(sinks[h])` in each row's denominator. lse
            includes it; a row that sees no key gives zeros and an lse of sinks[h].
        num_splits: 1 makes the Hopper kernels compute every row whole, so that its bits don't depend on what else is in
            the batch (batch invariance); long rows of a small batch are slower then. 0 lets the scheduler cut rows
            where that balances the GPU, and larger numbers, which FlashAttention takes as a count, do the same here.
            On the other backends it changes nothing.
        q_descale, k_descale, v_descale: float32, (batch, num_heads_k) or what broadcasts to it, such as (num_heads_k,)
            and (): the factors of FP8 queries, keys and values, positive; None is 1. The query heads of a KV head share
            theirs.
        return_softmax_lse: return lse too.
        out: written in place and returned: shape, dtype and device of q, not overlapping the inputs; bfloat16 where q
            is FP8.
        backend: None takes "hopper" for CUDA tensors and "cpu" for CPU tensors; "reference" is the float32
            specification in plain PyTorch, on any device, slow. Nothing falls back by itself.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim) in the dtype of q, or bfloat16 where that is FP8; with
        `return_softmax_lse` (out, lse), where lse is (batch, num_heads, seqlen_q), float32: the natural logarithm of
        each row's softmax denominator.

    Raises:
        ValueError: arguments that don't fit together; the message names the argument, what it was given, and what
            works.
        NotImplementedError: dropout, inputs that require grad (with grad enabled), or what the backend lacks.
        RuntimeError: CUDA tensors where the compiled extension is missing.
    """
    check_inference(dropout_p, q=q, k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks, out=out)
    problem = prepare(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        num_splits=num_splits,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        fp8_q=True,
        out=out,
    )
    ops.launch(problem, ops.choose(problem, backend))
    return _result(problem, return_softmax_lse)


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
    num_splits: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences of different lengths, packed one after the other; keys packed too, or in pages.

    Sequence b has the rows `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]` of q. The rows of q after the last sequence are
    padding: their out and lse are not written. All index tensors are int32, contiguous, on the device of q.

    Args:
        q: (total_q, num_heads, head_dim).
        k, v: (total_k, num_heads_k, head_dim); with `block_table` (num_blocks, page_size, num_heads_k, head_dim), where
            any page size and any strides with a contiguous head_dim do here (see `lite_attention.hopper` for what the
            kernel takes).
        cu_seqlens_q: (batch + 1,), where sequences start in q, in rows; must rise.
        cu_seqlens_k: (batch + 1,), where they start in k; with `block_table` only their lengths count. May be None
            where `block_table` and `seqused_k` are given.
        max_seqlen_q, max_seqlen_k: Python ints no smaller than the longest query and key length. On a Hopper GPU
            max_seqlen_q only chooses the kernel: a smaller one is right too, and fast where few queries are longer.
        seqused_k: (batch,), key lengths, in place of the differences of cu_seqlens_k and no greater than they are in
            packed k.
        block_table: (batch, max_blocks): page `block_table[b, n]` holds keys n * page_size and on of sequence b.
            Entries after a sequence's last page are never read.
        scheduler_metadata: int32, from `get_scheduler_metadata`; speeds up the Hopper backend, others don't need it.

    The other arguments, and errors, are those of `flash_attn_func`. On a GPU nothing waits, so lengths and page numbers
    are not checked there.

    Returns:
        out (total_q, num_heads, head_dim); with `return_softmax_lse` (out, lse), lse (num_heads, total_q), float32.
    """
    check_inference(dropout_p, q=q, k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks, out=out)
    if cu_seqlens_q is None:
        raise wrong("cu_seqlens_q", None, "an int32 tensor (batch + 1,)")
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
        num_splits=num_splits,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        fp8_q=True,
        out=out,
    )
    ops.launch(problem, ops.choose(problem, backend))
    return _result(problem, return_softmax_lse)


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
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a KV cache, which k and v, where given, are first appended to in place.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        k_cache, v_cache: (batch, seqlen_cache, num_heads_k, head_dim), or with `block_table` (num_blocks, page_size,
            num_heads_k, head_dim).
        k, v: (batch, seqlen_new, num_heads_k, head_dim), dtype of the caches, any strides: written at positions
            cache_seqlens and on of each sequence, before attention, which then covers cache_seqlens + seqlen_new keys.
        cache_seqlens: keys in the cache before the append: an int for all sequences, or int32 (batch,). None is the
            whole cache, and goes only without k and v.
        block_table: (batch, max_blocks), as in `flash_attn_varlen_func`.
        rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad: only None; rotate q and k, and select rows of the cache,
            before.
        rotary_interleaved: without effect, as there is no rotary embedding here.

    The other arguments, and errors, are those of `flash_attn_func`. On a GPU lengths in a tensor are not checked: an
    append past the end of the cache or of the block table trips PyTorch's own assertion on the device.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim); with `return_softmax_lse` (out, lse), lse (batch, num_heads,
        seqlen_q), float32.
    """
    for name, x, instead in (
        ("rotary_cos", rotary_cos, "rotate q and k before the call"),
        ("rotary_sin", rotary_sin, "rotate q and k before the call"),
        ("cache_batch_idx", cache_batch_idx, "index the cache before the call, or use a block_table"),
        ("cache_leftpad", cache_leftpad, "start sequences at the first key of the cache"),
    ):
        if x is not None:
            raise NotImplementedError(f"{name}: got {type(x).__name__}; LiteAttention has only {name}=None: {instead}")
    check_inference(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks, out=out)
    if (k is None) != (v is None):
        raise wrong("v" if v is None else "k", None, "k and v both, or neither")
    if k is not None and cache_seqlens is None:
        raise wrong("cache_seqlens", None, "the lengths that k and v are appended at")
    appended = k.shape[1] if k is not None and k.dim() == 4 else 0  # another rank is check_append's to refuse
    lengths = cache_lengths(cache_seqlens, q, appended)
    problem = prepare(
        q,
        k_cache,
        v_cache,
        seqused_k=lengths,
        block_table=block_table,
        scheduler_metadata=scheduler_metadata,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        num_splits=num_splits,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        fp8_q=True,
        out=out,
        names=("k_cache", "v_cache", "cache_seqlens"),
    )
    if isinstance(cache_seqlens, int) and cache_seqlens + appended > problem.max_seqlen_k:
        raise wrong(
            "cache_seqlens", f"{cache_seqlens} and {appended} new keys", f"at most {problem.max_seqlen_k} in all"
        )
    backend = ops.choose(problem, backend)  # which may refuse, so before the caches change
    if k is not None:
        _append(problem, k, v)
    ops.launch(problem, backend)
    return _result(problem, return_softmax_lse)


def cache_lengths(cache_seqlens: int | Tensor | None, q: Tensor, appended: int = 0) -> Tensor | None:
    """`cache_seqlens` as a tensor (batch,), once `appended` keys are in."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, Tensor):
        if readable(cache_seqlens) and min(cache_seqlens.flatten().tolist(), default=0) < 0:
            raise wrong("cache_seqlens", cache_seqlens.tolist(), "lengths of 0 or more")
        return cache_seqlens + appended if appended else cache_seqlens
    if not isinstance(cache_seqlens, (int, torch.SymInt)) or cache_seqlens < 0:
        raise wrong("cache_seqlens", cache_seqlens, "an int of 0 or more, or an int32 tensor (batch,)")
    return torch.full((q.shape[0],), cache_seqlens + appended, dtype=torch.int32, device=q.device)


def _append(problem: Problem, k: Tensor, v: Tensor) -> None:
    """Writes k and v at the end of each sequence, by index arithmetic on the device.

    `problem.seqused_k` is the lengths with them.
    """
    check_append(problem, k, v)
    if readable(problem.q):  # before the caches change; elsewhere the op checks what it can
        check_values(problem, "cache_seqlens and the keys of k")
    new = torch.arange(k.shape[1], device=k.device)
    position = (problem.seqused_k.long() - k.shape[1])[:, None] + new
    if problem.block_table is None:
        block, offset = torch.arange(problem.batch, device=k.device)[:, None], position
    else:
        block = problem.block_table.gather(1, position // problem.page_size).long()
        offset = position % problem.page_size
    as_bytes(problem.k).index_put_((block, offset), as_bytes(k))
    as_bytes(problem.v).index_put_((block, offset), as_bytes(v))


def _result(problem: Problem, with_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    return (problem.out, problem.lse) if with_lse else problem.out
