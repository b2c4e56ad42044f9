"""`LiteAttention` with the Hopper kernels: CUDA graphs, which no CPU has, and ranks over NCCL."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import part, run_ranks
from steps import coherent

from lite_attention import LiteAttention, SeqParallelLiteAttention, flash_attn_func, lite_modules

SIZES = {"batch": 1, "seqlen_q": 1024, "seqlen_k": 2048, "heads": 4, "heads_k": 2, "dim": 128, "dtype": torch.bfloat16}


def on_gpu(count):
    return [tuple(x.cuda() for x in call) for call in coherent(count, **SIZES)]


def test_minus_infinity_is_dense_attention():
    attention = LiteAttention(threshold=-math.inf)
    for q, k, v in on_gpu(3):
        out, lse = attention(q, k, v, return_softmax_lse=True)
        dense, dense_lse = flash_attn_func(q, k, v, return_softmax_lse=True)
        torch.testing.assert_close(out.float(), dense.float(), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(lse, dense_lse, atol=1e-3, rtol=1e-4)


def test_replays_of_a_graph_are_calls():
    """They count as steps, and between them a threshold, a reset and another batch order have effect."""
    calls, must_skip = on_gpu(10), [(512, 1024)]
    options = {"threshold": -3.0, "num_steps": 4, "stats_steps": 10}
    eager, captured = LiteAttention(**options), LiteAttention(**options)
    static = [x.clone() for x in calls[0]]
    captured(*static, must_skip_list=must_skip)
    captured.reset_skip_state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured(*static, must_skip_list=must_skip)
    by_step = torch.linspace(-3, -1, 4)[:, None].repeat(1, SIZES["heads"])
    changes = {
        3: lambda x: x.set_threshold(-1.0),
        5: lambda x: x.reset_skip_state(),
        7: lambda x: x.set_threshold(by_step),
    }
    for number, call in enumerate(calls):
        for x, new in zip(static, call, strict=True):
            x.copy_(new)
        if number in changes:
            for attention in (eager, captured):
                changes[number](attention)
        graph.replay()
        assert torch.equal(out, eager(*call, must_skip_list=must_skip))
        assert torch.equal(captured.skip_list().bits, eager.skip_list().bits)
    stats = [attention.stats()["default"] for attention in (eager, captured)]
    assert stats[0].steps == stats[1].steps == (0, 1, 2, 3, 0)
    assert (
        torch.equal(stats[0].sparsity, stats[1].sparsity) and stats[0].sparsity[-2].mean() > stats[0].sparsity[0].mean()
    )


def test_a_capture_without_a_state_is_refused():
    (call,) = on_gpu(1)
    attention = LiteAttention()
    with (
        pytest.raises(RuntimeError, match="make the call once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attention(*call)


def test_compiled_with_reduced_overhead():
    calls = on_gpu(6)
    eager, attention = LiteAttention(threshold=-3.0), LiteAttention(threshold=-3.0)
    compiled = torch.compile(attention, fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        for number, call in enumerate(calls):
            torch.compiler.cudagraph_mark_step_begin()
            got = (compiled if number else attention)(*call)
            assert torch.equal(got, eager(*call))
            assert torch.equal(attention.skip_list().bits, eager.skip_list().bits)


def both_methods(rank, size):
    results = {}
    for method in ("ring", "ulysses"):
        for threshold in (-math.inf, -3.0):
            attention = SeqParallelLiteAttention(method, threshold=threshold)
            outs = [attention(*(part(x, rank, size).cuda() for x in call)).cpu() for call in coherent(4, **SIZES)]
            lists = [one.skip_list().visits().float().mean().item() for one in lite_modules(attention).values()]
            results[method, threshold] = outs, lists
    return results


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_over_nccl(tmp_path):
    for rank, results in enumerate(run_ranks(both_methods, 2, tmp_path, backend="nccl")):
        for (_, threshold), (outs, kept) in results.items():
            assert (min(kept) == 1) == (threshold == -math.inf)
            if threshold == -math.inf:
                for out, (q, k, v) in zip(outs, on_gpu(4), strict=True):
                    dense = part(flash_attn_func(q, k, v).cpu(), rank, 2)
                    torch.testing.assert_close(out.float(), dense.float(), rtol=2**-6, atol=2**-6)
