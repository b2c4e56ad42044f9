"""Attention calls in every layout, drawn by hypothesis, with hostile memory wherever a call has no business reading."""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import torch
from hypothesis import strategies as st

from lite_attention import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

HUGE = 2**31 - 1
UNWRITTEN = 7.0  # what `out` holds before a call
LAYOUTS = ("dense", "packed", "packed_seqused", "paged", "paged_cu", "cache", "paged_cache")
ONE_LENGTH_Q = ("dense", "cache", "paged_cache")
FP8 = ("plain", "one", "heads", "batch")  # shapes of q_descale, k_descale and v_descale


@dataclass(frozen=True)
class Case:
    """What a call is to be; `build` makes its tensors."""

    layout: str
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads_k: int
    group: int
    head_dim: int
    page_size: int
    dtype: torch.dtype  # of out, and of q, k and v that are not FP8
    causal: bool
    window: tuple[int, int]
    softcap: float
    alibi: str  # "", "heads" or "batch"
    sinks: bool
    scale: float | None
    seed: int
    fp8: str = ""  # one of FP8 where keys and values are float8_e4m3fn
    fp8_q: bool = False  # whether queries are too


@st.composite
def cases(draw, max_q=12, max_k=40, dtypes=(torch.float32, torch.bfloat16, torch.float16), softcap=True):
    layout = draw(st.sampled_from(LAYOUTS))
    batch = draw(st.integers(1, 3))

    def lengths(top, one):
        length = st.one_of(st.integers(1, 9), st.integers(0, top), st.just(0))
        return [draw(length)] * batch if one else draw(st.lists(length, min_size=batch, max_size=batch))

    q_lens = lengths(max_q, one=layout in ONE_LENGTH_Q)
    k_lens = lengths(max_k, one=layout == "dense")
    side = st.one_of(st.just(-1), st.integers(0, max_k))
    fp8 = draw(st.sampled_from(("", "", "", *FP8)))
    fp8_q = bool(fp8) and draw(st.booleans())
    return Case(
        layout=layout,
        q_lens=tuple(q_lens),
        k_lens=tuple(k_lens),
        heads_k=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from((1, 3, 8, 16, 64))),
        page_size=draw(st.one_of(st.sampled_from((1, 16, 64)), st.integers(1, 64))),
        dtype=torch.bfloat16 if fp8_q else draw(st.sampled_from(dtypes)),
        causal=draw(st.booleans()),
        window=(draw(side), draw(side)),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.5, 20.0))) if softcap else 0.0,
        alibi=draw(st.sampled_from(("", "heads", "batch"))),
        sinks=draw(st.booleans()),
        scale=draw(st.sampled_from((None, None, 0.1, 1.5))),
        seed=draw(st.integers(0, 2**31)),
        fp8=fp8,
        fp8_q=fp8_q,
    )


class Call:
    """A call of a public function, and the clean q, k, v of each of its sequences, k and v as they are stored."""

    def __init__(self, case: Case):
        self.case = case
        self.random = torch.Generator().manual_seed(case.seed)
        heads, d, batch = case.heads_k * case.group, case.head_dim, len(case.q_lens)
        queries = torch.float8_e4m3fn if case.fp8_q else case.dtype
        self.q = [self._normal(n, heads, d).to(queries) for n in case.q_lens]
        stored = torch.float8_e4m3fn if case.fp8 else case.dtype
        self.k = [self._normal(n, case.heads_k, d).to(stored) for n in case.k_lens]
        self.v = [self._normal(n, case.heads_k, d).to(stored) for n in case.k_lens]
        shape = {"one": (), "heads": (case.heads_k,), "batch": (batch, case.heads_k)}.get(case.fp8)
        self.k_descale, self.v_descale, self.q_descale = (
            None if shape is None else torch.rand(shape, generator=self.random) + 0.5 for _ in "kvq"
        )
        slopes_shape = {"": None, "heads": (heads,), "batch": (batch, heads)}[case.alibi]
        self.slopes = torch.rand(slopes_shape, generator=self.random) if slopes_shape else None
        self.sinks = torch.randn(heads, generator=self.random) if case.sinks else None
        self.function, self.args, self.kwargs = getattr(self, f"_{case.layout}")()
        self.kwargs |= {
            "softmax_scale": case.scale,
            "causal": case.causal,
            "window_size": case.window,
            "softcap": case.softcap,
            "alibi_slopes": self.slopes,
            "sinks": self.sinks,
            "k_descale": self.k_descale,
            "v_descale": self.v_descale,
            "q_descale": self.q_descale if case.fp8_q else None,
            "return_softmax_lse": True,
        }

    def run(self, backend, **kwargs):
        """Out and lse by sequence, (n, heads, d) and (heads, n). Checks that nothing else of `out` was written."""
        out = self._scatter(torch.full(self.args[0].shape, UNWRITTEN, dtype=self.case.dtype))
        result, lse = self.function(*self.args, **self.kwargs, out=out, backend=backend, **kwargs)
        assert result is out
        if self.case.layout in ONE_LENGTH_Q:
            return list(out), list(lse)
        stops = torch.tensor(self.case.q_lens).cumsum(0).tolist()
        starts = [0, *stops[:-1]]
        assert (out[stops[-1] :] == UNWRITTEN).all()
        parts = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return [out[part] for part in parts], [lse[:, part] for part in parts]

    def oracle(self):
        """What `run` should give, in float64."""
        results = []
        for b, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True)):
            slopes = self.slopes[b] if self.case.alibi == "batch" else self.slopes
            scale = self.case.head_dim**-0.5 if self.case.scale is None else self.case.scale
            results.append(
                oracle.attention(
                    self._value(q, self.q_descale if self.case.fp8_q else None, b),
                    self._value(k, self.k_descale, b),
                    self._value(v, self.v_descale, b),
                    scale=scale,
                    causal=self.case.causal,
                    window=self.case.window,
                    softcap=self.case.softcap,
                    slopes=slopes,
                    sinks=self.sinks,
                )
            )
        return [out for out, _ in results], [lse for _, lse in results]

    def _dense(self):
        q, k, v = (self._scatter(torch.stack(x)) for x in (self.q, self.k, self.v))
        return flash_attn_func, (q, k, v), {}

    def _packed(self, gap=0, **kwargs):
        k, v = ([self._poisoned_after(x, gap) for x in parts] for parts in (self.k, self.v))
        lengths = [n + gap for n in self.case.k_lens]
        # Rows after the last sequence are padding, in q as in k and v.
        rest = self._int(3)
        q, k, v = (self._scatter(self._poisoned_after(torch.cat(x), rest)) for x in (self.q, k, v))
        maxima = (max(self.case.q_lens) + self._int(3), max(lengths) + self._int(3))
        return flash_attn_varlen_func, (q, k, v, _starts(self.case.q_lens), _starts(lengths), *maxima), kwargs

    def _packed_seqused(self):
        return self._packed(gap=1 + self._int(4), seqused_k=_int32(self.case.k_lens))

    def _paged(self, by_seqused=True):
        k_cache, v_cache, table = self._pages(self.case.k_lens)
        q = self._scatter(self._poisoned_after(torch.cat(self.q), self._int(3)))
        lengths = _int32(self.case.k_lens) if by_seqused else None
        cu_seqlens_k = None if by_seqused else _starts(self.case.k_lens)
        args = (q, k_cache, v_cache, _starts(self.case.q_lens), cu_seqlens_k)
        maxima = (max(self.case.q_lens), max(self.case.k_lens))
        return flash_attn_varlen_func, (*args, *maxima), {"block_table": table, "seqused_k": lengths}

    def _paged_cu(self):
        return self._paged(by_seqused=False)

    def _cache(self):
        room = max(self.case.k_lens) + self._int(4)
        caches = [
            self._scatter(torch.stack([self._poisoned_after(x, room - len(x)) for x in parts]))
            for parts in (self.k, self.v)
        ]
        args = (self._scatter(torch.stack(self.q)), *caches)
        return flash_attn_with_kvcache, args, {"cache_seqlens": _int32(self.case.k_lens)}

    def _paged_cache(self):
        k_cache, v_cache, table = self._pages(self.case.k_lens)
        args = (self._scatter(torch.stack(self.q)), k_cache, v_cache)
        return flash_attn_with_kvcache, args, {"cache_seqlens": _int32(self.case.k_lens), "block_table": table}

    def _pages(self, lengths):
        """Caches of shuffled pages in scattered memory, and a block table that is huge where it isn't used."""
        size = self.case.page_size
        counts = [-(-n // size) for n in lengths]
        order = torch.randperm(sum(counts) + 2, generator=self.random).tolist()
        table = torch.full((len(lengths), max(counts) + 2), HUGE, dtype=torch.int32)
        shape = (len(order), size, self.case.heads_k, self.case.head_dim)
        k_cache, v_cache = (self._scatter(torch.full(shape, torch.nan, dtype=self.k[0].dtype)) for _ in range(2))
        for b, count in enumerate(counts):
            for n in range(count):
                page = order.pop()
                table[b, n] = page
                for cache, x in ((k_cache, self.k[b]), (v_cache, self.v[b])):
                    part = x[n * size : (n + 1) * size]
                    cache[page, : len(part)] = part
        return k_cache, v_cache, table[:, : max(counts) + self._int(3)]

    def _scatter(self, x):
        """x in memory of another order with poison in between; the last dimension stays contiguous."""
        order = torch.randperm(x.dim() - 1, generator=self.random).tolist()
        poison = torch.nan if x.dtype == torch.float8_e4m3fn else torch.inf
        memory = torch.full([x.shape[i] + self._int(3) for i in order] + [x.shape[-1] + self._int(9)], poison)
        memory = memory.to(x.dtype)
        view = memory.permute([order.index(i) for i in range(len(order))] + [len(order)])
        view = view[tuple(slice(0, n) for n in x.shape)]
        view.copy_(x)
        return view

    def _poisoned_after(self, x, rows):
        poison = torch.full((rows, *x.shape[1:]), torch.nan, dtype=x.dtype)
        return torch.cat([x, poison])

    def _value(self, x, descale, b):
        """What the stored q, k or v of sequence b stands for."""
        if descale is None:
            return x.double()
        heads_k = self.case.heads_k
        factors = (descale[b] if self.case.fp8 == "batch" else descale).double().expand(heads_k)
        return x.double() * factors.repeat_interleave(x.shape[1] // heads_k)[:, None]

    def _normal(self, *shape):
        return torch.randn(shape, generator=self.random).to(self.case.dtype)

    def _int(self, stop):
        return int(torch.randint(stop, (), generator=self.random))


def assert_matches(got, expected, dtype, roundings=1.0, lse_tolerance=2e-6):
    """Outs within some roundings of `dtype`, lses within float32's noise; -inf and NaN stand where they should."""
    for out, lse, out_expected, lse_expected in zip(*got, *expected, strict=True):
        assert out.dtype == dtype and lse.dtype == torch.float32
        epsilon = roundings * torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
        assert_close(out.double(), out_expected.double(), rtol=epsilon, atol=epsilon)
        assert_close(lse.double(), lse_expected.double(), rtol=lse_tolerance, atol=4 * lse_tolerance)


def assert_close(actual, expected, *, rtol, atol):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def _starts(lengths):
    return torch.cat([torch.zeros(1, dtype=torch.int32), _int32(lengths).cumsum(0, dtype=torch.int32)])


def _int32(values):
    return torch.tensor(values, dtype=torch.int32)
