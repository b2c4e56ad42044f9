"""What is counted of requests whose lists are known beforehand: those of an eps that lets nearly all mass go."""

from __future__ import annotations

NEARLY_ALL = 0.9999999


def expected(prompt_tokens: int, new_tokens: int, *, min_context: int, newest: int) -> dict[str, int]:
    """Counts of one request, for each KV head and layer: pages read and visible, and decode steps by kind."""
    counts = {"read": 0, "visible": 0, "rows_listed": 0, "rows_dense": 0}
    for context in range(prompt_tokens + 1, prompt_tokens + new_tokens):  # the prompt's last token gives the first
        pages = -(-context // 16)
        counts["visible"] += pages
        if context < min_context:
            counts["rows_dense"] += 1
            counts["read"] += pages
        else:
            counts["rows_listed"] += 1
            first_new = (context - newest) // 16
            counts["read"] += pages - first_new + (first_new > 0)
    return counts
