"""The shape of one attention call, and the work that is in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Layout = Literal["dense", "packed", "paged"]
Fp8 = Literal["none", "kv", "qkv"]

BYTES = 2  # of an element in bfloat16; one in FP8 has half of it
SHORTEST = 16  # tokens: scaling leaves shorter sequences alone, so that a decode step stays one


@dataclass(frozen=True)
class Shape:
    """Sequences of `q_lens` queries over `k_lens` keys; the causal mask ends bottom right.

    "dense" is a batch of one length, "packed" has sequences one after the other, "paged" has keys in pages of
    `page_size` tokens. Where `planned`, the scheduler metadata is there before the call, as in a serving step, where it
    is made once for all layers. `fp8` says which of q, k and v are float8_e4m3fn, under factors for each sequence and
    KV head; what is not, and the output, is bfloat16.
    """

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: int
    heads_k: int
    head_dim: int
    causal: bool
    layout: Layout = "dense"
    page_size: int | None = None
    planned: bool = False
    fp8: Fp8 = "none"

    def __post_init__(self) -> None:
        if any(q > k for q, k in zip(self.q_lens, self.k_lens, strict=True)):
            raise ValueError(f"q_lens: got {self.q_lens}; needs no more queries than keys, {self.k_lens}")
        if self.layout == "dense" and len(set(self.q_lens)) * len(set(self.k_lens)) != 1:
            raise ValueError(f"layout: got 'dense' for {self.q_lens}, {self.k_lens}; needs sequences of one length")
        if (self.layout == "paged") != (self.page_size is not None):
            raise ValueError(f"page_size: got {self.page_size}; needs a number for 'paged' and None elsewhere")

    @property
    def batch(self) -> int:
        return len(self.q_lens)

    @property
    def flops(self) -> int:
        """Floating-point operations of both products, over the keys that each row sees."""
        seen = sum(
            q * k - (q * (q - 1) // 2 if self.causal else 0) for q, k in zip(self.q_lens, self.k_lens, strict=True)
        )
        return 4 * self.heads * self.head_dim * seen

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, each read once: what bounds a decode step."""
        return 2 * sum(self.k_lens) * self.heads_k * self.head_dim * (BYTES if self.fp8 == "none" else 1)

    @property
    def io_bytes(self) -> int:
        """Bytes of q, k, v and out."""
        query_and_output = BYTES + (1 if self.fp8 == "qkv" else BYTES)
        return self.kv_bytes + sum(self.q_lens) * self.heads * self.head_dim * query_and_output

    def scaled(self, factor: float) -> Shape:
        """With sequences `factor` times as long, and the batch as it was."""
        q_lens, k_lens = (
            tuple(max(min(n, SHORTEST), round(n * factor)) for n in lens) for lens in (self.q_lens, self.k_lens)
        )
        return replace(self, q_lens=q_lens, k_lens=k_lens)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        place = f"pages of {self.page_size}" if self.layout == "paged" else self.layout
        lens = f"{_lens(self.q_lens)} over {_lens(self.k_lens)}"
        fp8 = "" if self.fp8 == "none" else f", FP8 {self.fp8.upper()}"
        return (
            f"b{self.batch} {lens} tokens, {self.heads}/{self.heads_k} heads, hd{self.head_dim}, {mask}, {place}{fp8}"
        )


def _lens(lens: tuple[int, ...]) -> str:
    return str(lens[0]) if len(set(lens)) == 1 else f"{min(lens)}-{max(lens)}"
