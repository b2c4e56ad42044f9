"""What is to be measured."""

from __future__ import annotations

from dataclasses import dataclass

from lite_attention.quality.setting import Setting

PARTS = ("loss", "retrieval", "generation")


@dataclass(frozen=True)
class Plan:
    """All lengths are in tokens.

    Attributes:
        parts: some of PARTS.
        context, positions: of the loss; prompts of generation are a quarter of the context to all of it.
        lengths, cases: of retrieval, cases of each kind and length.
        prompts, tokens: of generation, tokens of each output.
        sketch_bits: of a channel in the sketch of a page, for all settings.
    """

    parts: tuple[str, ...]
    settings: tuple[Setting, ...]
    context: int
    positions: int
    lengths: tuple[int, ...]
    cases: int
    prompts: int
    tokens: int
    sketch_bits: int
