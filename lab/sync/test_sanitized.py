"""One small case of every kernel, for compute-sanitizer: each head dim, dtype, tile and way to find keys; lists too.

Inputs are made, and results checked, on the CPU, so that next to nothing but the kernels of this project runs on the
GPU. Sequences without keys, without queries, shorter and longer than a tile are in each case.
"""

from __future__ import annotations

from dataclasses import fields, replace

import accuracy
import pytest
import test_hopper_skip
import torch

from lite_attention import SkipList, get_scheduler_metadata, skip_attention
from lite_attention.pages import PAGE, attend_pages, empty_sketch, select_pages, write_sketch

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
    found, threshold = replace(expected, bits=expected.bits.cuda()), test_hopper_skip.thresholds(HEADS, -3.0)
    forced = {"must_do": [(170, 360)], "must_skip": [(700, 990)], **mask}
    for _ in range(2):
        out, _ = skip_attention(q.cuda(), k.cuda(), v.cuda(), found, threshold.cuda(), **forced)
        plain, _ = skip_attention(q, k, v, expected, threshold, backend="reference", **forced)
        assert torch.equal(found.bits.cpu(), expected.bits)
        rounding = 4 * torch.finfo(dtype).eps * plain.float().abs().max().clamp(min=1.0)
        assert (out.cpu().float() - plain.float()).abs().max() <= rounding


@every_dtype
@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_page_lists(head_dim, fp8, dtype):
    if fp8 and head_dim % 16:
        pytest.skip("FP8 has head dims of multiples of 16")
    page_step(head_dim, dtype, FP8 if fp8 else dtype, *DECODE)


@pytest.mark.parametrize(("heads", "newest"), [(4, 17), (64, 300)])
def test_page_lists_by_several_blocks(heads, newest):
    page_step(64, torch.bfloat16, torch.bfloat16, [1, 2], [17_000, 300], heads, 1, newest=newest, slack_pages=2000)


def page_step(head_dim, dtype, kv_dtype, lens_q, lens_k, heads=HEADS, heads_k=HEADS_K, newest=17, slack_pages=0):
    """Sketches of full pages, lists from them, attention over these."""
    sequences = accuracy.make_sequences(lens_q, lens_k, heads, heads_k, head_dim, dtype, 0, kv_dtype)
    case = accuracy.paged(sequences, PAGE, causal=True)
    q, k_cache, v_cache, starts, _, longest, _ = case.args
    used, table = case.kwargs["seqused_k"], case.kwargs["block_table"]
    full = torch.cat([accuracy.ints([-1]), *(table[b, : n // PAGE] for b, n in enumerate(lens_k))])
    table = torch.cat([table, torch.full((len(lens_k), slack_pages), accuracy.HUGE_PAGE, dtype=torch.int32)], 1)

    def step(move, lists=None):
        queries, keys, values = map(move, (q, k_cache, v_cache))
        sketch = empty_sketch(keys)
        sketch.zero_()
        write_sketch(keys, sketch, move(full))
        batch = *map(move, (starts, used, table)), longest
        made = select_pages(queries, sketch, *batch, eps=0.1, newest=newest)
        return made, attend_pages(queries, keys, values, made if lists is None else lists, *batch)

    made, (out, lse) = step(lambda x: x.cuda())
    lists = replace(made, **{field.name: getattr(made, field.name).cpu() for field in fields(made)})
    expected, (plain, plain_lse) = step(lambda x: x, lists)
    assert (lists.counts - expected.counts).abs().max() <= 2 + 0.005 * expected.counts.max()
    assert (lists.left_out <= 0.1 * (1 + 1e-3)).all()
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
