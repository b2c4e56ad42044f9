"""What the public functions are given: checked by metadata, which never waits for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.checks import (
    DTYPES,
    check_floats,
    check_ints,
    check_length,
    check_operand,
    is_number,
    wrong,
)
from lite_attention.pages.layout import ALIGNMENT, BITS, PAGE, bits_of, sketch_bytes
from lite_attention.pages.lists import PageLists
from lite_attention.problem import FP8
from lite_attention.skip.bits import words


def check_cache(name: str, cache: Tensor) -> None:
    """A paged cache of keys, of 16 to a page."""
    layout = f"(num_blocks, {PAGE}, num_heads_k, head_dim)"
    if not isinstance(cache, Tensor):
        raise wrong(name, type(cache).__name__, f"a tensor {layout}")
    if cache.dim() != 4 or cache.shape[1] != PAGE or 0 in cache.shape[2:]:
        raise wrong(name, f"shape {tuple(cache.shape)}", layout)
    if cache.dtype not in (*DTYPES, FP8):
        raise wrong(name, cache.dtype, " or ".join(map(str, (*DTYPES, FP8))))
    if cache.shape[-1] > 1 and cache.stride(-1) != 1:
        raise wrong(name, f"strides {cache.stride()}", "a head_dim of stride 1")


def check_sketch(sketch: Tensor, head_dim: int, like: Tensor) -> None:
    """The sketches of a cache, where vector loads reach them."""
    sizes = " or ".join(f"{sketch_bytes(head_dim, bits)} of {bits} bits" for bits in BITS)
    works = f"(num_blocks, num_heads_k, bytes), with bytes {sizes} for a head_dim of {head_dim}"
    if not isinstance(sketch, Tensor):
        raise wrong("sketch", type(sketch).__name__, f"a uint8 tensor {works}")
    if sketch.dim() != 3 or bits_of(head_dim, sketch.shape[2]) is None:
        raise wrong("sketch", f"shape {tuple(sketch.shape)}", works)
    if sketch.dtype != torch.uint8:
        raise wrong("sketch", sketch.dtype, torch.uint8)
    if sketch.device != like.device:
        raise wrong("sketch", f"a tensor on {sketch.device}", f"one on {like.device}, as the other tensors are")
    strides = sketch.stride()
    if strides[2] != 1 or any(step % ALIGNMENT for step in strides[:2]):
        raise wrong("sketch", f"strides {strides}", f"sketches without gaps, each at a multiple of {ALIGNMENT} bytes")


def check_sketches(k_cache: Tensor, sketch: Tensor) -> None:
    """A cache of keys, and the sketches of all of its pages and heads."""
    check_cache("k_cache", k_cache)
    check_sketch(sketch, k_cache.shape[3], k_cache)
    if sketch.shape[:2] != (k_cache.shape[0], k_cache.shape[2]):
        works = (k_cache.shape[0], k_cache.shape[2], sketch.shape[2])
        raise wrong("sketch", f"shape {tuple(sketch.shape)}", f"{works}, for the pages and heads of k_cache")


def check_queries(q: Tensor, sketch: Tensor) -> None:
    check_operand("q", q, "(total_q, num_heads, head_dim)")
    if 0 in q.shape[1:]:
        raise wrong("q", f"shape {tuple(q.shape)}", "num_heads and head_dim of 1 or more")
    check_sketch(sketch, q.shape[2], q)
    heads_k = sketch.shape[1]
    if heads_k == 0 or q.shape[1] % heads_k:
        raise wrong("sketch", f"{heads_k} heads", f"a num_heads_k that divides the num_heads of q, {q.shape[1]}")


def check_batch(q: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor, block_table: Tensor, max_seqlen_q: int) -> None:
    check_ints("seqused_k", seqused_k, ("batch",), q)
    batch = seqused_k.shape[0]
    check_ints("cu_seqlens_q", cu_seqlens_q, (batch + 1,), q)
    check_ints("block_table", block_table, (batch, "max_blocks"), q)
    check_length("max_seqlen_q", max_seqlen_q)


def check_budget(eps: float, min_context: int, newest: int) -> None:
    if not is_number(eps) or not 0 <= eps < 1:
        raise wrong("eps", eps, "a number from 0, which lists everything, to below 1")
    check_tokens("min_context", min_context, 0)
    check_tokens("newest", newest, 1)


def check_tokens(name: str, value: int, least: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < least:
        raise wrong(name, value, f"an int of {least} or more, in tokens")


def as_factors(k_descale: Tensor | None, batch: int, heads_k: int, like: Tensor) -> Tensor | None:
    """`k_descale` as a view (batch, heads_k)."""
    if k_descale is None:
        return None
    check_floats("k_descale", k_descale, ((), (heads_k,), (batch, heads_k)), like)
    return k_descale.expand(batch, heads_k)


def check_lists(lists: PageLists, batch: int, heads_k: int, blocks: int, q: Tensor) -> None:
    """Lists of the shape that `select_pages` makes for queries `q` of such a batch."""
    if not isinstance(lists, PageLists):
        raise wrong("lists", type(lists).__name__, "PageLists, as select_pages returns")
    check_ints("lists", lists.bits, (batch, heads_k, words(blocks)), q)
    check_ints("lists", lists.indices, (batch, heads_k, blocks), q)
    check_ints("lists", lists.counts, (batch, heads_k), q)
    check_floats("lists", lists.left_out, ((batch, q.shape[1]),), q)
    for x in (lists.bits, lists.indices, lists.counts, lists.left_out):
        if not x.is_contiguous():
            raise wrong("lists", f"strides {x.stride()} for shape {tuple(x.shape)}", "contiguous tensors")


def check_whole(whole: Tensor | None, batch: int, device: torch.device) -> None:
    if whole is None:
        return
    if not isinstance(whole, Tensor) or whole.dtype != torch.bool or whole.shape != (batch,):
        given = f"{whole.dtype} {tuple(whole.shape)}" if isinstance(whole, Tensor) else type(whole).__name__
        raise wrong("whole", given, f"None or a bool tensor ({batch},)")
    if whole.device != device:
        raise wrong("whole", f"a tensor on {whole.device}", f"one on {device}, as the other tensors are")
