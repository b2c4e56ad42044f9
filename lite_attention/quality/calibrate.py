"""An eps for each layer of a model, so that what its lists truly leave out is what the operator asks for.

Lists keep to their budget by the estimate of sketches, which in some layers is far below the truth. So the texts are
replayed as for the loss, with smaller and smaller eps in all layers at once, and each layer takes the largest one that
keeps it within the target. A last replay, with every layer at its own, tells what that leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.layer_eps import LayerEps
from lite_attention.quality.budgets import choose
from lite_attention.quality.decoder import Decoder
from lite_attention.quality.loss import replay
from lite_attention.quality.setting import Setting
from lite_attention.quality.tally import Tally

DIVISORS = (1, 2, 4, 8, 16, 32)  # of the target: the eps that are tried


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        found: for the file.
        before: the true mass that each layer left out with the target as its eps.
        never: layers that left out more than the target with every eps; they have the smallest.
    """

    found: LayerEps
    before: dict[int, float]
    never: tuple[int, ...]


def calibrate(
    decoder: Decoder,
    model: str,
    texts: Sequence[tuple[str, Tensor]],
    positions: int,
    setting: Setting,
    done: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Chooses the eps of each layer that decodes from lists.

    Args:
        decoder: of one sequence or more, the first of which is used, with room for the longest text.
        model: its name, for the file.
        texts: name and tokens (n,) of each, of one length.
        positions: that many tokens at the end of each are decoded.
        setting: its eps is the target, above 0.
        done: told what is done, before each replay.

    Raises:
        ValueError: no layer of the model decodes from lists.
    """
    target = setting.eps
    tried = [target / divisor for divisor in DIVISORS]
    measured = _left_out(decoder, texts, positions, [replace(setting, eps=eps) for eps in tried], done)
    if not measured[0]:
        raise wrong("model", "no layer that decodes from lists", "one with full attention that is not in dense_layers")
    chosen = {
        layer: choose({eps: left_out[layer] for eps, left_out in zip(tried, measured, strict=True)}, target)
        for layer in measured[0]
    }
    eps = {layer: min(tried) if own is None else own for layer, own in chosen.items()}
    (after,) = _left_out(decoder, texts, positions, [replace(setting, layer_eps=tuple(eps.items()))], done)
    names, context = tuple(name for name, _ in texts), len(texts[0][1])
    return Calibration(
        LayerEps(model, target, names, context, positions, eps, {layer: round(x, 4) for layer, x in after.items()}),
        {layer: round(x, 4) for layer, x in measured[0].items()},
        tuple(layer for layer, own in chosen.items() if own is None),
    )


def _left_out(
    decoder: Decoder,
    texts: Sequence[tuple[str, Tensor]],
    positions: int,
    settings: Sequence[Setting],
    done: Callable[[str], None],
) -> list[dict[int, float]]:
    """For each setting the true mass that each layer with lists left out, on average over the texts."""
    depth = decoder.model.config.num_hidden_layers
    tallies = [Tally(setting.eps) for setting in settings]
    for name, tokens in texts:
        start = len(tokens) - positions - 1
        done(f"calibration, {name}: prefill")
        decoder.truncate(0, 0)
        decoder.prefill(0, tokens[:start])
        for setting, tally in zip(settings, tallies, strict=True):
            done(f"calibration, {name}: {setting}")
            for _ in replay(decoder, start, tokens[start:-1], setting, tally):
                pass  # what the model says is of no interest here
    return [
        {layer: read.left_out for layer, read in tally.layers().items() if setting.lists(layer, depth)}
        for setting, tally in zip(settings, tallies, strict=True)
    ]
