"""Turns the arguments of the public functions into one checked `Problem`, or raises before anything runs.

`prepare` reads shapes, dtypes, devices and strides. They are metadata: it never waits for a GPU, and traces under
`torch.compile` and FakeTensors. What only the memory tells is for `lite_attention.values`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.problem import FP8, Problem

__all__ = [
    "DTYPES",
    "Problem",
    "check_append",
    "check_floats",
    "check_inference",
    "check_ints",
    "check_length",
    "check_num_splits",
    "check_operand",
    "is_number",
    "prepare",
    "wrong",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def wrong(name: str, given: object, works: object) -> ValueError:
    """The error for an argument: its name, what it was given, what works."""
    return ValueError(f"{name}: got {given}; needs {works}")


def check_inference(dropout_p: float = 0.0, **tensors: Tensor | None) -> None:
    """Raises NotImplementedError for what only training needs."""
    if dropout_p != 0:
        raise NotImplementedError(
            f"dropout_p: got {dropout_p}; LiteAttention is for inference and has only dropout_p=0.0"
        )
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise NotImplementedError(
                    f"{name}: got a tensor that requires grad; LiteAttention has no backward pass: call it under "
                    f"torch.inference_mode() or torch.no_grad(), or pass {name}.detach()"
                )


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    q_descale: Tensor | None = None,
    fp8_q: bool = False,
    out: Tensor | None = None,
    names: tuple[str, str, str] = ("k", "v", "seqused_k"),
) -> Problem:
    """Checks what metadata tells; allocates lse and, where it isn't given, out.

    `names` are what the caller calls k, v and seqused_k. Without `cu_seqlens_q` the shapes give max_seqlen_q and
    max_seqlen_k. `fp8_q` is whether q may be FP8.
    """
    varlen, paged = cu_seqlens_q is not None, block_table is not None
    q_layout = "(total_q, num_heads, head_dim)" if varlen else "(batch, seqlen_q, num_heads, head_dim)"
    if paged:
        k_layout = "(num_blocks, page_size, num_heads_k, head_dim)"
    else:
        k_layout = "(total_k, num_heads_k, head_dim)" if varlen else "(batch, seqlen_k, num_heads_k, head_dim)"
    check_operand("q", q, q_layout, or_fp8=fp8_q)
    check_operand(names[0], k, k_layout, like=q, or_fp8=True)
    check_operand(names[1], v, k_layout, like=q, or_fp8=True)
    if v.dtype != k.dtype:
        raise wrong(names[1], v.dtype, f"the dtype of {names[0]}, {k.dtype}")
    _check_heads(q, k, v, names)

    if varlen:
        check_ints("cu_seqlens_q", cu_seqlens_q, ("batch + 1",), q)
        if cu_seqlens_q.shape[0] == 0:
            raise wrong("cu_seqlens_q", "no elements", "batch + 1 of them")
        batch = cu_seqlens_q.shape[0] - 1
        check_length("max_seqlen_q", max_seqlen_q)
        check_length("max_seqlen_k", max_seqlen_k)
        if paged and seqused_k is None and cu_seqlens_k is None:
            raise wrong(names[2], "None, with cu_seqlens_k=None", "one of them, for the key lengths")
        if not paged and cu_seqlens_k is None:
            raise wrong("cu_seqlens_k", "None", f"a tensor, where {names[0]} is packed and not paged by a block_table")
    else:
        batch, max_seqlen_q = q.shape[0], q.shape[1]
        max_seqlen_k = k.shape[1]
        if not paged and k.shape[0] != batch:
            raise wrong(names[0], f"a batch of {k.shape[0]}", f"the batch of q, {batch}")
    if cu_seqlens_k is not None:
        check_ints("cu_seqlens_k", cu_seqlens_k, (batch + 1,), q)
    if seqused_k is not None:
        check_ints(names[2], seqused_k, (batch,), q)
    if scheduler_metadata is not None:
        check_ints("scheduler_metadata", scheduler_metadata, ("size",), q)
    if paged:
        check_ints("block_table", block_table, (batch, "max_blocks"), q)
        page_size, pages = k.shape[1], block_table.shape[1]
        if page_size == 0:
            raise wrong(names[0], "pages of 0 keys", "a page_size of 1 or more")
        if not varlen:
            max_seqlen_k = page_size * pages
        elif q.is_cuda and page_size * pages < max_seqlen_k:  # on the CPU check_values compares the lengths themselves
            raise wrong("block_table", f"{pages} pages of {page_size} keys", f"room for max_seqlen_k={max_seqlen_k}")

    left, right = _check_window(window_size)
    if softmax_scale is not None and not (is_number(softmax_scale) and 0 < softmax_scale < math.inf):
        raise wrong("softmax_scale", softmax_scale, "a positive number, or None for 1 / sqrt(head_dim)")
    if not (is_number(softcap) and 0 <= softcap < math.inf):
        raise wrong("softcap", softcap, "a positive number, or 0.0 for none")
    check_num_splits(num_splits)
    heads = q.shape[-2]
    if alibi_slopes is not None:
        check_floats("alibi_slopes", alibi_slopes, ((heads,), (batch, heads)), q)
    if sinks is not None:
        check_floats("sinks", sinks, ((heads,),), q)
    factors_shape = batch, k.shape[-2]
    q_descale = _check_descale("q_descale", q_descale, "q", q, factors_shape)
    k_descale = _check_descale("k_descale", k_descale, names[0], k, factors_shape)
    v_descale = _check_descale("v_descale", v_descale, names[1], v, factors_shape)
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16 if q.dtype == FP8 else q.dtype, device=q.device)
    else:
        if q.dtype == FP8 and isinstance(out, Tensor) and out.dtype != torch.bfloat16:
            raise wrong("out", out.dtype, f"torch.bfloat16 where q is {FP8}")
        check_operand("out", out, q_layout, like=q, any_dtype=q.dtype == FP8)
        if out.shape != q.shape:
            raise wrong("out", f"shape {tuple(out.shape)}", f"the shape of q, {tuple(q.shape)}")
        _check_writable("out", out)
    lse = torch.empty(
        (heads, q.shape[0]) if varlen else (batch, heads, max_seqlen_q), dtype=torch.float32, device=q.device
    )
    return Problem(
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        block_table,
        scheduler_metadata,
        max_seqlen_q,
        max_seqlen_k,
        1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale),
        left,
        0 if causal else right,
        float(softcap),
        alibi_slopes,
        sinks,
        num_splits,
        k_descale,
        v_descale,
        q_descale,
    )


def check_num_splits(num_splits: int) -> None:
    if not isinstance(num_splits, int) or isinstance(num_splits, bool) or num_splits < 0:
        raise wrong("num_splits", num_splits, "0 or a positive int")


def check_append(problem: Problem, k: Tensor, v: Tensor) -> None:
    """Checks k and v (batch, seqlen_new, heads_k, head_dim), which are to be written into the caches of `problem`."""
    for name, x, cache in (("k", k, problem.k), ("v", v, problem.v)):
        check_operand(name, x, "(batch, seqlen_new, num_heads_k, head_dim)", like=problem.q, or_fp8=True, strided=True)
        if x.dtype != cache.dtype:
            raise wrong(name, x.dtype, f"the dtype of {name}_cache, {cache.dtype}")
        works = (problem.batch, k.shape[1], problem.heads_k, problem.head_dim)
        if tuple(x.shape) != works:
            raise wrong(name, f"shape {tuple(x.shape)}", f"(batch, seqlen_new, num_heads_k, head_dim) = {works}")
        _check_writable(f"{name}_cache", cache)


def check_operand(
    name: str,
    x: Tensor,
    layout: str,
    like: Tensor | None = None,
    or_fp8: bool = False,
    any_dtype: bool = False,
    strided: bool = False,
) -> None:
    """A tensor ranked as `layout`, on the device of `like`; no gaps in head_dim unless `strided`.

    Its dtype is that of `like`, or one of DTYPES where there is none; FP8 too with `or_fp8`, all with `any_dtype`.
    """
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, f"a tensor {layout}")
    if x.dim() != layout.count(",") + 1:
        raise wrong(name, f"shape {tuple(x.shape)}", layout)
    works = DTYPES if like is None else (like.dtype,)
    works = dict.fromkeys((*works, FP8) if or_fp8 else works)
    if x.dtype not in works and not any_dtype:
        said = list(map(str, works))
        if like is not None:
            said = [f"the dtype of q, {like.dtype}", *(f", or {other}" for other in said[1:])]
        raise wrong(name, x.dtype, (" or " if like is None else "").join(said))
    if like is not None:
        _check_device(name, x, like)
    if not strided and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise wrong(name, f"strides {x.stride()}", f"a head_dim of stride 1, as {name}.contiguous() has")


def _check_heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    if v.shape != k.shape:
        raise wrong(names[1], f"shape {tuple(v.shape)}", f"the shape of {names[0]}, {tuple(k.shape)}")
    if q.shape[-1] == 0 or q.shape[-2] == 0:
        raise wrong("q", f"shape {tuple(q.shape)}", "num_heads and head_dim of 1 or more")
    if k.shape[-1] != q.shape[-1]:
        raise wrong(names[0], f"a head_dim of {k.shape[-1]}", f"the head_dim of q, {q.shape[-1]}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise wrong(names[0], f"{k.shape[-2]} heads", f"a num_heads_k that divides the num_heads of q, {q.shape[-2]}")


def check_ints(name: str, x: Tensor, shape: tuple[int | str, ...], like: Tensor) -> None:
    """An int32 tensor on the device of `like`. Names in `shape` stand for any size."""
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "an int32 tensor")
    sizes_fit = all(isinstance(want, str) or have == want for have, want in zip(x.shape, shape, strict=False))
    if x.dim() != len(shape) or not sizes_fit:
        raise wrong(name, f"shape {tuple(x.shape)}", f"({', '.join(map(str, shape))})")
    if x.dtype != torch.int32:
        raise wrong(name, x.dtype, torch.int32)
    _check_device(name, x, like)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise wrong(name, f"strides {x.stride()}", "a last dimension of stride 1")


def check_floats(name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...], like: Tensor) -> None:
    """A float32 tensor of one of `shapes`, on the device of `like`."""
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a float32 tensor")
    if tuple(x.shape) not in shapes:
        raise wrong(name, f"shape {tuple(x.shape)}", " or ".join(map(str, shapes)))
    if x.dtype != torch.float32:
        raise wrong(name, x.dtype, torch.float32)
    _check_device(name, x, like)


def _check_descale(name: str, x: Tensor | None, of: str, stored: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """The factors of `stored`, which the caller calls `of`, as a view of `shape`, which is (batch, heads_k)."""
    if x is None:
        return None
    if stored.dtype != FP8:
        raise wrong(name, f"{type(x).__name__} for {of} in {stored.dtype}", f"None, unless {of} is in {FP8}")
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a float32 tensor")
    sizes = (1, 1, *x.shape)[-2:]
    if x.dim() > 2 or any(have not in (1, want) for have, want in zip(sizes, shape, strict=True)):
        raise wrong(name, f"shape {tuple(x.shape)}", f"(batch, num_heads_k) = {shape}, or one that broadcasts to it")
    if x.dtype != torch.float32:
        raise wrong(name, x.dtype, torch.float32)
    _check_device(name, x, stored)
    return x.expand(shape)


def _check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise wrong(name, f"a tensor on {x.device}", f"one on the device of q, {like.device}")


def _check_writable(name: str, x: Tensor) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise wrong(name, f"strides {x.stride()}", "memory of its own for every element, as an expanded tensor hasn't")


def check_length(name: str, value: int | None) -> None:
    """A number of tokens, or of anything else, that the host knows."""
    if isinstance(value, Tensor):  # int(value) would wait for the GPU
        raise wrong(name, "a tensor", "a Python int")
    if not isinstance(value, (int, torch.SymInt)) or value < 0:
        raise wrong(name, value, "an int of 0 or more")


def _check_window(window_size: tuple[int, int]) -> tuple[int, int]:
    two = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not two or not all(isinstance(side, (int, torch.SymInt)) for side in window_size):
        raise wrong("window_size", window_size, "(left, right), two ints, where a negative one is unbounded")
    return _clamp(window_size[0]), _clamp(window_size[1])


def _clamp(side: int) -> int:
    """Kernels add positions to it in 32 bits."""
    return min(max(side, -1), 1 << 30)


def is_number(x: object) -> bool:
    return isinstance(x, (int, float, torch.SymFloat)) and not isinstance(x, bool)
