"""Calls that resemble each other, as the denoising steps of a diffusion model do."""

from __future__ import annotations

import torch

from lite_attention import LiteAttention, SkipList, skip_attention

TILE = (8, 8)
THRESHOLD = -3.0


def coherent(count, seed=0, *, batch=2, seqlen_q=40, seqlen_k=90, heads=4, heads_k=2, dim=16, dtype=torch.float32):
    """(q, k, v) of each step: tokens drift a little, and attention narrows from step to step."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    where_q, where_k = torch.linspace(0, 1, seqlen_q), torch.linspace(0, 1, seqlen_k)
    angles = torch.arange(1, dim // 2 + 1)
    q, k = (
        torch.cat([torch.cos(angles * x[:, None]), torch.sin(angles * x[:, None])], dim=1) for x in (where_q, where_k)
    )
    q = q[None, :, None] + 0.05 * normal(batch, seqlen_q, heads, dim)
    k = k[None, :, None] + 0.05 * normal(batch, seqlen_k, heads_k, dim)
    v = normal(batch, seqlen_k, heads_k, dim)
    for step in range(count):
        drift = 0.02 * normal(*q.shape)
        yield tuple(x.to(dtype) for x in ((1 + step) * (q + drift), k, v))


def module(**options):
    return LiteAttention(**({"threshold": THRESHOLD, "tile": TILE} | options))


def fresh(q, k):
    return SkipList.fresh(q.shape[0], q.shape[2], q.shape[1], k.shape[1], tile=TILE)


def functional(calls, threshold=THRESHOLD, refresh=(), **options):
    """(out, lse, the list's bits after it) of each call, by `skip_attention`; before the calls in `refresh` all tiles
    are visited again."""
    skip_list, results = None, []
    for number, (q, k, v) in enumerate(calls):
        if skip_list is None or number in refresh:
            skip_list = fresh(q, k)
        by_step = isinstance(threshold, torch.Tensor) and threshold.dim() == 2
        now = threshold[number] if by_step else threshold
        out, lse = skip_attention(q, k, v, skip_list, now, **options)
        results.append((out, lse, skip_list.bits.clone()))
    return results


def assert_same(attention, calls, expected, stream="default", **options):
    """The module's calls give the expected results bit for bit, and leave the expected lists."""
    for (q, k, v), (out, lse, bits) in zip(calls, expected, strict=True):
        got, got_lse = attention(q, k, v, return_softmax_lse=True, stream=stream, **options)
        assert torch.equal(got, out) and torch.equal(got_lse, lse)
        assert torch.equal(attention.skip_list(stream).bits, bits)
