"""The peers of each device."""

from __future__ import annotations

from pathlib import Path

from lite_attention.bench.contenders import Contender
from lite_attention.bench.peer_fa3 import FA3, find_fa3
from lite_attention.bench.peer_fa4 import FA4
from lite_attention.bench.peer_torch import SDPA, CuDNN

NAMES = {"cuda": ("fa3", "fa4", "cudnn"), "cpu": ("sdpa",)}


def find_peers(device: str, asked: str | None, fa3: Path | None) -> tuple[list[Contender], dict[str, str]]:
    """The peers to run, and why others can't.

    `asked` is the value of `--peers`: names with commas between, "none", or None for all that can be used. A peer that
    was asked for and can't be used is an error. `fa3` is the value of `--fa3`.
    """
    names = NAMES[device]
    wanted = names if asked is None else () if asked == "none" else tuple(asked.lower().split(","))
    if unknown := [name for name in wanted if name not in names]:
        raise SystemExit(f"--peers: got {unknown[0]!r}; on {device} it can be none, or some of {','.join(names)}")
    if fa3 is not None and "fa3" not in wanted:
        raise SystemExit(f"--fa3: got {fa3}, but FA3 is not among the peers: {', '.join(wanted) or 'none'}")
    if fa3 is not None and not fa3.is_file():
        raise SystemExit(f"--fa3: got {fa3}, where there is no file; needs vLLM's _vllm_fa3_C.abi3.so")
    found, missing = [], {}
    for name in wanted:
        peer = {"fa3": lambda: FA3(fa3 or find_fa3()), "fa4": FA4, "cudnn": CuDNN, "sdpa": SDPA}[name]()
        reason = peer.available()
        if reason is None:
            found.append(peer)
        elif asked is not None or (fa3 is not None and name == "fa3"):
            raise SystemExit(f"{'--peers' if asked is not None else '--fa3'}: {peer.name} can't be used: {reason}")
        else:
            missing[peer.name] = reason
    return found, missing
