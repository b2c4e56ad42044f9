"""A second opinion on skip lists: one row, one key, one bit at a time, from the words of the issue."""

from __future__ import annotations

import math

import numpy as np
import oracle

WORD = 32


def forced(ranges, seqlen_k, block_n, rounding):
    """The set of KV tiles that ranges of one entry touch ("outward") or cover ("inward"), by the tokens in them."""
    inside = {j for begin, end in ranges for j in range(begin, end)}
    quantifier = {"outward": any, "inward": all}[rounding]
    tiles = -(-seqlen_k // block_n)
    return {
        n for n in range(tiles) if quantifier(j in inside for j in range(n * block_n, min((n + 1) * block_n, seqlen_k)))
    }


def walk(q, k, words, do, skip, *, tile, scale, thresholds, causal, window):
    """One sequence: q (n, heads, d), k (m, heads_k, d); words[head][q tile] are ints, which are updated in place.

    Gives the visited KV tiles as sets, visited[head][q tile].
    """
    q, k = q.double().numpy(), k.double().numpy()
    (n, heads, _), (m, heads_k, _) = q.shape, k.shape
    block_m, block_n = tile
    scale_log2 = np.float32(scale) * np.float32(math.log2(math.e))
    visited = [[] for _ in range(heads)]
    for head in range(heads):
        products = q[:, head] @ k[:, head * heads_k // heads].T
        for start in range(0, n, block_m):
            rows = range(start, min(start + block_m, n))
            seen = {i: [j for j in range(m) if oracle.sees(i, j, n, m, causal, window)] for i in rows}
            row_words = words[head][start // block_m]
            in_list = {t for t in range(-(-m // block_n)) if row_words[t // WORD] >> t % WORD & 1}
            in_range = {j // block_n for i in rows for j in seen[i]}
            tiles = in_range & ((in_list - skip) | do)
            visited[head].append(tiles)
            highest = dict.fromkeys(rows)
            for count, t in enumerate(sorted(tiles, reverse=True)):
                stays = count == 0
                for i in rows:
                    scores = [products[i, j] for j in seen[i] if j // block_n == t]
                    if not scores:
                        continue
                    if highest[i] is None:
                        stays = True
                    else:
                        rise = np.float32(max(scores) - highest[i]) * scale_log2
                        stays |= bool(rise > np.float32(thresholds[head]))
                    highest[i] = max(scores) if highest[i] is None else max(highest[i], *scores)
                bit = 1 << t % WORD
                row_words[t // WORD] = row_words[t // WORD] & ~bit | (bit if stays else 0)
    return visited
