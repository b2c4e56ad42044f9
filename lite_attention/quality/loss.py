"""Perplexity of the last positions of a text, each predicted by a decode step.

Teacher forcing: whatever a step predicts, the next one is given the text's own token. What precedes the positions is
prefilled densely, once for all settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention.quality.decoder import Decoder
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.tally import Read, Tally

AT_ONCE = 512  # decode steps in a call: bounds the memory of logits


@dataclass(frozen=True)
class Loss:
    """One text and setting.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the text's tokens.
        change: perplexity over that of dense attention, less 1.
        change_error: its standard error, from the spread over positions: what is within two of it may be chance.
        divergence: KL divergence from dense attention's distributions, nats a token, on average.
        same_first: the share of positions where the most likely token is that of dense attention.
        read: over all layers but those with a sliding window; `layers` has each.
    """

    text: str
    context: int
    positions: int
    setting: Setting
    perplexity: float
    change: float
    change_error: float
    divergence: float
    same_first: float
    read: Read
    layers: dict[int, Read]


def measure_loss(
    decoder: Decoder,
    name: str,
    tokens: Tensor,
    positions: int,
    settings: Sequence[Setting],
    done: Callable[[str], None] = lambda _: None,
) -> list[Loss]:
    """For each setting, the loss over the last `positions` of `tokens` (n,), beside that of dense attention.

    Args:
        decoder: of one sequence or more, the first of which is used, with room for n tokens.
        name: of the text, for the result.
        done: told what is done, before each setting.
    """
    start = len(tokens) - positions - 1
    done(f"{name}: prefill")
    decoder.truncate(0, 0)
    decoder.prefill(0, tokens[:start])
    given, targets = tokens[start:-1], tokens[start + 1 :].split(AT_ONCE)
    done(f"{name}: dense")
    dense = list(replay(decoder, start, given, DENSE, None))
    dense_nll = _each(_nll, dense, targets)
    found = []
    for setting in settings:
        done(f"{name}: {setting}")
        tally = Tally(setting.eps)
        logits = list(replay(decoder, start, given, setting, tally))
        nll = _each(_nll, logits, targets)
        change = nll - dense_nll
        ratio = change.mean().exp().item()
        found.append(
            Loss(
                name,
                len(tokens),
                positions,
                setting,
                nll.mean().exp().item(),
                ratio - 1,
                ratio * (change.var(correction=0) / positions).sqrt().item(),
                divergences(logits, dense).mean().item(),
                _each(_same_first, logits, dense).mean().item(),
                tally.total(),
                tally.layers(),
            )
        )
    return found


def replay(decoder: Decoder, start: int, given: Tensor, setting: Setting, tally: Tally | None) -> Iterator[Tensor]:
    """Logits (n, vocab) after each of `given`, decoded from position `start` on, some at a time."""
    decoder.truncate(0, start)
    for part in given.split(AT_ONCE):
        yield decoder.decode([0], part[None], setting, tally)[0]


def divergences(logits: Iterable[Tensor], dense: Iterable[Tensor]) -> Tensor:
    """KL divergence in nats of what `logits` say from what `dense` ones say, float64 (positions,)."""
    return _each(_divergence, logits, dense)


def _each(measure: Callable[[Tensor, Tensor], Tensor], logits: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
    """float64 (positions,)."""
    return torch.cat([measure(a, b) for a, b in zip(logits, others, strict=True)]).double()


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _divergence(logits: Tensor, dense: Tensor) -> Tensor:
    here, there = (x.float().log_softmax(-1) for x in (logits, dense))
    return (there.exp() * (there - here)).sum(-1)


def _same_first(logits: Tensor, dense: Tensor) -> Tensor:
    return logits.argmax(-1) == dense.argmax(-1)
