"""Canaries: greedy prompts whose answer, among whatever load, is the one they had alone.

Two causes may turn a token, and are excused: a preemption, after which vLLM computes what was generated as a prompt,
and rounding. How much that is, is measured where two answers have had the same tokens: a difference is excused where
the lead of one token over the other moved no more than that. On the CPU in float32 answers are usually the same to the
bit, and nothing is excused.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

WORST = 6  # times the typical difference: of some thousand normal ones the largest is 4 times, of their pairs 5

Best = list[dict[str, float]]


@dataclass
class Canaries:
    """Compares answers with first ones.

    Attributes:
        first: tokens and logprobs of each canary, as it answered alone.
        found: how many answers were the same, and how many differences were excused, by cause.
    """

    first: list[tuple[list[int], Best]]
    found: Counter = field(default_factory=Counter)
    _spread: float = 0.0
    _spreads: int = 0

    @property
    def rounding(self) -> float:
        """The root mean square by which logprobs differ, beside what they have in common, where they differ at all."""
        return (self._spread / self._spreads) ** 0.5 if self._spreads else 0.0

    def compare(self, at: int, tokens: list[int], best: Best, preempted: bool) -> str | None:
        """What is wrong with another answer of canary `at`, or None. `preempted`: a request was while it ran."""
        expected, expected_best = self.first[at]
        pairs = list(zip(tokens, expected, strict=False))
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
        if not preempted:
            self._measure(best[:same], expected_best[:same])
        if same == len(tokens) == len(expected):
            self.found["same, beside a preemption" if preempted else "same"] += 1
            return None
        if preempted:
            self.found["another answer, beside a preemption"] += 1
            return None
        if same == len(pairs):
            return f"canary {at}: {len(tokens)} tokens, {len(expected)} at first"
        moved = _moved(best[same], expected_best[same], tokens[same], expected[same])
        if moved <= WORST * self.rounding:
            self.found["another answer, by rounding"] += 1
            return None
        return (
            f"canary {at}: token {same} is {tokens[same]}, at first {expected[same]}: one's lead over the other moved "
            f"by {moved:.4g}, rounding by {self.rounding:.4g}: {best[same]}, at first {expected_best[same]}"
        )

    def unused(self) -> str | None:
        """Whether there was nothing that could fail."""
        if self.found["same"] + self.found["another answer, by rounding"]:
            return None
        return "no canary was compared without a preemption beside it: needs a longer run, more pages or a lower rate"

    def _measure(self, best: Best, expected: Best) -> None:
        for here, there in zip(best, expected, strict=True):
            both = [here[token] - there[token] for token in here.keys() & there.keys()]
            if len(both) > 1 and any(both):
                self._spread += statistics.variance(both)
                self._spreads += 1


def _moved(here: dict[str, float], there: dict[str, float], token: int, other: int) -> float:
    """By how much one token's lead over the other moved; without end where it has none, or one isn't among the best."""
    one, two = f"token_id:{token}", f"token_id:{other}"
    if not {one, two} <= here.keys() & there.keys():
        return float("inf")
    lead = here[one] - here[two]
    return lead - (there[one] - there[two]) if lead >= 0 else float("inf")  # a greedy choice leads
