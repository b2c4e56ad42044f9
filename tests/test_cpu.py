"""The CPU path against the reference, in float64's place: same inputs in float32."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, Call, Case, assert_matches, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_attention import cpu, flash_attn_func, reference


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


def test_the_fused_kernel_computes_what_it_can(monkeypatch):
    """Without the reference at hand the CPU path still computes everything but softcap."""

    def refuse(*_, **__):
        raise AssertionError("the reference was called")

    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 9, 2, 8)
    monkeypatch.setattr(reference, "attend", refuse)
    flash_attn_func(q, k, k, causal=True, window_size=(3, 0), alibi_slopes=torch.rand(4), sinks=torch.rand(4))
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
