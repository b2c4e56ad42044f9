"""FlashAttention-4: the package flash-attn-4, kernels in CuTe DSL that are compiled when they are first called."""

from __future__ import annotations

import importlib.metadata
from types import ModuleType

import torch
from torch import Tensor

from lite_attention.bench.contenders import Call
from lite_attention.bench.inputs import Inputs
from lite_attention.bench.shapes import Shape


def _interface() -> ModuleType:
    import flash_attn.cute.interface

    return flash_attn.cute.interface


class FA4:
    """Its lists are those of its block-sparse kernel, of whole blocks.

    Not under a causal mask: there its blocks on the diagonal need a list of their own and a function that masks them,
    which is not made here.
    """

    name = "FA4"
    lists_name = "FA4 sparse"
    lists_tile = (128, 128)

    def available(self) -> str | None:
        try:
            _interface()
        except ImportError as error:
            return f"flash_attn.cute cannot be imported: {error}"
        except Exception as error:  # with an unfitting CUTLASS DSL it may raise anything
            return f"flash_attn.cute cannot be imported: {type(error).__name__}: {error}"
        return None

    def identity(self) -> str:
        try:
            return importlib.metadata.version("flash-attn-4")
        except importlib.metadata.PackageNotFoundError:
            return f"{_interface().__file__}, of no installed package"

    def lacks(self, shape: Shape) -> str | None:
        if shape.fp8 != "none":
            return "no FP8 on Hopper"
        return "no paged KV" if shape.layout == "paged" else None

    def prepare(self, inputs: Inputs) -> Call:
        forward, shape = _interface()._flash_attn_fwd, inputs.shape
        if shape.layout == "dense":
            return lambda: forward(inputs.q, inputs.k, inputs.v, causal=shape.causal)[0]
        return lambda: forward(
            inputs.q,
            inputs.k,
            inputs.v,
            cu_seqlens_q=inputs.cu_seqlens_q,
            cu_seqlens_k=inputs.cu_seqlens_k,
            max_seqlen_q=max(shape.q_lens),
            max_seqlen_k=max(shape.k_lens),
            causal=shape.causal,
        )[0]

    def lacks_lists(self, shape: Shape) -> str | None:
        if shape.causal:
            return "lists and a causal mask need a mask of blocks of its own"
        return None if shape.layout == "dense" else "lists for one length only"

    def prepare_lists(self, inputs: Inputs, visits: Tensor) -> Call:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        forward = _interface()._flash_attn_fwd
        count, order = visits.sum(-1).int(), torch.argsort(~visits, dim=-1, stable=True).int()
        none_masked = torch.zeros_like(count), torch.zeros_like(order)
        lists = BlockSparseTensorsTorch(*none_masked, count, order, block_size=self.lists_tile)
        return lambda: forward(inputs.q, inputs.k, inputs.v, block_sparse_tensors=lists)[0]
