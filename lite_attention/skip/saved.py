"""The lists of a `LiteAttention` module in a state dict: tensors only, so that safetensors takes it too.

A stream has four entries below `<prefix>skip_state.<stream>.`: `bits` and `calls` as they are in its state, `shape`,
int64 (10,), which is the shapes of q and k, block_m and block_n, and `dtype`, an empty tensor of the dtype of q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention.checks import check_ints, wrong
from lite_attention.skip.bits import words
from lite_attention.skip.state import Shape, StreamState
from lite_attention.skip.tiles import tile_count

FOLDER = "skip_state."
ENTRIES = ("bits", "calls", "shape", "dtype")


@dataclass(eq=False)
class Saved:
    """What a file has of a stream. Where its next calls run is not known before they do."""

    shape: Shape
    tile: tuple[int, int]
    bits: Tensor
    calls: Tensor

    @classmethod
    def of(cls, state: StreamState) -> Saved:
        visits = state.skip_list
        return cls(state.shape, (visits.block_m, visits.block_n), visits.bits.clone(), state.calls.clone())

    @classmethod
    def read(cls, entries: dict[str, Tensor]) -> Saved:
        """Of the four entries. Raises ValueError where they are not what `entries` makes."""
        missing = [name for name in ENTRIES if not isinstance(entries.get(name), Tensor)]
        if missing:
            raise wrong("skip_state", f"no {' and no '.join(missing)}", f"the tensors {', '.join(ENTRIES)}")
        bits, calls, shape, dtype = (entries[name].detach().clone() for name in ENTRIES)
        if shape.shape != (10,) or shape.dtype != torch.int64 or (shape < 0).any() or (shape[8:] == 0).any():
            raise wrong("skip_state", f"shape = {shape.tolist()}", "ten torch.int64 of 0 or more, a tile of 1 or more")
        if calls.shape != () or calls.dtype != torch.int64 or calls < 0:
            raise wrong("skip_state", f"calls = {calls.tolist()}, {calls.dtype}", "a torch.int64 of 0 or more")
        numbers = tuple(shape.tolist())
        q, k, (block_m, block_n) = numbers[:4], numbers[4:8], numbers[8:]
        check_ints("bits", bits, (q[0], q[2], tile_count(q[1], block_m), words(tile_count(k[1], block_n))), bits)
        return cls(Shape(q, k, dtype.dtype), (block_m, block_n), bits.contiguous(), calls)

    def entries(self) -> dict[str, Tensor]:
        numbers = torch.tensor((*self.shape.q, *self.shape.k, *self.tile), dtype=torch.int64, device="cpu")
        dtype = torch.empty(0, dtype=self.shape.dtype, device="cpu")
        return dict(zip(ENTRIES, (self.bits, self.calls, numbers, dtype), strict=True))

    def give(self, state: StreamState) -> None:
        """Makes the state go on from here, in place, where it is one of the same calls; else it stays as it is."""
        visits = state.skip_list
        if self.shape == state.shape and self.tile == (visits.block_m, visits.block_n):
            visits.bits.copy_(self.bits)
            state.calls.copy_(self.calls)


def read_all(state_dict: dict[str, Tensor], prefix: str) -> tuple[dict[str, Saved], list[str]]:
    """What `state_dict` has of each stream, and what is wrong with it."""
    streams: dict[str, dict[str, Tensor]] = {}
    for key, x in state_dict.items():
        if key.startswith(prefix + FOLDER):
            stream, _, entry = key.removeprefix(prefix + FOLDER).rpartition(".")
            streams.setdefault(stream, {})[entry] = x
    found, errors = {}, []
    for stream, entries in streams.items():
        try:
            found[stream] = Saved.read(entries)
        except ValueError as error:
            errors.append(f"{prefix}{FOLDER}{stream}: {error}")
    return found, errors
