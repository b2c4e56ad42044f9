"""How a running maximum that lags changes the errors of attention: a simulation on the CPU.

    python benchmarks/lagging_max.py --head-dim 64 --dtype bfloat16 --seeds 32

Softmax is computed tile by tile, from the last keys to the first, with weights rounded to the type of V, as the kernels
do it: once with a maximum that follows each tile, as in FlashAttention-3, and once with one that moves only where it
would grow by more than 2^3, as here. The first makes a row's largest weight exactly 1, the other rounds it like the
others. Printed are the second's errors against float64 over the first's: the mean of all elements, and the largest,
within four seeds, as many as tests/gpu/test_beside_fa3.py has, and within all.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

LAG = 3.0  # to base 2
TOKENS, HEADS, TILE = 777, 8, 128
GROUP = 4  # seeds


def attention(scores: Tensor, v: Tensor, lag: float) -> Tensor:
    """softmax of scores, to base 2, times v, in v's type."""
    highest = torch.full((*scores.shape[:-1], 1), -math.inf)
    total, out = torch.zeros_like(highest), torch.zeros(v.shape)
    for first in reversed(range(0, scores.shape[-1], TILE)):
        tile = scores[..., first : first + TILE]
        grown = torch.maximum(highest, tile.amax(-1, keepdim=True))
        now = torch.where(grown > highest + lag, grown, highest)
        weights, kept = torch.exp2(tile - now), torch.exp2(highest - now)
        total = total * kept + weights.sum(-1, keepdim=True)
        out = out * kept + weights.to(v.dtype).float() @ v[:, first : first + TILE].float()
        highest = now
    return (out / total).to(v.dtype)


def errors(seed: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the maximum that follows and of the one that lags."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(HEADS, TOKENS, head_dim, generator=generator).to(dtype) for _ in range(3))
    scores = q.float() @ k.float().transpose(-1, -2) * (math.log2(math.e) / math.sqrt(head_dim))
    exact = (scores.double() * math.log(2)).softmax(-1) @ v.double()
    follows, lags = ((attention(scores, v, lag).double() - exact).abs() for lag in (0.0, LAG))
    return follows, lags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seeds", type=int, default=32)
    arguments = parser.parse_args()
    found = [errors(seed, arguments.head_dim, getattr(torch, arguments.dtype)) for seed in range(arguments.seeds)]
    mean = sum(float(lags.mean()) for _, lags in found) / sum(float(follows.mean()) for follows, _ in found)
    largest = [(float(follows.max()), float(lags.max())) for follows, lags in found]

    def ratio(of: list[tuple[float, float]]) -> str:
        return f"{max(lags for _, lags in of) / max(follows for follows, _ in of):.3f}"

    groups = [ratio(largest[i : i + GROUP]) for i in range(0, len(largest), GROUP)]
    print(
        f"head_dim {arguments.head_dim}, {arguments.dtype}: mean error {mean:.3f} times that of a maximum that follows;"
    )
    print(f"largest of {GROUP} seeds: {', '.join(groups)}; of all {len(largest)}: {ratio(largest)}")


if __name__ == "__main__":
    main()
