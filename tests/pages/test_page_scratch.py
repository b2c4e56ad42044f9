"""The scratch of a selection on a GPU, against sizes worked out by hand."""

from __future__ import annotations

import pytest

from lite_attention.pages import select_scratch_bytes


@pytest.mark.parametrize(
    ("batch", "heads", "heads_k", "max_seqlen_q", "max_blocks", "expected"),
    [
        # 2 lists, heads by fours 2 each: 4 quads of 1 page and 1 tile. Words: 4 * 4 + 2 * 4 * 4 + 2.
        (1, 10, 2, 1, 1, 4 * 50),
        # 4 lists, 3 tokens each: 12 quads of 17 pages and 2 tiles. Words: 12 * 17 * 4 + 2 * 12 * 2 * 4 + 4 * 17.
        (2, 6, 2, 3, 17, 4 * (816 + 192 + 68)),
        # 128k tokens, four heads to a KV head: 16 + 2 + 4 bytes a page and list.
        (1024, 32, 8, 1, 8192, 22 * 8 * 1024 * 8192),
        # A fifth head is a second quad.
        (1024, 40, 8, 1, 8192, (2 * 18 + 4) * 8 * 1024 * 8192),
        (0, 32, 8, 1, 8192, 0),
    ],
)
def test_bytes_by_hand(batch, heads, heads_k, max_seqlen_q, max_blocks, expected):
    assert select_scratch_bytes(batch, heads, heads_k, max_seqlen_q, max_blocks) == expected
