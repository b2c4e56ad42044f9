"""What the Hopper kernels support. `csrc/ops.cu` launches them; it repeats only the checks that keep memory safe."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.problem import FP8, Problem

MAX_HEAD_DIM = 256
GRAIN_BYTES = 16  # of TMA
DTYPES = (torch.bfloat16, torch.float16)
PAGE_MULTIPLE = 16  # tokens: eight rows are one swizzle atom, and a KV tile must hold whole boxes


def head_dim_multiple(fp8_kv: bool = False) -> int:
    return GRAIN_BYTES // (1 if fp8_kv else 2)


def head_dim_supported(head_dim: int, fp8_kv: bool = False) -> bool:
    """Whether there is a kernel: those for 64, 96, 128, 192 and 256 serve smaller head dims too, at their own speed."""
    return 0 < head_dim <= MAX_HEAD_DIM and head_dim % head_dim_multiple(fp8_kv) == 0


def check_supported(problem: Problem) -> None:
    """Raises NotImplementedError where no kernel computes `problem`, ValueError where its memory can't be read by TMA.

    It reads metadata alone: nothing waits for the GPU.
    """
    p = problem
    if p.q.dtype not in (*DTYPES, FP8):
        raise unsupported("q", p.q.dtype, f"torch.bfloat16, torch.float16 and {FP8}")
    if not head_dim_supported(p.head_dim, p.fp8_kv):
        given = f"head_dim {p.head_dim}" + (f" with keys in {p.k.dtype}" if p.fp8_kv else "")
        raise unsupported("q", given, f"multiples of {head_dim_multiple(p.fp8_kv)} up to {MAX_HEAD_DIM}")
    if p.paged and p.page_size % PAGE_MULTIPLE != 0:
        raise unsupported("block_table", f"pages of {p.page_size} tokens", f"multiples of {PAGE_MULTIPLE}")
    for name, x in (("q", p.q), ("k", p.k), ("v", p.v), ("out", p.out)):
        check_memory(name, x)
    for name, x in (("cu_seqlens_q", p.cu_seqlens_q), ("cu_seqlens_k", p.cu_seqlens_k), ("seqused_k", p.seqused_k)):
        if x is not None and x.stride(0) != 1:
            raise wrong(name, f"stride {x.stride(0)}", "a contiguous tensor")
    for name, x in (("alibi_slopes", p.alibi_slopes), ("sinks", p.sinks)):
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise wrong(name, f"strides {tuple(x.stride())}", "contiguous rows")
    if p.paged and p.block_table.shape[1] > 1 and p.block_table.stride(1) != 1:
        raise wrong("block_table", f"strides {tuple(p.block_table.stride())}", "contiguous rows")


def check_memory(name: str, x: Tensor) -> None:
    """Raises ValueError where 16-byte loads along the last dimension don't reach all of x."""
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        multiple = GRAIN_BYTES // x.element_size()
        if size > 1 and (stride <= 0 or stride % multiple != 0):
            needs = f"strides that are positive multiples of {multiple} elements"
            raise wrong(name, f"strides {tuple(x.stride())}", f"{needs} on a Hopper GPU")
    if not torch.compiler.is_compiling() and type(x) is Tensor and x.data_ptr() % 16 != 0:
        raise wrong(name, f"memory at an address of {x.data_ptr() % 16} modulo 16", "16-byte alignment on a Hopper GPU")


def unsupported(name: str, given: object, works: str) -> NotImplementedError:
    """The error for an argument that the specification knows and the kernels don't."""
    return NotImplementedError(
        f"{name}: got {given}; the Hopper kernels have {works}. backend='reference' computes the call, slowly."
    )
