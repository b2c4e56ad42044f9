"""One small case of every kernel, for compute-sanitizer: each head dim, dtype, tile and way to find keys.

Inputs are made, and results checked, on the CPU, so that next to nothing but the kernels of this project runs on the
GPU. Sequences without keys, without queries, shorter and longer than a tile are in each case.
"""

from __future__ import annotations

import accuracy
import pytest
import torch

from lite_attention import get_scheduler_metadata

# Each class of head dims by its own and by smaller ones, whose columns past the end are neither read nor written.
HEAD_DIMS = [64, 40, 96, 72, 128, 104, 192, 136, 256, 200, 248]
DECODE = ([1, 0, 2, 1, 2], [0, 70, 37, 1, 700])
PREFILL = ([5, 70, 0, 300, 40], [0, 70, 37, 333, 200])
HEADS, HEADS_K = 4, 2


def decode_paged(sequences, **kwargs):
    return accuracy.paged(sequences, 16, causal=True, **kwargs)


def decode_packed(sequences, **kwargs):
    return accuracy.packed(sequences, causal=True, **kwargs)


def prefill_paged(sequences, **kwargs):
    return accuracy.paged(sequences, 48, causal=True, num_splits=1, **kwargs)


def prefill_masked(sequences, **kwargs):
    return accuracy.packed(sequences, window_size=(100, 3), **kwargs)


def prefill_full(sequences, **kwargs):
    return accuracy.packed(sequences, slack=0, **kwargs)


@pytest.mark.parametrize("modified", [False, True], ids=["plain", "modified"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", [decode_paged, decode_packed, prefill_paged, prefill_masked, prefill_full])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_one_case(monkeypatch, head_dim, layout, dtype, modified):
    monkeypatch.setattr(accuracy, "DEVICE", "cpu")
    lens_q, lens_k = DECODE if layout in (decode_paged, decode_packed) else PREFILL
    sequences = accuracy.make_sequences(lens_q, lens_k, HEADS, HEADS_K, head_dim, dtype, 0)
    kwargs = {}
    if modified:
        kwargs = {
            "softcap": 20.0,
            "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0]),
            "sinks": torch.tensor([1.0, -1.0, 0.0, 2.0]),
        }
    case = layout(sequences, **kwargs)
    out, lse = on_gpu(case).run()
    accuracy.check(case, out.cpu(), lse.cpu())


def on_gpu(case):
    def move(x):
        return x.cuda() if isinstance(x, torch.Tensor) else x

    kwargs = {name: move(value) for name, value in case.kwargs.items()}
    return accuracy.Case(case.call, tuple(map(move, case.args)), kwargs)


def test_a_shared_plan(monkeypatch):
    """Two layers under one plan, whose counters the first leaves as it found them."""
    monkeypatch.setattr(accuracy, "DEVICE", "cpu")
    case = decode_paged(accuracy.make_sequences(*DECODE, HEADS, HEADS_K, 128, torch.bfloat16, 0))
    moved = on_gpu(case)
    q, _, _, starts, _, longest_q, longest_k = moved.args
    metadata = get_scheduler_metadata(
        len(DECODE[0]), longest_q, longest_k, HEADS, HEADS_K, 128, cu_seqlens_q=starts, total_q=len(q),
        seqused_k=moved.kwargs["seqused_k"], causal=True, page_size=16,
    )  # fmt: skip
    for _ in range(2):
        out, lse = moved.run(scheduler_metadata=metadata)
        accuracy.check(case, out.cpu(), lse.cpu())
