"""Prompts of real code: the Python sources of installed packages, no part of them twice."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

PACKAGES = ("vllm", "transformers", "torch")
LEAST_BYTES = 2000  # of a file; shorter ones are mostly imports


def sources(packages: Sequence[str] = PACKAGES) -> Iterator[str]:
    """Every file once, under a line with its path."""
    seen = set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            if len(data) < LEAST_BYTES or digest in seen:
                continue
            seen.add(digest)
            yield f"# {package}/{path.relative_to(root)}\n{data.decode(errors='replace')}\n"


def code_prompts(tokenizer: object, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of so many tokens each, one after the other through the sources.

    `tokenizer` is one of Hugging Face's, as `tokenizers` has it.
    """
    needed, found, batch = sum(lengths), [], []
    for text in sources():
        batch.append(text)
        if len(batch) == 512:
            found += [token for each in tokenizer.encode_batch(batch, add_special_tokens=False) for token in each.ids]
            batch = []
            if len(found) >= needed:
                break
    if batch and len(found) < needed:
        found += [token for each in tokenizer.encode_batch(batch, add_special_tokens=False) for token in each.ids]
    if len(found) < needed:
        raise SystemExit(f"{len(found)} tokens of code are installed; needs {needed}: fewer or shorter requests")
    ends = list(accumulate(lengths))
    return [found[end - length : end] for end, length in zip(ends, lengths, strict=True)]
