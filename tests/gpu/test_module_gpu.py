"""`LiteAttention` with the Hopper kernels: CUDA graphs, which no CPU has, and ranks over NCCL."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import part, run_ranks
from steps import coherent

from lite_attention import LiteAttention, SeqParallelLiteAttention, SkipList, flash_attn_func, skip_attention

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


def test_a_graph_of_the_function_reads_its_threshold_at_each_replay():
    thresholds = [-math.inf, *(x - torch.arange(4.0).cuda() for x in (-6.0, -3.0)), 0.0]
    calls = on_gpu(len(thresholds))
    static, threshold = [x.clone() for x in calls[0]], torch.full((4,), -1.0, device="cuda")
    captured, eager = (SkipList.fresh(1, 4, 1024, 2048, head_dim=128, device="cuda") for _ in range(2))
    skip_attention(*static, captured, threshold)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = skip_attention(*static, captured, threshold)
    captured.reset()
    kept = []
    for call, now in zip(calls, thresholds, strict=True):
        for x, new in zip((*static, threshold), (*call, torch.as_tensor(now)), strict=True):
            x.copy_(new)
        graph.replay()
        expected, expected_lse = skip_attention(*call, eager, now)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        assert torch.equal(captured.bits, eager.bits)
        kept.append(captured.visits().float().mean().item())
    assert kept[0] == 1 and kept == sorted(kept, reverse=True) and 1 > kept[1] > kept[-1]


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


METHODS, THRESHOLDS = ("ring", "ulysses"), (-math.inf, -3.0)


def both_methods(rank, size):
    """(out, lse, the bits of each list) of each call, on the CPU."""
    results = {}
    for method in METHODS:
        for threshold in THRESHOLDS:
            attention = SeqParallelLiteAttention(method, threshold=threshold)
            results[method, threshold] = of_calls = []
            for call in coherent(4, **SIZES):
                out, lse = attention(*(part(x, rank, size).cuda() for x in call), return_softmax_lse=True)
                lists = [one.skip_list().bits.cpu() for one in attention.parts]
                of_calls.append((out.cpu(), lse.cpu(), lists))
    return results


def functional(calls, threshold):
    """(out, lse, the list's bits after it) of each call, by `skip_attention`, on the CPU."""
    q, k, _ = calls[0]
    skip_list = SkipList.fresh(1, q.shape[2], q.shape[1], k.shape[1], head_dim=SIZES["dim"], device="cuda")
    results = []
    for call in calls:
        out, lse = skip_attention(*(x.contiguous() for x in call), skip_list, threshold)
        results.append((out.cpu(), lse.cpu(), skip_list.bits.cpu()))
    return results


def in_parts(calls, rank, size, threshold):
    """What a rank has in the ring: the results over each part of the keys, joined by their lse, and their lists."""
    of_parts = [
        functional([(part(q, rank, size), part(k, n, size), part(v, n, size)) for q, k, v in calls], threshold)
        for n in range(size)
    ]
    for step in zip(*of_parts, strict=True):
        outs, lses = (torch.stack([x[n].double() for x in step]) for n in (0, 1))
        weights = torch.softmax(lses, dim=0).transpose(2, 3)[..., None]
        yield (weights * outs).sum(0), lses.logsumexp(0), [bits for _, _, bits in step]


def by_heads(calls, rank, size, threshold):
    """What a rank has in Ulysses: its tokens of the results, and its heads of the list."""
    for out, lse, bits in functional(calls, threshold):
        yield part(out, rank, size).double(), part(lse, rank, size, dim=2).double(), [part(bits, rank, size)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_over_nccl(tmp_path):
    """Their lists are those of one process bit for bit; outputs are over what was visited, rounded once more."""
    calls = on_gpu(4)
    for rank, results in enumerate(run_ranks(both_methods, 2, tmp_path, backend="nccl")):
        for (method, threshold), of_calls in results.items():
            expected = (in_parts if method == "ring" else by_heads)(calls, rank, 2, threshold)
            for (out, lse, lists), (own, own_lse, own_lists) in zip(of_calls, expected, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(lists, own_lists, strict=True))
                torch.testing.assert_close(out.double(), own, rtol=2**-8, atol=1e-5)
                torch.testing.assert_close(lse.double(), own_lse, rtol=1e-6, atol=1e-5)
            assert all((bits == -1).all() for bits in lists) == (threshold == -math.inf)
            if threshold == -math.inf:
                for (out, _, _), (q, k, v) in zip(of_calls, calls, strict=True):
                    dense = part(flash_attn_func(q, k, v).cpu(), rank, 2)
                    torch.testing.assert_close(out.float(), dense.float(), rtol=2**-6, atol=2**-6)
