"""The field's accuracy rule, and problems with hostile unused memory to hold it against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from lite_attention import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from lite_attention.problem import as_bytes

DEVICE = "cuda"
HUGE_PAGE = 2**31 - 1
FP8 = torch.float8_e4m3fn
# Of all heads, in a call whose mean error is judged: the elements of a row err together, by its weights, and the mean
# over a few rows is now and then larger than that of the formula for no other reason than chance.
LEAST_ROWS = 16


@dataclass
class Case:
    """Arguments of one public call, and where the valid queries and keys of each sequence are."""

    call: object
    args: tuple
    kwargs: dict
    sequences: list = field(default_factory=list)  # (q (sq, h, d), k (sk, h_k, d), v) each, clean, as they are stored
    cached: bool = False  # its keys are in a KV cache

    def run(self, backend=None, **extra):
        return self.call(*self.args, **self.kwargs, return_softmax_lse=True, backend=backend, **extra)

    def value(self, name, x, b):
        """What the stored q, k or v of sequence b stands for, in float32."""
        descale = self.kwargs.get(f"{name}_descale")
        if descale is None:
            return x.float()
        heads_k = self.sequences[b][1].shape[1]
        factors = descale.expand(len(self.sequences), heads_k)[b].repeat_interleave(x.shape[1] // heads_k)
        return x.float() * factors[:, None]


def visible(sq, sk, causal, window):
    """(sq, sk) bool: what each query sees, aligned to the bottom right."""
    left, right = window
    right = 0 if causal else right
    distance = torch.arange(sk, device=DEVICE)[None] - (torch.arange(sq, device=DEVICE)[:, None] + sk - sq)
    seen = torch.ones(sq, sk, dtype=torch.bool, device=DEVICE)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def plain_attention(q, k, v, scale, causal, window, softcap=0.0, slopes=None, sinks=None):
    """The formula in the dtype of its inputs, rounded at each step: out (sq, h, d) and lse (h, sq)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q * scale, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        sq, sk = q.shape[0], k.shape[0]
        position = torch.arange(sq, device=DEVICE)[:, None] + sk - sq
        scores = scores - (slopes[:, None, None] * (position - torch.arange(sk, device=DEVICE)).abs()).to(scores.dtype)
    seen = visible(q.shape[0], k.shape[0], causal, window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:  # a column of its own, without a value
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], -1)
    lse = torch.logsumexp(scores.float(), -1)
    probs = torch.softmax(scores, -1)[..., : k.shape[0]].masked_fill(~seen.any(-1)[None, :, None], 0.0)
    return torch.einsum("hqk,khd->qhd", probs.to(v.dtype), v), lse


def check(case: Case, out, lse):
    """max|out - ref| <= 2 max|plain - ref| + 2 max|ref + 0.3 - 0.3 - ref| in each sequence; lse within fp32's noise.

    With a KV cache also mean|out - ref| <= 1.5 mean|plain - ref| over the call. With a softcap half as much again of
    the errors of plain, and an lse within that of a tanh of 11 bits; with FP8 queries within `fp8_sum_error`.
    """
    kwargs = case.kwargs
    causal, window = kwargs.get("causal", False), kwargs.get("window_size", (-1, -1))
    softcap, slopes, sinks = kwargs.get("softcap", 0.0), kwargs.get("alibi_slopes"), kwargs.get("sinks")
    assert not torch.isnan(out).any(), "NaN in the output"
    assert not torch.isnan(lse).any(), "NaN in the log-sum-exp"
    more = 1.5 if softcap else 1.0
    row, judged, sums = 0, 0, torch.zeros(2, dtype=torch.float64, device=out.device)
    for b, (q, k, v) in enumerate(case.sequences):
        sq = q.shape[0]
        varlen = out.dim() == 3
        got, got_lse = (out[row : row + sq], lse[:, row : row + sq]) if varlen else (out[b], lse[b])
        row += sq
        if sq == 0:
            continue
        scale = kwargs.get("softmax_scale") or q.shape[-1] ** -0.5
        mods = {"softcap": softcap, "slopes": slopes[b] if slopes is not None and slopes.dim() == 2 else slopes}
        mods["sinks"] = sinks
        values = [case.value(name, x, b) for name, x in zip("qkv", (q, k, v), strict=True)]
        ref, ref_lse = plain_attention(*values, scale, causal, window, **mods)
        plain, _ = plain_attention(*(x.to(got.dtype) for x in values), scale, causal, window, **mods)
        errors, plain_errors = (got.float() - ref).abs(), (plain.float() - ref).abs()
        judged += sq * q.shape[1]
        sums += torch.stack([errors.sum(dtype=torch.float64), plain_errors.sum(dtype=torch.float64)])
        error = errors.max().item()
        rounding = (ref + 0.3 - 0.3 - ref).abs().max().item()
        allowed = 2 * more * plain_errors.max().item() + 2 * rounding + 1e-5
        assert error <= allowed, f"sequence {b}, sq {sq}, sk {k.shape[0]}: error {error:.2e}, allowed {allowed:.2e}"
        nothing = torch.isinf(ref_lse)
        assert torch.equal(nothing, torch.isinf(got_lse) & (got_lse < 0)), f"sequence {b}: rows that see no key"
        blind = ~visible(sq, k.shape[0], causal, window).any(-1)
        assert (got[blind] == 0).all(), f"sequence {b}: rows that see no key are not zero"
        tolerance = max(1e-3, softcap * 2**-10)
        if q.dtype == FP8:
            tolerance += scale * fp8_sum_error(*values[:2])
        torch.testing.assert_close(got_lse[~nothing], ref_lse[~nothing], atol=tolerance, rtol=1e-4)
    if case.cached and judged >= LEAST_ROWS:
        error, allowed = (sums / (judged * out.shape[-1])).tolist()
        allowed = 1.5 * more * allowed + 1e-7
        assert error <= allowed, f"mean error {error:.2e}, allowed {allowed:.2e}"


def check_in_parts(case: Case, out, lse, rows=64):
    """`check` of one causal sequence, a head and some rows at a time: the formula would need memory for all scores."""
    ((q, k, v),) = case.sequences
    out, lse = (out[0], lse[0]) if out.dim() == 4 else (out, lse)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        heads, heads_k = slice(head, head + 1), slice(head // group, head // group + 1)
        for first in range(0, len(q), rows):
            some = slice(first, min(first + rows, len(q)))
            seen = len(k) - len(q) + some.stop
            part = q[some, heads], k[:seen, heads_k], v[:seen, heads_k]
            check(replace(case, sequences=[part]), out[some, heads], lse[heads, some])


def fp8_sum_error(q, k):
    """How far q.k may be off where the tensor cores multiply FP8: a bound for vectors of independent elements.

    Hopper's keep 13 bits after the leading one of a sum's largest term, and cut the rest off every term (DeepSeek-V3,
    arXiv 2412.19437, section 3.5.2). For d terms and a sum of size s these errors, of either sign and up to s * 2**-13
    each, have a standard deviation of 0.6 * sqrt(d) * s * 2**-13, and s has one of |q| |k| / sqrt(d). So d cancels: in
    units of 2**-13 * |q| |k|, 0.6 is the scale of errors, 1 what simulated ones reach in a million sums, and this 8.
    """
    if 0 in (*q.shape, *k.shape):
        return 0.0
    return 2**-10 * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()


def random(*shape, dtype, generator, spread=1.0):
    return (torch.randn(*shape, device=DEVICE, generator=generator) * spread).to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def ints(values):
    return torch.tensor(values, device=DEVICE, dtype=torch.int32)


def starts(lengths):
    return torch.cat([ints([0]), ints(lengths).cumsum(0).int()]) if lengths else ints([0])


def make_sequences(lens_q, lens_k, heads, heads_k, d, dtype, seed, kv_dtype=None):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    new = lambda n, h, dtype: random(n, h, d, dtype=dtype, generator=generator)  # noqa: E731
    kv_dtype = kv_dtype or dtype
    return [
        (new(sq, heads, dtype), new(sk, heads_k, kv_dtype), new(sk, heads_k, kv_dtype))
        for sq, sk in zip(lens_q, lens_k, strict=True)
    ]


@contextmanager
def poisoned_scratch() -> Iterator[None]:
    """What is allocated meanwhile, by C++ as by Python, holds NaN or the largest int, as PyTorch fills it for this."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def joined(join, tensors):
    """torch.cat or torch.stack, of FP8 too."""
    if tensors[0].dtype != FP8:
        return join(tensors)
    return join([x.view(torch.uint8) for x in tensors]).view(FP8)


def fixed(sequences, **kwargs):
    q, k, v = (joined(torch.stack, x) for x in zip(*sequences, strict=True))
    return Case(flash_attn_func, (q, k, v), kwargs, sequences)


def packed(sequences, slack=3, **kwargs):
    """Variable lengths; seqused_k leaves `slack` poisoned keys after each sequence unused."""
    lens_q, lens_k = [s[0].shape[0] for s in sequences], [s[1].shape[0] for s in sequences]
    q = joined(torch.cat, [s[0] for s in sequences])
    padded = [[joined(torch.cat, [x, poisoned(slack, *x.shape[1:], dtype=x.dtype)]) for x in s[1:]] for s in sequences]
    k, v = (joined(torch.cat, x) for x in zip(*padded, strict=True))
    args = (q, k, v, starts(lens_q), starts([n + slack for n in lens_k]), max(lens_q), max(lens_k) + slack)
    if slack:
        kwargs["seqused_k"] = ints(lens_k)
    return Case(flash_attn_varlen_func, args, kwargs, sequences)


def pages(sequences, page_size, *, generator_seed=0, by_head=False, one_memory=True, spare=3):
    """Caches of scattered pages, NaN wherever no key was written, and a table that is huge past each sequence's end."""
    _, k0, _ = sequences[0]
    heads_k, d, dtype = k0.shape[1], k0.shape[2], k0.dtype
    counts = [-(-s[1].shape[0] // page_size) for s in sequences]
    total = sum(counts) + spare
    order = torch.randperm(total, generator=torch.Generator().manual_seed(generator_seed)).tolist()
    memory = (total, heads_k, page_size, 2 * d) if by_head else (total, page_size, heads_k, 2 * d)
    cache = poisoned(*memory, dtype=dtype)
    cache = cache.transpose(1, 2) if by_head else cache
    k_cache, v_cache = cache[..., :d], cache[..., d:]
    if not one_memory:
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    table = torch.full((len(sequences), max(counts) + 2), HUGE_PAGE, device=DEVICE, dtype=torch.int32)
    for b, (_, *keys) in enumerate(sequences):
        own = torch.tensor([order.pop() for _ in range(counts[b])], dtype=torch.int64, device=DEVICE)
        table[b, : counts[b]] = own
        for x, cache in zip(keys, (k_cache, v_cache), strict=True):
            whole = poisoned(counts[b] * page_size, heads_k, d, dtype=dtype)
            whole[: len(x)] = x
            as_bytes(cache)[own] = as_bytes(whole).view(counts[b], page_size, heads_k, d)
    return k_cache, v_cache, table


def paged(sequences, page_size, **kwargs):
    layout = {name: kwargs.pop(name) for name in ("by_head", "one_memory") if name in kwargs}
    lens_q, lens_k = [s[0].shape[0] for s in sequences], [s[1].shape[0] for s in sequences]
    k_cache, v_cache, table = pages(sequences, page_size, **layout)
    q = joined(torch.cat, [s[0] for s in sequences])
    args = (q, k_cache, v_cache, starts(lens_q), None, max(lens_q), max(lens_k))
    kwargs = {"seqused_k": ints(lens_k), "block_table": table} | kwargs
    return Case(flash_attn_varlen_func, args, kwargs, sequences, cached=True)


def kvcache(sequences, capacity, **kwargs):
    """A dense cache (batch, capacity, heads_k, head_dim), NaN past each sequence's end."""
    q = joined(torch.stack, [s[0] for s in sequences])
    heads_k, d = sequences[0][1].shape[1:]
    k_cache, v_cache = (poisoned(len(sequences), capacity, heads_k, d, dtype=sequences[0][1].dtype) for _ in range(2))
    for b, (_, k, v) in enumerate(sequences):
        k_cache[b, : k.shape[0]], v_cache[b, : v.shape[0]] = k, v
    kwargs["cache_seqlens"] = ints([s[1].shape[0] for s in sequences])
    return Case(flash_attn_with_kvcache, (q, k_cache, v_cache), kwargs, sequences, cached=True)


def kvcache_pages(sequences, page_size, new=0, **kwargs):
    """The same call over scattered pages.

    The last `new` keys of each sequence, which has no fewer, come as k and v; the cache has NaN in their place.
    """
    q = joined(torch.stack, [s[0] for s in sequences])
    k_cache, v_cache, table = pages(sequences, page_size, by_head=kwargs.pop("by_head", False))
    lens_k = [s[1].shape[0] - new for s in sequences]
    if new:
        kwargs["k"], kwargs["v"] = (joined(torch.stack, [s[i][-new:] for s in sequences]) for i in (1, 2))
        place = torch.tensor([[n + i for i in range(new)] for n in lens_k], device=DEVICE)
        page = table.gather(1, place // page_size).long()
        for cache in (k_cache, v_cache):
            nothing = poisoned(*place.shape, *cache.shape[2:], dtype=cache.dtype)
            as_bytes(cache)[page, place % page_size] = as_bytes(nothing)
    kwargs |= {"cache_seqlens": ints(lens_k), "block_table": table}
    return Case(flash_attn_with_kvcache, (q, k_cache, v_cache), kwargs, sequences, cached=True)


def a_million_keys(seqlen_q, heads, layout, kv_dtype=None, **kwargs):
    """2^20 + 7 of them, of one head, and causal queries at their end.

    Four keys, the first and the last among them, are such that a row of a head has most of its weight there: where one
    is missed, or another is read for it, the result is another one. Of the others each has next to no weight.
    """
    keys = 2**20 + 7
    sequences = make_sequences([seqlen_q], [keys], heads, 1, 128, torch.bfloat16, 24, kv_dtype)
    ((q, k, _),) = sequences
    for head, place in enumerate((0, 2**19 + 5, 2**20, keys - 1)):
        row = max(place - (keys - seqlen_q), seqlen_q // 2)
        query = q[row, head % heads].float()
        score = query.norm() ** 2 * q.shape[-1] ** -0.5
        k[place, 0] = (query * (15 / score)).to(k.dtype)  # the million others have an lse of 14.4
    if layout == "paged":
        return paged(sequences, 16, causal=True, **kwargs)
    if layout == "packed":
        return packed(sequences, causal=True, **kwargs)
    return kvcache(sequences, keys + 100, causal=True, **kwargs)
