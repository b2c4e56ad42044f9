"""What the Hopper kernels of page lists support; `csrc/pages` and `csrc/ops.cu` have them."""

from __future__ import annotations

from torch import Tensor

from lite_attention import hopper
from lite_attention.pages.problem import Selection
from lite_attention.problem import FP8, Problem

MAX_QUERIES = 64
"""Of a sequence and KV head, query tokens times query heads: the rows of one tile."""


def check_sketch(k_cache: Tensor) -> None:
    """Raises as `hopper.check_supported`, for keys to make sketches of."""
    if k_cache.dtype not in (*hopper.DTYPES, FP8):
        raise hopper.unsupported("k_cache", k_cache.dtype, "torch.bfloat16, torch.float16 and torch.float8_e4m3fn")
    _check_head_dim("k_cache", k_cache.shape[-1])
    hopper.check_memory("k_cache", k_cache)


def check_select(selection: Selection) -> None:
    s = selection
    if s.q.dtype not in hopper.DTYPES:
        raise hopper.unsupported("q", s.q.dtype, "torch.bfloat16 and torch.float16")
    _check_head_dim("q", s.q.shape[-1])
    _check_queries(s.max_seqlen_q, s.q.shape[1] // s.heads_k)


def check_attend(problem: Problem) -> None:
    hopper.check_supported(problem)
    _check_queries(problem.max_seqlen_q, problem.heads // problem.heads_k)


def _check_head_dim(name: str, head_dim: int) -> None:
    if not hopper.head_dim_supported(head_dim):
        works = f"multiples of {hopper.head_dim_multiple()} up to {hopper.MAX_HEAD_DIM}"
        raise hopper.unsupported(name, f"head_dim {head_dim}", works)


def _check_queries(max_seqlen_q: int, group: int) -> None:
    if max_seqlen_q * group > MAX_QUERIES:
        given = f"{max_seqlen_q} query tokens of {group} query heads to a KV head"
        raise hopper.unsupported("max_seqlen_q", given, f"at most {MAX_QUERIES} tokens times heads in page lists")
