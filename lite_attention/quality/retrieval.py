"""Whether decoding finds what was put into a long text: a passkey, or one of several codes.

The text is prefilled densely, once for all settings. The question is decoded, token by token as far as attention goes,
and so is the answer: the step that must find the needle reads a list.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lite_attention.quality.batches import most_sequences
from lite_attention.quality.decoder import Decoder
from lite_attention.quality.generation import greedy
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.texts import Text, prefix_of, tokens_of

BOXES = "ABCDEFGH"
NEEDLES = {"passkey": 1, "multi-needle": len(BOXES)}
"""What is hidden, by kind, and how many."""


@dataclass(frozen=True)
class Case:
    """A text with needles, as tokens, a question, and the digits that answer it."""

    context: Tensor
    question: Tensor
    answer: str


@dataclass(frozen=True)
class Found:
    """How many of the cases of a kind and length were answered, `lost` of those that dense attention answers."""

    kind: str
    context: int
    setting: Setting
    cases: int
    found: int
    lost: int


def make_cases(
    kind: str, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, context: int, count: int, seed: int = 0
) -> list[Case]:
    """Cases of `context` tokens, their questions among them, the asked needle from the start to the end in turn."""
    dice, prefix, made = random.Random(f"{kind} {context} {seed}"), prefix_of(tokenizer), []
    for i in range(count):
        depth = i / max(count - 1, 1)
        codes = [str(dice.randrange(10000, 100000)) for _ in range(NEEDLES[kind])]
        asked = dice.randrange(len(codes))
        if kind == "passkey":
            needles = [f"\nThe pass key is {codes[0]}. Remember it. {codes[0]} is the pass key.\n"]
            question = "\nWhat is the pass key? The pass key is"
        else:
            needles = [f"\nThe code of box {box} is {code}.\n" for box, code in zip(BOXES, codes, strict=True)]
            question = f"\nWhat is the code of box {BOXES[asked]}? The code of box {BOXES[asked]} is"
        depths = [depth if n == asked else dice.random() for n in range(len(codes))]
        parts = [tokens_of(tokenizer, needle) for needle in needles]
        asks = tokens_of(tokenizer, question)
        room = context - len(prefix) - len(asks) - sum(map(len, parts))
        filler = texts[i % len(texts)].window(room, dice.random())
        made.append(Case(torch.cat([prefix, *_hidden(filler, parts, depths)]), asks, codes[asked]))
    return made


def measure_retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    context: int,
    cases: Sequence[Case],
    settings: Sequence[Setting],
    done: Callable[[str], None] = lambda _: None,
    sketch_bits: int = 12,
) -> list[Found]:
    """How many of the cases are answered by dense attention and by each setting; an answer is right where the code is
    in it.

    `done` is told what is done, before each setting and batch; `sketch_bits` are the decoder's.
    """
    new = len(tokens_of(tokenizer, " 12345.")) + 2  # room for a space or a quotation mark before the code
    room = context + new
    batch = min(len(cases), most_sequences(model, room))
    decoder = Decoder(model, batch, room, sketch_bits)
    answered: dict[Setting, list[bool]] = {setting: [] for setting in (DENSE, *settings)}
    for at in range(0, len(cases), batch):
        some = cases[at : at + batch]
        done(f"{kind}, {context}: prefill of cases {at + 1} to {at + len(some)}")
        for row, case in enumerate(some):
            decoder.truncate(row, 0)
            decoder.prefill(row, case.context.to(model.device))
        for setting, hits in answered.items():
            done(f"{kind}, {context}: {setting}, cases {at + 1} to {at + len(some)}")
            answers = greedy(decoder, _ask(decoder, some, setting), new, setting).tolist()
            hits.extend(
                case.answer in tokenizer.decode(answer).replace(" ", "")
                for case, answer in zip(some, answers, strict=True)
            )
    dense = answered[DENSE]
    return [
        Found(kind, context, setting, len(cases), sum(hits), sum(a and not b for a, b in zip(dense, hits, strict=True)))
        for setting, hits in answered.items()
    ]


def _ask(decoder: Decoder, cases: Sequence[Case], setting: Setting) -> Tensor:
    """The first token of each answer, (cases,). Questions of one length are decoded together."""
    of_length: dict[int, list[int]] = {}
    for row, case in enumerate(cases):
        decoder.truncate(row, len(case.context))
        of_length.setdefault(len(case.question), []).append(row)
    device = decoder.model.device
    first = torch.empty(len(cases), dtype=torch.long, device=device)
    for rows in of_length.values():
        questions = torch.stack([cases[row].question for row in rows]).to(device)
        first[rows] = decoder.decode(rows, questions, setting)[:, -1].argmax(-1)
    return first


def _hidden(filler: Tensor, needles: list[Tensor], depths: list[float]) -> list[Tensor]:
    """The filler in pieces, with each needle at its depth between them."""
    pieces, last = [], 0
    for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda one: one[0]):
        at = round(depth * len(filler))
        pieces += [filler[last:at], needle]
        last = at
    return [*pieces, filler[last:]]
