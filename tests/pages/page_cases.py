"""Decode steps over paged caches, drawn by hypothesis, with hostile memory wherever a call has no business reading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from lite_attention.pages import PAGE, attend_pages, decode_pages, empty_sketch, select_pages, write_sketch

HUGE = 2**31 - 1
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class PageCase:
    """What a step is to be; `Step` makes its tensors."""

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads_k: int = 2
    group: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    eps: float = 0.1
    min_context: int = 0
    newest: int = 20
    scale: float | None = None
    sharp: float = 2.0  # how far the keys of pages lie apart
    fp8: tuple[str, ...] | None = None  # axes of the descales, where keys and values are FP8
    sinks: bool = False
    bits: int = 12  # of a sketch's channel
    seed: int = 0


@st.composite
def page_cases(draw, max_pages=14, max_q=4):
    batch = draw(st.integers(1, 3))
    k_len = st.one_of(st.integers(0, max_pages * PAGE), st.integers(0, max_pages).map(lambda n: n * PAGE))
    return PageCase(
        q_lens=tuple(draw(st.lists(st.integers(0, max_q), min_size=batch, max_size=batch))),
        k_lens=tuple(draw(st.lists(k_len, min_size=batch, max_size=batch))),
        heads_k=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from((1, 3, 8, 16, 40, 64))),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        eps=draw(st.one_of(st.sampled_from((0.0, 0.02, 0.1, 0.4)), st.floats(0, 0.99))),
        min_context=draw(st.sampled_from((0, 0, 40, 100))),
        newest=draw(st.sampled_from((1, 16, 17, 64))),
        scale=draw(st.sampled_from((None, 0.2, 1.0))),
        sharp=draw(st.sampled_from((0.0, 1.0, 3.0))),
        fp8=draw(st.sampled_from((None, None, (), ("heads_k",), ("batch", "heads_k")))),
        sinks=draw(st.booleans()),
        bits=draw(st.sampled_from((12, 8))),
        seed=draw(st.integers(0, 2**31)),
    )


class Step:
    """The tensors of a case, and the functions called with them."""

    def __init__(self, case: PageCase):
        self.case = case
        make = torch.Generator().manual_seed(case.seed)
        held = [-(-k_len // PAGE) for k_len in case.k_lens]
        blocks, batch = sum(held) + 3, len(held)
        shape = (blocks, PAGE, case.heads_k, case.head_dim)
        kv_dtype = case.dtype if case.fp8 is None else FP8
        free = torch.randperm(blocks, generator=make, dtype=torch.int32)
        self.block_table = torch.full((batch, max(held) + 2), HUGE, dtype=torch.int32)
        k, v = (torch.full(shape, torch.nan) for _ in range(2))
        for b, k_len in enumerate(case.k_lens):
            pages, free = free[: held[b]], free[held[b] :]
            self.block_table[b, : held[b]] = pages
            for cache in (k, v):
                keys = torch.full((held[b] * PAGE, *shape[2:]), torch.nan)
                spread = torch.randn(held[b], 1, *shape[2:], generator=make) * case.sharp
                keys[:k_len] = torch.randn(k_len, *shape[2:], generator=make)
                cache[pages.long()] = keys.unflatten(0, (held[b], PAGE)) + spread
        self.k_cache, self.v_cache = k.to(kv_dtype), v.to(kv_dtype)

        rows = sum(case.q_lens)
        q = torch.randn(rows + 2, case.heads_k * case.group, case.head_dim, generator=make)
        q[rows:] = torch.nan
        self.q = q.to(case.dtype)
        self.cu_seqlens_q = torch.tensor([0, *case.q_lens]).cumsum(0).int()
        self.seqused_k = torch.tensor(case.k_lens, dtype=torch.int32)
        self.max_seqlen_q = max(case.q_lens)
        sizes = {"batch": batch, "heads_k": case.heads_k}
        self.k_descale, self.v_descale = (
            None if case.fp8 is None else 0.5 + torch.rand([sizes[axis] for axis in case.fp8], generator=make)
            for _ in range(2)
        )
        self.sinks = torch.randn(q.shape[1], generator=make) if case.sinks else None
        self.sketch = empty_sketch(self.k_cache, case.bits).fill_(255)
        full = [self.block_table[b, : k_len // PAGE] for b, k_len in enumerate(case.k_lens)]
        write_sketch(self.k_cache, self.sketch, torch.cat([torch.tensor([-1, -HUGE], dtype=torch.int32), *full]))

    @property
    def batch_arguments(self):
        return self.cu_seqlens_q, self.seqused_k, self.block_table, self.max_seqlen_q

    @property
    def scale(self):
        return self.case.head_dim**-0.5 if self.case.scale is None else self.case.scale

    def descale(self, name, b, head):
        x = getattr(self, name)
        return 1.0 if x is None else float(x.expand(len(self.case.k_lens), self.case.heads_k)[b, head])

    def select(self, **changes):
        case = self.case
        arguments = {
            "eps": case.eps,
            "min_context": case.min_context,
            "newest": case.newest,
            "softmax_scale": case.scale,
            "k_descale": self.k_descale,
        }
        return select_pages(self.q, self.sketch, *self.batch_arguments, **(arguments | changes))

    def attend(self, lists, **changes):
        arguments = {
            "softmax_scale": self.case.scale,
            "sinks": self.sinks,
            "k_descale": self.k_descale,
            "v_descale": self.v_descale,
        }
        return attend_pages(self.q, self.k_cache, self.v_cache, lists, *self.batch_arguments, **(arguments | changes))

    def decode(self, **changes):
        case = self.case
        arguments = {
            "eps": case.eps,
            "min_context": case.min_context,
            "newest": case.newest,
            "softmax_scale": case.scale,
            "sinks": self.sinks,
            "k_descale": self.k_descale,
            "v_descale": self.v_descale,
        }
        tensors = self.q, self.k_cache, self.v_cache, self.sketch
        return decode_pages(*tensors, *self.batch_arguments, **(arguments | changes))

    def keys(self, b):
        """K and V of sequence b as float64 values, (k_len, heads_k, head_dim)."""
        k_len = self.case.k_lens[b]
        pages = self.block_table[b, : -(-k_len // PAGE)].long()
        both = []
        for name, cache in (("k_descale", self.k_cache), ("v_descale", self.v_cache)):
            factors = torch.tensor([self.descale(name, b, head) for head in range(self.case.heads_k)])
            stored = torch.stack([cache[int(page)].float() for page in pages]) if len(pages) else cache[:0].float()
            both.append(stored.flatten(0, 1)[:k_len].double() * factors[:, None])
        return both

    def rows(self, b):
        start, stop = self.cu_seqlens_q[b : b + 2].tolist()
        return slice(start, stop)


def sets_of(lists):
    """The listed pages as sets, [batch][head], from each form; the forms must agree."""
    batch, heads = lists.counts.shape
    result = []
    for b in range(batch):
        result.append([])
        for head in range(heads):
            words = [word & 0xFFFFFFFF for word in lists.bits[b, head].tolist()]
            from_bits = [n for n in range(32 * len(words)) if words[n // 32] >> n % 32 & 1]
            assert lists.indices[b, head, : int(lists.counts[b, head])].tolist() == from_bits
            result[b].append(set(from_bits))
    return result
