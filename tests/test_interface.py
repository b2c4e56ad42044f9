"""The public functions as callers use them: what comes back, what is written, and the KV cache."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from cases import assert_close

import lite_attention
from lite_attention import checks, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

COMMON = "dropout_p softmax_scale causal window_size alibi_slopes deterministic"
FLASH_ATTENTION = {
    "flash_attn_func": f"q k v {COMMON}",
    "flash_attn_varlen_func": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {COMMON}",
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
        "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    ),
}


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, h, 16, generator=generator) for n, h in ((5, 4), (9, 2), (9, 2)))


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.param


@pytest.mark.parametrize("name", FLASH_ATTENTION)
def test_positional_arguments_are_flash_attentions(name):
    parameters = inspect.signature(getattr(lite_attention, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == FLASH_ATTENTION[name].split()


def test_out_is_written_and_returned(qkv, backend):
    expected, expected_lse = flash_attn_func(*qkv, return_softmax_lse=True, backend=backend)
    memory = torch.full((2, 5, 4, 40), 7.0)
    out = memory[..., 3:19]
    result, lse = flash_attn_func(*qkv, out=out, return_softmax_lse=True, backend=backend)
    assert result is out
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert (memory[..., :3] == 7).all() and (memory[..., 19:] == 7).all()
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32


def test_inputs_are_not_written(qkv, backend):
    copies = [x.clone() for x in qkv]
    flash_attn_func(*qkv, causal=True, sinks=torch.zeros(4), backend=backend)
    assert all(torch.equal(x, copy) for x, copy in zip(qkv, copies, strict=True))


def test_default_scale_and_explicit_scale(qkv, backend):
    q, k, v = qkv
    assert_close(
        flash_attn_func(q, k, v, backend=backend), flash_attn_func(q, k, v, 0.0, 0.25, backend=backend), rtol=0, atol=0
    )
    doubled = flash_attn_func(2 * q, k, v, softmax_scale=0.1, backend=backend)
    assert_close(doubled, flash_attn_func(q, k, v, softmax_scale=0.2, backend=backend), rtol=1e-6, atol=1e-6)


def test_causal_sets_the_right_side_of_the_window(qkv, backend):
    both = flash_attn_func(*qkv, causal=True, window_size=(3, 4), backend=backend)
    assert torch.equal(both, flash_attn_func(*qkv, window_size=(3, 0), backend=backend))
    assert not torch.equal(both, flash_attn_func(*qkv, window_size=(3, 4), backend=backend))


@pytest.mark.parametrize("window", [(-7, -2), (2**40, 2**40)])
def test_windows_without_bound(qkv, backend, window):
    assert torch.equal(
        flash_attn_func(*qkv, window_size=window, backend=backend), flash_attn_func(*qkv, backend=backend)
    )


def test_windows_fit_into_the_integers_of_kernels(qkv):
    problem = checks.prepare(*qkv, window_size=(2**40, 2**31 - 1))
    assert problem.window_left + problem.max_seqlen_k < 2**31 > problem.window_right + problem.max_seqlen_k


def test_deterministic_is_accepted_either_way(qkv, backend):
    results = [flash_attn_func(*qkv, deterministic=flag, backend=backend) for flag in (False, True)]
    assert torch.equal(*results)


def test_lse_is_the_log_of_the_denominator(qkv, backend):
    """Two halves of the keys, joined by their lse, are the whole."""
    q, k, v = qkv
    whole, lse = flash_attn_func(q, k, v, return_softmax_lse=True, backend=backend)
    parts = [
        flash_attn_func(q, k[:, s], v[:, s], return_softmax_lse=True, backend=backend) for s in (slice(4), slice(4, 9))
    ]
    lses = torch.stack([part[1] for part in parts])
    weights = torch.softmax(lses, 0).transpose(2, 3)[..., None]
    assert_close(torch.logsumexp(lses, 0), lse, rtol=1e-6, atol=1e-6)
    assert_close(sum(w * part[0] for w, part in zip(weights, parts, strict=True)), whole, rtol=1e-5, atol=1e-6)


def test_sinks_join_the_denominator_and_the_lse(qkv, backend):
    sinks = torch.tensor([0.3, -1.0, 4.0, -math.inf])
    plain, plain_lse = flash_attn_func(*qkv, return_softmax_lse=True, backend=backend)
    out, lse = flash_attn_func(*qkv, sinks=sinks, return_softmax_lse=True, backend=backend)
    assert_close(lse, torch.logaddexp(plain_lse, sinks[:, None]), rtol=1e-6, atol=1e-6)
    assert_close(out, plain * torch.exp(plain_lse - lse).transpose(1, 2)[..., None], rtol=1e-5, atol=1e-6)
    assert torch.equal(out[:, :, 3], plain[:, :, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(qkv, backend, dtype):
    q, k, v = (x.to(dtype) for x in qkv)
    out, lse = flash_attn_func(q, k, v, return_softmax_lse=True, backend=backend)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected = flash_attn_func(q.float(), k.float(), v.float(), backend="reference")
    epsilon = torch.finfo(dtype).eps
    assert_close(out.float(), expected, rtol=2 * epsilon, atol=2 * epsilon)


def test_empty_batches(backend):
    q, k = torch.empty(0, 5, 4, 16), torch.empty(0, 9, 2, 16)
    out, lse = flash_attn_func(q, k, k, return_softmax_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == (0, 4, 5)
    none = torch.zeros(1, dtype=torch.int32)
    out = flash_attn_varlen_func(torch.empty(0, 4, 16), torch.empty(0, 2, 16), torch.empty(0, 2, 16), none, none, 0, 0)
    assert out.shape == (0, 4, 16)


def test_varlen_is_each_sequence_alone(qkv, backend):
    q, k, v = qkv
    starts_q, starts_k = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 2, 9], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(
        q[0], k[0], v[0], starts_q, starts_k, 3, 7, causal=True, return_softmax_lse=True, backend=backend
    )
    for rows, keys in ((slice(0, 3), slice(0, 2)), (slice(3, 5), slice(2, 9))):
        alone, alone_lse = flash_attn_func(
            q[:1, rows], k[:1, keys], v[:1, keys], causal=True, return_softmax_lse=True, backend=backend
        )
        assert_close(out[rows], alone[0], rtol=1e-6, atol=1e-6)
        assert_close(lse[:, rows], alone_lse[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_splits", [0, 1, 7])
def test_splits_do_not_change_the_answer(qkv, num_splits, backend):
    q, k, v = qkv
    expected = flash_attn_func(q, k, v, backend=backend)
    assert torch.equal(flash_attn_func(q, k, v, num_splits=num_splits, backend=backend), expected)
    starts = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32)
    for b in range(2):
        alone = flash_attn_varlen_func(q[b], k[b], v[b], *starts, 5, 9, num_splits=num_splits, backend=backend)
        assert torch.equal(alone, flash_attn_varlen_func(q[b], k[b], v[b], *starts, 5, 9, backend=backend))


class TestKVCache:
    """A cache of 2 sequences with 4 and 0 keys, to which 5 are appended, dense or in shuffled pages of 4."""

    lengths = torch.tensor([4, 0], dtype=torch.int32)
    table = torch.tensor([[5, 1, 3], [0, 4, 2**31 - 1]], dtype=torch.int32)

    @pytest.fixture
    def data(self, qkv):
        q, k, v = qkv
        return q, k, v, torch.cat([k[:, 4:], k[:, :4]], 1)[:, :5], v[:, :5] + 1

    def caches(self, k, v, paged):
        shape = (7, 4, 2, 16) if paged else (2, 11, 2, 16)
        caches = tuple(torch.full(shape, math.nan) for _ in range(2))
        for cache, x in zip(caches, (k, v), strict=True):
            (cache[5] if paged else cache[0])[:4] = x[0, :4]
        return caches

    def contents(self, cache, paged):
        """The 9 and 5 keys that should be in use, and whether any other is still untouched."""
        if paged:
            sequences = [cache[self.table[b, : 3 - b].long()].flatten(0, 1) for b in range(2)]
            others = [sequences[0][9:], sequences[1][5:], cache[[2, 6]]]
        else:
            sequences = [cache[0], cache[1]]
            others = [cache[0, 9:], cache[1, 5:]]
        return sequences[0][:9], sequences[1][:5], all(x.isnan().all() for x in others)

    @pytest.mark.parametrize("paged", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_append(self, data, paged, causal, backend):
        q, k, v, new_k, new_v = data
        k_cache, v_cache = self.caches(k, v, paged)
        out, lse = flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            new_k,
            new_v,
            cache_seqlens=self.lengths,
            block_table=self.table if paged else None,
            causal=causal,
            return_softmax_lse=True,
            backend=backend,
        )
        assert self.lengths.tolist() == [4, 0]
        expected = [(torch.cat([k[0, :4], new_k[0]]), torch.cat([v[0, :4], new_v[0]])), (new_k[1], new_v[1])]
        for cache, which in ((k_cache, 0), (v_cache, 1)):
            first, second, untouched = self.contents(cache, paged)
            assert torch.equal(first, expected[0][which]) and torch.equal(second, expected[1][which]) and untouched
        for b, (keys, values) in enumerate(expected):
            alone, alone_lse = flash_attn_func(
                q[b : b + 1], keys[None], values[None], causal=causal, return_softmax_lse=True, backend=backend
            )
            assert_close(out[b], alone[0], rtol=1e-6, atol=1e-6)
            assert_close(lse[b], alone_lse[0], rtol=1e-6, atol=1e-6)

    def test_a_length_for_all(self, data, backend):
        q, k, v, _, _ = data
        out = flash_attn_with_kvcache(q, k, v, cache_seqlens=6, backend=backend)
        assert torch.equal(out, flash_attn_func(q, k[:, :6], v[:, :6], backend=backend))
        assert torch.equal(flash_attn_with_kvcache(q, k, v, backend=backend), flash_attn_func(q, k, v, backend=backend))

    @pytest.mark.parametrize("num_splits", [0, 1, 7])
    def test_splits_do_not_change_the_answer(self, data, num_splits, backend):
        q, k, v, _, _ = data
        out = flash_attn_with_kvcache(q, k, v, num_splits=num_splits, backend=backend)
        assert torch.equal(out, flash_attn_func(q, k, v, backend=backend))

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"cache_seqlens": torch.tensor([4, 7], dtype=torch.int32)}, "cache_seqlens and the keys of k"),
            ({"cache_seqlens": torch.tensor([4, -1], dtype=torch.int32)}, "cache_seqlens: got .*lengths of 0 or more"),
            ({"cache_seqlens": 7}, "cache_seqlens: got 7 and 5 new keys; needs at most 11"),
            ({"cache_seqlens": -1}, "cache_seqlens: got -1"),
            ({"cache_seqlens": 2.0}, "cache_seqlens: got 2.0"),
            ({"cache_seqlens": None}, "cache_seqlens: got None"),
            ({"cache_seqlens": torch.tensor([4, 0])}, "cache_seqlens: got torch.int64"),
            ({"k": torch.zeros(2, 5, 1, 16)}, r"k: got shape \(2, 5, 1, 16\)"),
            ({"k": torch.zeros(2, 5, 16)}, r"k: got shape \(2, 5, 16\)"),
            ({"v": torch.zeros(2, 4, 2, 16)}, r"v: got shape \(2, 4, 2, 16\)"),
            ({"v": torch.zeros(2, 5, 2, 16).double()}, "v: got torch.float64"),
            ({"k": None}, "k: got None"),
            ({"v": None}, "v: got None"),
            ({"num_splits": -1}, "num_splits: got -1"),
            ({"backend": "hopper"}, "backend: got 'hopper'"),
        ],
    )
    def test_a_refused_append_leaves_the_cache_alone(self, data, bad, message):
        q, k, v, new_k, new_v = data
        caches = self.caches(k, v, paged=False)
        copies = [cache.clone() for cache in caches]
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(q, *caches, **({"k": new_k, "v": new_v, "cache_seqlens": self.lengths} | bad))
        for cache, copy in zip(caches, copies, strict=True):
            assert_close(cache, copy, rtol=0, atol=0)

    def test_a_refused_paged_append_leaves_the_cache_alone(self, data):
        q, k, v, new_k, new_v = data
        caches = self.caches(k, v, paged=True)
        copies = [cache.clone() for cache in caches]
        for lengths, message in (
            ([4, 4], r"block_table: got 2147483647 for page 2 of sequence 1"),
            ([4, 8], "3 pages of 4"),
        ):
            with pytest.raises(ValueError, match=message):
                lengths = torch.tensor(lengths, dtype=torch.int32)
                flash_attn_with_kvcache(q, *caches, new_k, new_v, cache_seqlens=lengths, block_table=self.table)
        for cache, copy in zip(caches, copies, strict=True):
            assert_close(cache, copy, rtol=0, atol=0)

    def test_expanded_caches_cannot_be_appended_to(self, data):
        q, k, _, new_k, new_v = data
        shared = k[:1].expand(2, 9, 2, 16)
        with pytest.raises(ValueError, match="k_cache: got strides"):
            flash_attn_with_kvcache(q, shared, k.clone(), new_k, new_v, cache_seqlens=0)

    @pytest.mark.parametrize("name", ["rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad"])
    def test_what_is_missing_is_named(self, data, name):
        q, k, v, _, _ = data
        with pytest.raises(NotImplementedError, match=f"{name}: got Tensor; LiteAttention has only {name}=None"):
            flash_attn_with_kvcache(q, k, v, **{name: torch.zeros(2, dtype=torch.int32)})
