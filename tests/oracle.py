"""A second opinion on attention: float64, one head, one row, one key at a time, from the definition."""

from __future__ import annotations

import math

import numpy as np
import torch


def attention(q, k, v, *, scale, causal, window, softcap=0.0, slopes=None, sinks=None, visits=None):
    """One sequence: q (n, heads, d), k and v (m, heads_k, d), slopes and sinks one a head.

    Row i looks at those of the keys that its mask lets it see for which visits(head, i, j) is true. Gives out (n,
    heads, d) and lse (heads, n).
    """
    q, k, v = (x.double().numpy() for x in (q, k, v))
    (n, heads, d), (m, heads_k, _) = q.shape, k.shape
    out, lse = np.zeros((n, heads, d)), np.full((heads, n), -np.inf)
    for head in range(heads):
        shared = head * heads_k // heads
        sink = None if sinks is None else float(sinks[head])
        slope = 0.0 if slopes is None else float(slopes[head])
        for i in range(n):
            seen = [j for j in range(m) if sees(i, j, n, m, causal, window)]
            if visits is not None:
                seen = [j for j in seen if visits(head, i, j)]
            logits = [_logit(q[i, head] @ k[j, shared] * scale, i + m - n - j, softcap, slope) for j in seen]
            out[i, head], lse[head, i] = _softmax_sum(logits, [v[j, shared] for j in seen], sink, d)
    return torch.from_numpy(out), torch.from_numpy(lse)


def sees(i, j, n, m, causal, window):
    before = (m - 1 - j) - (n - 1 - i)  # how far key j lies before row i, both counted from the end
    left, right = window
    if causal:
        right = 0
    return (left < 0 or before <= left) and (right < 0 or before >= -right)


def _logit(score, before, softcap, slope):
    if softcap:
        score = math.tanh(score / softcap) * softcap
    return score - slope * abs(before)


def _softmax_sum(logits, values, sink, d):
    everything = logits if sink is None else [*logits, sink]
    if not everything:
        return np.zeros(d), -np.inf
    top = max(everything)
    total = math.fsum(math.exp(x - top) for x in everything)
    mean = sum((math.exp(x - top) / total * value for x, value in zip(logits, values, strict=True)), np.zeros(d))
    return mean, top + math.log(total)
