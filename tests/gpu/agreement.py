"""Whether two runs of a model agree, where rounding may turn a token.

Kernels round otherwise, and by the last layer that moves logits, those of small value as much as those of large. How
much is measured, where both runs have had the same tokens: a difference of tokens is excused where it is of that size.
"""

from __future__ import annotations

import statistics

WORST = 6  # times the typical difference: of some thousand normal ones the largest is 4 times, of their pairs 5


def agreement(found: dict, expected: dict, excuse: bool = False) -> int:
    """How many tokens come before the first that differs, over all prompts; without `excuse`, that must be a tie.

    Both have for each prompt one sample's tokens, and of every position the logits of the best few.
    """
    agreed, typical = 0, rounding(found, expected)
    for i, ((tokens,), (others,)) in enumerate(zip(found["tokens"], expected["tokens"], strict=True)):
        same = _first_difference(tokens, others)
        agreed += same
        if same < len(tokens) and not excuse:
            here, there = found["best"][i][0][same], expected["best"][i][0][same]
            moved = _moved(here, there, str(tokens[same]), str(others[same]))
            assert moved <= WORST * typical, (
                f"prompt {i} differs at {same} by {moved}, rounding by {typical}: {here}, expected {there}"
            )
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


def _moved(here: dict[str, float], there: dict[str, float], token: str, other: str) -> float:
    """By how much the lead of one token over the other differs; without end where one isn't among the best."""
    if not {token, other} <= here.keys() & there.keys():
        return float("inf")
    return (here[token] - here[other]) - (there[token] - there[other])
