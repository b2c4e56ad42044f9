"""Memory of a server's processes in a soak test, and whether it drifts."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence

import psutil

LEAST = 9  # samples after the warm phase that tell a drift


def host_mib(pid: int) -> float:
    """Resident memory of a process and all that it has started, MiB. A process that ends meanwhile counts nothing."""
    total = 0
    for process in _family(pid):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started; none where it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def gpu_mib(pid: int | None = None) -> float | None:
    """Memory in use on the GPUs that CUDA shows this process, MiB; None without nvidia-smi.

    Whoever uses it, or of a process `pid` and all that it has started, on all GPUs: None where nvidia-smi lists none.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    if pid is not None:
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True)
        return used_by({process.pid for process in _family(pid)}, answer.stdout) if answer.returncode == 0 else None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    answer = subprocess.run(query, capture_output=True, text=True)
    return sum(map(float, answer.stdout.split())) if answer.returncode == 0 else None


def used_by(pids: set[int], listed: str) -> float | None:
    """MiB of these processes in nvidia-smi's lines of process and memory; None where it has none of them."""
    lines = [line.split(",") for line in listed.splitlines()]
    numbers = [(int(line[0]), float(line[1])) for line in lines if len(line) == 2 and line[1].strip().isdecimal()]
    found = [mib for pid, mib in numbers if pid in pids]
    return sum(found) if found else None


def drift(samples: Sequence[tuple[float, float]], warm_s: float) -> float | None:
    """Growth in MiB from the first to the last third of what follows the warm phase; None where that is too short.

    `samples`: seconds and MiB. Medians, so that a request in passing is no growth.
    """
    after = [mib for second, mib in samples if second >= warm_s]
    if len(after) < LEAST:
        return None
    third = len(after) // 3
    return statistics.median(after[-third:]) - statistics.median(after[:third])


def fault(name: str, samples: Sequence[tuple[float, float]], warm_s: float, bound: float) -> str | None:
    """What is wrong with the memory called `name`, or None."""
    grown = drift(samples, warm_s)
    if grown is None or grown <= bound:
        return None
    return f"{name} grew by {grown:.0f} MiB after the first {warm_s:.0f} s, more than {bound:.0f}"
