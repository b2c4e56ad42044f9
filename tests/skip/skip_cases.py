"""Calls with skip lists in every layout, drawn by hypothesis, over the hostile memory of `cases`.

q and k are small integers, so that every score is exact in float32 and lists can be compared bit for bit.
"""

from __future__ import annotations

import dataclasses
import math

import oracle
import skip_oracle
import torch
from cases import Call, Case, assert_close, cases
from hypothesis import strategies as st

from lite_attention import (
    SkipList,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    skip_attention,
    skip_attention_varlen,
    skip_attention_with_kvcache,
)

WITH_LISTS = {
    flash_attn_func: skip_attention,
    flash_attn_varlen_func: skip_attention_varlen,
    flash_attn_with_kvcache: skip_attention_with_kvcache,
}
MASK = 2**32 - 1
FILLS = {"full": MASK, "empty": 0, "odd": 0xAAAAAAAA, "even": 0x55555555, "single": 1 << 3}  # or "random"


@dataclasses.dataclass(frozen=True)
class SkipCase:
    """What a call with a list is to be. Ranges are cut to the keys of the list."""

    case: Case
    tile: tuple[int, int]
    fill: str
    thresholds: tuple[float, ...]  # one for all heads, or one a head
    must_do: tuple | None  # of each entry, (begin, end)
    must_skip: tuple | None
    update: bool = True


@st.composite
def skip_cases(draw, max_k=40):
    case = draw(cases(max_k=max_k, softcap=False))
    heads = case.heads_k * case.group
    threshold = st.sampled_from((-math.inf, -9.0, -3.0, -1.0, -0.1, 0.0))
    length = st.integers(0, max_k + 4)
    ranges = st.lists(st.tuples(length, length).map(sorted).map(tuple), max_size=2).map(tuple)
    forced = st.none() | st.tuples(*[ranges] * len(case.q_lens))
    return SkipCase(
        case=dataclasses.replace(case, alibi="", fp8="", fp8_q=False),
        tile=(draw(st.integers(1, 7)), draw(st.one_of(st.just(1), st.integers(1, 9)))),  # of 1 key for second words
        fill=draw(st.sampled_from(("full", "random", *FILLS))),
        thresholds=draw(st.tuples(threshold) | st.tuples(*[threshold] * heads)),
        must_do=draw(forced),
        must_skip=draw(forced),
        update=draw(st.sampled_from((True, True, True, False))),
    )


class SkipCall(Call):
    """A call with a list, and what it should give."""

    def __init__(self, skip_case: SkipCase):
        super().__init__(skip_case.case)
        self.skip_case = skip_case
        for name in ("softcap", "alibi_slopes", "q_descale", "k_descale", "v_descale", "return_softmax_lse"):
            del self.kwargs[name]
        q, k = self.args[:2]
        if self.function is flash_attn_varlen_func:
            lengths = self.args[5:7]
        elif self.case.layout == "paged_cache":
            lengths = q.shape[1], self.kwargs["block_table"].shape[1] * self.case.page_size
        else:
            lengths = q.shape[1], k.shape[1]
        self.function = WITH_LISTS[self.function]
        batch, heads = len(self.case.q_lens), self.case.heads_k * self.case.group
        self.skip_list = SkipList.fresh(batch, heads, *lengths, tile=skip_case.tile)
        self._fill(self.skip_list.bits)
        one = len(skip_case.thresholds) == 1 and heads > 1
        self.threshold = skip_case.thresholds[0] if one else torch.tensor(skip_case.thresholds)
        self.thresholds = skip_case.thresholds * heads if one else skip_case.thresholds
        self.args = (*self.args[:3], self.skip_list, self.threshold, *self.args[3:])
        self.must = {name: self._cut(getattr(skip_case, name)) for name in ("must_do", "must_skip")}
        self.kwargs |= {"update": skip_case.update, **self.must}

    def words(self):
        """The list as ints without sign, [batch][head][q tile][word]."""
        return (self.skip_list.bits.long() & MASK).tolist()

    def expected(self):
        """The words after a call with the list as it is now, and out and lse by sequence in float64."""
        words, outs, lses = self.words(), [], []
        block_m, block_n = self.skip_case.tile
        scale = self.case.head_dim**-0.5 if self.case.scale is None else self.case.scale
        mask = {"causal": self.case.causal, "window": self.case.window}
        for b, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True)):
            visited = skip_oracle.walk(
                q,
                k,
                words[b],
                self._forced("must_do", b, "outward"),
                self._forced("must_skip", b, "inward"),
                tile=self.skip_case.tile,
                scale=scale,
                thresholds=self.thresholds,
                **mask,
            )
            visits = lambda head, i, j, visited=visited: j // block_n in visited[head][i // block_m]  # noqa: E731
            out, lse = oracle.attention(q, k, v, scale=scale, sinks=self.sinks, visits=visits, **mask)
            outs.append(out)
            lses.append(lse)
        return (words if self.skip_case.update else self.words()), (outs, lses)

    def check(self, backend):
        """Runs the call, and compares the list bit for bit, and out and lse."""
        words, expected = self.expected()
        got = self.run(backend)
        assert self.words() == words
        # With nothing skipped the CPU path is the dense one, whose fused kernel rounds more in 16 bits (test_cpu.py).
        fused = backend == "cpu" and self.case.dtype != torch.float32
        roundings, lse_tolerance = (4, 1e-4) if fused else (1, 2e-6)
        for out, lse, out_expected, lse_expected in zip(*got, *expected, strict=True):
            epsilon = max(roundings * torch.finfo(self.case.dtype).eps, 2e-5)
            assert_close(out.double(), out_expected, rtol=epsilon, atol=epsilon)
            assert_close(lse.double(), lse_expected, rtol=lse_tolerance, atol=5 * lse_tolerance)

    def _forced(self, name, b, rounding):
        ranges = self.must[name]
        block_n = self.skip_case.tile[1]
        return (
            set() if ranges is None else skip_oracle.forced(ranges[b], self.skip_list.max_seqlen_k, block_n, rounding)
        )

    def _fill(self, bits):
        if self.skip_case.fill == "random":
            bits.random_(-(2**31), 2**31, generator=self.random)
        else:
            value = FILLS[self.skip_case.fill]
            bits.fill_(value - 2**32 if value >= 2**31 else value)

    def _cut(self, entries):
        top = self.skip_list.max_seqlen_k
        return entries and [[(min(begin, top), min(end, top)) for begin, end in ranges] for ranges in entries]

    def _normal(self, *shape):
        return torch.randint(-1, 2, shape, generator=self.random).to(self.case.dtype)
