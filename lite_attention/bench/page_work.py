"""Rows that decode from listed pages: attention over random lists, and whole steps with lists from sketches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import lite_attention
from lite_attention import reference
from lite_attention.bench.check import Agreement, Sample, against_reference, allowed_error, samples
from lite_attention.bench.contenders import plan_of
from lite_attention.bench.inputs import Inputs
from lite_attention.bench.skip_work import compare_lists
from lite_attention.pages import (
    PAGE,
    PageLists,
    attend_pages,
    decode_pages,
    empty_sketch,
    select_pages,
    write_sketch,
)
from lite_attention.problem import take

EPS = 0.1
NEAR = 1e-5  # of squared distances of keys: more than float32 sums of them differ by
HALVINGS = 16  # of the range in which the queries' size is sought


@dataclass(frozen=True)
class RandomPages:
    """Attention over lists of random pages, a `share` of all, with the first and the last one of each sequence."""

    share: float

    def prepare(self, inputs: Inputs, seed: int) -> ListedPages:
        shape, table = inputs.shape, _table(inputs)
        random = torch.Generator().manual_seed(seed)  # of the CPU: the same lists on every device
        lists = _empty(inputs)
        for b, k_len in enumerate(shape.k_lens):
            listed = torch.rand(shape.heads_k, -(-k_len // PAGE), generator=random) < self.share
            listed[:, 0] = listed[:, -1] = True
            lists.write(b, listed.to(table.device))
        return ListedPages(inputs, lists)


@dataclass(frozen=True)
class NeededPages:
    """A step that writes sketches, selects and attends, with queries so large that a `share` of the pages is needed.

    One sequence in 16 has a page that fills. Sequences shorter than `min_context` list everything. `sketch_bits` are
    those of the operator's setting.
    """

    share: float = 1.0
    min_context: int = 0
    sketch_bits: int = 12

    def prepare(self, inputs: Inputs, seed: int) -> PageStep:
        sketch = empty_sketch(inputs.k, self.sketch_bits)
        write_sketch(inputs.k, sketch, torch.arange(len(sketch), dtype=torch.int32, device=sketch.device))
        step, low, high = PageStep(inputs, sketch, self.min_context), -2.0, 6.0
        if self.share < 1:
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                step = PageStep(replace(inputs, q=inputs.q * 2**middle), sketch, self.min_context)
                if step.visited > self.share:
                    low = middle
                else:
                    high = middle
        return step


@dataclass(frozen=True)
class SketchedPrefill:
    """Dense attention over a prompt, after sketches of its pages: of the many tokens few fill a page."""

    def prepare(self, inputs: Inputs, seed: int) -> PrefillStep:
        return PrefillStep(inputs)


class ListedPages:
    """Calls over lists that stay as they are. out is filled with NaN, which a call must overwrite."""

    steps = 1

    def __init__(self, inputs: Inputs, lists: PageLists) -> None:
        self.inputs, self.lists = inputs, lists
        self.out = torch.full_like(inputs.q, math.nan)
        pages = sum(-(-k_len // PAGE) for k_len in inputs.shape.k_lens)
        self.visited = float(lists.counts.sum()) / (pages * inputs.shape.heads_k)
        self.expected = lists.listed()

    def __call__(self) -> Tensor:
        one = self.inputs
        attend_pages(one.q, one.k, one.v, self.lists, *_batch(one), out=self.out)
        return self.out

    def check(self) -> list[Agreement]:
        self()
        return [against_reference(self.out, self._samples())]

    def check_list(self) -> Agreement:
        return compare_lists(self.lists.listed(), self.expected)

    def _samples(self) -> list[Sample]:
        """The first and the last sequence, over the keys of their lists. Each has one query token."""
        one, shape = self.inputs, self.inputs.shape
        group, found = shape.heads // shape.heads_k, []
        for b in sorted({0, shape.batch - 1}):
            place = one.rows_of(b)
            q, (k, v) = one.queries()[place], one.keys_of(b)
            expected, formula = [], []
            for head in range(shape.heads_k):
                keys = self.expected[b, head].repeat_interleave(PAGE)[: len(k)]
                part = q[:, head * group : (head + 1) * group], k[keys, head : head + 1], v[keys, head : head + 1]
                expected.append(reference.attend(*part, softmax_scale=one.softmax_scale)[0])
                weights = (part[0][0] @ part[1][:, 0].T * one.softmax_scale).softmax(-1)
                formula.append((weights @ part[2][:, 0])[None])
            exact = torch.cat(expected, 1)
            found.append(Sample(place, exact, allowed_error(torch.cat(formula, 1), exact)))
        return found


class PageStep(ListedPages):
    """Calls that write sketches and make their lists anew. What is planned of a step for all layers is there before."""

    def __init__(self, inputs: Inputs, sketch: Tensor, min_context: int) -> None:
        self.sketch, self.min_context = sketch, min_context
        fills = torch.arange(inputs.shape.batch, device=sketch.device) % PAGE == 0
        self.filled = torch.where(fills, _table(inputs)[:, 0], -1).int()
        self.metadata = plan_of(inputs, min_context)
        step = {"eps": EPS, "min_context": min_context}
        super().__init__(inputs, select_pages(inputs.q, sketch, *_batch(inputs), **step, lists=_empty(inputs)))

    def __call__(self) -> Tensor:
        one = self.inputs
        decode_pages(
            one.q,
            one.k,
            one.v,
            self.sketch,
            *_batch(one),
            eps=EPS,
            filled=self.filled,
            min_context=self.min_context,
            lists=self.lists,
            scheduler_metadata=self.metadata,
            out=self.out,
        )
        return self.out

    def check(self) -> list[Agreement]:
        found = super().check()
        return [*found, Agreement("the budget", float(self.lists.left_out.max()), EPS * (1 + 1e-3), 0.0, 0.0)]

    def check_list(self) -> Agreement:
        """Of a step that leaves nothing out only the counts: its other lists may be what they were before it."""
        if max(self.inputs.shape.k_lens) < self.min_context:
            return compare_lists(self.lists.counts, self.expected.sum(-1))
        return super().check_list()


class PrefillStep:
    """out is filled with NaN, which a call must overwrite."""

    steps = 1
    visited = 1.0

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.sketch = empty_sketch(inputs.k)
        self.out = torch.full_like(inputs.q, math.nan)
        fills = torch.arange(inputs.q.shape[0], device=inputs.q.device) % PAGE == PAGE - 1
        pages = _table(inputs).flatten().repeat_interleave(PAGE)[: len(fills)]
        self.filled = torch.where(fills, pages, -1).int()

    def __call__(self) -> Tensor:
        one = self.inputs
        write_sketch(one.k, self.sketch, self.filled)
        starts, used, table, longest = _batch(one)
        lite_attention.flash_attn_varlen_func(
            one.q, one.k, one.v, starts, None, longest, max(one.shape.k_lens),
            causal=True, seqused_k=used, block_table=table, out=self.out,
        )  # fmt: skip
        return self.out

    def check(self) -> list[Agreement]:
        return [against_reference(self(), samples(self.inputs))]

    def check_list(self) -> Agreement:
        """That every full page has its sketch, as the reference has it: codes may differ by one where rounding ties.

        So may the choice of the farthest key, on which the means depend: pages where two are as far, but for rounding,
        are passed over.
        """
        expected, full = torch.empty_like(self.sketch), self.filled[self.filled >= 0]
        write_sketch(self.inputs.k, expected, full, backend="reference")
        means = slice(PAGE, PAGE + self.inputs.shape.head_dim)
        found, expected = (x[full.long()][..., means].int() for x in (self.sketch, expected))
        apart = (found - expected).abs().amax(-1)
        keys = take(self.inputs.k, full).float()
        farthest, next_to_it = (keys - keys.mean(1, keepdim=True)).square().sum(-1).topk(2, dim=1).values.unbind(1)
        apart = apart.masked_fill(next_to_it >= farthest * (1 - NEAR), 0)
        return Agreement("the sketches", float(apart.max()), 1.0, 0.0, 0.0)


def _table(inputs: Inputs) -> Tensor:
    if inputs.block_table is None:
        raise ValueError(f"layout: got {inputs.shape.layout}; needs paged, as lists are of pages")
    return inputs.block_table


def _batch(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, int]:
    return inputs.cu_seqlens_q, inputs.seqused_k, _table(inputs), max(inputs.shape.q_lens)


def _empty(inputs: Inputs) -> PageLists:
    shape, table = inputs.shape, _table(inputs)
    return PageLists.empty(shape.batch, shape.heads_k, shape.heads, table.shape[1], table.device)
