"""The user's texts as tokens, and windows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lite_attention.checks import wrong

FRONT = 0.1  # of a text is left out: titles, licences, contents


@dataclass(frozen=True)
class Text:
    """Tokens of one file, on the CPU, without special tokens."""

    name: str
    tokens: Tensor

    def window(self, length: int, place: float) -> Tensor:
        """`length` tokens: of all windows that there are, the one this far through the text, 0 to 1.

        Raises:
            ValueError: the text has fewer tokens.
        """
        last = len(self.tokens) - length
        if last < 0:
            raise wrong(self.name, f"a text of {len(self.tokens)} tokens", f"{length} after its first tenth")
        start = round(last * place)
        return self.tokens[start : start + length]


def windows(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, context: int, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Name of each text, and its first `context` tokens on the device, the tokenizer's prefix among them."""
    prefix = prefix_of(tokenizer)
    for text in texts:
        yield text.name, torch.cat([prefix, text.window(context - len(prefix), 0)]).to(device)


def read_texts(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """The files as UTF-8, each from a tenth of its length on."""
    return [Text(path.name, tokens_of(tokenizer, _body(path))) for path in paths]


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """int64 (n,), without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The special tokens that the tokenizer puts before a text, such as BOS; often none."""
    return torch.tensor(tokenizer("").input_ids, dtype=torch.long)


def _body(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[round(len(text) * FRONT) :]
