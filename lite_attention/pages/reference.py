"""Decoding from listed pages as LiteAttention means it: the specification, in plain PyTorch, on any device.

Sketch: `layout` says what it is. It depends on nothing but the page's keys as they are stored, FP8 without its descale,
so that it may be copied, swapped and shared with the page. There is one for each full page; which pages of a sequence
are full its length says, and nothing is stored for the last one while it isn't.

Select: for each sequence of a batch, each of its query tokens, and each KV head:

1. The token at position p sees the keys 0 to p. It counts the pages of which it sees all 16 keys; `estimate` gives each
   query head's share of mass in them. (Keys in a page that is not full have no part in this: they are always read, and
   to count them could only make the shares of others smaller.)
2. Page 0 and the pages of the `newest` keys that it sees are always listed; so is a page whose log-mass isn't finite.
3. Of the others it lists the fewest without which no query head of the KV head misses more than eps of its mass, as
   `estimate.needed` says.

A list is the union over the sequence's query tokens. With eps 0, and for sequences of less than `min_context` keys or
that are to be `whole`, it is of all pages. A sequence without query tokens has none. Nothing of a sequence depends on
another, or on where its pages lie.

All this is float64, so that lists are those of real arithmetic. Kernels agree but where a sum meets eps, or ranks are
equal, up to rounding.

Attend: the causal softmax, aligned to the bottom right, over the keys of listed pages, float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.pages.estimate import log_mass, needed, shares
from lite_attention.pages.layout import PAGE, Moments, bits_of, decode, encode
from lite_attention.pages.problem import Selection
from lite_attention.problem import Problem, Sequence, take
from lite_attention.reference import average, visible

PAGES_AT_ONCE = 1024  # bounds the memory of float32 copies


def write_sketch(k_cache: Tensor, sketch: Tensor, pages: Tensor) -> None:
    """Writes the sketches of these pages; negative numbers are none."""
    bits = bits_of(k_cache.shape[3], sketch.shape[2])
    for some in pages[pages >= 0].split(PAGES_AT_ONCE):
        keys = take(k_cache, some).transpose(1, 2)
        sketch.index_copy_(0, some.long(), encode(keys, bits))


def select(selection: Selection) -> None:
    """Writes the lists. Reads lengths back to the host, so on a GPU it synchronises."""
    for sequence in selection.sequences():
        listed, left_out = _listed(selection, sequence)
        selection.lists.write(sequence.index, listed)
        selection.lists.left_out[sequence.index] = left_out.flatten()


def _listed(selection: Selection, sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Bool (heads_k, pages of the sequence), and what that leaves out, float64 (heads_k, group)."""
    pages, full, heads_k = -(-sequence.k_len // PAGE), sequence.k_len // PAGE, selection.heads_k
    device = selection.q.device
    left_out = torch.zeros(heads_k, selection.q.shape[1] // heads_k, dtype=torch.float64, device=device)
    whole = selection.whole is not None and bool(selection.whole[sequence.index])
    if sequence.q_len == 0 or selection.eps == 0 or sequence.k_len < selection.min_context or whole:
        return torch.full((heads_k, pages), sequence.q_len > 0, device=device), left_out

    listed = torch.zeros(heads_k, pages, dtype=torch.bool, device=device)
    sketch = selection.sketch.index_select(0, selection.block_table[sequence.index, :full])
    moments = decode(sketch, selection.q.shape[-1])
    scale = torch.full((heads_k,), selection.softmax_scale, dtype=torch.float64, device=device)
    if selection.k_descale is not None:
        scale *= selection.k_descale[sequence.index]
    for row in range(sequence.q_len):
        position = sequence.k_len - sequence.q_len + row
        if position < 0:  # more queries than keys: this one sees none
            continue
        first_new = max(position + 1 - selection.newest, 0) // PAGE
        listed[:, 0] = True
        listed[:, first_new : position // PAGE + 1] = True
        counted = (position + 1) // PAGE
        if counted > 0:
            q = selection.q[sequence.q_start + row].unflatten(0, (heads_k, -1))
            masses = log_mass(q, Moments(*(part[:counted] for part in moments)), scale)
            always = ~masses.isfinite().all(1)
            always[:, 0] = True
            always[:, first_new:] = True
            share = shares(masses)
            chosen = needed(share, always, selection.eps)
            listed[:, :counted] |= chosen
            left_out = torch.maximum(left_out, share.masked_fill(chosen[:, None], 0.0).sum(-1))
    return listed, left_out


def attend(problem: Problem, indices: Tensor, counts: Tensor) -> None:
    """Computes `problem` over listed pages into its `out` and `lse`. Synchronises, on a GPU."""
    for sequence in problem.sequences():
        q, out, lse = problem.rows(sequence)
        k, v = (x.float().repeat_interleave(problem.heads // problem.heads_k, dim=1) for x in problem.keys(sequence))
        pages = torch.zeros(problem.heads_k, indices.shape[2], dtype=torch.bool, device=q.device)
        for head, count in enumerate(counts[sequence.index].tolist()):
            pages[head, indices[sequence.index, head, :count]] = True
        listed = pages.repeat_interleave(PAGE, dim=1)[:, : sequence.k_len]
        listed = listed.repeat_interleave(problem.heads // problem.heads_k, dim=0)
        seen = visible(slice(0, sequence.q_len), sequence.q_len, sequence.k_len, -1, 0, device=q.device)
        scores = torch.einsum("ihd,jhd->hij", q.float(), k) * problem.softmax_scale
        result, result_lse = average(scores, seen & listed[:, None], v, problem.sinks)
        out.copy_(result)
        lse.copy_(result_lse)
