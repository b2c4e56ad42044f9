"""The reference against PyTorch's attention, and against an oracle that shares no code with it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LAYOUTS, Call, Case, assert_close, assert_matches, cases
from hypothesis import given, settings

from lite_attention import flash_attn_func, flash_attn_varlen_func, reference


@given(cases())
@settings(max_examples=300)
def test_reference_is_the_oracle(case):
    call = Call(case)
    assert_matches(call.run("reference"), call.oracle(), case.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_with_every_feature(layout):
    case = Case(
        layout=layout,
        q_lens=(5, 5, 5),
        k_lens=(21, 21, 21) if layout == "dense" else (21, 0, 3),
        heads_k=2,
        group=3,
        head_dim=16,
        page_size=4,
        dtype=torch.float32,
        causal=True,
        window=(9, 2),
        softcap=5.0,
        alibi="batch",
        sinks=True,
        scale=None,
        seed=1,
    )
    call = Call(case)
    assert_matches(call.run("reference"), call.oracle(), case.dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (5, 0), (7, 3)])
@pytest.mark.parametrize("alibi", [False, True])
def test_reference_is_torch_attention(causal, window, alibi):
    q, k, v = torch.randn(2, 17, 6, 32), torch.randn(2, 29, 2, 32), torch.randn(2, 29, 2, 32)
    distance = torch.arange(29) - (torch.arange(17)[:, None] + 29 - 17)
    bias = torch.zeros(6, 17, 29, dtype=torch.double)
    slopes = torch.rand(6) if alibi else None
    if alibi:
        bias -= slopes[:, None, None] * distance.abs()
    if window[0] >= 0:
        bias[:, distance < -window[0]] = -math.inf
    if causal or window[1] >= 0:
        bias[:, distance > (0 if causal else window[1])] = -math.inf
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=bias, enable_gqa=True
    ).transpose(1, 2)
    out = flash_attn_func(q, k, v, causal=causal, window_size=window, alibi_slopes=slopes, backend="reference")
    assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_query_heads_share_neighbouring_key_heads(heads_k):
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, heads_k, 8)
    v = torch.arange(float(heads_k))[:, None].expand(1, 1, heads_k, 8).contiguous()
    out = flash_attn_func(q, k, v, backend="reference")
    assert out[0, 0, :, 0].tolist() == [h // (4 // heads_k) for h in range(4)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_bad_key_reaches_the_rows_that_see_it_and_no_other(backend, poison, which):
    torch.manual_seed(0)
    q, k, v = torch.rand(1, 9, 2, 8), torch.rand(1, 12, 1, 8), torch.rand(1, 12, 1, 8)
    window = (3, 0)
    clean, clean_lse = flash_attn_func(q, k, v, window_size=window, return_softmax_lse=True, backend=backend)
    (k if which == "k" else v)[0, 6] = poison
    out, lse = flash_attn_func(q, k, v, window_size=window, return_softmax_lse=True, backend=backend)
    sees = torch.tensor([i + 12 - 9 - 3 <= 6 <= i + 12 - 9 for i in range(9)])
    assert sees.any() and not sees.all()
    assert_close(out[:, ~sees], clean[:, ~sees], rtol=1e-6, atol=1e-6)
    assert_close(lse[:, :, ~sees], clean_lse[:, :, ~sees], rtol=1e-6, atol=1e-6)
    if which == "v":
        expected = torch.full_like(out[:, sees], poison)
        assert_close(out[:, sees], expected, rtol=0, atol=0)
    elif not poison < 0:  # a key of -inf has a weight of zero
        assert out[:, sees].isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (-1, 3), (0, 0)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_sequences_without_keys(backend, window, softcap):
    """They give zeros, beside sequences that have keys and sequences that have no rows."""
    q, k = torch.randn(12, 4, 16), torch.randn(7, 2, 16)
    starts_q, starts_k = (torch.tensor(starts, dtype=torch.int32) for starts in ([0, 9, 9, 12], [0, 0, 3, 7]))
    for sinks in (None, torch.tensor([0.5, -3.0, 0.0, 9.0])):
        out, lse = flash_attn_varlen_func(
            q,
            k,
            k,
            starts_q,
            starts_k,
            9,
            4,
            window_size=window,
            softcap=softcap,
            sinks=sinks,
            return_softmax_lse=True,
            backend=backend,
        )
        expected = torch.full((4,), -math.inf) if sinks is None else sinks
        assert (out[:9] == 0).all() and torch.equal(lse[:, :9], expected[:, None].expand(4, 9))
        assert (out[9:] != 0).all() and lse[:, 9:].isfinite().all()


def test_rows_that_see_no_key():
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 3, 2, 8)
    out, lse = flash_attn_func(q, k, k, causal=True, return_softmax_lse=True, backend="reference")
    assert (out[:, :2] == 0).all() and (lse[:, :, :2] == -math.inf).all()
    assert (out[:, 2:] != 0).all() and lse[:, :, 2:].isfinite().all()
    sinks = torch.tensor([0.5, -3.0])
    out, lse = flash_attn_func(q, k, k, causal=True, sinks=sinks, return_softmax_lse=True, backend="reference")
    assert (out[:, :2] == 0).all() and (lse[0, :, :2] == sinks[:, None]).all()


def test_long_sequences_go_in_blocks_of_rows(monkeypatch):
    q, k, v = torch.randn(23, 4, 8), torch.randn(31, 2, 8), torch.randn(31, 2, 8)
    whole = reference.attend(q, k, v, softmax_scale=0.3, window_left=9, window_right=0)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 4 * 31 * 5)
    blocks = reference.attend(q, k, v, softmax_scale=0.3, window_left=9, window_right=0)
    for got, expected in zip(blocks, whole, strict=True):
        assert_close(got, expected, rtol=1e-6, atol=1e-6)
