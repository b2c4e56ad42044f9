"""What calls with a skip list are given beside the arguments of dense attention: checked, and made into `Lists`.

Only metadata is read, so nothing waits for a GPU; the ops of the CPU path and the reference also check values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.checks import Problem, check_floats, check_ints, wrong
from lite_attention.skip.bits import words
from lite_attention.skip.problem import Lists
from lite_attention.skip.ranges import Ranges
from lite_attention.skip.skip_list import SkipList


def check_features(softcap: float = 0.0, alibi_slopes: Tensor | None = None, **tensors: Tensor) -> None:
    """Raises NotImplementedError for what dense attention has and calls with lists don't.

    `tensors` are q, k and v by the names that the caller gives them.
    """
    if softcap != 0:
        raise NotImplementedError(f"softcap: got {softcap}; attention with skip lists has only softcap=0.0")
    if alibi_slopes is not None:
        given = type(alibi_slopes).__name__
        raise NotImplementedError(f"alibi_slopes: got {given}; attention with skip lists has only alibi_slopes=None")
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize == 1:
            raise NotImplementedError(
                f"{name}: got {x.dtype}; attention with skip lists has torch.bfloat16, torch.float16 and torch.float32"
            )


def prepare_lists(
    problem: Problem,
    skip_list: SkipList,
    threshold: float | Tensor,
    must_do: Ranges | None,
    must_skip: Ranges | None,
    update: bool,
) -> Lists:
    """Checks the list against the call, and puts threshold and forced tiles on the device."""
    _check_list(problem, skip_list)
    do = None if must_do is None else as_mask("must_do", must_do, skip_list)
    skip = None if must_skip is None else as_mask("must_skip", must_skip, skip_list)
    if do is not None and skip is not None:
        skip = skip & ~do
    bits, block_m, block_n = skip_list.bits, skip_list.block_m, skip_list.block_n
    return Lists(bits, _threshold(problem, threshold), do, skip, block_m, block_n, bool(update))


def _check_list(problem: Problem, skip_list: SkipList) -> None:
    if not isinstance(skip_list, SkipList):
        raise wrong("skip_list", type(skip_list).__name__, "a SkipList, as SkipList.fresh makes")
    skip_list.check_bits()
    if skip_list.bits.device != problem.q.device:
        raise wrong("skip_list", f"a list on {skip_list.bits.device}", f"one on the device of q, {problem.q.device}")
    for what, have, works in (
        ("a batch of", skip_list.batch, problem.batch),
        ("num_heads of", skip_list.num_heads, problem.heads),
        ("max_seqlen_q of", skip_list.max_seqlen_q, problem.max_seqlen_q),
        ("max_seqlen_k of", skip_list.max_seqlen_k, problem.max_seqlen_k),
    ):
        if have != works:
            raise wrong("skip_list", f"a list for {what} {have}", f"one for that of the call, {works}")


def _threshold(problem: Problem, threshold: float | Tensor) -> Tensor:
    if isinstance(threshold, Tensor):
        check_floats("threshold", threshold, ((), (problem.heads,)), problem.q)
        return threshold
    number = isinstance(threshold, (int, float, torch.SymFloat)) and not isinstance(threshold, bool)
    if not number or not -math.inf <= threshold <= 0:
        raise wrong("threshold", threshold, f"a number of at most 0, or a float32 tensor () or ({problem.heads},)")
    return torch.full((), threshold, dtype=torch.float32, device=problem.q.device)


def as_mask(name: str, tiles: Ranges, skip_list: SkipList) -> Tensor:
    """Ranges of tokens, or a mask that was made of them before, as a mask."""
    if isinstance(tiles, Tensor) and tiles.dim() == 2:
        check_ints(name, tiles, (skip_list.batch, words(skip_list.kv_tiles)), skip_list.bits)
        if not tiles.is_contiguous():
            raise wrong(name, f"strides {tiles.stride()}", "a contiguous mask")
        return tiles
    return skip_list.must_do_mask(tiles) if name == "must_do" else skip_list.must_skip_mask(tiles)
