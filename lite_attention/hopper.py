"""What the Hopper kernel supports, and its launch."""

from __future__ import annotations

from lite_attention.checks import Problem


def check_supported(problem: Problem) -> None:
    """Raises NotImplementedError where the kernel can't compute `problem`."""
    raise NotImplementedError("LiteAttention has no Hopper kernel yet; backend='reference' computes the call, slowly.")
