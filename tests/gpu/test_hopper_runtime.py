"""The Hopper kernels among streams, CUDA graphs, torch.compile and shared scheduler metadata."""

from __future__ import annotations

import accuracy
import pytest
import torch

from lite_attention import get_scheduler_metadata, scheduler_metadata_size


def decode_case(lens_k, seed=0, heads=(8, 2), head_dim=128):
    sequences = accuracy.make_sequences([1] * len(lens_k), lens_k, *heads, head_dim, torch.bfloat16, seed)
    return accuracy.paged(sequences, 16, causal=True)


def prefill_case(lens, seed=0):
    sequences = accuracy.make_sequences(lens, [n + 50 for n in lens], 8, 2, 64, torch.bfloat16, seed)
    return accuracy.packed(sequences, causal=True)


def test_on_a_stream_of_its_own():
    case, stream = decode_case([3000, 17, 900]), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        out, lse = case.run()
    stream.synchronize()
    accuracy.check(case, out, lse)


def test_two_streams_at_once():
    cases = [decode_case([9000, 4000], 1), prefill_case([700, 300], 2)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(10):
        for case, stream, kept in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(case.run())
    torch.cuda.synchronize()
    for case, kept in zip(cases, results, strict=True):
        for out, lse in kept:
            accuracy.check(case, out, lse)


def capture(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("shared_metadata", [False, True], ids=["own-plan", "metadata"])
def test_graph_follows_the_lengths(shared_metadata):
    """Captured with all lengths zero, replayed with lengths, pages and queries that change."""
    batch, longest, page_size, heads, heads_k, d = 4, 5000, 16, 8, 2, 128
    per_sequence = longest // page_size + 1
    cache = accuracy.poisoned(batch * per_sequence, page_size, heads_k, 2 * d, dtype=torch.bfloat16)
    q = torch.zeros(batch, heads, d, device="cuda", dtype=torch.bfloat16)
    used, starts = accuracy.ints([0] * batch), accuracy.starts([1] * batch)
    table = torch.full((batch, per_sequence), accuracy.HUGE_PAGE, device="cuda", dtype=torch.int32)
    shape = (batch, 1, longest, heads, heads_k, d)
    size = scheduler_metadata_size(batch, batch, 1, heads, heads_k, d) + 64
    metadata = torch.full((size,), -1, device="cuda", dtype=torch.int32) if shared_metadata else None

    def plan():
        if shared_metadata:
            get_scheduler_metadata(
                *shape,
                cu_seqlens_q=starts,
                total_q=batch,
                seqused_k=used,
                causal=True,
                page_size=page_size,
                out=metadata,
            )

    def run():
        return accuracy.flash_attn_varlen_func(
            q, cache[..., :d], cache[..., d:], starts, None, 1, longest, causal=True, seqused_k=used, block_table=table,
            scheduler_metadata=metadata, return_softmax_lse=True,
        )  # fmt: skip

    plan()
    graph, (out, lse) = capture(run)
    graph.replay()
    assert (out == 0).all()
    for seed, lens_k in enumerate([[1, 5000, 16, 333], [5000] * 4, [0, 0, 7, 0], [129, 128, 127, 4097]]):
        sequences = accuracy.make_sequences([1] * batch, lens_k, heads, heads_k, d, torch.bfloat16, seed)
        cache.fill_(float("nan"))
        table.fill_(accuracy.HUGE_PAGE)
        for b, (new_q, k, v) in enumerate(sequences):
            q[b] = new_q[0]
            for i in range(-(-lens_k[b] // page_size)):
                page, some = (i + 1) * batch - b - 1, slice(i * page_size, (i + 1) * page_size)
                table[b, i] = page
                cache[page, : k[some].shape[0], :, :d], cache[page, : k[some].shape[0], :, d:] = k[some], v[some]
        used.copy_(accuracy.ints(lens_k))
        plan()
        graph.replay()
        case = accuracy.Case(None, (), {"causal": True}, sequences, cached=True)
        accuracy.check(case, out, lse)


@pytest.mark.parametrize("shared_metadata", [False, True], ids=["own-plan", "metadata"])
@pytest.mark.parametrize("max_seqlen_q", [1, 64], ids=["decode", "prefill"])
def test_graph_serves_steps_of_any_kind(max_seqlen_q, shared_metadata):
    """As vLLM captures full graphs of mixed batches: 64 rows and 4 requests, dealt otherwise at each replay, with
    requests without queries and rows of no request for padding."""
    batch, rows, longest, page_size, heads, heads_k, d = 4, 64, 600, 16, 8, 2, 128
    per_sequence = -(-longest // page_size)
    cache = accuracy.poisoned(batch * per_sequence, page_size, heads_k, 2 * d, dtype=torch.bfloat16)
    q = torch.zeros(rows, heads, d, device="cuda", dtype=torch.bfloat16)
    used, starts = accuracy.ints([0] * batch), accuracy.starts([0, 0, 0, rows])
    table = torch.arange(batch * per_sequence, device="cuda", dtype=torch.int32).view(batch, per_sequence)
    size = scheduler_metadata_size(batch, rows, max_seqlen_q, heads, heads_k, d)
    metadata = torch.zeros(size, device="cuda", dtype=torch.int32) if shared_metadata else None

    def plan():
        if shared_metadata:
            get_scheduler_metadata(
                batch, max_seqlen_q, longest, heads, heads_k, d, cu_seqlens_q=starts, total_q=rows, seqused_k=used,
                causal=True, page_size=page_size, out=metadata,
            )  # fmt: skip

    def run():
        return accuracy.flash_attn_varlen_func(
            q, cache[..., :d], cache[..., d:], starts, None, max_seqlen_q, longest, causal=True, seqused_k=used,
            block_table=table, scheduler_metadata=metadata, return_softmax_lse=True,
        )  # fmt: skip

    plan()
    graph, (out, lse) = capture(run)
    steps = [([1, 1, 1], [600, 17, 1]), ([64], [600]), ([1, 40, 0, 2], [33, 40, 0, 599]), ([1] * 4, [600, 1, 128, 129])]
    for seed, (lens_q, lens_k) in enumerate(steps):
        sequences = accuracy.make_sequences(lens_q, lens_k, heads, heads_k, d, torch.bfloat16, seed)
        cache.fill_(float("nan"))
        tokens = sum(lens_q)
        for b, (_, k, v) in enumerate(sequences):
            both = torch.cat([k, v], -1)
            for i, page in enumerate(both.split(page_size)):
                cache[table[b, i], : len(page)] = page
        q[:tokens] = torch.cat([sequence[0] for sequence in sequences])
        padding = batch - len(lens_q)
        used.copy_(accuracy.ints(lens_k + [0] * padding))
        starts.copy_(accuracy.starts(lens_q + [0] * padding))
        out.fill_(7.0)
        plan()
        graph.replay()
        case = accuracy.Case(None, (), {"causal": True}, sequences, cached=True)
        accuracy.check(case, out[:tokens], lse[:, :tokens])
        assert (out[tokens:] == 7.0).all()


def test_two_graphs_in_flight():
    cases = [decode_case([6000, 200, 3000], seed) for seed in (3, 4)]
    graphs = [capture(case.run) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for case, (_, result) in zip(cases, graphs, strict=True):
        accuracy.check(case, *result)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_metadata_serves_many_layers(kind, head_dim):
    lens_q = [1, 1, 1] if kind == "decode" else [300, 0, 77]
    lens_k = [4000, 0, 129] if kind == "decode" else [900, 3, 77]
    layers = [accuracy.make_sequences(lens_q, lens_k, 8, 2, head_dim, torch.bfloat16, seed) for seed in range(3)]
    cases = [accuracy.paged(sequences, 32, causal=True) for sequences in layers]
    metadata = get_scheduler_metadata(
        3, max(lens_q), max(lens_k), 8, 2, head_dim, cu_seqlens_q=accuracy.starts(lens_q), total_q=sum(lens_q),
        seqused_k=accuracy.ints(lens_k), causal=True, page_size=32,
    )  # fmt: skip
    for case in cases:
        own = case.run()
        accuracy.check(case, *own)
        shared = case.run(scheduler_metadata=metadata)
        assert torch.equal(own[0], shared[0])
        assert torch.equal(own[1], shared[1])


def test_metadata_for_queries_of_one_length_serves_packed_ones():
    """What a plan says of where sequences begin is what the call says."""
    lens_k = [4000, 100, 129]
    case = accuracy.paged(accuracy.make_sequences([2] * 3, lens_k, 8, 2, 128, torch.bfloat16, 0), 32, causal=True)
    metadata = get_scheduler_metadata(
        3, 2, max(lens_k), 8, 2, 128, seqused_k=accuracy.ints(lens_k), causal=True, page_size=32
    )
    own, shared = case.run(), case.run(scheduler_metadata=metadata)
    assert torch.equal(own[0], shared[0]) and torch.equal(own[1], shared[1])


def test_metadata_out_is_checked():
    with pytest.raises(ValueError, match="out"):
        get_scheduler_metadata(4, 1, 100, 8, 2, 64, out=torch.empty(5, device="cuda", dtype=torch.int32))
    with pytest.raises(ValueError, match="total_q"):
        get_scheduler_metadata(1, 1, 100, 8, 2, 64, cu_seqlens_q=accuracy.ints([0, 1]))


def test_compiles_without_a_graph_break():
    case = prefill_case([200, 77], 5)
    expected = case.run()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: case.call(*args, **case.kwargs, return_softmax_lse=True), fullgraph=True)
    out, lse = compiled(*case.args)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_opcheck():
    q = torch.randn(2, 100, 4, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 130, 2, 64, device="cuda", dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(2, 4, 100, device="cuda")
    args = (q, k, k.clone(), out, lse, None, None, None, None, None, 100, 130, 0.125, -1, 0)
    torch.library.opcheck(torch.ops.lite_attention.fwd.default, args)


def test_other_memory_is_not_waited_for():
    """A call returns while the GPU is still busy: nothing synchronises."""
    case = decode_case([2000, 100], 6)
    case.run()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    case.run()
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
