"""The choice of an eps for each layer, from what lists in that layer alone do to a model's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Target eps and divergence in nats a token: about a perplexity half a percent and two percent higher.
KNOWN = ((0.02, 0.0025), (0.1, 0.01))
TINY = 1e-6  # of bytes: a move that adds none is the best one


@dataclass(frozen=True)
class Rung:
    """One layer at one eps, with all other layers dense.

    Attributes:
        eps: 0 is dense.
        divergence: KL divergence from dense attention's distributions, nats a token, on average, for each text; less
            what rounding alone makes, so that it may be below 0 by chance.
        error: the standard error of each.
        read: bytes that the layer reads over those of dense attention, on average over the texts.
        left_out: the true softmax mass that its lists leave out, on average over the texts.
    """

    eps: float
    divergence: tuple[float, ...]
    error: tuple[float, ...]
    read: float
    left_out: float

    @property
    def most(self) -> tuple[float, float]:
        """The largest divergence of the texts, and its error."""
        return max(zip(self.divergence, self.error, strict=True))


def dense_rung(texts: int) -> Rung:
    return Rung(0.0, (0.0,) * texts, (0.0,) * texts, 1.0, 0.0)


def default_budget(eps: float) -> float:
    """Nats a token that all layers together may cost with this target: a straight line through what is known."""
    (low, less), (high, more) = KNOWN
    return less + (eps - low) * (more - less) / (high - low)


def over_share(rungs: Mapping[int, Rung], budget: float) -> list[int]:
    """Layers that must be measured at a smaller eps: where the texts exceed the budget, those above an equal share.

    The others, at most at their share each, never need a smaller one.
    """
    if _worst(list(rungs.values()))[1] <= budget:
        return []
    return [layer for layer, rung in rungs.items() if rung.most[0] > budget / len(rungs)]


def choose(ladders: Mapping[int, Sequence[Rung]], budget: float) -> dict[int, Rung]:
    """One rung of each layer: the sum of divergences is within the budget for every text, and few bytes are read.

    Divergences of small changes that have nothing to do with each other add up, which is what this counts on. Greedy:
    while a text exceeds the budget, the layer goes down whose step saves that text the most for each byte that it adds.
    Then every layer that turns out to be lower than it must goes up again.

    Args:
        ladders: of each layer, from its largest eps on.
        budget: nats a token, above 0.

    Raises:
        ValueError: the lowest rungs exceed the budget.
    """
    at = dict.fromkeys(ladders, 0)

    def chosen(at: Mapping[int, int]) -> dict[int, Rung]:
        return {layer: ladders[layer][n] for layer, n in at.items()}

    while True:
        text, total = _worst(list(chosen(at).values()))
        if total <= budget:
            break
        moves = [
            (saved / max(below.read - here.read, TINY), layer, n)
            for layer, here in chosen(at).items()
            for n, below in enumerate(ladders[layer])
            if n > at[layer] and (saved := _cost(here, text) - _cost(below, text)) > 0
        ]
        if not moves:
            raise ValueError(f"budget: got {budget:g}; needs at least {total:g}, what the smallest eps cost")
        _, layer, n = max(moves)
        at[layer] = n
    for layer in sorted(at, key=lambda layer: -ladders[layer][at[layer]].read):
        for n in range(at[layer]):
            if _worst(list(chosen(at | {layer: n}).values()))[1] <= budget:
                at[layer] = n
                break
    return chosen(at)


def total(rungs: Sequence[Rung], text: int) -> float:
    """The sum of the layers' divergences for this text."""
    return sum(_cost(rung, text) for rung in rungs)


def _worst(rungs: Sequence[Rung]) -> tuple[int, float]:
    """The text with the largest sum of divergences, by its number, and that sum."""
    sums = [total(rungs, text) for text in range(len(rungs[0].divergence))]
    return max(enumerate(sums), key=lambda each: each[1])


def _cost(rung: Rung, text: int) -> float:
    return max(rung.divergence[text], 0.0)
