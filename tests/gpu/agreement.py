"""Whether two runs of a model agree, where rounding may turn a token.

Kernels round otherwise, and by the last layer that moves logits, those of small value as much as those of large. How
much is measured, where both runs have had the same tokens: a difference of tokens is excused where it is of that size.
It is not where logits are equal: of these one and the same token must come.
"""

from __future__ import annotations

import statistics

WORST = 6.0  # times the typical difference: of some thousand normal ones the largest is 4 times, of their pairs 5


def agreement(found: dict, expected: dict, excuse: bool = False, worst: float = WORST) -> int:
    """How many tokens come before the first that differs, over all prompts; without `excuse`, that must be a tie.

    A tie is where logits have moved by at most `worst` times what rounding moves them by. Both have for each prompt one
    sample's tokens, and of every position the logits of the best few.
    """
    agreed, typical = 0, rounding(found, expected)
    for i, ((tokens,), (others,)) in enumerate(zip(found["tokens"], expected["tokens"], strict=True)):
        same = _first_difference(tokens, others)
        agreed += same
        if same < len(tokens) and not excuse:
            here, there = found["best"][i][0][same], expected["best"][i][0][same]
            token, other = str(tokens[same]), str(others[same])
            where = f"prompt {i} differs at {same}: {token} of {here}, expected {other} of {there}"
            assert _lead(here, token, other) >= 0 and _lead(there, other, token) >= 0, f"not the best token; {where}"
            moved = _lead(here, token, other) + _lead(there, other, token)
            assert 0 < moved <= worst * typical, f"logits moved by {moved}, by rounding {typical}; {where}"
    return agreed


def rounding(found: dict, expected: dict) -> float:
    """The root mean square by which logits differ, beside what they have in common, where they differ at all."""
    spreads = []
    for i, ((tokens,), (others,)) in enumerate(zip(found["tokens"], expected["tokens"], strict=True)):
        same = _first_difference(tokens, others)
        for here, there in zip(found["best"][i][0][:same], expected["best"][i][0][:same], strict=True):
            both = [here[token] - there[token] for token in here.keys() & there.keys()]
            if len(both) > 1 and any(both):
                spreads.append(statistics.variance(both))
    return statistics.fmean(spreads) ** 0.5 if spreads else 0.0


def _first_difference(tokens: list[int], others: list[int]) -> int:
    assert len(tokens) == len(others)
    return next((at for at, (one, other) in enumerate(zip(tokens, others, strict=True)) if one != other), len(tokens))


def _lead(best: dict[str, float], token: str, other: str) -> float:
    """Of one token over the other; without end where one isn't among the best."""
    return best[token] - best[other] if {token, other} <= best.keys() else float("inf")
