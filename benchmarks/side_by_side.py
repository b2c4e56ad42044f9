"""Greedy outputs of two engines for the same prompts: how long they agree, and the first differences side by side.

    python benchmarks/side_by_side.py MODEL lists.outputs.json dense.outputs.json --out differences.md

The JSONs are what `vllm_code.py --out` leaves of outputs: in one file where it ran all engines, in two where they ran
apart. MODEL is a Hugging Face directory, for its tokenizer. Two ways to compute one attention part by rounding alone,
sooner or later: the engine `eps=0` beside the others tells how soon.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

BEFORE, AFTER = 12, 16  # tokens that are shown around the first difference
LASTED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # tokens
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Outputs:
    """Of one engine: for each prompt its length and the tokens that follow."""

    prompt_tokens: list[int]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Agreement:
    """For each prompt the tokens before the first that differs; `of_tokens` where none of so many does."""

    agreed: list[int]
    of_tokens: int

    @property
    def same(self) -> int:
        """Prompts whose outputs are the same to the end."""
        return sum(each == self.of_tokens for each in self.agreed)

    def lasted(self, tokens: int) -> float:
        """The share of prompts whose outputs are the same for so many tokens."""
        return statistics.fmean(each >= tokens for each in self.agreed)


def agreement(outputs: Outputs, others: Outputs) -> Agreement:
    """Of as many tokens as all outputs have.

    Raises:
        ValueError: they are not of the same prompts, as far as lengths tell.
    """
    if outputs.prompt_tokens != others.prompt_tokens:
        got, works = (f"{len(each.tokens)} prompts" for each in (outputs, others))
        raise ValueError(f"outputs: got those of {got}, not of the other engine's {works}, or of other lengths")
    compared = min(map(len, outputs.tokens + others.tokens))
    both = zip(outputs.tokens, others.tokens, strict=True)
    return Agreement([_first_difference(a[:compared], b[:compared]) for a, b in both], compared)


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def read(files: Iterable[Path]) -> dict[str, Outputs]:
    """The outputs of all files, by engine."""
    return {name: Outputs(**each) for path in files for name, each in json.loads(path.read_text()).items()}


def markdown(outputs: dict[str, Outputs], peer: str, decode: Decode) -> str:
    """Of each engine beside `peer`: how long outputs agree, and where each prompt's two part."""
    dense = outputs[peer]
    compared = {name: agreement(each, dense) for name, each in outputs.items() if name != peer}
    lengths = dense.prompt_tokens
    shown = " to ".join(map(str, sorted({min(lengths), max(lengths)})))
    lines = [
        f"# How long outputs are those of {peer}",
        "",
        f"Written by `benchmarks/side_by_side.py`. {len(lengths)} prompts of {shown} tokens, answered greedily. Agreed "
        "are the tokens before the first that differs.",
        "",
        "| engine | the same to the end | agreed, median | quartiles | mean | least |",
        "|---|---|---|---|---|---|",
        *(_summary(name, each) for name, each in compared.items()),
        "",
        "Share of prompts whose outputs are the same for so many tokens:",
        "",
        *_shares(compared),
    ]
    for name, each in compared.items():
        lines += ["", *_differences(name, peer, each, outputs[name], dense, decode)]
    return "\n".join(lines) + "\n"


def _summary(name: str, found: Agreement) -> str:
    agreed, prompts = found.agreed, len(found.agreed)
    low, _, high = statistics.quantiles(agreed, n=4, method="inclusive") if prompts > 1 else agreed * 3
    return (
        f"| {name} | {found.same} of {prompts}, {found.same / prompts:.1%} | {statistics.median(agreed):g} of "
        f"{found.of_tokens} | {low:g} to {high:g} | {statistics.fmean(agreed):.1f} | {min(agreed)} |"
    )


def _shares(compared: dict[str, Agreement]) -> list[str]:
    most = max((each.of_tokens for each in compared.values()), default=0)
    steps = [*(each for each in LASTED if each < most), most]
    lines = ["| engine |" + "".join(f" {each} |" for each in steps), "|---|" + "---|" * len(steps)]
    for name, each in compared.items():
        cells = (f" {each.lasted(step):.1%} |" if step <= each.of_tokens else " |" for step in steps)
        lines.append(f"| {name} |" + "".join(cells))
    return lines


def _differences(name: str, peer: str, found: Agreement, outputs: Outputs, dense: Outputs, decode: Decode) -> list[str]:
    """A table of the prompts whose outputs part."""
    lines = [f"## {name} beside {peer}", ""]
    if found.same == len(found.agreed):
        return [*lines, f"All outputs are the same for {found.of_tokens} tokens."]
    lines += [f"| prompt | agreed | both say | {peer} goes on | {name} goes on |", "|---|---|---|---|---|"]
    for prompt, at in enumerate(found.agreed):
        if at < found.of_tokens:
            before, after = slice(max(at - BEFORE, 0), at), slice(at, at + AFTER)
            one, other = dense.tokens[prompt], outputs.tokens[prompt]
            texts = (_code(decode(part)) for part in (one[before], one[after], other[after]))
            cells = [f"{prompt + 1} ({dense.prompt_tokens[prompt]} tokens)", str(at), *texts]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _code(text: str) -> str:
    """A text as code in a cell, on one line: a fence longer than any in it, and pipes that end no cell."""
    shown = repr(text)[1:-1].replace("|", "\\|")
    if not shown:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}"


def decoder(model: Path) -> Decode:
    """The text of tokens by the tokenizer of a Hugging Face directory."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("outputs", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--peer", default="FLASH_ATTN", help="the engine that the others are held to (%(default)s)")
    parser.add_argument("--out", type=Path, help="a file for the Markdown; without, it is printed")
    arguments = parser.parse_args()
    outputs = read(arguments.outputs)
    if arguments.peer not in outputs or len(outputs) < 2:
        parser.error(f"the files have {', '.join(outputs) or 'nothing'}; needs {arguments.peer} and another engine")
    text = markdown(outputs, arguments.peer, decoder(arguments.model))
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
