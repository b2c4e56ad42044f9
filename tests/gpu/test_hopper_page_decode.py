"""A decode step in one call, on the GPU: its lists are those of `select_pages`, its output is right over these.

Where every row is computed whole the bits are those of the three calls; where nothing is listed, those of dense
attention under the same plan.
"""

from __future__ import annotations

import random as py_random

import accuracy
import pytest
import torch
from page_steps import HUGE, Step, keys_of, poison

from lite_attention import flash_attn_varlen_func, get_scheduler_metadata, scheduler_metadata_size
from lite_attention.pages import PAGE, PageLists, decode_pages, select_pages
from lite_attention.skip.bits import words

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
every_kernel = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
planned_or_not = pytest.mark.parametrize("planned", [False, True], ids=["own-plan", "metadata"])


def hostile_lists(step, garbage=HUGE):
    """As a step before has left them, or worse."""
    batch, blocks = step.table.shape
    lists = PageLists.empty(batch, step.heads_k, step.heads, blocks, torch.device(accuracy.DEVICE))
    for x in (lists.bits, lists.indices, lists.counts):
        x.fill_(garbage)
    lists.left_out.fill_(torch.nan)
    return lists


def some_filled(step):
    """Every third full page, one of them twice, among padding."""
    full = step.full_pages()
    pages = full[full >= 0][::3]
    return torch.cat([accuracy.ints([-1, -HUGE]), pages, pages[-1:], accuracy.ints([-1] * 5)])


def spoil(step, pages):
    """Makes the sketches of these pages say that their page matters more than any other, whatever a query is.

    Their deviation is 3156 and their means are up to 192, which by Cauchy and Schwarz can't outweigh it.
    """
    some = pages[pages >= 0].long()
    step.sketch[some] = 255
    step.sketch[some, :, :16] = 0x3F
    step.sketch[some, :, 12:16] = 0x45


def whole_marks(step, marks):
    return torch.tensor(marks, dtype=torch.bool, device=accuracy.DEVICE)


def same_lists(lists, expected):
    """In all that is defined of lists of which some leave pages out."""
    for name in ("bits", "counts", "left_out"):
        assert torch.equal(getattr(lists, name), getattr(expected, name)), name
    entry = torch.arange(expected.max_blocks, device=expected.counts.device)
    listed = entry < expected.counts[..., None]
    assert torch.equal(lists.indices.where(listed, 0), expected.indices.where(listed, 0))


def everything_counts(step, lists):
    """All pages of each sequence that has queries, and nothing left out."""
    held = [-(-n // PAGE) * (q > 0) for q, n in zip(step.q_lens, step.k_lens, strict=True)]
    assert lists.counts.tolist() == [[n] * step.heads_k for n in held]
    assert (lists.left_out == 0).all()


def near_the_reference(step, lists, expected):
    """Lists of the same length but for pages on the border, where rounding moves a rank or a sum."""
    for b, q_len in enumerate(step.q_lens):
        allowed = max(1, q_len) * (2 + 0.005 * expected.counts[b].float())
        assert ((lists.counts[b] - expected.counts[b]).abs() <= allowed).all()
    torch.testing.assert_close(lists.left_out, expected.left_out, rtol=1e-2, atol=2e-3)


def dense(step, metadata=None, **changes):
    """Out and lse of dense attention."""
    return flash_attn_varlen_func(
        step.q, step.k_cache, step.v_cache, step.starts, None, step.max_q, step.table.shape[1] * PAGE, causal=True,
        seqused_k=step.used, block_table=step.table, scheduler_metadata=metadata, return_softmax_lse=True,
        **step.descales, **changes,
    )  # fmt: skip


def step_by_chance(name, head_dim, group, batch, dtype, bits):
    """A step, the options of its calls, and what its plan knows of them."""
    rng = py_random.Random(name)
    heads_k = rng.choice([1, 2, 4])
    most_q = min(4, 64 // group)
    q_lens = [rng.choice([1, 1, 1, rng.randint(0, most_q)]) for _ in range(batch)]
    q_lens[0] = max(q_lens[0], 1)
    longest = 6000 if batch < 64 else 1500
    lengths = [0, rng.randint(1, 15), rng.randint(16, 300), PAGE * rng.randint(1, 90), rng.randint(300, longest)]
    k_lens = [rng.choice([*lengths, rng.randint(300, longest)]) for _ in q_lens]
    k_lens[0] = longest  # which is listed
    layout = {"fp8": rng.random() < 0.35, "by_head": rng.random() < 0.5, "one_memory": rng.random() < 0.5, "bits": bits}
    step = Step(q_lens, k_lens, group * heads_k, heads_k, head_dim, dtype, rng.randrange(2**31), **layout)
    whole = None
    if rng.random() < 0.5:
        whole = whole_marks(step, [False, *(rng.random() < 0.3 for _ in range(batch - 1))])
    sinks = {"sinks": torch.randn(step.heads, device=accuracy.DEVICE)} if rng.random() < 0.4 else {}
    return step, sinks, {"min_context": rng.choice([0, 0, 200]), "whole": whole}


SHAPES = [(head_dim, group, batch) for head_dim in (64, 128, 256) for group in (1, 4, 7, 8) for batch in (1, 3, 64)]
OF_8_BITS = [(64, 1, 64), (64, 8, 3), (128, 4, 1), (128, 7, 64), (256, 4, 3), (96, 8, 3)]
STEPS = [
    *(pytest.param(*shape, 12, id="-".join(map(str, shape))) for shape in (*SHAPES, (96, 4, 3))),
    *(pytest.param(*shape, 8, id="-".join(map(str, shape)) + "-8bits") for shape in OF_8_BITS),
]


@every_kernel
@pytest.mark.parametrize(("head_dim", "group", "batch", "bits"), STEPS)
def test_it_is_the_three_calls(head_dim, group, batch, bits, dtype):
    """Without metadata and with it; then from pages of which the unlisted are NaN, and by a table of stale numbers."""
    name = f"{head_dim} {group} {batch} {dtype}"
    step, sinks, listing = step_by_chance(name, head_dim, group, batch, dtype, bits)
    expected, written, filled = step.select(**listing), step.sketch.clone(), some_filled(step)
    plans, results = (None, step.plan(**listing)), []
    for metadata in plans:
        spoil(step, filled)
        out, lists = torch.full_like(step.q, torch.nan), hostile_lists(step)
        options = {"scheduler_metadata": metadata, **listing, **sinks}
        result, lse, made = step.decode(filled=filled, lists=lists, out=out, **options)
        assert result is out and made is lists
        assert torch.equal(step.sketch, written)
        same_lists(lists, expected)
        step.check(lists, out, lse, **sinks)
        results.append((out, lse))
    near_the_reference(step, expected, step.decode(backend="reference", **listing, **sinks)[2])

    poison(step, expected)
    rest = torch.arange(step.table.shape[1], device=accuracy.DEVICE) >= (step.used[:, None] + PAGE - 1) // PAGE
    for stale in (HUGE, -1):
        step.table.masked_fill_(rest, stale)
        for metadata, (out, lse) in zip(plans, results, strict=True):
            lists = hostile_lists(step, stale)
            again, again_lse, _ = step.decode(lists=lists, scheduler_metadata=metadata, **listing, **sinks)
            same_lists(lists, expected)
            assert torch.equal(again, out) and torch.equal(again_lse, lse)


@planned_or_not
@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("k_lens", [[40_000], [20_000, 20_000], [40_000, 7, 0, 900]], ids=["one", "two", "and-short"])
def test_lists_that_are_split_over_many_workers(k_lens, head_dim, q_len, fp8, planned):
    step = Step([q_len] * len(k_lens), k_lens, head_dim=head_dim, fp8=fp8, sharp=0.5)
    expected, metadata = step.select(), step.plan() if planned else None
    assert 100 < int(expected.counts[0].min()) < 2500  # of as many pages: several query tokens need nearly all
    results = [step.decode(lists=hostile_lists(step), scheduler_metadata=metadata) for _ in range(3)]
    for out, lse, lists in results:
        same_lists(lists, expected)
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
    step.check(expected, *results[0][:2])


@planned_or_not
@pytest.mark.parametrize("least", [0, 100])
def test_more_than_a_thousand_lists(least, planned):
    rng = py_random.Random(0)
    k_lens = [rng.choice([0, rng.randint(1, 15), rng.randint(16, 400), rng.randint(200, 400)]) for _ in range(200)]
    step = Step([1] * 200, k_lens, heads=32, heads_k=8)
    expected = step.select(eps=0.3, newest=1, min_context=least)
    metadata = step.plan(min_context=least) if planned else None
    lists = hostile_lists(step)
    out, lse, _ = step.decode(0.3, 1, min_context=least, lists=lists, scheduler_metadata=metadata)
    same_lists(lists, expected)
    assert int(lists.counts.sum()) < 8 * sum(-(-n // PAGE) for n in k_lens)
    step.check(lists, out, lse)


@every_kernel
@planned_or_not
@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_in_whole_rows_it_is_the_three_calls_to_the_bit(head_dim, fp8, planned, dtype):
    step = Step([1, 2, 0, 1, 1], [9001, 777, 30, 5, 0], head_dim=head_dim, dtype=dtype, fp8=fp8)
    sinks = torch.randn(8, device=accuracy.DEVICE)
    expected = step.select()
    attended = step.attend(expected, num_splits=1, sinks=sinks)
    metadata = step.plan(num_splits=1) if planned else None
    lists = hostile_lists(step)
    out, lse, _ = step.decode(lists=lists, num_splits=1, sinks=sinks, scheduler_metadata=metadata)
    same_lists(lists, expected)
    assert torch.equal(out, attended[0]) and torch.equal(lse, attended[1])


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize("num_splits", [0, 1])
@pytest.mark.parametrize("how", ["min_context", "whole", "either"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_step_that_lists_nothing_is_dense_to_the_bit(head_dim, how, num_splits, fp8, sinks):
    """Under the same plan. A sequence without keys, and one without queries, count as nothing."""
    step = Step([1, 2, 0, 1, 1], [9001, 777, 30, 16, 0], head_dim=head_dim, fp8=fp8)
    listing = {
        "min_context": {"min_context": 9002},
        "whole": {"whole": whole_marks(step, [True] * 5)},
        "either": {"min_context": 1000, "whole": whole_marks(step, [True, False, False, False, False])},
    }[how]
    sinks = {"sinks": torch.randn(8, device=accuracy.DEVICE)} if sinks else {}
    metadata, filled, written = step.plan(num_splits=num_splits, **listing), some_filled(step), step.sketch.clone()
    spoil(step, filled)
    lists = hostile_lists(step)
    for plan in (metadata, None):
        out, lse, _ = step.decode(
            filled=filled, lists=lists, scheduler_metadata=plan, num_splits=num_splits, **listing, **sinks
        )
        expected = dense(step, plan, num_splits=num_splits, **sinks)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
        everything_counts(step, lists)
        assert torch.equal(step.sketch, written)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [5, 0, 15], [1, 16, 0]])
@planned_or_not
def test_next_to_no_keys(planned, lengths):
    """Without a full page there is nothing to leave out; rows without keys are zero."""
    step = Step([1, 1, 2], lengths)
    lists, metadata = hostile_lists(step), step.plan() if planned else None
    out, lse, _ = step.decode(lists=lists, scheduler_metadata=metadata)
    everything_counts(step, lists)
    step.check(step.select(eps=0), out, lse)


@planned_or_not
def test_eps_0_lists_everything(planned):
    """Under a plan of a step that decodes from lists, as of a layer with its own eps."""
    step = Step([1, 2, 1], [9001, 777, 3])
    lists, metadata = hostile_lists(step), step.plan() if planned else None
    out, lse, _ = step.decode(0, lists=lists, scheduler_metadata=metadata)
    everything_counts(step, lists)
    step.check(step.select(eps=0), out, lse)


@planned_or_not
def test_marks_and_short_sequences_beside_those_that_are_listed(planned):
    step = Step([1, 1, 0, 2, 1], [4000, 3000, 500, 777, 3999])
    plain = step.select()
    for listing, whole in (
        ({"whole": whole_marks(step, [0, 1, 0, 1, 0])}, (1, 3)),
        ({"min_context": 4000}, (1, 3, 4)),
        ({"min_context": 1000, "whole": whole_marks(step, [1, 0, 0, 0, 0])}, (0, 3)),
    ):
        lists, metadata = hostile_lists(step), step.plan(**listing) if planned else None
        out, lse, _ = step.decode(lists=lists, scheduler_metadata=metadata, **listing)
        same_lists(lists, step.select(**listing))
        step.check(lists, out, lse)
        for b, n in enumerate([250, 188, 0, 49, 250]):
            if b in whole:
                assert lists.counts[b].tolist() == [n, n] and (lists.left_out[b] == 0).all()
            else:
                assert torch.equal(lists.bits[b], plain.bits[b])


@planned_or_not
@pytest.mark.parametrize("rows", [0, 2], ids=["no-rows", "rows-of-padding"])
def test_pages_that_fill_are_written_where_there_are_no_queries(rows, planned):
    step = Step([0, 0], [900, 40])
    step.max_q = 1
    step.q = torch.zeros(rows, step.heads, step.head_dim, dtype=step.q.dtype, device=accuracy.DEVICE)
    filled, written = some_filled(step), step.sketch.clone()
    spoil(step, filled)
    lists, metadata = hostile_lists(step), step.plan() if planned else None
    step.decode(filled=filled, lists=lists, scheduler_metadata=metadata)
    assert torch.equal(step.sketch, written)
    everything_counts(step, lists)


def test_pages_that_the_cache_has_not_are_passed_over():
    step = Step([1], [320])
    expected = step.decode()
    step.sketch.fill_(255)
    filled = torch.cat([accuracy.ints([len(step.sketch), HUGE, -HUGE, -1]), step.full_pages()])
    out, lse, lists = step.decode(filled=filled)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    same_lists(lists, expected[2])


@pytest.mark.parametrize("stale", [HUGE, -1, -HUGE], ids=["huge", "none", "negative"])
def test_padding_rows_of_a_graph_read_nothing(stale):
    """Rows of length 0 whose block numbers are stale, between and after those of requests."""
    step = Step([1, 0, 1, 0, 0], [4001, 0, 2999, 0, 0])
    expected, expected_lse, of_lists = step.decode(num_splits=1)
    step.table[[1, 3, 4]] = stale
    lists = hostile_lists(step)
    out, lse, _ = step.decode(lists=lists, scheduler_metadata=step.plan(num_splits=1), num_splits=1)
    same_lists(lists, of_lists)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    lists = hostile_lists(step)
    out, lse, _ = step.decode(lists=lists, scheduler_metadata=step.plan())
    same_lists(lists, of_lists)
    step.check(lists, out, lse)


# Memory that steps and layers share


class Shared:
    """One memory for plans, and one for lists, of any batch up to `rows` rows of `blocks` pages, as in a server."""

    def __init__(self, rows, tokens, max_q, blocks, heads=8, heads_k=2, head_dim=128):
        size = scheduler_metadata_size(rows, tokens, max_q, heads, heads_k, head_dim) + 64
        self.metadata = torch.full((size,), -1, device=accuracy.DEVICE, dtype=torch.int32)
        self.bits = torch.full((rows * heads_k * words(blocks),), -1, device=accuracy.DEVICE, dtype=torch.int32)
        self.indices = torch.full((rows * heads_k * blocks,), HUGE, device=accuracy.DEVICE, dtype=torch.int32)

    def lists(self, step):
        batch, blocks = step.table.shape
        fresh = PageLists.empty(batch, step.heads_k, step.heads, blocks, torch.device(accuracy.DEVICE))
        return PageLists(
            self.bits[: fresh.bits.numel()].view_as(fresh.bits),
            self.indices[: fresh.indices.numel()].view_as(fresh.indices),
            fresh.counts,
            fresh.left_out,
        )


def test_batches_one_after_another_share_plan_and_lists():
    """Long, short and none listed, of other sizes, with nothing between them that waits."""
    long = Step([1, 1, 1], [9001, 777, 40_000], seed=1)
    wide = Step([1] * 70, [py_random.Random(3).randint(0, 1500) for _ in range(70)], seed=2)
    alone = Step([1], [20_000], seed=3)
    shared = Shared(70, 70, 1, max(step.table.shape[1] for step in (long, wide, alone)))
    order = [(long, 0), (wide, 0), (wide, 2000), (alone, 0), (long, 1000), (wide, 500), (alone, 30_000), (long, 0)]
    results = []
    for step, least in order:
        metadata = step.plan(min_context=least, out=shared.metadata)
        lists = shared.lists(step)
        out, lse, _ = step.decode(min_context=least, lists=lists, scheduler_metadata=metadata)
        results.append((out, lse, lists.counts, lists.left_out))
    for (step, least), (out, lse, counts, left_out) in zip(order, results, strict=True):
        own = step.plan(min_context=least)
        expected, expected_lse, lists = step.decode(min_context=least, scheduler_metadata=own)
        assert torch.equal(counts, lists.counts) and torch.equal(left_out, lists.left_out)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        step.check(step.select(min_context=least), out, lse)


def capture(run):
    """A CUDA graph of `run`, after a first run of it, and what it returned while it was captured."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("k_lens", [[9001, 777, 3000], [40_000], [300] * 64], ids=["mixed", "one", "many"])
def test_layers_of_a_step_share_plan_and_lists(k_lens):
    """In one graph, each layer right after the other: with queries, keys and an eps of its own."""
    layers = [Step([1] * len(k_lens), k_lens, seed=seed) for seed in range(6)]
    budgets = [0.1, 0.4, 0.0, 0.02, 0.1, 0.3]
    shared = Shared(len(k_lens), len(k_lens), 1, layers[0].table.shape[1])
    lists = [shared.lists(step) for step in layers]
    outs = [torch.full_like(step.q, torch.nan) for step in layers]
    filled = [some_filled(step) for step in layers]

    def run():
        layers[0].plan(min_context=200, out=shared.metadata)
        return [
            step.decode(eps, min_context=200, filled=pages, lists=into, out=out, scheduler_metadata=shared.metadata)[1]
            for step, eps, pages, into, out in zip(layers, budgets, filled, lists, outs, strict=True)
        ]

    graph, found = capture(run)
    for _ in range(10):
        for step, pages, into, out in zip(layers, filled, lists, outs, strict=True):
            spoil(step, pages)
            out.fill_(torch.nan), into.counts.fill_(HUGE), into.left_out.fill_(torch.nan)
        graph.replay()
        for step, eps, into, out, lse in zip(layers, budgets, lists, outs, found, strict=True):
            options = {"min_context": 200, "scheduler_metadata": step.plan(min_context=200)}
            expected, expected_lse, own = step.decode(eps, **options)
            assert torch.equal(into.counts, own.counts) and torch.equal(into.left_out, own.left_out)
            assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
            step.check(step.select(eps=eps, min_context=200), out, lse)


LEAST = 1000
REPLAYS = {
    "all short": [900, 777, 30, 999],
    "one listed": [900, 1000, 30, 999],
    "all listed": [9001, 1777, 2999, 4000],
    "padding": [9001, 0, 0, 0],
    "nothing": [0, 0, 0, 0],
    "mixed": [4000, 15, 2048, 0],
    "all short again": [16, 777, 0, 999],
    "all listed again": [9001, 1777, 2999, 4000],
    "marked": [9001, 1777, 2999, 4000],
    "some marked": [9001, 1777, 2999, 4000],
}
MARKS = {"marked": [1, 1, 1, 1], "some marked": [1, 0, 0, 1]}


@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@planned_or_not
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_graph_goes_from_dense_to_lists_and_back(head_dim, planned, fp8):
    """One graph, with the plan in it, replayed as sequences grow, end and begin, and are parts of prompts."""
    longest = [max(lengths) for lengths in zip(*REPLAYS.values(), strict=True)]
    step = Step([1] * 4, longest, head_dim=head_dim, fp8=fp8)
    whole = torch.zeros(4, dtype=torch.bool, device=accuracy.DEVICE)
    filled = torch.full((4,), -1, dtype=torch.int32, device=accuracy.DEVICE)
    shared = Shared(4, 4, 1, step.table.shape[1], head_dim=head_dim)
    lists, out = shared.lists(step), torch.full_like(step.q, torch.nan)
    listing, metadata = {"min_context": LEAST, "whole": whole}, shared.metadata if planned else None

    def run():
        if planned:
            step.plan(out=shared.metadata, **listing)
        return step.decode(filled=filled, lists=lists, out=out, scheduler_metadata=metadata, **listing)[1]

    graph, lse = capture(run)
    for name, lengths in REPLAYS.items():
        step.used.copy_(accuracy.ints(lengths))
        whole.copy_(whole_marks(step, MARKS.get(name, [0, 0, 0, 0])))
        step.q.normal_()
        filled.copy_(step.table[:, 0])
        spoil(step, filled)
        out.fill_(torch.nan), lists.counts.fill_(HUGE), lists.left_out.fill_(torch.nan)
        graph.replay()
        got, got_lse = out.clone(), lse.clone()

        step.k_lens = lengths
        step.sequences = [(step.q[b : b + 1], k, v) for b, (k, v) in enumerate(keys_of(step, lengths))]
        expected = step.select(**listing)
        assert torch.equal(lists.counts, expected.counts), name
        assert torch.equal(lists.left_out, expected.left_out), name
        step.check(expected, got, got_lse)
        own = step.plan(**listing) if planned else None
        made, made_lse, _ = step.decode(scheduler_metadata=own, **listing)
        assert torch.equal(got, made) and torch.equal(got_lse, made_lse), name
        if not any(n >= LEAST and not mark for n, mark in zip(lengths, whole.tolist(), strict=True)):
            everything_counts(step, lists)
            plain, plain_lse = dense(step, own)
            assert torch.equal(got, plain) and torch.equal(got_lse, plain_lse), name
        else:
            same_lists(lists, expected)


def test_a_graph_of_a_wide_batch_follows_a_narrow_one():
    """A plan for fewer sequences than the graph was captured with is not mistaken for one of more, and the reverse."""
    narrow, wide = Step([1] * 2, [9001, 40], seed=1), Step([1] * 64, [500] * 64, seed=2)
    shared = Shared(64, 64, 1, max(narrow.table.shape[1], wide.table.shape[1]))

    def run(step):
        metadata = step.plan(min_context=200, out=shared.metadata)
        return step.decode(min_context=200, lists=shared.lists(step), scheduler_metadata=metadata)

    graphs = [(step, *capture(lambda step=step: run(step))) for step in (narrow, wide)]
    for _ in range(4):
        for step, graph, (out, lse, lists) in graphs:
            out.fill_(torch.nan), lists.counts.fill_(-1)
            graph.replay()
            expected = step.select(min_context=200)
            same_lists(lists, expected)
            step.check(expected, out, lse)


def test_it_starts_after_what_the_stream_has_before_it():
    """Keys, queries, tables and lengths that the kernels right before have written, with no wait between."""
    step = Step([1, 1], [9001, 3000])
    expected = step.decode(filled=step.full_pages(), scheduler_metadata=step.plan(), num_splits=0)
    tensors = [step.q, step.k_cache, step.used, step.table, step.starts]
    right = [x.clone() for x in tensors]
    filled = step.full_pages()
    for _ in range(5):
        step.sketch.fill_(255)
        for x in tensors:
            x.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000)
        for x, value in zip(tensors, right, strict=True):
            x.copy_(value)
        lists = hostile_lists(step)
        out, lse, _ = step.decode(filled=filled, lists=lists, scheduler_metadata=step.plan())
        # What comes next may write over what it reads.
        for x in tensors:
            x.zero_()
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
        for x, value in zip(tensors, right, strict=True):
            x.copy_(value)
        same_lists(lists, expected[2])


def test_a_table_of_more_pages_than_a_plan_was_made_for():
    """A plan depends on lengths, and not on how wide tables are."""
    step = Step([1, 1], [9001, 3000])
    metadata, expected = step.plan(), step.select()
    wide = torch.full((2, 3 * step.table.shape[1]), HUGE, dtype=torch.int32, device=accuracy.DEVICE)
    wide[:, : step.table.shape[1]] = step.table
    step.table = wide
    out, lse, lists = step.decode(scheduler_metadata=metadata)
    assert torch.equal(lists.counts, expected.counts) and torch.equal(lists.left_out, expected.left_out)
    step.check(lists, out, lse)


def test_a_sequence_does_not_see_the_rest_of_the_batch():
    k_lens = [4001, 777, 3000, 16, 9000, 0, 2000] * 5
    step = Step([1] * len(k_lens), k_lens)
    out, lse, lists = step.decode(num_splits=1)
    for b in (0, 4, 6, 34):
        starts, used, table, _ = step.of_batch(slice(b, b + 1))
        sketch = step.sketch.clone()
        single, single_lse, alone = decode_pages(
            step.q[b : b + 1], step.k_cache, step.v_cache, sketch, starts - starts[0], used, table, 1, eps=0.1,
            newest=40, num_splits=1,
        )  # fmt: skip
        assert torch.equal(alone.bits[0], lists.bits[b]) and torch.equal(alone.left_out[0], lists.left_out[b])
        assert torch.equal(single[0], out[b]) and torch.equal(single_lse[:, 0], lse[:, b])


def test_metadata_without_room_for_a_plan_is_refused():
    step = Step([1, 1], [9001, 3000])
    small = torch.zeros(3, dtype=torch.int32, device=accuracy.DEVICE)
    with pytest.raises(RuntimeError, match="get_scheduler_metadata makes more"):
        step.decode(scheduler_metadata=small)


@pytest.mark.parametrize("q_len", [2, 5, 8])
@pytest.mark.parametrize("group", [4, 8])
def test_a_speculative_step_lists_the_union_of_its_tokens(group, q_len):
    step = Step([q_len, 1, q_len], [4003, 2000, 5], heads=2 * group)
    lists = hostile_lists(step)
    out, lse, _ = step.decode(0.3, 64, lists=lists, scheduler_metadata=step.plan())
    union = torch.zeros_like(lists.listed()[0])
    for i in range(q_len):
        used = accuracy.ints([4003 - q_len + 1 + i])
        one = select_pages(
            step.q[i : i + 1], step.sketch, accuracy.ints([0, 1]), used, step.table[:1], 1, eps=0.3, newest=64
        )
        union |= one.listed()[0]
    assert torch.equal(lists.listed()[0], union)
    step.check(lists, out, lse)


def test_metadata_of_a_longer_memory_serves():
    """Memory that is longer than a plan, as a server's is."""
    step = Step([1, 1], [9001, 3000])
    memory = torch.full((100_000,), HUGE, dtype=torch.int32, device=accuracy.DEVICE)
    get_scheduler_metadata(
        2, 1, 9001, 8, 2, 128, cu_seqlens_q=step.starts, total_q=2, seqused_k=step.used, causal=True, page_size=PAGE,
        out=memory,
    )  # fmt: skip
    out, lse, lists = step.decode(scheduler_metadata=memory)
    step.check(lists, out, lse)
