"""The CPU path against the reference, in float64's place: same inputs in float32."""

from __future__ import annotations

import pytest
import torch
from cases import HUGE, LAYOUTS, Call, Case, assert_matches, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_attention import cpu, flash_attn_func, flash_attn_varlen_func, reference


@given(st.one_of(cases(), cases(max_q=300, max_k=500)))
@settings(max_examples=250)
def test_cpu_path_is_the_reference(case):
    call = Call(case)
    # The fused kernel rounds the weights to the input dtype before it multiplies them with v.
    assert_matches(call.run("cpu"), call.run("reference"), case.dtype, roundings=4, lse_tolerance=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 128, 129])
@pytest.mark.parametrize("alibi", ["", "batch"])
def test_every_layout_and_block(layout, rows, alibi):
    case = Case(
        layout=layout,
        q_lens=(rows,) * 3,
        k_lens=(260,) * 3 if layout == "dense" else (260, 0, 70),
        heads_k=3,
        group=3,
        head_dim=64,
        page_size=16,
        dtype=torch.float32,
        causal=True,
        window=(90, -1),
        softcap=0.0,
        alibi=alibi,
        sinks=True,
        scale=None,
        seed=2,
    )
    call = Call(case)
    assert_matches(call.run("cpu"), call.run("reference"), case.dtype)


def decode(lengths, dtype=torch.float32, causal=True, **kwargs):
    """A row of each of these sequences over shuffled pages of 16, whose unused slots are NaN."""
    counts = [-(-length // 16) for length in lengths]
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    q, k, v = new(len(lengths), 6, 32), new(sum(counts), 16, 2, 32), new(sum(counts), 16, 2, 32)
    table = torch.full((len(lengths), max(counts)), HUGE, dtype=torch.int32)
    order = torch.randperm(sum(counts), generator=generator, dtype=torch.int32)
    for row, pages, length in zip(table, order.split(counts), lengths, strict=True):
        row[: len(pages)] = pages
        if length % 16:
            k[pages[-1], length % 16 :] = v[pages[-1], length % 16 :] = torch.nan

    def run(some):
        return flash_attn_varlen_func(
            q[some],
            k,
            v,
            torch.arange(len(some) + 1, dtype=torch.int32),
            None,
            1,
            max(lengths),
            causal=causal,
            seqused_k=torch.tensor([lengths[b] for b in some], dtype=torch.int32),
            block_table=table[some],
            return_softmax_lse=True,
            **kwargs,
        )

    return run


LENGTHS = (1, 15, 16, 100, 127, 128, 129, 250, 1000, 1025, 2000, 1900, 3, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys_at_once", [400, 1 << 16])
@pytest.mark.parametrize(
    "feature",
    [
        {},
        {"sinks": torch.arange(6.0)},
        {"window_size": (40, -1)},
        {"alibi_slopes": torch.arange(6.0) / 6},
        {"alibi_slopes": torch.arange(6.0 * len(LENGTHS)).view(-1, 6) / 100},
    ],
    ids=["plain", "sinks", "window", "alibi_heads", "alibi_batch"],
)
def test_decode_of_many_sequences(dtype, keys_at_once, feature, monkeypatch):
    monkeypatch.setattr(cpu, "KEYS_AT_ONCE", keys_at_once)
    everything = list(range(len(LENGTHS)))
    out, lse = decode(LENGTHS, dtype, **feature)(everything)
    expected, expected_lse = decode(LENGTHS, dtype, **feature, backend="reference")(everything)
    assert_matches(([out], [lse]), ([expected], [expected_lse]), dtype, roundings=4, lse_tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sequence_does_not_depend_on_its_batch(dtype):
    run = decode(LENGTHS, dtype)
    everything = list(range(len(LENGTHS)))
    out, lse = run(everything)
    for some in ([5], [12], [9, 3], everything[::-1], everything[::2]):
        out_some, lse_some = run(some)
        assert torch.equal(out_some, out[some]) and torch.equal(lse_some, lse[:, some])


def test_the_fused_kernel_computes_what_it_can(monkeypatch):
    """Without the reference at hand the CPU path still computes everything but softcap."""

    def refuse(*_, **__):
        raise AssertionError("the reference was called")

    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 9, 2, 8)
    monkeypatch.setattr(reference, "attend", refuse)
    flash_attn_func(q, k, k, causal=True, window_size=(3, 0), alibi_slopes=torch.rand(4), sinks=torch.rand(4))
    assert decode(LENGTHS)(list(range(len(LENGTHS))))[0].isfinite().all()
    with pytest.raises(AssertionError, match="the reference was called"):
        flash_attn_func(q, k, k, softcap=3.0)


def test_blocks_read_only_keys_that_they_see(monkeypatch):
    """Windows and causal masks shorten the work, not only the result."""
    computed = 0
    fused = cpu._fused

    def counting(q, k, *args):
        nonlocal computed
        computed += q.shape[0] * k.shape[0]
        return fused(q, k, *args)

    monkeypatch.setattr(cpu, "_fused", counting)
    q = torch.randn(1, 1024, 1, 8)
    flash_attn_func(q, q, q, causal=True)
    assert computed <= 0.6 * 1024 * 1024
    computed = 0
    flash_attn_func(q, q, q, window_size=(64, 64))
    assert computed <= 0.3 * 1024 * 1024
