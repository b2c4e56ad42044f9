"""The torch custom ops behind the public functions, and the choice between them.

`lite_attention::fwd` has a CPU implementation in Python and a CUDA one in the compiled extension; `lite_attention::fwd_reference` has
the same schema and runs the specification on any device.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lite_attention import cpu, hopper, reference
from lite_attention.checks import Problem

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table, Tensor? scheduler_metadata, "
    "int max_seqlen_q, int max_seqlen_k, float softmax_scale, int window_left, int window_right, "
    "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None) -> ()"
)

BACKENDS = ("hopper", "cpu", "reference")

torch.library.define("lite_attention::fwd", SCHEMA)
torch.library.define("lite_attention::fwd_reference", SCHEMA)


def _run_cpu(*args: object) -> None:
    cpu.run(Problem(*args))


def _run_reference(*args: object) -> None:
    reference.run(Problem(*args))


def _run_fake(*args: object) -> None:
    """Writes to `out` and `lse` and returns nothing: there is no shape to infer."""


torch.library.impl("lite_attention::fwd", "CPU")(_run_cpu)
torch.library.impl("lite_attention::fwd_reference", "CompositeExplicitAutograd")(_run_reference)
torch.library.register_fake("lite_attention::fwd")(_run_fake)
torch.library.register_fake("lite_attention::fwd_reference")(_run_fake)

EXTENSION = Path(__file__).with_name("_C.abi3.so")
# Built wherever there is nvcc, it links with libtorch_cuda, which only a torch for CUDA has.
if EXTENSION.exists() and torch.version.cuda is not None:
    torch.ops.load_library(EXTENSION)


def launch(problem: Problem, backend: str | None) -> None:
    """Computes `problem` with the backend asked for, or with the one for its device. Never another one."""
    backend = backend or ("hopper" if problem.q.is_cuda else "cpu")
    if backend == "hopper":
        hopper.check_supported(problem)
    op = torch.ops.lite_attention.fwd_reference if backend == "reference" else torch.ops.lite_attention.fwd
    op(
        problem.q,
        problem.k,
        problem.v,
        problem.out,
        problem.lse,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        problem.seqused_k,
        problem.block_table,
        problem.scheduler_metadata,
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        problem.softmax_scale,
        problem.window_left,
        problem.window_right,
        problem.softcap,
        problem.alibi_slopes,
        problem.sinks,
    )
