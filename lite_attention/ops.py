"""The torch custom ops behind the public functions, and the choice between them.

`lite_attention::fwd` computes into `out` and `lse` and returns nothing. Its CPU implementation is Python, its CUDA
implementation comes from the compiled extension, which registers it when it is loaded. `lite_attention::fwd_reference`
has the same schema and computes the specification on any device. `lite_attention::skip_fwd` and its `_reference` are
the same for calls with skip lists (`lite_attention.skip.op`). The ops of page lists are `lite_attention.pages.op`'s.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lite_attention import cpu, hopper, reference
from lite_attention.checks import Problem, wrong
from lite_attention.pages import op as page_op
from lite_attention.skip import op as skip_op
from lite_attention.values import check_values

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table, "
    "Tensor(c!)? scheduler_metadata, "  # it holds counters, which count during a launch
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, int window_left, int window_right, "
    "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, int num_splits=0, "
    "Tensor? k_descale=None, Tensor? v_descale=None, Tensor? q_descale=None) -> ()"
)
METADATA_SCHEMA = (
    "(Tensor(a!) metadata, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, int batch, int total_q, "
    "int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, int head_dim, "
    "int window_left, int window_right, int num_splits=0, bool paged=False, bool fp8_kv=False, "
    "bool fp8_q=False, int min_context=0, Tensor? whole=None) -> ()"
)
METADATA_SIZE_SCHEMA = (
    "(int batch, int total_q, int max_seqlen_q, int num_heads, int num_heads_k, int head_dim, int device) -> int"
)
BACKENDS = ("hopper", "cpu", "reference")
EXTENSION = Path(__file__).with_name("_C.abi3.so")


def _fwd_cpu(*args: object) -> None:
    problem = Problem(*args)
    check_values(problem)
    cpu.run(problem)


def _fwd_reference(*args: object) -> None:
    problem = Problem(*args)
    check_values(problem)
    reference.run(problem)


def _fwd_fake(*args: object) -> None:
    """What tracing sees: tensors that the schema names change, nothing is returned."""


def _load_extension() -> str | None:
    """Loads the compiled kernels, after the schema that they implement. Gives the reason where there are none."""
    if not EXTENSION.exists():
        return "it was not built: reinstall with nvcc (CUDA 12.8 or newer) on PATH or in CUDA_HOME"
    if torch.version.cuda is None:  # built wherever there is nvcc, it links with libtorch_cuda
        return f"it is built but not loaded: torch {torch.__version__} has no CUDA"
    try:
        torch.ops.load_library(EXTENSION)
    except OSError as error:  # everything but the kernels works
        return f"{EXTENSION} does not load: {error}"
    return None


for _name, _schema, _key, _implementation in (
    ("lite_attention::fwd", SCHEMA, "CPU", _fwd_cpu),
    ("lite_attention::fwd_reference", SCHEMA, "CompositeExplicitAutograd", _fwd_reference),
    ("lite_attention::skip_fwd", skip_op.SCHEMA, "CPU", skip_op.fwd_cpu),
    ("lite_attention::skip_fwd_reference", skip_op.SCHEMA, "CompositeExplicitAutograd", skip_op.fwd_reference),
    *page_op.OPS,
):
    torch.library.define(_name, _schema)
    torch.library.impl(_name, _key)(_implementation)
    torch.library.register_fake(_name)(_fwd_fake)

torch.library.define("lite_attention::get_scheduler_metadata", METADATA_SCHEMA)
torch.library.register_fake("lite_attention::get_scheduler_metadata")(_fwd_fake)
torch.library.define("lite_attention::scheduler_metadata_size", METADATA_SIZE_SCHEMA)

EXTENSION_MISSING = _load_extension()
"""Why the compiled kernels can't be used; None where they are loaded."""


def choose(problem: Problem, backend: str | None) -> str:
    """The backend named, or else the one for the device; raises where it can't compute `problem`."""
    backend = backend_on(problem.q.device, backend)
    if backend == "hopper":
        hopper.check_supported(problem)
    return backend


def backend_on(device: torch.device, backend: str | None) -> str:
    """The backend named, or else the one for the device; raises where it isn't for that device."""
    if backend is not None and backend not in BACKENDS:
        raise wrong("backend", repr(backend), f"None or one of {', '.join(map(repr, BACKENDS))}")
    if backend is None:
        backend = {"cuda": "hopper", "cpu": "cpu"}.get(device.type)
    if backend is None:
        raise NotImplementedError(f"q: got a tensor on {device}; needs cuda or cpu, or backend='reference'")
    if backend == "cpu" and device.type != "cpu":
        raise wrong("backend", f"'cpu' for tensors on {device}", "tensors on the CPU, or another backend")
    if backend == "hopper":
        _check_hopper(device)
    return backend


def launch(problem: Problem, backend: str) -> None:
    """Computes `problem` into its `out` and `lse` with the backend that `choose` gave."""
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
        problem.num_splits,
        problem.k_descale,
        problem.v_descale,
        problem.q_descale,
    )


def _check_hopper(device: torch.device) -> None:
    if device.type != "cuda":
        raise wrong("backend", f"'hopper' for tensors on {device}", "tensors on a Hopper GPU, or another backend")
    if EXTENSION_MISSING is not None:
        raise RuntimeError(
            f"LiteAttention's CUDA extension is not there: {EXTENSION_MISSING}. Without it only "
            "backend='reference' computes CUDA tensors, slowly."
        )
    if not _is_hopper(device):
        raise NotImplementedError(
            f"q: got a tensor on {device}, compute capability {torch.cuda.get_device_capability(device)}; "
            "LiteAttention's kernels need (9, 0), which is Hopper: H100, H200, H800, GH200. backend='reference' "
            "computes on any device, slowly."
        )


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)
