"""What ptxas made of the kernels: the steps of attention keep nothing in local memory.

A change anywhere in a kernel can cost registers everywhere, and no result shows it. Needs a build here, and the
cuobjdump that Triton brings.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = sorted((Path(__file__).parents[1] / "build/kernels/csrc/sm90/instances").glob("*.o"))
FEW = 8  # of hundreds of instructions; where accumulators were spilled there were 18 and more


def _cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    path = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(path) if path and path.exists() else None


def _kernels(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of the instructions of each kernel."""
    text = subprocess.run([_cuobjdump(), "-sass", path], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[tuple[int, str]]] = {}
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            instructions = kernels.setdefault(name[1], [])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line):
            instructions.append((int(found[1], 16), found[2]))
    return kernels


def _branch(text: str) -> int | None:
    """Where a branch goes."""
    found = re.search(r"\bBRA\b\S*\s+(?:\S+,\s*){0,2}0x([0-9a-f]+)", text)
    return int(found[1], 16) if found else None


def _step(instructions: list[tuple[int, str]]) -> list[str]:
    """A tile in the middle of an item: once through the smallest loop around matrix products, past the blocks without
    any that a branch leads over. These are masks, and what runs at the border between two items."""
    loops = []
    for address, text in instructions:
        target = _branch(text)
        if target is not None and target < address:
            body = [each for each in instructions if target <= each[0] <= address]
            if any("HGMMA" in each for _, each in body):
                loops.append(body)
    step, resume = [], 0
    body = min(loops, key=len)
    for address, text in body:
        if address < resume:
            continue
        step.append(text)
        target = _branch(text)
        if target is not None and address < target <= body[-1][0]:
            skipped = [each for at, each in body if address < at < target]
            if not any("HGMMA" in each or "WARPGROUP" in each for each in skipped):
                resume = target
    return step


def _spilled(instructions: list[str]) -> int:
    return sum(bool(re.search(r"\b(LDL|STL)\b", each)) for each in instructions)


@pytest.mark.skipif(not OBJECTS, reason="the kernels are not built here")
@pytest.mark.skipif(_cuobjdump() is None, reason="there is no cuobjdump")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name.removesuffix(".cu.o"))
def test_steps_keep_nothing_in_local_memory(path):
    kernels = {name: each for name, each in _kernels(path).items() if "fwd_kernel" in name}
    assert kernels
    spilled = {name: _spilled(_step(each)) for name, each in kernels.items()}
    assert {name: count for name, count in spilled.items() if count > FEW} == {}
