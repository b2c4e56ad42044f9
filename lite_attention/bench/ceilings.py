"""The ceilings of this machine, in this run: what a copy and a matrix product reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lite_attention.bench.timing import Clock, Time, interleaved

COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes
SIDE = {"cuda": 8192, "cpu": 512}  # of the square matrices


@dataclass(frozen=True)
class Ceilings:
    """`copy` in TB/s, read and written; `product` of bfloat16 matrices of `side` in TFLOP/s."""

    copy: float
    copied_bytes: int
    product: float
    side: int

    def of(self, bound: str) -> float:
        return self.product if bound == "compute" else self.copy

    def __str__(self) -> str:
        return (
            f"copy of {self.copied_bytes >> 20} MiB {self.copy:.2f} TB/s, "
            f"bfloat16 product of {self.side} x {self.side} matrices {self.product:.4g} TFLOP/s"
        )


def measure_ceilings(device: torch.device, repetitions: int, clock: Clock) -> Ceilings:
    size, side = COPIED[device.type], SIDE[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    calls = {"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]}
    interleaved(calls, 3, clock)  # the first calls choose a kernel and allocate
    times = {name: Time.of(samples).median for name, samples in interleaved(calls, repetitions, clock).items()}
    return Ceilings(2 * size / times["copy"] / 1e6, size, 2 * side**3 / times["product"] / 1e6, side)
