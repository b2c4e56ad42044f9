"""FlashAttention-3 as vLLM ships it: one library of torch ops, which needs no vLLM around it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from lite_attention.bench.contenders import Call
from lite_attention.bench.inputs import Inputs, rows
from lite_attention.bench.shapes import Shape

LIBRARY = Path("vllm_flash_attn", "_vllm_fa3_C.abi3.so")  # below vLLM's package


def find_fa3() -> Path | None:
    """The library inside an installed vLLM, which is not imported: that takes seconds and changes the process."""
    spec = importlib.util.find_spec("vllm")
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((file for place in places if (file := Path(place) / LIBRARY).is_file()), None)


def _vllm_version(library: Path) -> str | None:
    """Of the vLLM that the library lies in, as it says itself beside its package; None where nothing does."""
    folders = library.absolute().parents
    package = folders[len(LIBRARY.parts) - 1]
    if package.name != "vllm" or not package.parent.is_dir():
        return None
    found = importlib.metadata.distributions(name="vllm", path=[str(package.parent)])
    return next((one.version for one in found), None)


class FA3:
    """`path` is the library, None where none was found. Where keys are FP8 its queries are too, as in vLLM."""

    name = "FA3"

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def available(self) -> str | None:
        if self.path is None:
            return f"no installed vLLM has {LIBRARY}; --fa3 PATH names such a file"
        if torch.cuda.get_device_capability() != (9, 0):
            return f"{torch.cuda.get_device_name()} is no Hopper GPU"
        try:
            torch.ops.load_library(self.path)
        except OSError as error:
            return f"{self.path} does not load: {str(error).splitlines()[0]}"
        missing = [op for op in ("fwd", "get_scheduler_metadata") if not hasattr(torch.ops._vllm_fa3_C, op)]
        return f"{self.path} has no op _vllm_fa3_C::{missing[0]}" if missing else None

    def identity(self) -> str:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        version = _vllm_version(self.path)
        return f"{self.path}, sha256 {digest[:16]}" + (f", of vLLM {version}" if version else "")

    def lacks(self, shape: Shape) -> str | None:
        return None

    def prepare(self, inputs: Inputs) -> Call:
        shape, paged = inputs.shape, inputs.block_table is not None
        q = inputs.queries()
        descales = [inputs.descales.get(f"{name}_descale") for name in "qkv"]
        if shape.fp8 == "kv":
            q = q.to(inputs.k.dtype)
        k, v = (inputs.k, inputs.v) if paged else (rows(inputs.k), rows(inputs.v))
        out = torch.empty_like(q, dtype=torch.float16 if q.dtype == torch.float16 else torch.bfloat16)
        ops = torch.ops._vllm_fa3_C
        metadata = None
        if shape.planned:
            metadata = ops.get_scheduler_metadata(
                shape.batch, max(shape.q_lens), max(shape.k_lens), shape.heads, shape.heads_k,
                shape.head_dim, shape.head_dim, q.dtype, inputs.seqused_k, inputs.cu_seqlens_q,
                None, None, None, None,  # cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k
                shape.page_size, 0,  # max_seqlen_k_new
                shape.causal, -1, -1, False,  # window, has_softcap
                0, None, 0,  # num_splits, pack_gqa, sm_margin
            )  # fmt: skip
        arguments = (
            q, k, v,
            None, None, None,  # k_new, v_new, q_v
            out, inputs.cu_seqlens_q, None if paged else inputs.cu_seqlens_k,
            None, None,  # cu_seqlens_k_new, seqused_q
            inputs.seqused_k if paged else None, max(shape.q_lens), max(shape.k_lens), inputs.block_table,
            None, None, None, None, None,  # kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary
            *descales,
            inputs.softmax_scale, shape.causal, -1, -1,  # window
            0.0, True,  # softcap, rotary_interleaved
            metadata, 0, None, 0,  # num_splits, pack_gqa, sm_margin
            None, 1, 0, None,  # s_aux, cp_world_size, cp_rank, cp_tot_seqused_k
        )  # fmt: skip
        return lambda: ops.fwd(*arguments)[0]
