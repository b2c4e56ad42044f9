"""The skip list: for each tile of queries, which KV tiles it visits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lite_attention.checks import check_ints, check_length, wrong
from lite_attention.skip import bits as packing
from lite_attention.skip.ranges import Ranges, must_do_mask, must_skip_mask
from lite_attention.skip.tiles import tile_count, tile_shape

FULL_WORD = -1


@dataclass(eq=False)
class SkipList:
    """Which KV tiles each tile of queries visits: a bit each, which calls of `skip_attention` update in place.

    A q tile is `block_m` consecutive query tokens of one query head, a KV tile `block_n` consecutive keys. With GQA too
    each query head has rows of its own. Tiles count from the start of their sequence. A list serves calls of the batch,
    heads and lengths that it was made for, and its tiles are those of one head dim: a call refuses another's. It
    belongs to one stream of calls, as one layer's steps are; calls that share it must run one after the other.

    For 75,600 tokens and 40 heads of dim 128 it takes 1.3 MB.

    Attributes:
        bits: int32, contiguous, (batch, num_heads, q_tiles, words): KV tile n is bit n % 32 of word n // 32, and 1 is
            visit. q_tiles is max_seqlen_q / block_m and words is the KV tiles / 32, rounded up. Bits of tiles that a
            q tile doesn't see under the mask, or that its sequence doesn't have, mean nothing and stay as they are.
        block_m, block_n: query tokens and keys of a tile.
        max_seqlen_q, max_seqlen_k: tokens of the longest query and keys, as the calls have them.
    """

    bits: Tensor
    block_m: int
    block_n: int
    max_seqlen_q: int
    max_seqlen_k: int

    def __post_init__(self) -> None:
        _check_geometry(self.block_m, self.block_n, self.max_seqlen_q, self.max_seqlen_k)
        self.check_bits()

    @classmethod
    def fresh(
        cls,
        batch: int,
        num_heads: int,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        head_dim: int | None = None,
        tile: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> SkipList:
        """A list that visits every tile.

        Args:
            batch, num_heads: sequences and query heads of the calls.
            max_seqlen_q, max_seqlen_k: lengths of the calls, in tokens: seqlen_q and seqlen_k of `skip_attention`,
                the arguments of these names of `skip_attention_varlen`, seqlen_q and the capacity of the cache (or of
                the block table) of `skip_attention_with_kvcache`.
            head_dim: of the calls; takes the tiles of the Hopper kernel for it, which `backend="hopper"` requires.
            tile: (block_m, block_n) in its place; the CPU path and the reference take any.
            device: that of the calls; None is PyTorch's default.

        Raises:
            ValueError: neither or both of `head_dim` and `tile`, or a number out of range.
        """
        if (head_dim is None) == (tile is None):
            raise wrong("tile", f"{tile}, with head_dim={head_dim}", "one of them, for the shape of the tiles")
        block_m, block_n = tile_shape(head_dim) if head_dim is not None else tile
        check_length("batch", batch)
        check_length("num_heads", num_heads)
        _check_geometry(block_m, block_n, max_seqlen_q, max_seqlen_k)
        q_tiles, kv_tiles = tile_count(max_seqlen_q, block_m), tile_count(max_seqlen_k, block_n)
        shape = (batch, num_heads, q_tiles, packing.words(kv_tiles))
        bits = torch.full(shape, FULL_WORD, dtype=torch.int32, device=device)
        return cls(bits, block_m, block_n, max_seqlen_q, max_seqlen_k)

    @classmethod
    def from_visits(cls, visits: Tensor, tile: tuple[int, int], max_seqlen_q: int, max_seqlen_k: int) -> SkipList:
        """The list of `visits`, bool (batch, num_heads, q_tiles, kv_tiles), with tiles (block_m, block_n).

        Raises:
            ValueError: `visits` is no bool tensor of the tiles that these lengths have.
        """
        block_m, block_n = tile
        _check_geometry(block_m, block_n, max_seqlen_q, max_seqlen_k)
        tiles = (tile_count(max_seqlen_q, block_m), tile_count(max_seqlen_k, block_n))
        if visits.dtype != torch.bool or visits.dim() != 4 or tuple(visits.shape[2:]) != tiles:
            works = f"torch.bool of (batch, num_heads, {tiles[0]}, {tiles[1]})"
            raise wrong("visits", f"{visits.dtype} of {tuple(visits.shape)}", works)
        return cls(packing.pack(visits), block_m, block_n, max_seqlen_q, max_seqlen_k)

    @property
    def batch(self) -> int:
        return self.bits.shape[0]

    @property
    def num_heads(self) -> int:
        return self.bits.shape[1]

    @property
    def q_tiles(self) -> int:
        return tile_count(self.max_seqlen_q, self.block_m)

    @property
    def kv_tiles(self) -> int:
        return tile_count(self.max_seqlen_k, self.block_n)

    @property
    def nbytes(self) -> int:
        """Bytes of `bits`."""
        return self.bits.nbytes

    def full(self) -> SkipList:
        """Another list of the same calls, that visits every tile."""
        return replace(self, bits=torch.full_like(self.bits, FULL_WORD))

    def reset(self) -> None:
        """Visits every tile again. In place, so that CUDA graphs and compiled callers see it."""
        self.bits.fill_(FULL_WORD)

    def visits(self) -> Tensor:
        """The list as bool, (batch, num_heads, q_tiles, kv_tiles); a copy."""
        return packing.unpack(self.bits, self.kv_tiles)

    def in_view(self, window_left: int = -1, window_right: int = -1) -> Tensor:
        """The KV tiles that a mask lets each q tile see, in calls whose sequences have the lengths of the list.

        Args:
            window_left, window_right: keys before and after its own position that a row sees, aligned to the bottom
                right as in all calls; a negative one is unbounded. (-1, 0) is causal.

        Returns:
            int32 (q_tiles, words), laid out as `bits`.
        """
        device = self.bits.device
        shift = self.max_seqlen_k - self.max_seqlen_q  # row i stands at key position i + shift
        first_row = torch.arange(self.q_tiles, device=device)[:, None] * self.block_m + shift
        last_row = (first_row + self.block_m - 1).clamp(max=self.max_seqlen_k - 1)
        first_key = torch.arange(self.kv_tiles, device=device) * self.block_n
        last_key = (first_key + self.block_n - 1).clamp(max=self.max_seqlen_k - 1)
        seen = torch.ones(self.q_tiles, self.kv_tiles, dtype=torch.bool, device=device)
        if window_left >= 0:
            seen &= last_key >= first_row - window_left
        if window_right >= 0:
            seen &= first_key <= last_row + window_right
        return packing.pack(seen)

    def must_do_mask(self, ranges: Ranges) -> Tensor:
        """The KV tiles that have a token in any of the ranges: a mask for the `must_do` of calls with this list.

        Args:
            ranges: (begin, end) token ranges, end excluded: a sequence of them for all batch entries, a sequence of
                such sequences with one for each entry, or an int32 tensor (batch, n, 2). Where one entry has fewer
                ranges than another, empty ones, as (0, 0), fill the tensor. None reaches past `max_seqlen_k`.

        Returns:
            int32 (batch, words), laid out as `bits`.

        Raises:
            ValueError: ranges of another form, or out of range. A tensor on a GPU is not read: there, what lies out of
                range is cut off.
        """
        return must_do_mask(ranges, self.bits, self.max_seqlen_k, self.block_n)

    def must_skip_mask(self, ranges: Ranges) -> Tensor:
        """The KV tiles whose tokens all lie in the ranges together: a mask for the `must_skip` of calls with this list.

        The last tile has no tokens from `max_seqlen_k` on. Arguments, result and errors are those of `must_do_mask`.
        """
        return must_skip_mask(ranges, self.bits, self.max_seqlen_k, self.block_n)

    def check_bits(self) -> None:
        """Raises ValueError where `bits` is no list of these lengths and tiles."""
        check_ints(
            "skip_list", self.bits, ("batch", "num_heads", self.q_tiles, packing.words(self.kv_tiles)), self.bits
        )
        if not self.bits.is_contiguous():
            raise wrong("skip_list", f"strides {self.bits.stride()}", "contiguous bits")


def _check_geometry(block_m: int, block_n: int, max_seqlen_q: int, max_seqlen_k: int) -> None:
    for name, tokens in (("block_m", block_m), ("block_n", block_n)):
        if not isinstance(tokens, int) or tokens < 1:
            raise wrong(name, tokens, "an int of 1 or more")
    check_length("max_seqlen_q", max_seqlen_q)
    check_length("max_seqlen_k", max_seqlen_k)
