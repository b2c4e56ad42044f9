"""Whether two runs of a model agree, where rounding may turn a token."""

from __future__ import annotations

import math


def is_a_tie(logits: dict[str, float], first: int, second: int) -> bool:
    """Whether two of the logits at a position are equal but for bfloat16 rounding: 2 units in the last place."""
    a, b = logits.get(str(first)), logits.get(str(second))
    if a is None or b is None:
        return False
    ulp = 2.0 ** (math.floor(math.log2(max(abs(a), abs(b), 1e-6))) - 7)
    return abs(a - b) <= 2 * ulp


def agreement(found: dict, expected: dict, excuse: bool) -> int:
    """How many tokens come before the first that differs, over all prompts; without `excuse`, that must be a tie."""
    agreed = 0
    for i, ((tokens,), (others,)) in enumerate(zip(found["tokens"], expected["tokens"], strict=True)):
        assert len(tokens) == len(others)
        same = next((at for at, (one, other) in enumerate(zip(tokens, others, strict=True)) if one != other), None)
        agreed += len(tokens) if same is None else same
        if same is not None and not excuse:
            pair = others[same], tokens[same]
            best, expected_best = found["best"][i][0][same], expected["best"][i][0][same]
            assert is_a_tie(best, *pair) or is_a_tie(expected_best, *pair), f"prompt {i} differs at {same}: {best}"
    return agreed
