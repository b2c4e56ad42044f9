"""The kernels of page lists: sketches and lists against the specification, attention under the accuracy rule."""

from __future__ import annotations

import random as py_random
from dataclasses import replace

import accuracy
import pytest
import torch
from page_steps import FP8, Step, keys_of, poison, some_lists

from lite_attention import SkipList, flash_attn_varlen_func
from lite_attention.pages import (
    PAGE,
    PageLists,
    attend_pages,
    empty_sketch,
    select_pages,
    select_scratch_bytes,
    sketch_bytes,
    write_sketch,
)
from lite_attention.pages.estimate import log_mass, shares
from lite_attention.pages.layout import decode

HEADS = [(1, 1), (4, 4), (8, 2), (9, 3), (14, 2), (32, 8), (20, 1), (64, 1)]
HUGE = accuracy.HUGE_PAGE
every_kernel = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
every_head_dim = pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])


def forms_agree(step, lists):
    """Bits, indices and counts say the same; gives it as bool (batch, heads_k, max_blocks)."""
    listed = lists.listed()
    assert torch.equal(lists.counts, listed.sum(-1, dtype=torch.int32))
    assert (lists.bits[..., -1] >> (lists.max_blocks - 1) % 32 >> 1 == 0).all() or lists.max_blocks % 32 == 0
    for b in range(len(step.k_lens)):
        for head in range(step.heads_k):
            indices = lists.indices[b, head, : int(lists.counts[b, head])]
            assert torch.equal(indices.long(), listed[b, head].nonzero().flatten())
    return listed


# Sketches


def codes_of(sketch, head_dim):
    """Codes of means and of differences, (..., head_dim), and the bytes that fill up sections."""
    means_end, after = 16 + head_dim, 16 + -(-head_dim // 16) * 16
    bytes_of_means = sketch[..., 16:means_end]
    if sketch.shape[-1] == after:  # of 8 bits
        return (bytes_of_means & 15).int(), (bytes_of_means >> 4).int(), sketch[..., means_end:]
    # Of each eight channels two bytes of the even ones, two of the odd ones.
    pairs = sketch[..., after : after + head_dim // 2].unflatten(-1, (-1, 2, 2))
    fill = torch.cat([sketch[..., means_end:after], sketch[..., after + head_dim // 2 :]], -1)
    return bytes_of_means.int(), torch.stack([pairs & 15, pairs >> 4], -1).movedim(-3, -1).flatten(-4).int(), fill


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=["bf16", "fp16", "fp8"])
@pytest.mark.parametrize(("by_head", "bits"), [(False, 12), (True, 12), (True, 8)], ids=["False", "True", "8bits"])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 136, 192, 200, 256])
def test_sketches_are_the_references(head_dim, by_head, bits, dtype):
    """Codes may differ by one where rounding ties. What they say is also held to the keys."""
    fp8 = dtype == FP8
    head_dim += head_dim % 16 if fp8 else 0
    options = {"fp8": fp8, "by_head": by_head, "bits": bits}
    step = Step([1, 1], [700, 333], head_dim=head_dim, dtype=torch.bfloat16 if fp8 else dtype, **options)
    page = int(step.table[0, 3])
    step.k_cache[page, 5, 1, 7] = float("nan")
    step.k_cache[int(step.table[0, 4])] = 0.0
    sketch, expected = (torch.full_like(step.sketch, 255) for _ in range(2))
    write_sketch(step.k_cache, sketch, step.full_pages())
    write_sketch(step.k_cache, expected, step.full_pages(), backend="reference")
    full = [int(x) for x in step.full_pages() if x >= 0]
    rest = [page for page in range(len(sketch)) if page not in full]
    assert (sketch[rest] == 255).all()
    assert sketch[page, 1, :16].clone().view(torch.float32).isnan().all() and (sketch[page, 1, 16:] == 0).all()

    keys = step.k_cache.view(torch.uint8)[full].view(step.k_cache.dtype).double().transpose(1, 2)
    sums = keys.sum(2)
    distances = (keys - sums[:, :, None] / PAGE).square().sum(-1)
    two = distances.topk(2).values
    is_known = torch.ones_like(sums[..., 0], dtype=torch.bool)
    is_known[full.index(page), 1] = False
    # Which of two keys is the farthest, rounding may decide; of a page of zeros it is the same.
    some = is_known & ~(two[..., 1] > two[..., 0] * (1 - 1e-5))
    assert some.sum() >= is_known.sum() - 2
    found, right = sketch[full][some], expected[full][some]
    (*codes, fill), right_codes = codes_of(found, head_dim), codes_of(right, head_dim)
    assert (fill == 0).all()
    scales, right_scales = (x[..., :16].contiguous().view(torch.float32) for x in (found, right))
    for of in (0, 1, 3):
        torch.testing.assert_close(scales[:, of], right_scales[:, of], rtol=1e-4 if of == 3 else 2e-5, atol=1e-6)
    off = (codes[0] - right_codes[0]).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-2
    alike = (off == 0).all(-1)  # else differences are from another mean
    assert alike.float().mean() > 0.8
    torch.testing.assert_close(scales[alike, 2], right_scales[alike, 2], rtol=2e-5, atol=1e-6)
    assert codes[1].min() >= 1 and codes[1].max() <= 15
    off = (codes[1] - right_codes[1])[alike].abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-2

    mean, difference, deviation = (x.double() for x in decode(found, head_dim))
    place = distances.argmax(-1)[..., None, None].expand(-1, -1, 1, head_dim)
    farthest = keys.gather(2, place)[some][:, 0]
    others = (sums[some] - farthest) / (PAGE - 1)
    assert ((mean - others).abs() <= 0.501 * scales[:, 1:2] + 1e-5).all()
    assert ((mean + difference - farthest).abs() <= 0.501 * scales[:, 2:3] + 1e-5).all()
    around = (keys[some] - others[:, None]).square().sum((1, 2)) - (farthest - others).square().sum(1)
    torch.testing.assert_close(deviation, (around / (PAGE - 1) / head_dim).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("bits", [12, 8], ids=["12bits", "8bits"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_of_keys_as_far_the_first_is_apart(head_dim, bits, dtype):
    """In each page two keys lie as far from the mean, on its two sides; one page for each two places."""
    pairs = [(i, j) for i in range(PAGE) for j in range(i)]
    k = torch.zeros(len(pairs), PAGE, 2, head_dim)
    for page, (i, j) in enumerate(pairs):
        k[page, [i, j], :, head_dim - 3] = torch.tensor([[-8.0, 8.0], [8.0, -8.0]])
    k = k.cuda().to(dtype)
    sketch = empty_sketch(k, bits).fill_(255)
    write_sketch(k, sketch, torch.arange(len(k), dtype=torch.int32, device="cuda"))
    mean, difference, _ = decode(sketch, head_dim)
    expected = torch.tensor([8.0, -8.0], device="cuda").expand(len(k), 2)
    torch.testing.assert_close((mean + difference)[..., head_dim - 3], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, -3e19])
@pytest.mark.parametrize("bits", [12, 8], ids=["12bits", "8bits"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_page_without_moments_says_so_whichever_key_it_is(head_dim, bits, value):
    k = torch.randn(PAGE + 1, PAGE, 2, head_dim, device="cuda").bfloat16()
    sketch, before = empty_sketch(k, bits), empty_sketch(k, bits)
    pages = torch.arange(PAGE + 1, dtype=torch.int32, device="cuda")
    write_sketch(k, before, pages)
    for page in range(PAGE):
        k[page, page, 1, (37 * page + 5) % head_dim] = value
    k[PAGE, ::2, 1, 5], k[PAGE, 1::2, 1, 5] = 1e19, -1e19  # each key's square is 1e38, their sum is too large
    write_sketch(k, sketch.fill_(255), pages)
    assert sketch[:, 1, :16].clone().view(torch.float32).isnan().all() and (sketch[:, 1, 16:] == 0).all()
    assert torch.equal(sketch[:, 0], before[:, 0])


@pytest.mark.parametrize("head_dim", [8, 64])
def test_a_direct_call_needs_sketches_of_a_known_size(head_dim):
    k, pages = torch.zeros(4, PAGE, 2, head_dim, device="cuda", dtype=torch.bfloat16), accuracy.ints([0, 1])
    for bits in (12, 8):
        torch.ops.lite_attention.page_sketch(k, empty_sketch(k, bits), pages)
    both = f"{sketch_bytes(head_dim, 12)} or {sketch_bytes(head_dim, 8)}"
    for size in (16, sketch_bytes(head_dim, 12) + 16):
        wrong = torch.zeros(4, 2, size, device="cuda", dtype=torch.uint8)
        with pytest.raises(RuntimeError, match=f"sketch must be a uint8 CUDA tensor .*{both}"):
            torch.ops.lite_attention.page_sketch(k, wrong, pages)


def test_pages_that_the_cache_has_not_are_passed_over():
    step = Step([1], [320])
    sketch = torch.full_like(step.sketch, 255)
    write_sketch(step.k_cache, sketch, accuracy.ints([len(sketch), HUGE, -HUGE, -1]))
    assert (sketch == 255).all()


# Lists


@pytest.mark.parametrize(("heads", "heads_k", "q_len"), [(32, 8, 1), (10, 2, 3)])
def test_scratch_is_as_large_as_planned(heads, heads_k, q_len):
    """What vLLM's plan of memory counts is what the kernels ask for, but for small tensors of the call."""
    step = Step([q_len] * 3, [4000, 700, 4096], heads=heads, heads_k=heads_k)
    lists = PageLists.empty(3, heads_k, heads, step.table.shape[1], step.table.device)
    step.select(eps=0.1, lists=lists)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    step.select(eps=0.1, lists=lists)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    planned = select_scratch_bytes(3, heads, heads_k, q_len, step.table.shape[1])
    assert planned <= taken < planned + 4096


def spec_shares(step, b, head, row):
    """The specification's shares, float64 (group, pages that the token sees all of)."""
    position = step.k_lens[b] - step.q_lens[b] + row
    counted = max(position + 1, 0) // PAGE
    sketch = step.sketch[step.table[b, :counted].long(), head : head + 1]
    group = step.heads // step.heads_k
    q = step.q[int(step.starts[b]) + row, head * group : (head + 1) * group][None]
    scale = torch.full((1,), step.head_dim**-0.5, dtype=torch.float64, device="cuda")
    if step.descales:
        scale *= step.descales["k_descale"][b, head]
    return shares(log_mass(q, decode(sketch, step.head_dim), scale))[0]


BY_CHANCE = [
    *(pytest.param(seed, 12, id=str(seed)) for seed in range(6)),
    *(pytest.param(seed, 8, id=f"{seed}-8bits") for seed in range(6, 9)),
]


@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128, 192, 200, 256])
@pytest.mark.parametrize(("seed", "bits"), BY_CHANCE)
def test_lists_keep_the_budget_and_are_no_longer_than_the_references(head_dim, seed, bits):
    rng = py_random.Random(f"{head_dim} {seed}")
    heads, heads_k = rng.choice(HEADS)
    batch = rng.randint(1, 4)
    most_q = min(5, 64 // (heads // heads_k))
    q_lens = [rng.choice([1, 1, rng.randint(0, most_q)]) for _ in range(batch)]
    k_lens = [rng.choice([0, rng.randint(1, 300), rng.randint(300, 9000), 16 * rng.randint(1, 300)]) for _ in q_lens]
    q_lens[0] = max(q_lens[0], 1)
    eps, newest = rng.choice([1e-4, 0.02, 0.1, 0.5]), rng.choice([1, 16, 17, 64])
    dtype = rng.choice([torch.bfloat16, torch.float16])
    fp8 = head_dim % 16 == 0 and rng.random() < 0.3
    options = {"by_head": rng.random() < 0.5, "fp8": fp8, "sharp": rng.choice([0.5, 1.0]), "bits": bits}
    step = Step(q_lens, k_lens, heads, heads_k, head_dim, dtype, seed, **options)
    lists, expected = (step.select(eps=eps, newest=newest, backend=x) for x in (None, "reference"))
    listed, in_expected = forms_agree(step, lists), expected.listed()
    torch.testing.assert_close(lists.left_out, expected.left_out, rtol=1e-2, atol=eps * 2e-2)
    assert (lists.left_out <= eps * (1 + 1e-3)).all()
    for b, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
        for head in range(heads_k):
            # Pages on the border may differ where rounding moves a rank or a sum.
            differ = int((listed[b, head] != in_expected[b, head]).sum())
            assert differ <= max(1, q_len) * (2 + 0.005 * int(in_expected[b, head].sum()))
            for row in range(max(0, q_len - k_len), q_len):
                share = spec_shares(step, b, head, row)
                left_out = share.masked_fill(listed[b, head, : share.shape[1]], 0.0).sum(-1)
                assert (left_out <= eps * (1 + 1e-3)).all()


def geometric(pages, ratio, order, bits, by="means"):
    """A step whose pages have shares in the ratio of neighbours in `order`, exact in any arithmetic.

    By the mean of keys that are all alike, by one key among zeros, or by how far keys deviate in a channel that queries
    don't weigh, with a mean of 0, beside a key apart that queries don't weigh either.
    """
    step = Step([1], [pages * PAGE], heads=2, heads_k=1, head_dim=64, sharp=0, bits=bits)
    step.k_cache.view(torch.int16).zero_()
    places = step.table[0, order.cuda()].long()
    sizes = torch.arange(pages).mul(ratio)[:, None, None].to(step.k_cache)
    if by == "means":
        step.k_cache[places, :, :, 0] = sizes
    elif by == "keys apart":
        step.k_cache[places, 11:12, :, 0] = sizes
    else:
        step.k_cache[places, 0, :, 2] = 1024.0
        step.k_cache[places, 1:8, :, 1] = 4 * sizes
        step.k_cache[places, 8:15, :, 1] = -4 * sizes
    step.q.zero_()
    step.q[:, :, 0] = 5.0 if by == "deviations" else 8.0  # under the scale of 1 / 8
    write_sketch(step.k_cache, step.sketch, step.full_pages())
    return step


@pytest.mark.parametrize("eps", [1e-3, 0.02, 0.1, 0.4])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("by", ["means", "keys apart", "deviations"])
@pytest.mark.parametrize("bits", [12, 8], ids=["12bits", "8bits"])
def test_where_nothing_is_near_a_border_lists_are_equal(bits, by, ratio, eps):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    step = geometric(200, ratio, order, bits, by)
    lists, expected = (step.select(eps=eps, newest=1, backend=x) for x in (None, "reference"))
    assert torch.equal(forms_agree(step, lists), expected.listed()) and int(lists.counts.max()) < 50
    # Of 8 bits a code of 15 is 31 in the product, and 16 steps are taken away again: that rounds more.
    is_exact = bits == 12 and by == "means"
    torch.testing.assert_close(lists.left_out, expected.left_out, rtol=1e-4 if is_exact else 5e-4, atol=1e-7)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("bits", [12, 8], ids=["12bits", "8bits"])
def test_spreads_on_both_sides_of_the_knee(bits, ratio):
    """The largest is 1.88, just beyond, or 3.75, where most are."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    step = geometric(200, ratio / 16, order, bits, "deviations")
    for eps in (0.1, 0.4):
        lists, expected = (step.select(eps=eps, newest=1, backend=x) for x in (None, "reference"))
        assert torch.equal(forms_agree(step, lists), expected.listed()) and int(lists.counts.max()) < 180
        torch.testing.assert_close(lists.left_out, expected.left_out, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [12, 8], ids=["12bits", "8bits"])
def test_channels_far_from_the_others(bits):
    """As some models have: steps are large then, and so is what the kernel takes away from its sums."""
    step = Step([1, 2], [6000, 2999], bits=bits)
    step.k_cache[..., 5] += 40
    step.k_cache[..., 77] -= 25
    write_sketch(step.k_cache, step.sketch, step.full_pages())
    lists, expected = (step.select(backend=x) for x in (None, "reference"))
    forms_agree(step, lists)
    torch.testing.assert_close(lists.left_out, expected.left_out, rtol=1e-2, atol=2e-3)
    assert ((lists.counts - expected.counts).abs() <= 2 * (2 + 0.005 * expected.counts)).all()


def test_pages_of_equal_rank_stay_or_go_together():
    step = Step([1], [3200], heads=4, heads_k=1, head_dim=64)
    step.k_cache.view(torch.int16).zero_()
    write_sketch(step.k_cache, step.sketch, step.full_pages())
    assert int(step.select(eps=0.5, newest=1).counts) == 200
    assert int(step.select(eps=0.991, newest=1).counts) == 2
    assert int(step.select(eps=0.989, newest=1).counts) == 200


def test_sequences_that_list_everything_beside_those_that_do_not():
    step = Step([1, 1, 0, 2, 1], [4000, 3000, 500, 777, 3999])
    plain = step.select()
    counts = [250, 188, 0, 49, 250]
    whole = step.select(whole=torch.tensor([0, 1, 0, 1, 0], device="cuda").bool())
    least = step.select(min_context=4000)
    for lists, dense in ((whole, (1, 3)), (least, (1, 3, 4)), (step.select(eps=0), range(5))):
        forms_agree(step, lists)
        for b in range(5):
            if b in dense or b == 2:
                assert lists.counts[b].tolist() == [counts[b]] * 2 and (lists.left_out[b] == 0).all()
            else:
                assert torch.equal(lists.bits[b], plain.bits[b]) and (lists.counts[b] < counts[b]).all()
                assert torch.equal(lists.left_out[b], plain.left_out[b]) and (lists.left_out[b] > 0).any()


def test_what_is_not_finite_is_listed_and_nothing_else_changes():
    step = Step([1, 1], [4000, 3000])
    before = step.select()
    listed = before.listed()
    unlisted = int((~listed[0, 1]).nonzero()[0])
    step.sketch[int(step.table[0, unlisted]), 1, :16] = torch.full((4,), torch.nan).view(torch.uint8).cuda()
    after = step.select().listed()
    assert after[0, 1, unlisted] and torch.equal(after[0, 0], listed[0, 0]) and torch.equal(after[1], listed[1])
    step.q[1, 2] = torch.nan
    lists = step.select()
    assert lists.counts[1, 0] == 188 and torch.equal(lists.listed()[1, 1], listed[1, 1])


def test_a_speculative_step_lists_the_union_of_its_tokens():
    step = Step([4], [4003])
    union = torch.zeros_like(step.select(eps=0.3).listed())
    most = torch.zeros(1, 8, device="cuda")
    for i in range(4):
        used = accuracy.ints([4000 + i])
        one = select_pages(step.q[i : i + 1], step.sketch, accuracy.ints([0, 1]), used, step.table, 1, eps=0.3)
        union |= one.listed()
        most = torch.maximum(most, one.left_out)
    together = step.select(eps=0.3, newest=64)
    assert torch.equal(together.listed(), union) and torch.equal(together.left_out, most)


@pytest.mark.parametrize(("heads_k", "bits"), [(1, 12), (2, 12), (2, 8)], ids=["1", "2", "2-8bits"])
def test_a_million_keys(heads_k, bits):
    pages = 65536
    generator = torch.Generator("cuda").manual_seed(3)
    k = accuracy.random(pages, PAGE, heads_k, 64, dtype=torch.bfloat16, generator=generator)
    k += accuracy.random(pages, 1, heads_k, 64, dtype=torch.bfloat16, generator=generator)
    sketch = empty_sketch(k, bits)
    write_sketch(k, sketch, torch.arange(pages, dtype=torch.int32, device="cuda"))
    q = accuracy.random(1, 4 * heads_k, 64, dtype=torch.bfloat16, generator=generator)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int().cuda()[None]
    arguments = (q, sketch, accuracy.ints([0, 1]), accuracy.ints([pages * PAGE]), table, 1)
    lists, expected = (select_pages(*arguments, eps=0.1, backend=x) for x in (None, "reference"))
    assert (lists.counts - expected.counts).abs().max() <= 0.002 * expected.counts.max()
    assert torch.equal(lists.counts, lists.listed().sum(-1, dtype=torch.int32))
    out, lse = attend_pages(q, k, k, lists, *arguments[2:])
    for head in range(heads_k):
        seen = k[table[0, lists.indices[0, head, : int(lists.counts[0, head])].long()].long(), :, head].flatten(0, 1)
        rows = slice(4 * head, 4 * head + 4)
        scores = q[0, rows].float() @ seen.float().T / 8
        torch.testing.assert_close(lse[rows, 0], scores.logsumexp(-1), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(out[0, rows].float(), scores.softmax(-1) @ seen.float(), rtol=2e-2, atol=2e-2)


# Attention


@every_kernel
@every_head_dim
@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize("seed", range(5))
def test_attention_over_random_lists(head_dim, dtype, fp8, seed):
    rng = py_random.Random(f"{head_dim} {dtype} {fp8} {seed}")
    heads, heads_k = rng.choice(HEADS)
    batch = rng.randint(1, 5)
    most_q = 64 // (heads // heads_k)
    q_lens = [rng.choice([1, 1, rng.randint(0, min(8, most_q))]) for _ in range(batch)]
    q_lens[0] = max(q_lens[0], 1)
    k_lens = [rng.choice([0, 1, rng.randint(1, 300), rng.randint(300, 5000), 16 * rng.randint(1, 100)]) for _ in q_lens]
    options = {"by_head": rng.random() < 0.5, "one_memory": rng.random() < 0.5, "fp8": fp8}
    dim = head_dim - rng.choice([0, 0, 16])
    step = Step(q_lens, k_lens, heads, heads_k, dim, dtype, seed, **options)
    lists = some_lists(step, rng.choice([0.0, 0.1, 0.5, 0.9]), seed)
    poison(step, lists)
    sinks = {"sinks": torch.randn(heads, device="cuda")} if rng.random() < 0.3 else {}
    num_splits = rng.choice([0, 0, 1])
    out, lse = step.attend(lists, num_splits=num_splits, **sinks)
    step.check(lists, out, lse, **sinks)
    again = step.attend(lists, num_splits=num_splits, **sinks)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@every_kernel
@every_head_dim
@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
def test_with_all_pages_listed_it_is_dense_to_the_bit(head_dim, dtype, fp8):
    """In whole rows, whose tiles are the same then."""
    step = Step([1, 2, 0, 1], [4001, 777, 30, 16], head_dim=head_dim, dtype=dtype, fp8=fp8)
    sinks = torch.randn(8, device="cuda")
    out, lse = step.attend(step.select(eps=0), num_splits=1, sinks=sinks)
    dense, dense_lse = flash_attn_varlen_func(
        step.q, step.k_cache, step.v_cache, step.starts, None, 2, 4001, causal=True, seqused_k=step.used,
        block_table=step.table, num_splits=1, sinks=sinks, return_softmax_lse=True, **step.descales,
    )  # fmt: skip
    assert torch.equal(out, dense) and torch.equal(lse, dense_lse)


@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
def test_a_sequence_does_not_see_the_rest_of_the_batch(fp8):
    k_lens = [4001, 777, 3000, 16, 9000, 0, 2000] * 5
    step = Step([1] * len(k_lens), k_lens, fp8=fp8)
    lists = step.select()
    out, lse = step.attend(lists, num_splits=1)
    step.check(lists, out, lse)
    for b in (0, 4, 6, 34):
        one = slice(b, b + 1)
        alone = step.select(one)
        assert torch.equal(alone.bits, lists.bits[one]) and torch.equal(alone.left_out, lists.left_out[one])
        single, single_lse = step.attend(alone, one, num_splits=1)
        assert torch.equal(single[b], out[b]) and torch.equal(single_lse[:, b], lse[:, b])


@pytest.mark.parametrize(("q_len", "heads"), [(1, 4), (3, 4), (3, 8), (1, 36), (1, 64)])
def test_a_list_is_the_same_by_one_block_or_several(q_len, heads):
    """With 8 heads shares have room in shared memory where there are several blocks, with 36 not; 64 have one block."""
    k_lens = [70_000] + [100] * 139  # alone the first has blocks to spare, in the batch one for each KV head
    step = Step([q_len] * len(k_lens), k_lens, heads_k=1, heads=heads, sharp=4.0)  # unions of many heads are short too
    together, alone = step.select(), step.select(slice(0, 1))
    listed = forms_agree(step, together)
    assert 0 < int(alone.counts) < listed.shape[-1] // 2
    for name in ("bits", "counts", "left_out"):
        assert torch.equal(getattr(alone, name), getattr(together, name)[:1]), name
    assert torch.equal(alone.indices[0, 0, : int(alone.counts)], together.indices[0, 0, : int(alone.counts)])


@pytest.mark.parametrize("batch", [1, 16, 20])
def test_tables_for_which_shared_memory_has_no_room(batch):
    """By a cluster, by one block with a multiprocessor to itself, and by one of two beside each other."""
    step = Step([1] * batch, [3001] * batch, heads=64, heads_k=8, sharp=0.5)
    narrow = step.select()
    blocks = step.table.shape[1]
    wide = accuracy.ints([HUGE]).expand(batch, 70_000).contiguous()
    wide[:, :blocks] = step.table
    step.table = wide
    lists = step.select()
    assert torch.equal(lists.listed()[..., :blocks], narrow.listed()) and not lists.listed()[..., blocks:].any()
    assert torch.equal(lists.counts, narrow.counts) and torch.equal(lists.left_out, narrow.left_out)


def test_a_graph_follows_lengths_and_queries():
    """One graph of a decode step, replayed as sequences grow, end and begin in a wider batch."""
    step = Step([1, 1, 1], [4001, 777, 2999])
    starts, used, table, _ = (x.clone() if isinstance(x, torch.Tensor) else x for x in step.of_batch())
    q, filled = step.q.clone(), torch.full((3,), -1, dtype=torch.int32, device="cuda")
    lists = PageLists.empty(3, 2, 8, table.shape[1], torch.device("cuda"))
    out = torch.empty_like(q)

    def run():
        write_sketch(step.k_cache, step.sketch, filled)
        select_pages(q, step.sketch, starts, used, table, 1, eps=0.1, lists=lists)
        return attend_pages(q, step.k_cache, step.v_cache, lists, starts, used, table, 1, out=out)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = run()
    before = None
    for new in ([4001, 777, 2999], [4000, 0, 3], [0, 0, 0], [1, 760, 2048], [4001, 777, 2999]):
        used.copy_(accuracy.ints(new))
        q.normal_()
        filled.copy_(table[:, 0])
        step.sketch[table[:, 0].long()] = 255
        graph.replay()
        got = out.clone(), lse.clone(), lists.counts.clone(), lists.left_out.clone()
        made, made_lse = run()
        assert torch.equal(got[0], made) and torch.equal(got[1], made_lse)
        assert torch.equal(got[2], lists.counts) and torch.equal(got[3], lists.left_out)
        step.k_lens, step.q = new, q
        step.sequences = [(q[b : b + 1], k, v) for b, (k, v) in enumerate(keys_of(step, new))]
        step.check(lists, made, made_lse)
        assert before is None or not torch.equal(before, got[0])
        before = got[0]


def test_lists_that_are_garbage_read_no_foreign_memory():
    """As of padding rows in a graph: whatever the numbers are, there is no fault, and other sequences keep theirs."""
    step = Step([1, 1, 1], [4001, 777, 2999])
    lists = step.select()
    out, lse = step.attend(lists, num_splits=1)
    garbage = replace(lists, counts=lists.counts.clone(), indices=lists.indices.clone())
    for count in (HUGE, -HUGE, -1, 10**6, 251):
        garbage.counts[0] = count
        for number in (HUGE, -HUGE, -1, 10**8, 252):
            garbage.indices[0] = number
            made, made_lse = step.attend(garbage, num_splits=1)
            torch.cuda.synchronize()
            assert torch.equal(made[1:], out[1:]) and torch.equal(made_lse[:, 1:], lse[:, 1:])
    stale = step.table.clone()
    stale[0] = HUGE
    step.table = stale
    lists = step.select()
    step.attend(lists)
    torch.cuda.synchronize()


def test_an_operator_sees_what_the_kernels_have_not():
    step = Step([17], [400])
    with pytest.raises(NotImplementedError, match="max_seqlen_q: got 17 query tokens of 4 query heads"):
        step.select()
    with pytest.raises(NotImplementedError, match="max_seqlen_q: got 17 query tokens of 4 query heads"):
        step.attend(some_lists(step, 1.0))
    with pytest.raises(NotImplementedError, match="max_seqlen_q: got 17 query tokens of 4 query heads"):
        step.decode()


def test_a_table_too_wide_for_shared_memory_is_refused_by_name():
    step = Step([1] * 150, [40] * 150, heads=64, heads_k=1, head_dim=64)
    step.table = torch.cat([step.table, accuracy.ints([HUGE]).expand(150, 200_000)], 1)
    with pytest.raises(RuntimeError, match=f"block_table has {step.table.shape[1]} pages a sequence"):
        step.select()


def test_a_direct_call_needs_a_table_of_its_batch():
    """None of the ops reads a row that is not there, or takes columns for rows."""
    q, k = (torch.zeros(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((3, 4, 64), (8, PAGE, 2, 64)))
    out, lse, table = torch.empty_like(q), torch.empty(4, 3, device="cuda"), torch.zeros(3, 2, device="cuda").int()
    starts, used = accuracy.ints([0, 1, 2, 3]), accuracy.ints([20, 1, 32])
    skip = SkipList.fresh(3, 4, 1, 2 * PAGE, head_dim=64, device="cuda")
    lists = PageLists.empty(3, 2, 4, 2, torch.device("cuda"))
    lists.counts.zero_()
    ops, tensors = torch.ops.lite_attention, (q, k, k, out, lse)

    def dense(table):
        ops.fwd(*tensors, starts, None, used, table, None, 1, 2 * PAGE, 0.125, -1, 0)

    def skipping(table):
        listed = (skip.bits, torch.full((), -1.0, device="cuda"), None, None)
        tile = (skip.block_m, skip.block_n)
        ops.skip_fwd(*tensors, *listed, starts, None, used, table, 1, 2 * PAGE, 0.125, -1, 0, None, *tile, True)

    def listed(table):
        arguments = (lists.indices, lists.counts, starts, used, table, 1, 0.125, None, None, None, 0)
        ops.page_attend(*tensors, *arguments)

    def decoding(table):
        arguments = (starts, used, table, None, None, 1, 0.125, 0.1, 0, 64, None, None, None, 0)
        ops.page_decode(q, k, k, sketch, None, out, lse, *made, *arguments)

    sketch = empty_sketch(k).zero_()
    made = lists.bits, lists.indices, lists.counts, lists.left_out
    for call in (dense, skipping, listed, decoding):
        call(table)
        for wrong in (table[:2], torch.cat([table, table]), table.T.contiguous().T):
            with pytest.raises(RuntimeError, match="block_table must be"):
                call(wrong)
    with pytest.raises(RuntimeError, match="block_table must be"):
        dense(table.flatten())
