"""The CPU path: PyTorch's fused attention for the CPU.

Query rows go in blocks, each over the slice of keys that some row of it sees. So causal and windowed calls skip most of
what they mask, and only blocks on an edge of the mask need one. ALiBi rides on the mask; sinks follow from the lse.

Sequences of one row, which decoding has many of, share calls where their lengths round to the same padded length. Fewer
and larger calls keep more threads busy. As its padding follows from its own length, a sequence's answer does not depend
on the rest of the batch, but for the last bit of float32, which the BLAS may round either way.

FP8 is computed with in float32.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from lite_attention import reference
from lite_attention.problem import Problem, Sequence, dequantised, take

BLOCK_ROWS = 128
FOLD_ROWS = 8  # up to here the heads of a GQA group are rows of one product: 4 times as fast for one bfloat16 row
PADDING = 128  # keys; from 1024 keys on an eighth of the length, rounded down to a power of two
KEYS_AT_ONCE = 1 << 16  # copied from pages for one call


def run(problem: Problem) -> None:
    """Computes `problem` into its `out` and `lse`."""
    run_sequences(problem, list(problem.sequences()))


def run_sequences(problem: Problem, sequences: list[Sequence]) -> None:
    """Computes these sequences of `problem`."""
    if problem.softcap > 0:  # which the fused kernel lacks
        for sequence in sequences:
            reference.run_sequence(problem, sequence)
        return
    together = problem.paged and problem.window_left < 0 and problem.alibi_slopes is None
    padded = defaultdict(list)
    for sequence in sequences:
        if together and sequence.q_len == 1 and sequence.k_len > 0:
            padded[_padded_pages(sequence.k_len, problem.page_size)].append(sequence)
        else:
            _attend(problem, sequence)
    for pages, some in padded.items():
        count = max(1, KEYS_AT_ONCE // (pages * problem.page_size))
        for start in range(0, len(some), count):
            _attend_rows(problem, some[start : start + count], pages)
    if not problem.out.isfinite().all():
        # A NaN or infinity reaches all rows of a call as 0 * NaN, be it in a page's unused end or in a key that another
        # row sees. A call of one sequence has no unused keys, and the reference none that a row doesn't see.
        for sequence in sequences:
            for compute in (_attend, reference.run_sequence):
                if not problem.rows(sequence)[1].isfinite().all():
                    compute(problem, sequence)


def _padded_pages(k_len: int, page_size: int) -> int:
    """The pages that `k_len` keys are padded to."""
    grain = max(PADDING, 1 << max(k_len.bit_length() - 4, 0))
    return -(-(-(-k_len // grain) * grain) // page_size)


def _attend_rows(problem: Problem, sequences: list[Sequence], pages: int) -> None:
    """Sequences of one row each, which sees all keys, over that many pages each."""
    batch, heads, heads_k, head_dim = len(sequences), problem.heads, problem.heads_k, problem.head_dim
    index = torch.tensor([sequence.index for sequence in sequences])
    lengths = torch.tensor([sequence.k_len for sequence in sequences])[:, None]
    # Pages after the last are the last again: theirs to read, and masked.
    page = torch.arange(pages).minimum((lengths - 1) // problem.page_size)
    table = problem.block_table[index].gather(1, page).flatten()
    k, v = (
        dequantised(
            take(x, table).view(batch, pages * problem.page_size, heads_k, head_dim),
            None if descale is None else descale[index, None],
        ).transpose(1, 2)
        for x, descale in ((problem.k, problem.k_descale), (problem.v, problem.v_descale))
    )
    unused = torch.arange(pages * problem.page_size) >= lengths
    mask = torch.zeros(unused.shape).masked_fill_(unused, -math.inf)[:, None, None]
    if problem.varlen:
        rows = torch.tensor([sequence.q_start for sequence in sequences])
        q, out, lse = problem.q, problem.out, problem.lse.T
    else:
        rows, q, out, lse = index, problem.q[:, 0], problem.out[:, 0], problem.lse[:, :, 0]
    q = dequantised(take(q, rows), problem.q_factors(index))
    q = q.view(batch, heads_k, heads // heads_k, head_dim).to(k.dtype)
    result, result_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=mask, scale=problem.softmax_scale
    )
    result, result_lse = result.reshape(batch, heads, head_dim), result_lse.reshape(batch, heads)
    if problem.sinks is not None:
        result, result_lse = with_sinks(result, result_lse, problem.sinks)
    out.index_copy_(0, rows, result.to(out.dtype))
    lse.index_copy_(0, rows, result_lse)


def _attend(problem: Problem, sequence: Sequence) -> None:
    q, out, lse = problem.rows(sequence)
    k, v = problem.keys(sequence)
    q = q.to(k.dtype)
    seqlen_q, seqlen_k = sequence.q_len, sequence.k_len
    left, right = problem.window_left, problem.window_right
    shift = seqlen_k - seqlen_q  # row i stands at key position i + shift
    blind = seqlen_q if seqlen_k == 0 else 0
    if right >= 0:  # the first rows, where there are more of them than keys, see nothing; every other row sees a key
        blind = min(max(blind, -shift - right), seqlen_q)
    if blind > 0:
        out[:blind] = 0
        lse[:, :blind] = -math.inf if problem.sinks is None else problem.sinks[:, None]
    for start in range(blind, seqlen_q, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, seqlen_q)
        first = max(start + shift - left, 0) if left >= 0 else 0
        last = min(stop + shift + right, seqlen_k) if right >= 0 else seqlen_k
        mask = _mask(start + shift, stop + shift, first, last, left, right, problem.slopes(sequence))
        result, result_lse = _fused(q[start:stop], k[first:last], v[first:last], mask, problem.softmax_scale)
        if problem.sinks is not None:
            result, result_lse = with_sinks(result, result_lse.T, problem.sinks)
            result_lse = result_lse.T
        out[start:stop] = result
        lse[:, start:stop] = result_lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (rows, heads, head_dim) and lse (rows, heads) once `exp(sinks)` joins the denominators."""
    joined = torch.logaddexp(lse, sinks)
    return out * torch.exp(lse - joined)[..., None], joined


def _mask(start: int, stop: int, first: int, last: int, left: int, right: int, slopes: Tensor | None) -> Tensor | None:
    """What is added to the scores of the rows at positions [start, stop) and keys [first, last).

    Float32, (rows, keys), or with ALiBi (heads, rows, keys); None where it would be zero.
    """
    full_left = left < 0 or stop - 1 - left <= first
    full_right = right < 0 or start + right >= last - 1
    if full_left and full_right and slopes is None:
        return None
    distance = torch.arange(first, last) - torch.arange(start, stop)[:, None]
    if slopes is None:
        mask = torch.zeros(distance.shape)
    else:
        mask = -slopes[:, None, None] * distance.abs()
    if not full_left:
        mask.masked_fill_(distance < -left, -math.inf)
    if not full_right:
        mask.masked_fill_(distance > right, -math.inf)
    return mask


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v of one block by PyTorch's kernel, called by a name that gives the lse too."""
    rows, heads, head_dim = q.shape
    heads_k = k.shape[1]
    fold = rows <= FOLD_ROWS and heads_k < heads
    if fold:
        group = heads // heads_k
        q = q.view(rows, heads_k, group, head_dim).permute(1, 2, 0, 3).reshape(heads_k, group * rows, head_dim)
        if mask is not None:
            mask = mask.repeat(group, 1) if mask.dim() == 2 else mask.view(heads_k, group * rows, -1)
    else:
        q = q.transpose(0, 1)
    if mask is not None:
        mask = mask.expand(1, 1 if mask.dim() == 2 else q.shape[0], -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=mask, scale=scale
    )
    # Folded or not, (heads_k, group, rows) and (heads, rows) are the same order.
    return out[0].reshape(heads, rows, head_dim).transpose(0, 1), lse[0].reshape(heads, rows)
