"""What the Hopper kernels take of PyTorch's allocator while they choose pages, so that others can plan with it.

It mirrors `select` in `csrc/pages/ops.cu`, where `scratch` is allocated, and what that takes from
`csrc/pages/launch.h`: `kHeads`, `kTile`, `SelectParams::quads()` and `SelectParams::tiles_of_list()`.
"""

from __future__ import annotations

WORD = 4  # bytes, of float32 and uint32
HEADS = 4  # query heads that are estimated together
TILE = 16  # pages, likewise


def select_scratch_bytes(batch: int, heads: int, heads_k: int, max_seqlen_q: int, max_blocks: int) -> int:
    """Bytes that a call of `select_pages` or `decode_pages` on a GPU has from its start to its launches.

    `max_blocks` is the width of its block table: what it holds doesn't matter. A call that can't leave anything out, as
    `eps` is 0 or the table is for fewer tokens than `min_context`, takes none.
    """
    lists = batch * heads_k
    quads = lists * max_seqlen_q * -(-heads // (heads_k * HEADS))
    scores = quads * max_blocks * HEADS
    tiles = quads * -(-max_blocks // TILE) * HEADS
    ranks = lists * max_blocks
    return WORD * (scores + 2 * tiles + ranks)
