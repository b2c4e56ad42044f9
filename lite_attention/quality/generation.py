"""For how long greedy generation from lists says the same as from dense attention.

Two ways to compute one attention differ by rounding, and a model that hesitates between two tokens turns that into
another text. So a setting of eps 0, which lists everything and computes rows whole, belongs beside the others: it tells
how long outputs agree when nothing but rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lite_attention.quality.batches import most_sequences
from lite_attention.quality.decoder import Decoder
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.texts import Text, prefix_of

BEFORE, AFTER = 12, 16  # tokens that a side-by-side shows around the first difference


@dataclass(frozen=True)
class Difference:
    """Where a prompt's two outputs part: what both say before, and what each goes on with."""

    prompt: int
    prompt_tokens: int
    at: int
    both: str
    dense: str
    listed: str


@dataclass(frozen=True)
class Agreement:
    """Over all prompts, tokens until the first difference: `agreed` has each, `tokens` where there is none."""

    setting: Setting
    tokens: int
    agreed: list[int]
    differences: list[Difference]

    @property
    def same(self) -> int:
        """Prompts whose outputs are the same to the end."""
        return sum(each == self.tokens for each in self.agreed)


def make_prompts(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, shortest: int, longest: int, count: int
) -> list[Tensor]:
    """Windows of the texts in turn, from `shortest` to `longest` tokens, spread over each text."""
    prefix, prompts = prefix_of(tokenizer), []
    for i in range(count):
        part = i / max(count - 1, 1)
        length = round(shortest + (longest - shortest) * part) - len(prefix)
        prompts.append(torch.cat([prefix, texts[i % len(texts)].window(length, 1 - part)]))
    return prompts


def greedy(decoder: Decoder, first: Tensor, count: int, setting: Setting) -> Tensor:
    """The most likely tokens, `count` of each sequence, of which `first` (rows,) are chosen already: (rows, count)."""
    rows, chosen = range(len(first)), [first]
    while len(chosen) < count:
        chosen.append(decoder.decode(rows, chosen[-1][:, None], setting)[:, -1].argmax(-1))
    return torch.stack(chosen, dim=1)


def measure_agreement(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    tokens: int,
    settings: Sequence[Setting],
    done: Callable[[str], None] = lambda _: None,
    sketch_bits: int = 12,
) -> list[Agreement]:
    """For each setting, greedy outputs of `tokens` tokens beside those of dense attention. Nothing ends an output.

    The first token comes from the prefill, the same for all. `done` is told what is done, before each setting and
    batch; `sketch_bits` are the decoder's.
    """
    room = max(map(len, prompts)) + tokens
    batch = min(len(prompts), most_sequences(model, room))
    decoder = Decoder(model, batch, room, sketch_bits)
    outputs: dict[Setting, list[Tensor]] = {setting: [] for setting in (DENSE, *settings)}
    for at in range(0, len(prompts), batch):
        some = prompts[at : at + batch]
        done(f"generation: prefill of prompts {at + 1} to {at + len(some)}")
        for row in range(len(some)):
            decoder.truncate(row, 0)
        first = torch.stack([decoder.prefill(row, prompt.to(model.device)) for row, prompt in enumerate(some)])
        for setting, out in outputs.items():
            done(f"generation: {setting}, prompts {at + 1} to {at + len(some)}")
            for row, prompt in enumerate(some):
                decoder.truncate(row, len(prompt))
            out.extend(greedy(decoder, first.argmax(-1), tokens, setting).cpu())
    return [compare(tokenizer, prompts, outputs[DENSE], outputs[setting], setting) for setting in settings]


def compare(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    dense: Sequence[Tensor],
    listed: Sequence[Tensor],
    setting: Setting,
) -> Agreement:
    """Outputs of two kinds, a prompt's by a prompt's."""
    agreed, differences = [], []
    for number, (prompt, a, b) in enumerate(zip(prompts, dense, listed, strict=True)):
        parted = (a != b).nonzero().flatten().tolist()
        at = parted[0] if parted else len(a)
        agreed.append(at)
        if parted:
            both, after = a[max(at - BEFORE, 0) : at], slice(at, at + AFTER)
            texts = map(tokenizer.decode, (both, a[after], b[after]))
            differences.append(Difference(number, len(prompt), at, *texts))
    return Agreement(setting, len(dense[0]), agreed, differences)
