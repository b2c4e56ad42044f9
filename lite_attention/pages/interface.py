"""The public functions of decoding from listed pages.

A decode step of a layer is one call, `decode_pages`: it writes the sketches of pages that filled, makes the lists and
attends to them. Its kernels overlap, and where no sequence of the step has a list it is dense attention, under a plan
that all layers share. `write_sketch`, `select_pages` and `attend_pages` are its parts, as calls of their own; prompts
need the first alone. Common to all:

- The cache has pages of 16 tokens; query head h reads key head `h // (num_heads // num_heads_k)`.
- Attention is causal, aligned to the bottom right: the last query token of a sequence sees all of its `seqused_k`
  keys, the one before it all but the last. Windows, softcap and ALiBi are for dense attention.
- What a call writes is in tensors of the caller's or in its result; calls can be compiled with `torch.compile`.
- A sequence's list is the same in any batch, and so are the bits of its output with `num_splits=1`.

`lite_attention.pages.reference` has every detail, `lite_attention.pages.layout` the bytes of a sketch. Sources of the
ideas: this project's study of decode lists; sketches of pages, Quest (arXiv 2406.10774); a budget of softmax mass,
Twilight (arXiv 2502.02770); leaving out what is negligible, LiteAttention (arXiv 2511.11062).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention import ops
from lite_attention.checks import check_inference, check_ints
from lite_attention.pages import hopper, op
from lite_attention.pages.checks import check_cache, check_lists, check_sketches
from lite_attention.pages.layout import sketch_bytes
from lite_attention.pages.lists import PageLists
from lite_attention.pages.prepare import prepare_attention, prepare_selection


def empty_sketch(k_cache: Tensor, bits: int = 12) -> Tensor:
    """Room for the sketches of a cache (num_blocks, 16, num_heads_k, head_dim), on its device; what it holds is unset.

    `bits` are of a channel: 12, 8 of the mean and 4 of the key apart, or 8, 4 of each. The other functions tell by the
    size of the sketches.

    Returns:
        uint8 (num_blocks, num_heads_k, sketch_bytes(head_dim, bits)).

    Raises:
        ValueError: a cache of another form, or other bits.
    """
    check_cache("k_cache", k_cache)
    num_blocks, _, heads_k, head_dim = k_cache.shape
    return torch.empty(num_blocks, heads_k, sketch_bytes(head_dim, bits), dtype=torch.uint8, device=k_cache.device)


def write_sketch(k_cache: Tensor, sketch: Tensor, pages: Tensor, *, backend: str | None = None) -> None:
    """Writes, in place, the sketches of full pages from their keys.

    Args:
        k_cache: (num_blocks, 16, num_heads_k, head_dim), bfloat16, float16, float32 or float8_e4m3fn; any strides with
            a contiguous head_dim. FP8 keys count as stored, so that the descale is for `select_pages`.
        sketch: uint8 (num_blocks, num_heads_k, sketch_bytes(head_dim, bits)), as `empty_sketch` makes; its strides may
            have gaps between pages and heads, in multiples of 16 bytes.
        pages: int32 (n,), the pages that are full now, by their number in the cache. Negative ones are padding. A page
            may come twice.
        backend: None takes "hopper" for CUDA tensors and "cpu" for CPU tensors; "reference" is the specification on any
            device.

    Raises:
        ValueError: arguments that don't fit together; the message names the argument, what it was given, and what
            works. On the CPU also a page that the cache hasn't.
        NotImplementedError: a cache that requires grad (with grad enabled), or what the device's backend hasn't: the
            Hopper kernels have 16-bit or FP8 keys and a head_dim that is a multiple of 8, up to 256.
    """
    check_inference(k_cache=k_cache)
    check_sketches(k_cache, sketch)
    check_ints("pages", pages, ("n",), k_cache)
    backend = ops.backend_on(k_cache.device, backend)
    if backend == "hopper":
        hopper.check_sketch(k_cache)
    op.launch_sketch(k_cache, sketch, pages, backend)


def select_pages(
    q: Tensor,
    sketch: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    *,
    eps: float,
    min_context: int = 0,
    newest: int = 64,
    softmax_scale: float | None = None,
    k_descale: Tensor | None = None,
    lists: PageLists | None = None,
    backend: str | None = None,
    whole: Tensor | None = None,
) -> PageLists:
    """Lists, for each sequence and KV head, the pages that its queries need.

    Always listed are a sequence's first page and those of the newest tokens that a query sees. Of the others a list has
    the fewest for which the estimated softmax mass of what is left out is at most `eps` in every query head of the KV
    head; over several query tokens, the union.

    Args:
        q: (total_q, num_heads, head_dim), bfloat16, float16 or float32. Sequence b has the rows `cu_seqlens_q[b]` to
            `cu_seqlens_q[b + 1]`; rows after the last are padding.
        sketch: as `write_sketch` writes it. Read are the sketches of full pages: page n of a sequence where 16 (n + 1)
            is at most `seqused_k`.
        cu_seqlens_q, seqused_k, block_table: int32 (batch + 1,), (batch,), (batch, max_blocks), as in
            `flash_attn_varlen_func`. Entries of `block_table` after a sequence's last page are never read.
        max_seqlen_q: the most query tokens that a sequence has, or more. The Hopper kernels have up to 64 /
            (num_heads / num_heads_k), for decoding and speculative steps.
        eps: 0 <= eps < 1, a share of mass. 0 lists everything.
        min_context: sequences of fewer keys list everything.
        newest: tokens, 1 or more.
        softmax_scale: factor on q.k, positive; None is 1 / sqrt(head_dim).
        k_descale: float32 (), (num_heads_k,) or (batch, num_heads_k): the factors of FP8 keys; None is 1.
        lists: lists of this batch to write into, contiguous; None makes new ones.
        backend: as in `write_sketch`.
        whole: bool (batch,), the sequences that list everything whatever `eps` says; None is those alone that
            `min_context` names.

    Returns:
        The lists, for `attend_pages` with the same `seqused_k` and `block_table`; `lists`, where given.

    Raises:
        ValueError, NotImplementedError: as `write_sketch`; on the CPU ValueError also for lengths or pages that don't
            fit.
    """
    selection = prepare_selection(
        q,
        sketch,
        cu_seqlens_q,
        seqused_k,
        block_table,
        max_seqlen_q,
        eps=eps,
        min_context=min_context,
        newest=newest,
        softmax_scale=softmax_scale,
        k_descale=k_descale,
        lists=lists,
        whole=whole,
    )
    backend = ops.backend_on(q.device, backend)
    if backend == "hopper":
        hopper.check_select(selection)
    op.launch_select(selection, backend)
    return selection.lists


def attend_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lists: PageLists,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    *,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out: Tensor | None = None,
    num_splits: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the keys of listed pages; with all pages listed it is dense attention.

    Args:
        q: (total_q, num_heads, head_dim).
        k_cache, v_cache: (num_blocks, 16, num_heads_k, head_dim), dtype of q, or both float8_e4m3fn.
        lists: as `select_pages` returns. Read are `indices` and `counts`: ascending pages, each of which the sequence
            has. Where a sequence has several query tokens, a list has every page from the one of the first token's
            position on, as all lists of `select_pages` do. Pages that no list has are not read.
        sinks, k_descale, v_descale, out, num_splits: as in `flash_attn_varlen_func`.

    The other arguments are those of `select_pages`.

    Returns:
        out (total_q, num_heads, head_dim) in the dtype of q, and lse (num_heads, total_q), float32: the natural
        logarithm of each row's softmax denominator over listed pages. A row that sees no listed key gives zeros and
        -inf, or the sink's logit.

    Raises:
        ValueError, NotImplementedError: as `select_pages`; on the CPU ValueError also for lists that don't fit.
    """
    problem = prepare_attention(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        seqused_k,
        block_table,
        max_seqlen_q,
        softmax_scale=softmax_scale,
        sinks=sinks,
        k_descale=k_descale,
        v_descale=v_descale,
        out=out,
        num_splits=num_splits,
    )
    check_lists(lists, problem.batch, problem.heads_k, block_table.shape[1], q)
    backend = ops.backend_on(q.device, backend)
    if backend == "hopper":
        hopper.check_attend(problem)
    op.launch_attend(problem, lists, backend)
    return problem.out, problem.lse


def decode_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sketch: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    *,
    eps: float,
    filled: Tensor | None = None,
    min_context: int = 0,
    newest: int = 64,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    lists: PageLists | None = None,
    whole: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    out: Tensor | None = None,
    num_splits: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, PageLists]:
    """A decode step: `write_sketch` of the pages that fill, then `select_pages`, then `attend_pages`.

    Results are those of the three calls. Where no sequence of the step leaves anything out, as each has less than
    `min_context` keys or is `whole`, or eps is 0, the Hopper kernels may compute it as dense attention: then `bits` and
    `indices` of the lists may stay as they were, while `counts` are of all pages and `left_out` is 0, as always.

    Args:
        filled: int32 (n,), as `pages` of `write_sketch`: of this step's sequences or of others, and written also where
            the step has no queries. None where no page fills.
        scheduler_metadata: of `get_scheduler_metadata` for this batch, heads, head_dim and max_seqlen_q, causal, with a
            page_size of 16, the `num_splits` of this call, the `kv_dtype` of the cache, and the same `min_context` and
            `whole`. It is made once a step and serves all layers, whatever their eps. It also holds the counters by
            which the parts of a split list find each other: calls that share it must run one after another. None makes
            it in the call. With num_splits=1, on the CPU and for the reference it isn't used.

    The other arguments are those of the three functions.

    Returns:
        out and lse as `attend_pages` returns them, and the lists; `out` and `lists`, where given.

    Raises:
        ValueError, NotImplementedError: as the three functions.
    """
    problem = prepare_attention(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        seqused_k,
        block_table,
        max_seqlen_q,
        softmax_scale=softmax_scale,
        sinks=sinks,
        k_descale=k_descale,
        v_descale=v_descale,
        scheduler_metadata=scheduler_metadata,
        out=out,
        num_splits=num_splits,
    )
    check_sketches(k_cache, sketch)
    if filled is not None:
        check_ints("filled", filled, ("n",), q)
    selection = prepare_selection(
        q,
        sketch,
        cu_seqlens_q,
        seqused_k,
        block_table,
        max_seqlen_q,
        eps=eps,
        min_context=min_context,
        newest=newest,
        softmax_scale=softmax_scale,
        k_descale=problem.k_descale,
        lists=lists,
        whole=whole,
    )
    backend = ops.backend_on(q.device, backend)
    if backend == "hopper":
        hopper.check_sketch(k_cache)
        hopper.check_select(selection)
        hopper.check_attend(problem)
    op.launch_decode(problem, selection, filled, backend)
    return problem.out, problem.lse, selection.lists
