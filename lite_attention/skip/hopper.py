"""What the Hopper kernels with skip lists support, beside what `lite_attention.hopper` says of all kernels."""

from __future__ import annotations

import torch

from lite_attention.checks import wrong
from lite_attention.problem import Problem
from lite_attention.skip.problem import Lists
from lite_attention.skip.tiles import tile_shape

MAX_SEQLEN_K = 1 << 20  # a block keeps the words of a q tile in shared memory; kMaxSkipTokens in csrc/sm90/launch.h


def check_supported(problem: Problem, lists: Lists) -> None:
    """Raises what `skip_attention` says where no kernel computes the call. Reads metadata alone."""
    if not _has_kernels():
        raise RuntimeError(
            "LiteAttention's CUDA extension was built without the kernels with skip lists: reinstall it from this "
            "version's source. Without them only backend='reference' computes CUDA tensors, slowly."
        )
    works = tile_shape(problem.head_dim)
    if (lists.block_m, lists.block_n) != works:
        raise wrong(
            "skip_list",
            f"tiles of {(lists.block_m, lists.block_n)}",
            f"{works} for a head_dim of {problem.head_dim} on a Hopper GPU, as SkipList.fresh(head_dim=...) has",
        )
    if problem.max_seqlen_k > MAX_SEQLEN_K:
        raise NotImplementedError(
            f"max_seqlen_k: got {problem.max_seqlen_k}; the Hopper kernels with skip lists have up to {MAX_SEQLEN_K}. "
            "backend='reference' computes the call, slowly."
        )


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("lite_attention::skip_fwd", "CUDA")
