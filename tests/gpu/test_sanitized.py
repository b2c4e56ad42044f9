"""One small case of every kernel, for compute-sanitizer: each head dim, dtype, tile and way to find keys; lists too.

Inputs are made, and results checked, on the CPU, so that next to nothing but the kernels of this project runs on the
GPU. Sequences without keys, without queries, shorter and longer than a tile are in each case.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import accuracy
import pytest
import test_hopper_skip
import torch

from lite_attention import SkipList, get_scheduler_metadata, skip_attention, skip_attention_varlen
from lite_attention.pages import PAGE, attend_pages, decode_pages, empty_sketch, select_pages, write_sketch

# Each class of head dims by its own and by smaller ones, whose columns past the end are neither read nor written.
HEAD_DIMS = [64, 40, 96, 72, 128, 104, 192, 136, 256, 200, 248]
DECODE = ([1, 0, 2, 1, 2], [0, 70, 37, 1, 700])
PREFILL = ([5, 70, 0, 300, 40], [0, 70, 37, 333, 200])
HEADS, HEADS_K = 4, 2
FP8 = accuracy.FP8
FP8_HEAD_DIMS = [64, 48, 96, 80, 128, 112, 192, 144, 256, 240]
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def inputs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(accuracy, "DEVICE", "cpu")


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


every_layout = pytest.mark.parametrize(
    "layout", [decode_paged, decode_packed, prefill_paged, prefill_masked, prefill_full]
)
every_modification = pytest.mark.parametrize("modified", [False, True], ids=["plain", "modified"])


@every_modification
@every_dtype
@every_layout
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_one_case(head_dim, layout, dtype, modified):
    run(layout, head_dim, dtype, dtype, modified)


@every_modification
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=["bf16", "fp16", "fp8"])
@every_layout
@pytest.mark.parametrize("head_dim", FP8_HEAD_DIMS)
def test_fp8_keys_and_values(head_dim, layout, dtype, modified):
    factors = dict(zip("qkv", 0.5 + torch.rand(3, 5, HEADS_K, generator=torch.Generator().manual_seed(0)), strict=True))
    if dtype != FP8:
        del factors["q"]
    run(layout, head_dim, dtype, FP8, modified, **{f"{name}_descale": x for name, x in factors.items()})


def run(layout, head_dim, dtype, kv_dtype, modified, **kwargs):
    lens_q, lens_k = DECODE if layout in (decode_paged, decode_packed) else PREFILL
    sequences = accuracy.make_sequences(lens_q, lens_k, HEADS, HEADS_K, head_dim, dtype, 0, kv_dtype)
    if modified:
        kwargs |= {
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


@every_dtype
@pytest.mark.parametrize("mask", [{}, {"causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_skip_lists(head_dim, mask, dtype):
    """One that visits some tiles, walked, shortened by votes and walked again."""
    shape, generator = (2, HEADS, 300, 1000), torch.Generator().manual_seed(0)
    sequences = test_hopper_skip.exact([300] * 2, [1000] * 2, HEADS, HEADS_K, head_dim, dtype, seed=0)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    fresh = SkipList.fresh(*shape, head_dim=head_dim, device="cuda")
    visits = torch.rand(2, HEADS, fresh.q_tiles, fresh.kv_tiles, generator=generator) < 0.7
    expected = SkipList.from_visits(visits, (fresh.block_m, fresh.block_n), *shape[2:])
    forced = {"must_do": [(170, 360)], "must_skip": [(700, 990)], **mask}
    walk_twice(accuracy.Case(skip_attention, (q, k, v), forced), expected)


def walk_twice(case, expected):
    """`case` with the list by the kernel, and with an equal one by the reference, which is `expected` after."""
    found, threshold = replace(expected, bits=expected.bits.cuda()), test_hopper_skip.thresholds(HEADS, -3.0)
    moved = on_gpu(case)
    for _ in range(2):
        out, _ = case.call(*moved.args[:3], found, threshold.cuda(), *moved.args[3:], **moved.kwargs)
        plain, _ = case.call(*case.args[:3], expected, threshold, *case.args[3:], **case.kwargs, backend="reference")
        assert torch.equal(found.bits.cpu(), expected.bits)
        rounding = 4 * torch.finfo(out.dtype).eps * plain.float().abs().max().clamp(min=1.0)
        assert (out.cpu().float() - plain.float()).abs().max() <= rounding


def random_bits(skip_list):
    """The list with random words: bits of tiles that no sequence has, too."""
    generator = torch.Generator().manual_seed(0)
    return replace(skip_list, bits=torch.empty_like(skip_list.bits).random_(-(2**31), 2**31, generator=generator))


@pytest.mark.parametrize("page_size", [None, 16, 48], ids=["packed", "page16", "page48"])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 192, 256])
def test_skip_lists_of_random_words(head_dim, page_size):
    """Packed and paged; sequences of the batch have fewer tiles than the list."""
    sequences = test_hopper_skip.exact(*PREFILL, HEADS, HEADS_K, head_dim, torch.bfloat16, seed=0)
    case = accuracy.paged(sequences, page_size) if page_size else accuracy.packed(sequences)
    lengths = case.args[5:]
    skip_list = SkipList.fresh(len(sequences), HEADS, *lengths, head_dim=head_dim, device="cpu")
    walk_twice(replace(case, call=skip_attention_varlen, kwargs=case.kwargs | {"causal": True}), random_bits(skip_list))


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
@pytest.mark.parametrize(("head_dim", "longer"), [(64, (200, 4300)), (128, (300, 5700))])
def test_a_sequence_longer_than_its_skip_list(head_dim, longer, paged):
    """The second of three, which only the GPU could tell: neither words nor rows past the list's end are touched.

    It has more tiles of queries than the list has rows, and more tiles of keys than its word has bits.
    """
    lens_q, lens_k = [100, longer[0], 70], [90, longer[1], 100]
    sequences = test_hopper_skip.exact(lens_q, lens_k, HEADS, HEADS_K, head_dim, torch.bfloat16, seed=0)
    case = accuracy.paged(sequences, 48) if paged else accuracy.packed(sequences)
    moved, longest = on_gpu(case), (100, 100)
    arguments = *moved.args[3:5], *longest
    fresh = SkipList.fresh(3, HEADS, *longest, head_dim=head_dim, device="cpu")
    assert fresh.bits.shape[2:] == (1, 1) and longer[0] > fresh.block_m and longer[1] > 32 * fresh.block_n
    mask = {"must_do": [(0, 10)], "must_skip": [(20, 30)]}
    around = torch.full((5, *fresh.bits.shape[1:]), -1, dtype=torch.int32).cuda()  # the list, and an entry on each side
    found = replace(fresh, bits=around[1:-1])
    out, lse = skip_attention_varlen(*moved.args[:3], found, 0.0, *arguments, **moved.kwargs, **mask)
    out, lse, around = out.cpu(), lse.cpu(), around.cpu()
    assert (around[[0, -1]] == -1).all() and not out.isnan().any()
    beyond = slice(lens_q[0] + fresh.block_m, sum(lens_q[:2]))
    assert (out[beyond] == 0).all() and (lse[:, beyond] == -math.inf).all(), "rows without a list visit nothing"
    for b, rows in ((0, slice(0, 100)), (2, slice(sum(lens_q[:2]), None))):
        plain, _ = skip_attention(
            *(x[None] for x in sequences[b]),
            SkipList.fresh(1, HEADS, lens_q[b], lens_k[b], head_dim=head_dim, device="cpu"),
            0.0,
            backend="reference",
        )
        rounding = 4 * torch.finfo(out.dtype).eps * plain.float().abs().max().clamp(min=1.0)
        assert (out[rows].float() - plain[0].float()).abs().max() <= rounding


@every_dtype
@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_page_lists(head_dim, fp8, dtype):
    if fp8 and head_dim % 16:
        pytest.skip("FP8 has head dims of multiples of 16")
    page_step(head_dim, dtype, FP8 if fp8 else dtype, *DECODE)


@pytest.mark.parametrize(("heads", "tokens", "newest"), [(4, 2, 17), (32, 2, 300), (36, 1, 17), (64, 1, 300)])
def test_page_lists_by_several_blocks(heads, tokens, newest):
    """Shared memory has room for the counts of several blocks with up to 36 heads; lists of more are cut by one."""
    lens = [1, tokens], [17_000, 300]
    page_step(64, torch.bfloat16, torch.bfloat16, *lens, heads, 1, newest=newest, slack_pages=2000)


@pytest.mark.parametrize("heads", [4, 12])  # by tokens and heads, products of 8 columns and of 16
@pytest.mark.parametrize(
    ("head_dim", "kv_dtype"),
    [(40, torch.bfloat16), (72, torch.bfloat16), (136, torch.bfloat16), (200, torch.bfloat16), (64, FP8), (256, FP8)],
)
def test_page_lists_from_sketches_of_8_bits(head_dim, kv_dtype, heads):
    page_step(head_dim, torch.bfloat16, kv_dtype, *DECODE, heads, bits=8)


def page_step(
    head_dim, dtype, kv_dtype, lens_q, lens_k, heads=HEADS, heads_k=HEADS_K, newest=17, slack_pages=0, bits=12
):
    """Sketches of full pages, lists from them, attention over these: by three calls, and by one."""
    sequences = accuracy.make_sequences(lens_q, lens_k, heads, heads_k, head_dim, dtype, 0, kv_dtype)
    case = accuracy.paged(sequences, PAGE, causal=True)
    q, k_cache, v_cache, starts, _, longest, _ = case.args
    used, table = case.kwargs["seqused_k"], case.kwargs["block_table"]
    full = torch.cat([accuracy.ints([-1]), *(table[b, : n // PAGE] for b, n in enumerate(lens_k))])
    table = torch.cat([table, torch.full((len(lens_k), slack_pages), accuracy.HUGE_PAGE, dtype=torch.int32)], 1)

    def step(move, lists=None, at_once=False):
        queries, keys, values = map(move, (q, k_cache, v_cache))
        sketch = empty_sketch(keys, bits)
        sketch.zero_()
        write_sketch(keys, sketch, move(full))
        batch = *map(move, (starts, used, table)), longest
        if at_once:
            result = decode_pages(queries, keys, values, sketch, *batch, eps=0.1, filled=move(full), newest=newest)
            return result[2], result[:2]
        made = select_pages(queries, sketch, *batch, eps=0.1, newest=newest)
        return made, attend_pages(queries, keys, values, made if lists is None else lists, *batch)

    made, (out, lse) = step(lambda x: x.cuda())
    lists = replace(made, **{field.name: getattr(made, field.name).cpu() for field in fields(made)})
    expected, (plain, plain_lse) = step(lambda x: x, lists)
    assert (lists.counts - expected.counts).abs().max() <= 2 + 0.005 * expected.counts.max()
    assert (lists.left_out <= 0.1 * (1 + 1e-3)).all()
    torch.testing.assert_close(out.cpu(), plain, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.cpu(), plain_lse, atol=2e-3, rtol=1e-3)
    again, (out, lse) = step(lambda x: x.cuda(), at_once=True)
    assert torch.equal(again.bits, made.bits) and torch.equal(again.left_out, made.left_out)
    torch.testing.assert_close(out.cpu(), plain, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.cpu(), plain_lse, atol=2e-3, rtol=1e-3)


def test_a_shared_plan():
    """Two layers under one plan, whose counters the first leaves as it found them."""
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
