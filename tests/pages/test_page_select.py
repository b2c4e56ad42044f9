"""Which pages are listed: against the oracle, and the promises one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import page_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_cases import HUGE, PageCase, Step, page_cases, sets_of

from lite_attention.pages import PAGE, empty_sketch, select_pages, write_sketch
from lite_attention.pages.estimate import ALIGNED, log_mass
from lite_attention.pages.layout import decode

LONG = PageCase(q_lens=(1, 1), k_lens=(1000, 700), eps=0.2, sharp=1.5)


def everything(k_len):
    return set(range(-(-k_len // PAGE)))


@given(page_cases())
def test_the_lists_are_the_oracles(case):
    step = Step(case)
    for backend in ("cpu", "reference"):
        assert sets_of(step.select(backend=backend)) == page_oracle.lists(step)


@given(page_cases())
@settings(max_examples=50)
def test_what_is_left_out_is_within_the_budget(case):
    step = Step(case)
    lists = sets_of(step.select())
    for b, (q_len, k_len) in enumerate(zip(case.q_lens, case.k_lens, strict=True)):
        for head in range(case.heads_k):
            for i in range(max(0, q_len - k_len), q_len):
                queries, sketches = page_oracle.seen_by(step, b, head, i)
                scale = step.scale * step.descale("k_descale", b, head)
                for share in page_oracle.shares(queries, sketches, scale):
                    left_out = math.fsum(x for page, x in share.items() if page not in lists[b][head])
                    assert left_out <= case.eps * (1 + 1e-9)


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.4])
def test_no_listed_page_could_go(eps):
    """Were the least of those that the budget chose left out too, some head would miss more than eps."""
    step = Step(replace(LONG, eps=eps))
    lists = sets_of(step.select())
    for b in range(2):
        for head in range(LONG.heads_k):
            queries, sketches = page_oracle.seen_by(step, b, head, 0)
            of_heads = page_oracle.shares(queries, sketches, step.scale)
            chosen = lists[b][head] - page_oracle.forced(LONG.k_lens[b] - 1, LONG.newest)
            assert chosen and len(lists[b][head]) < len(everything(LONG.k_lens[b]))
            least = min(chosen, key=lambda page: max(share[page] for share in of_heads))
            left_out = everything(LONG.k_lens[b]) - lists[b][head] | {least}
            assert any(math.fsum(share[page] for page in left_out) > eps for share in of_heads)


@given(page_cases(), st.floats(0, 0.99))
@settings(max_examples=50)
def test_a_smaller_budget_lists_no_less(case, other):
    step = Step(case)
    less, more = (step.select(eps=eps).listed() for eps in sorted((case.eps, other)))
    assert (more <= less).all()


@given(page_cases())
@settings(max_examples=50)
def test_a_list_does_not_depend_on_the_rest_of_the_batch(case):
    """Alone, with its pages elsewhere in another cache, a sequence has the list that it has among strangers."""
    step = Step(case)
    together = sets_of(step.select())
    for b, k_len in enumerate(case.k_lens):
        held = -(-k_len // PAGE)
        pages = step.block_table[b, :held].long()
        sketch = torch.full((held + 5, *step.sketch.shape[1:]), 255, dtype=torch.uint8)
        places = torch.randperm(held + 5)[:held]
        sketch[places] = step.sketch[pages]
        descale = step.k_descale
        alone = select_pages(
            step.q[step.rows(b)],
            sketch,
            torch.tensor([0, case.q_lens[b]], dtype=torch.int32),
            step.seqused_k[b : b + 1],
            torch.cat([places, torch.full((7,), HUGE)])[None].int(),
            case.q_lens[b],
            eps=case.eps,
            min_context=case.min_context,
            newest=case.newest,
            softmax_scale=case.scale,
            k_descale=descale[b : b + 1] if descale is not None and descale.dim() == 2 else descale,
        )
        assert sets_of(alone) == [together[b]]


def test_a_speculative_step_lists_what_its_tokens_would_one_by_one():
    case = PageCase(q_lens=(5,), k_lens=(807,), eps=0.3, sharp=1.5)
    step = Step(case)
    union = [set() for _ in range(case.heads_k)]
    for i in range(5):
        one = select_pages(
            step.q[i : i + 1],
            step.sketch,
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([803 + i], dtype=torch.int32),
            step.block_table,
            1,
            eps=case.eps,
            newest=case.newest,
        )
        for head, listed in enumerate(sets_of(one)[0]):
            assert listed != everything(803 + i)
            union[head] |= listed
    assert sets_of(step.select()) == [union]


@given(page_cases(max_q=1))
@settings(max_examples=50)
def test_left_out_is_the_share_of_pages_that_are_not_listed(case):
    step = Step(case)
    lists = step.select()
    for b, of_heads in enumerate(sets_of(lists)):
        for head, listed in enumerate(of_heads):
            shares = [{}] * case.group
            if case.q_lens[b] and case.k_lens[b]:
                queries, sketches = page_oracle.seen_by(step, b, head, 0)
                shares = page_oracle.shares(queries, sketches, step.scale * step.descale("k_descale", b, head))
            expected = [math.fsum(x for page, x in share.items() if page not in listed) for share in shares]
            given_out = lists.left_out[b, head * case.group : (head + 1) * case.group]
            assert given_out.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_left_out_is_the_largest_over_the_query_tokens():
    step = Step(PageCase(q_lens=(3,), k_lens=(805,), eps=0.3, sharp=1.5))
    arguments = {"eps": 0.3, "newest": 20}
    ones = [
        select_pages(
            step.q[i : i + 1],
            step.sketch,
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([803 + i], dtype=torch.int32),
            step.block_table,
            1,
            **arguments,
        ).left_out
        for i in range(3)
    ]
    assert torch.equal(step.select().left_out, torch.stack(ones).amax(0)) and (ones[0] > 0).all()


def test_whole_sequences_list_everything_beside_those_that_do_not():
    step = Step(LONG)
    lists, whole = step.select(), step.select(whole=torch.tensor([False, True]))
    assert sets_of(whole) == [sets_of(lists)[0], [everything(700)] * 2]
    assert torch.equal(whole.left_out[0], lists.left_out[0]) and (lists.left_out > 0).all()
    assert (whole.left_out[1] == 0).all()


def test_given_lists_are_written_and_returned():
    step = Step(LONG)
    made, given_lists = step.select(), step.select(eps=0)
    for x in (given_lists.bits, given_lists.counts, given_lists.left_out):
        x.fill_(77)
    assert step.select(lists=given_lists) is given_lists
    assert sets_of(given_lists) == sets_of(made) and torch.equal(given_lists.left_out, made.left_out)


def test_eps_0_lists_everything():
    step = Step(replace(LONG, sharp=1000.0))  # so that most shares are 0 in any arithmetic
    assert sets_of(step.select(eps=0)) == [[everything(n)] * 2 for n in LONG.k_lens]
    assert (step.select(eps=0).left_out == 0).all()
    assert all(len(listed) < 30 for row in sets_of(step.select(eps=1e-12)) for listed in row)


def test_sequences_under_min_context_list_everything():
    step = Step(LONG)
    lists = sets_of(step.select(min_context=1000))
    assert lists[1] == [everything(700)] * 2 and lists[0] == sets_of(step.select())[0]
    assert sets_of(step.select(min_context=1001))[0] == [everything(1000)] * 2


@pytest.mark.parametrize(("newest", "first"), [(1, 62), (8, 62), (9, 61), (24, 61), (25, 60), (5000, 0)])
def test_the_first_and_the_newest_pages_are_always_listed(newest, first):
    step = Step(LONG)
    rare = sets_of(step.select(eps=0.999999, newest=newest))
    assert rare[0] == [{0, *range(first, 63)}] * 2


def test_a_page_that_is_filled_counts_from_then_on():
    """The sketch of the page that is not full yet is not read; the length alone says so."""
    step = Step(PageCase(q_lens=(1,), k_lens=(160,), newest=1))
    last = int(step.block_table[0, 9])
    full = page_oracle.lists(step)
    assert sets_of(step.select()) == full
    step.seqused_k[0] = 159
    before = sets_of(step.select())
    step.sketch[last] = torch.randint(256, step.sketch[last].shape, dtype=torch.uint8)
    assert sets_of(step.select()) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_page_without_moments_is_listed_and_the_others_stay_as_they_were(value):
    step = Step(LONG)
    before = sets_of(step.select())
    unlisted = min(everything(1000) - before[0][1])
    others = Step(LONG)
    others.k_cache[int(step.block_table[0, unlisted]), 3, 1, 5] = value
    write_sketch(others.k_cache, others.sketch, step.block_table[0, unlisted : unlisted + 1])
    after = sets_of(others.select())
    assert after[0][0] == before[0][0] and after[1] == before[1]
    assert unlisted in after[0][1]


def test_a_query_that_is_not_finite_lists_everything():
    step = Step(LONG)
    before = sets_of(step.select())
    step.q[0, 3] = torch.nan
    assert sets_of(step.select()) == [[before[0][0], everything(1000)], before[1]]


def test_pages_of_equal_rank_stay_or_go_together():
    k = torch.zeros(20, PAGE, 1, 8)
    sketch = empty_sketch(k)
    write_sketch(k, sketch, torch.arange(20, dtype=torch.int32))
    arguments = (
        torch.ones(1, 1, 8),
        sketch,
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([320], dtype=torch.int32),
        torch.arange(20, dtype=torch.int32)[None],
        1,
    )
    assert sets_of(select_pages(*arguments, eps=0.5, newest=1)) == [[everything(320)]]
    assert sets_of(select_pages(*arguments, eps=0.91, newest=1)) == [[{0, 19}]]


def test_a_page_with_the_key_that_a_query_looks_for_is_listed():
    step = Step(PageCase(q_lens=(1,), k_lens=(2000,), heads_k=1, group=1, head_dim=64, eps=0.1, sharp=0.0))
    few = sets_of(step.select(eps=0.9))[0][0]
    page = min(everything(2000) - few)
    q = step.q[0, 0]
    step.k_cache[int(step.block_table[0, page]), 7, 0] = 40 * q / q.norm()
    write_sketch(step.k_cache, step.sketch, step.block_table[0, page : page + 1])
    assert page in sets_of(step.select(eps=0.9))[0][0]


def log_masses(k, q, bits=12, aligned=ALIGNED):
    """Estimated from the sketches of pages of one KV head, (pages, 16, head_dim), and exact; both less log(16)."""
    sketch = empty_sketch(k[:, :, None], bits)
    write_sketch(k[:, :, None], sketch, torch.arange(len(k), dtype=torch.int32))
    moments = decode(sketch, k.shape[2])
    moments = moments._replace(deviation=moments.deviation * math.sqrt(aligned / ALIGNED))
    estimated = log_mass(q[None, None], moments, torch.ones(1))[0, 0]
    return estimated, (k.double() @ q.double()).logsumexp(-1) - math.log(PAGE)


@pytest.mark.parametrize("bits", [12, 8])
@pytest.mark.parametrize("size", [0.0, 0.05, 1.0, 5.0])
def test_the_estimate_is_the_oracles(size, bits):
    """With spreads on both sides of the knee, and under a scale of less and of more than 1."""
    step = Step(PageCase(q_lens=(1,), k_lens=(640,), group=3, head_dim=40, sharp=1.0, bits=bits))
    q, scale = step.q[0].unflatten(0, (2, 3)) * size, torch.tensor([0.3, 1.4])
    sketch = step.sketch[step.block_table[0, :40].long()]
    found = log_mass(q, decode(sketch, 40), scale)
    for head in range(2):
        for row in range(3):
            one = q[head, row].double().tolist(), float(scale[head])
            expected = [page_oracle.estimate(one[0], sketch[page, head].tolist(), one[1]) for page in range(40)]
            assert found[head, row].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_the_estimate_is_near_the_mass_of_gaussian_keys():
    """Where the scores spread little it is unbiased; where they spread much, half their variance would be far off.

    That is where keys vary alike in all directions. What `ALIGNED` adds for keys that don't is on top.
    """
    torch.manual_seed(0)
    k, q = torch.randn(4000, PAGE, 64), torch.zeros(64)
    for spread, error, more in ((0.5, 0.05, 0.32), (1.0, 0.1, 1.29), (4.0, 0.6, 6.5)):
        q[5] = spread
        estimated, exact = log_masses(k, q, aligned=1.0)
        assert abs((estimated - exact).mean()) < error
        assert (log_masses(k, q)[0] - estimated).mean() == pytest.approx(more, rel=0.15)
    mean, deviation = k[..., 5].mean(1), k[..., 5].var(1, correction=0).sqrt()
    uncapped = spread * mean + (spread * deviation).square() / 2
    assert (uncapped - exact).mean() > 2


@pytest.mark.parametrize("bits", [12, 8])
def test_pages_whose_keys_are_alike_have_their_exact_mass(bits):
    make = torch.Generator().manual_seed(0)
    k = torch.randint(16, (50, 1, 64), generator=make) * 17.0 - 100  # codes have these exactly
    k[:, 0, :2] = torch.tensor([-100.0, 155.0])
    q = torch.randn(64, generator=make) / 8
    estimated, exact = log_masses(k.expand(-1, PAGE, -1), q, bits)
    assert torch.allclose(estimated, exact, rtol=0, atol=1e-3) and exact.std() > 10


@pytest.mark.parametrize("bits", [12, 8])
def test_the_mass_of_a_single_key_is_not_missed(bits):
    """Such pages are what eps is broken by where a sketch has only means and deviations of all 16 keys."""
    make = torch.Generator().manual_seed(0)
    k, q = torch.randn(100, PAGE, 64, generator=make), torch.randn(64, generator=make) / 8
    k[:, 6] += 12 * q / q.norm() ** 2  # a score of 12 more, where the others' deviation is 1
    estimated, exact = log_masses(k, q, bits)
    assert (estimated - exact).abs().max() < 1.5
    mean, variance = k.mean(1).double() @ q.double(), k.var(1, correction=0).double() @ q.double().square()
    by_channels = mean + torch.where(variance < 1.74**2, variance / 2, 1.74 * variance.sqrt() - 1.74**2 / 2)
    assert (exact - by_channels).min() > 5


@pytest.mark.parametrize("bits", [12, 8])
def test_a_page_with_one_key_that_matters_is_listed(bits):
    step = Step(PageCase(q_lens=(1,), k_lens=(2000,), heads_k=1, group=1, head_dim=64, sharp=0.0, bits=bits))
    page = min(everything(2000) - sets_of(step.select(eps=0.9))[0][0])
    q, place = step.q[0, 0], int(step.block_table[0, page])
    step.k_cache[place, 7, 0] += 12 * q / q.norm() ** 2 * math.sqrt(64)
    scores = step.keys(0)[0][:, 0] @ q.double() / math.sqrt(64)
    mass = scores.softmax(0).unflatten(0, (-1, PAGE)).sum(1)
    assert mass[page] > 0.9
    # By the mean and the deviation of each channel of all 16 keys it has next to none.
    k = torch.stack([step.k_cache[int(n), :, 0] for n in step.block_table[0, :125]])
    variance = k.var(1, correction=0) @ q.square() / 64
    assert variance.max() < 1.74**2
    assert (k.mean(1) @ q / math.sqrt(64) + variance / 2).softmax(0)[page] < 0.1

    write_sketch(step.k_cache, step.sketch, step.block_table[0, page : page + 1])
    for backend in ("cpu", "reference"):
        assert sets_of(step.select(eps=0.2, newest=1, backend=backend)) == [[{0, page, 124}]]


def test_the_same_call_gives_the_same_lists():
    step = Step(LONG)
    first, second = step.select(), step.select()
    assert torch.equal(first.bits, second.bits) and torch.equal(first.counts, second.counts)
