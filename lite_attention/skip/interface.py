"""The public functions with skip lists.

Each is a dense function of `lite_attention.interface` that visits only the KV tiles of a list, and takes tiles that
proved negligible off the list. Common to all three:

- A q tile (`SkipList` says what that is) visits the KV tiles that its list has, from the last to the first, of those
  that the causal mask, the window and the lengths let it see. out and lse are exact over the keys in them.
- A visited tile stays in the list where in any row of the q tile (its largest score - the largest score of all tiles
  visited before it) * log2(e) > threshold, of scaled scores. The first visited tile always stays. What left the list is
  not visited again until `SkipList.reset`.
- Lists are of query heads, with GQA too.
- The list is written in place, on the stream of the call, and nothing is kept elsewhere: calls can be compiled with
  `torch.compile` and captured in CUDA graphs. (In a capture, threshold, must_do and must_skip must be tensors.)

`lite_attention.skip.reference` has every detail. Source of the idea: LiteAttention, arXiv 2511.11062.
"""

from __future__ import annotations

from torch import Tensor

from lite_attention import ops
from lite_attention.checks import Problem, check_inference, prepare, wrong
from lite_attention.interface import cache_lengths
from lite_attention.skip import hopper, op
from lite_attention.skip.checks import check_features, prepare_lists
from lite_attention.skip.ranges import Ranges
from lite_attention.skip.skip_list import SkipList


def skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    skip_list: SkipList,
    threshold: float | Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    must_do: Ranges | None = None,
    must_skip: Ranges | None = None,
    update: bool = True,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a batch of sequences of one length over the KV tiles of a skip list.

    Where a call visits every tile in view, as with a threshold of -inf and a list that nothing has left, its result is
    that of dense attention: on the CPU path and for the reference bit for bit. On a GPU bit for bit where the dense
    kernel walks tiles of as many keys, and no row in parts. That is so with num_splits=1 for head dims up to 96 and
    from 136 to 192. From 104 to 128 it is so without num_splits, where there is no mask, no pages and so little work
    that the kernel does not split it, of more than 64 rows (seqlen_q * num_heads / num_heads_k). Else, and for larger
    head dims, the two agree up to rounding.

    With `torch.compile`: Inductor of PyTorch 2.13 drops a `skip_list.bits.clone()` after a call, so that the copy
    changes with the list; to keep a list inside of a compiled function take `skip_list.visits()`, or clone outside.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), bfloat16 or float16; float32 too on the CPU and for the reference.
        k, v: (batch, seqlen_k, num_heads_k, head_dim).
        skip_list: made for this batch, num_heads, seqlen_q and seqlen_k; updated in place.
        threshold: at most 0, in log2 units: -10 takes off the list what weighs less than 2**-10 of the largest weight
            seen before it; nearer to 0 skips more, -inf skips nothing. A float, or a float32 tensor () or (num_heads,)
            on the device of q, which is read when the call runs: it can change without compiling or capturing again.
        softcap, alibi_slopes: only 0.0 and None.
        must_do: token ranges whose tiles are visited whatever the list says; the forms that `SkipList.must_do_mask`
            takes, or what it returns. Ranges round outward to tiles. A visited tile gets its place in the list by its
            vote, also where it had left.
        must_skip: token ranges that are not visited, rounded inward to tiles, as `SkipList.must_skip_mask` takes or
            returns them. Tiles keep their place in the list. In a tile of both must_do wins.
        update: False leaves the list as it is.
        softmax_scale, causal, window_size, sinks, out, backend: as in `flash_attn_func`; without a tile to visit out is
            zeros and lse -inf, or the sink's logit.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim) in the dtype of q, and lse (batch, num_heads, seqlen_q), float32: the
        natural logarithm of each row's softmax denominator over the visited tiles.

    Raises:
        ValueError: arguments that don't fit together, among them a list made for other lengths, heads or tiles, or no
            longer of the shape that it was made in. The message names the argument, what it was given, and what works.
        NotImplementedError: softcap, ALiBi, FP8, inputs that require grad (with grad enabled), or what the backend
            lacks.
        RuntimeError: CUDA tensors where the compiled extension is missing or has no kernels with lists.
    """
    check_inference(q=q, k=k, v=v, sinks=sinks, out=out, threshold=threshold)
    check_features(softcap, alibi_slopes, q=q, k=k, v=v)
    problem = prepare(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, sinks=sinks, out=out
    )
    return attend(problem, skip_list, threshold, must_do, must_skip, update, backend)


def skip_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    skip_list: SkipList,
    threshold: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    must_do: Ranges | None = None,
    must_skip: Ranges | None = None,
    update: bool = True,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of sequences of different lengths, packed or with keys in pages, over the KV tiles of a skip list.

    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k and block_table are those of
    `flash_attn_varlen_func`, the other arguments, and errors, those of `skip_attention`. The list is made for these
    max_seqlen_q and max_seqlen_k; entry b of it is sequence b, of which it uses the tiles that the sequence has.

    Returns:
        out (total_q, num_heads, head_dim) in the dtype of q, and lse (num_heads, total_q), float32. Rows after the last
        sequence are padding, and not written.
    """
    check_inference(q=q, k=k, v=v, sinks=sinks, out=out, threshold=threshold)
    check_features(softcap, alibi_slopes, q=q, k=k, v=v)
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
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        sinks=sinks,
        out=out,
    )
    return attend(problem, skip_list, threshold, must_do, must_skip, update, backend)


def skip_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    skip_list: SkipList,
    threshold: float | Tensor,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    must_do: Ranges | None = None,
    must_skip: Ranges | None = None,
    update: bool = True,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys in a KV cache, over the KV tiles of a skip list.

    q, k_cache, v_cache, cache_seqlens and block_table are those of `flash_attn_with_kvcache`, without its append: write
    new keys before. The other arguments, and errors, are those of `skip_attention`. The list is made for the length of
    q and the capacity of the cache: max_seqlen_k is seqlen_cache, or max_blocks * page_size with `block_table`.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim) in the dtype of q, and lse (batch, num_heads, seqlen_q), float32.
    """
    check_inference(q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks, out=out, threshold=threshold)
    check_features(softcap, alibi_slopes, q=q, k_cache=k_cache, v_cache=v_cache)
    problem = prepare(
        q,
        k_cache,
        v_cache,
        seqused_k=cache_lengths(cache_seqlens, q),
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        sinks=sinks,
        out=out,
        names=("k_cache", "v_cache", "cache_seqlens"),
    )
    if isinstance(cache_seqlens, int) and cache_seqlens > problem.max_seqlen_k:
        raise wrong("cache_seqlens", cache_seqlens, f"at most the {problem.max_seqlen_k} keys that there is room for")
    return attend(problem, skip_list, threshold, must_do, must_skip, update, backend)


def attend(
    problem: Problem,
    skip_list: SkipList,
    threshold: float | Tensor,
    must_do: Ranges | None,
    must_skip: Ranges | None,
    update: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Computes a checked call with a list; `problem` has its out and lse. Arguments are those of `skip_attention`."""
    lists = prepare_lists(problem, skip_list, threshold, must_do, must_skip, update)
    backend = ops.choose(problem, backend)
    if backend == "hopper":
        hopper.check_supported(problem, lists)
    op.launch(problem, lists, backend)
    return problem.out, problem.lse
