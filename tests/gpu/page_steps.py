"""Decode steps over paged caches for the GPU suite, with hostile memory wherever a call has no business reading."""

from __future__ import annotations

import accuracy
import torch

from lite_attention import get_scheduler_metadata
from lite_attention.pages import (
    PAGE,
    PageLists,
    attend_pages,
    decode_pages,
    select_pages,
    sketch_bytes,
    write_sketch,
)

FP8 = torch.float8_e4m3fn
HUGE = accuracy.HUGE_PAGE


class Step:
    """A decode step over paged caches whose pages lie apart from each other, with sketches of the full ones."""

    def __init__(self, q_lens, k_lens, heads=8, heads_k=2, head_dim=128, dtype=torch.bfloat16, seed=0, **options):
        fp8, bits = options.pop("fp8", False), options.pop("bits", 12)
        generator = torch.Generator(accuracy.DEVICE).manual_seed(seed)
        self.sequences = accuracy.make_sequences(
            q_lens, k_lens, heads, heads_k, head_dim, dtype, seed, FP8 if fp8 else None
        )
        if sharp := options.pop("sharp", 1.0):
            for _, k, _ in self.sequences:
                pages = -(-len(k) // PAGE)
                apart = accuracy.random(pages, heads_k, head_dim, dtype=dtype, generator=generator, spread=sharp)
                k.copy_((k.float() + apart.float().repeat_interleave(PAGE, 0)[: len(k)]).to(k.dtype))
        self.descales = {}
        if fp8:
            factors = 0.5 + torch.rand(2, len(k_lens), heads_k, device=accuracy.DEVICE, generator=generator)
            self.descales = {"k_descale": factors[0], "v_descale": factors[1]}
        case = accuracy.paged(self.sequences, PAGE, causal=True, **options)
        self.q, self.k_cache, self.v_cache, self.starts, *_ = case.args
        self.used, self.table = case.kwargs["seqused_k"], case.kwargs["block_table"]
        self.q_lens, self.k_lens, self.max_q = q_lens, k_lens, max(q_lens)
        self.heads, self.heads_k, self.head_dim = heads, heads_k, head_dim
        size = sketch_bytes(head_dim, bits)
        wide = torch.full((len(self.k_cache), heads_k + 1, size + 16), 255, dtype=torch.uint8)
        self.sketch = wide.to(accuracy.DEVICE)[:, :heads_k, :size]
        write_sketch(self.k_cache, self.sketch, self.full_pages())

    def full_pages(self):
        full = [self.table[b, : n // PAGE] for b, n in enumerate(self.k_lens)]
        return torch.cat([accuracy.ints([-1, -HUGE]), *full, accuracy.ints([-1] * 20)])

    def of_batch(self, rows=slice(None)):
        """Arguments for some of the sequences; their queries stay where they are."""
        first, last = rows.indices(len(self.k_lens))[:2]
        return self.starts[first : last + 1], self.used[rows], self.table[rows], self.max_q

    def select(self, rows=slice(None), eps=0.1, newest=40, **changes):
        descale = {"k_descale": self.descales["k_descale"][rows]} if self.descales else {}
        arguments = {"eps": eps, "newest": newest} | descale | changes
        return select_pages(self.q, self.sketch, *self.of_batch(rows), **arguments)

    def attend(self, lists, rows=slice(None), **changes):
        descales = {name: x[rows] for name, x in self.descales.items()}
        return attend_pages(self.q, self.k_cache, self.v_cache, lists, *self.of_batch(rows), **(descales | changes))

    def decode(self, eps=0.1, newest=40, **changes):
        arguments = {"eps": eps, "newest": newest} | self.descales | changes
        tensors = self.q, self.k_cache, self.v_cache, self.sketch
        return decode_pages(*tensors, *self.of_batch(), **arguments)

    def plan(self, **changes):
        """The scheduler metadata for `decode` with the same `min_context`, `whole` and `num_splits`."""
        return get_scheduler_metadata(
            len(self.k_lens), self.max_q, self.table.shape[1] * PAGE, self.heads, self.heads_k, self.head_dim,
            cu_seqlens_q=self.starts, total_q=len(self.q), seqused_k=self.used, causal=True, page_size=PAGE,
            kv_dtype=self.k_cache.dtype, **changes,
        )  # fmt: skip

    def check(self, lists, out, lse, **kwargs):
        """Each KV head's part of the output, under the accuracy rule, by attention over the keys of its list."""
        group, sinks = self.heads // self.heads_k, kwargs.pop("sinks", None)
        for head in range(self.heads_k):
            heads = slice(head * group, (head + 1) * group)
            sequences = []
            for b, (q, k, v) in enumerate(self.sequences):
                pages = lists.indices[b, head, : int(lists.counts[b, head])].long()
                keys = (pages[:, None] * PAGE + torch.arange(PAGE, device=pages.device)).flatten()
                keys = keys[keys < len(k)]
                k, v = (x[:, head : head + 1].view(torch.uint8 if x.dtype == FP8 else x.dtype)[keys] for x in (k, v))
                if self.descales:
                    k, v = k.view(FP8), v.view(FP8)
                sequences.append((q[:, heads], k, v))
            descales = {name: x[:, head : head + 1] for name, x in self.descales.items()}
            sinks_of = {} if sinks is None else {"sinks": sinks[heads]}
            kwargs_of = {"causal": True} | descales | sinks_of | kwargs
            case = accuracy.Case(None, (), kwargs_of, sequences, cached=True)
            accuracy.check(case, out[:, heads], lse[heads])


def some_lists(step, share, seed=0):
    """Any lists that have the pages of several query tokens; what they don't use is hostile."""
    generator = torch.Generator().manual_seed(seed)
    blocks = step.table.shape[1]
    lists = PageLists.empty(len(step.k_lens), step.heads_k, step.heads, blocks, torch.device(accuracy.DEVICE))
    lists.indices.fill_(HUGE)
    for b, (q_len, k_len) in enumerate(zip(step.q_lens, step.k_lens, strict=True)):
        listed = torch.rand(step.heads_k, -(-k_len // PAGE), generator=generator) < share
        if q_len > 1:
            listed[:, max(k_len - q_len, 0) // PAGE :] = True
        lists.write(b, listed.to(accuracy.DEVICE))
    return lists


def poison(step, lists):
    """NaN in every key and value that no list has of a head."""
    for cache in (step.k_cache, step.v_cache):
        kept = torch.full(cache.shape, float("nan"), device=accuracy.DEVICE).to(cache.dtype)
        for b, counts in enumerate(lists.counts.tolist()):
            for head, count in enumerate(counts):
                for page in step.table[b, lists.indices[b, head, :count].long()].tolist():
                    kept[page, :, head].view(torch.uint8).copy_(cache[page, :, head].view(torch.uint8))
        cache.view(torch.uint8).copy_(kept.view(torch.uint8))


def keys_of(step, k_lens):
    """K and V of each sequence, by the table."""
    for b, n in enumerate(k_lens):
        pages = step.table[b, : -(-n // PAGE)].long()
        yield tuple(cache[pages].flatten(0, 1)[:n] for cache in (step.k_cache, step.v_cache))
