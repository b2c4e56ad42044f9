"""An eps for each layer of a model, by what lists in that layer do to the model's output.

How much mass a layer's lists leave out does not tell whether the model misses it. So each layer decodes the texts from
lists while all others stay dense, and the distributions of the next token are compared with those of dense attention.
Where the layers' divergences add up to more than the budget, those with more than their share are measured with
smaller eps too, and `budgets` chooses. A last replay, with every layer at its own eps, tells what all cost together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.layer_eps import LayerEps
from lite_attention.quality.budgets import Rung, choose, dense_rung, over_share, total
from lite_attention.quality.decoder import Decoder
from lite_attention.quality.loss import divergences, replay
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.tally import Tally

DIVISORS = (4, 16)  # of the target: the eps that are tried where the target costs too much; dense is below them
NEGLIGIBLE = 0.01  # of the budget: with less from rounding in all layers it isn't measured for each


@dataclass(frozen=True)
class Together:
    """One text with lists in all layers.

    Attributes:
        text: its name.
        rounding: KL divergence from dense attention, nats a token, with lists of everything: from rounding alone.
        at_target: with the target as eps of all layers.
        read_at_target: bytes read over those of dense attention, then.
        alone: the sum of what the layers cost alone, each with its own eps, without rounding.
        divergence: with each layer's own eps; `error` is its standard error.
        read: bytes, then.
    """

    text: str
    rounding: float
    at_target: float
    read_at_target: float
    alone: float
    divergence: float
    error: float
    read: float


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        found: for the file.
        budget: nats a token, for each text.
        at_target: each layer alone with the target as its eps.
        chosen: each layer alone with the eps that it has been given.
        together: of each text.
    """

    found: LayerEps
    budget: float
    at_target: dict[int, Rung]
    chosen: dict[int, Rung]
    together: tuple[Together, ...]

    @property
    def over(self) -> list[str]:
        """Texts in which all layers together cost more than the budget, and chance hardly explains it."""
        return [each.text for each in self.together if each.divergence - each.rounding - 2 * each.error > self.budget]


def calibrate(
    decoder: Decoder,
    model: str,
    texts: Sequence[tuple[str, Tensor]],
    positions: int,
    setting: Setting,
    budget: float,
    done: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Chooses the eps of each layer that decodes from lists.

    Args:
        decoder: of one sequence or more, the first of which is used, with room for the longest text.
        model: its name, for the file.
        texts: name and tokens (n,) of each, of one length.
        positions: that many tokens at the end of each are decoded.
        setting: its eps is the target, above 0, and the largest eps of any layer.
        budget: KL divergence in nats a token that lists in all layers may cost any of the texts, above 0.
        done: told what is done, before each step.

    Raises:
        ValueError: no layer of the model decodes from lists.
    """
    found = _Measured(decoder, texts, positions, setting, budget, done)
    at_target = found.first()
    ladders = {layer: [rung] for layer, rung in at_target.items()}
    over = over_share(at_target, budget)
    for layer, rungs in found.lower(over).items():
        ladders[layer] += [*rungs, dense_rung(len(texts))]
    chosen = choose(ladders, budget)
    eps = {layer: rung.eps for layer, rung in chosen.items()}
    # Without a smaller eps, what all cost together is known.
    own = found.all_own(replace(setting, layer_eps=tuple(eps.items()))) if over else found.at_target
    together = tuple(
        Together(
            name,
            max(rounding.mean().item(), 0.0),  # below 0 by rounding of its own
            target.mean().item(),
            read_target,
            total(list(chosen.values()), number),
            apart.mean().item(),
            _error(apart),
            read,
        )
        for number, ((name, _), rounding, (target, read_target), (apart, read)) in enumerate(
            zip(texts, found.rounding, found.at_target, own, strict=True)
        )
    )
    names = tuple(name for name, _ in texts)
    layer_eps = LayerEps(model, setting.eps, names, len(texts[0][1]), positions, eps, decoder.sketch_bits)
    return Calibration(layer_eps, budget, at_target, chosen, together)


class _Measured:
    """Replays of all texts.

    Attributes:
        rounding: of each text the divergence (positions,) with lists of everything in all layers.
        at_target: of each text the divergence with the target in all layers, and the bytes read.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[tuple[str, Tensor]],
        positions: int,
        setting: Setting,
        budget: float,
        done: Callable[[str], None],
    ) -> None:
        self._decoder, self._texts, self._positions = decoder, texts, positions
        self._setting, self._budget, self._done = setting, budget, done
        self._depth = decoder.model.config.num_hidden_layers
        self._alone_rounding: list[dict[int, Tensor]] = []  # of each text, by layer
        self.rounding: list[Tensor] = []
        self.at_target: list[tuple[Tensor, float]] = []

    def first(self) -> dict[int, Rung]:
        """All layers, together and each alone, with the target."""
        found = []
        for number in range(len(self._texts)):
            text = self._text(number)
            text.say("all layers")
            self.rounding.append(text.apart(replace(self._setting, eps=0.0))[0])
            apart, tally = text.apart(self._setting)
            self.at_target.append((apart, tally.total().bytes))
            layers = [layer for layer in tally.layers() if self._setting.lists(layer, self._depth)]
            if not layers:
                raise wrong(
                    "model", "no layer that decodes from lists", "one with full attention that is not in dense_layers"
                )
            # In 16 bits a change of any size in one layer is rounding in all layers behind it, which would be counted
            # once for each layer.
            rounds = self.rounding[-1].mean().item() * len(layers) > NEGLIGIBLE * self._budget
            self._alone_rounding.append({})
            found.append({})
            for layer in layers:
                text.say(f"layer {layer}, eps {self._setting.eps:g}")
                alone = text.apart(self._alone(layer, 0.0))[0] if rounds else torch.zeros_like(apart)
                self._alone_rounding[-1][layer] = alone
                found[-1][layer] = self._one(text, number, layer, self._setting.eps)
        return {layer: _rung(self._setting.eps, [each[layer] for each in found]) for layer in found[0]}

    def lower(self, layers: Sequence[int]) -> dict[int, list[Rung]]:
        """These layers, each alone, with the smaller eps, the largest first."""
        tried = [self._setting.eps / divisor for divisor in DIVISORS]
        found = {layer: {eps: [] for eps in tried} for layer in layers}
        for number in range(len(self._texts)) if layers else ():
            text = self._text(number)
            for layer in layers:
                text.say(f"layer {layer}, eps {', '.join(f'{eps:g}' for eps in tried)}")
                for eps in tried:
                    found[layer][eps].append(self._one(text, number, layer, eps))
        return {layer: [_rung(eps, each) for eps, each in by_eps.items()] for layer, by_eps in found.items()}

    def all_own(self, setting: Setting) -> list[tuple[Tensor, float]]:
        """Of each text the divergence in this setting, and the bytes read."""
        found = []
        for number in range(len(self._texts)):
            text = self._text(number)
            text.say(str(setting))
            apart, tally = text.apart(setting)
            found.append((apart, tally.total().bytes))
        return found

    def _text(self, number: int) -> _Text:
        return _Text(self._decoder, *self._texts[number], self._positions, self._done)

    def _alone(self, layer: int, eps: float) -> Setting:
        others = tuple(other for other in range(self._depth) if other != layer)
        return replace(self._setting, eps=eps, dense_layers=others)

    def _one(self, text: _Text, number: int, layer: int, eps: float) -> tuple[Tensor, float, float]:
        """Divergence (positions,) beyond rounding, bytes read and mass left out of one layer alone."""
        apart, tally = text.apart(self._alone(layer, eps))
        read = tally.layers()[layer]
        return apart - self._alone_rounding[number][layer], read.bytes, read.left_out


class _Text:
    """A text that is prefilled, and what dense attention says after each of its positions."""

    def __init__(
        self, decoder: Decoder, name: str, tokens: Tensor, positions: int, done: Callable[[str], None]
    ) -> None:
        self._decoder, self._name, self._done = decoder, name, done
        self._start = len(tokens) - positions - 1
        self._given = tokens[self._start : -1]
        self.say("prefill")
        decoder.truncate(0, 0)
        decoder.prefill(0, tokens[: self._start])
        self._dense = list(replay(decoder, self._start, self._given, DENSE, None))

    def say(self, what: str) -> None:
        self._done(f"calibration, {self._name}: {what}")

    def apart(self, setting: Setting) -> tuple[Tensor, Tally]:
        """KL divergence from dense attention after each position, and what was read."""
        tally = Tally(setting.eps)
        return divergences(replay(self._decoder, self._start, self._given, setting, tally), self._dense), tally


def _rung(eps: float, texts: Sequence[tuple[Tensor, float, float]]) -> Rung:
    return Rung(
        eps,
        tuple(apart.mean().item() for apart, _, _ in texts),
        tuple(_error(apart) for apart, _, _ in texts),
        sum(read for _, read, _ in texts) / len(texts),
        sum(left_out for _, _, left_out in texts) / len(texts),
    )


def _error(apart: Tensor) -> float:
    return (apart.var(correction=0) / len(apart)).sqrt().item()
