"""A second opinion on sketches and lists: one byte, one channel, one page at a time, in float64, from the words."""

from __future__ import annotations

import math
import struct

PAGE = 16


def moments(sketch, head_dim):
    """Mean and difference of each channel, and the deviation, from the bytes of one sketch; None where it has none."""
    offset, step, difference_step, deviation = struct.unpack("<4f", bytes(sketch[:16]))
    if math.isnan(offset):
        return None
    after = 16 + 16 * math.ceil(head_dim / 16)
    mean, difference = [], []
    for d in range(head_dim):
        code = sketch[16 + d]
        if len(sketch) == after:  # of 8 bits
            code, of_difference = code % 16, code // 16
        else:
            byte, is_high = place(d)
            of_difference = sketch[after + byte] // 16 if is_high else sketch[after + byte] % 16
        mean.append(offset + step * code)
        difference.append((of_difference - 8) * difference_step)
    return mean, difference, deviation


def place(channel):
    """Where the difference of a channel is among those of 12 bits: the byte, and whether it is in its high half."""
    before, among = divmod(channel, 8)
    byte, is_high = {0: (0, 0), 2: (0, 1), 4: (1, 0), 6: (1, 1), 1: (2, 0), 3: (2, 1), 5: (3, 0), 7: (3, 1)}[among]
    return 4 * before + byte, bool(is_high)


def estimate(query, sketch, scale):
    """Log-mass of a page less log(16), or None."""
    found = moments(sketch, len(query))
    if found is None:
        return None
    mean, difference, deviation = found
    score = scale * math.fsum(x * m for x, m in zip(query, mean, strict=True))
    spread = math.sqrt(4 * scale**2 * math.fsum(x * x for x in query) * deviation**2)
    others = score + (spread**2 / 2 if spread < 1.74 else 1.74 * spread - 1.74**2 / 2)
    apart = score + scale * math.fsum(x * d for x, d in zip(query, difference, strict=True))
    top = max(others, apart)
    return top + math.log((15 * math.exp(others - top) + math.exp(apart - top)) / 16)


def shares(queries, sketches, scale):
    """One dict, page to share, for each query of a group; pages of None are not in it."""
    result = []
    for query in queries:
        logs = {page: estimate(query, sketch, scale) for page, sketch in enumerate(sketches)}
        logs = {page: x for page, x in logs.items() if x is not None}
        top = max(logs.values(), default=0.0)
        total = math.fsum(math.exp(x - top) for x in logs.values())
        result.append({page: math.exp(x - top) / total for page, x in logs.items()})
    return result


def forced(position, newest):
    """Pages listed whatever the estimate says."""
    return {0} | {j // PAGE for j in range(max(0, position + 1 - newest), position + 1)}


def token_list(queries, sketches, position, *, scale, eps, newest):
    """The list of one query token and KV head; `sketches` are of the pages that it sees all of."""
    always = forced(position, newest)
    of_heads = shares(queries, sketches, scale)
    rest = [page for page in range(len(sketches)) if page in of_heads[0] and page not in always]
    unknown = {page for page in range(len(sketches)) if page not in of_heads[0]}
    rank = {page: max(share[page] for share in of_heads) for page in rest}
    rest.sort(key=rank.get)
    while rest:
        for dropped in range(len(rest), -1, -1):
            if all(math.fsum(share[page] for page in rest[:dropped]) <= eps for share in of_heads):
                return always | unknown | set(rest[dropped:])
    return always | unknown


def lists(step):
    """The lists of a step, sets, [batch][head]."""
    case, result = step.case, []
    for b, (q_len, k_len) in enumerate(zip(case.q_lens, case.k_lens, strict=True)):
        result.append([])
        for head in range(case.heads_k):
            listed = set()
            if q_len and (case.eps == 0 or k_len < case.min_context):
                listed = {j // PAGE for j in range(k_len)}
            else:
                for i in range(q_len):
                    position = k_len - q_len + i
                    if position >= 0:
                        listed |= token_list(
                            *seen_by(step, b, head, i),
                            position,
                            scale=step.scale * step.descale("k_descale", b, head),
                            eps=case.eps,
                            newest=case.newest,
                        )
            result[b].append(listed)
    return result


def seen_by(step, b, head, i):
    """The queries of the group in token i of sequence b, and the sketches of the pages that it sees all of."""
    case = step.case
    position = case.k_lens[b] - case.q_lens[b] + i
    row = step.rows(b).start + i
    queries = step.q[row, head * case.group : (head + 1) * case.group].double().tolist()
    pages = step.block_table[b, : (position + 1) // PAGE].tolist()
    return queries, [step.sketch[page, head].tolist() for page in pages]
