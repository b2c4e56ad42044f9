"""Processes that are the ranks of a torch.distributed group, each with a part of the tokens."""

from __future__ import annotations

import multiprocessing
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 240


def run_ranks(work, size, folder, *args, backend="gloo"):
    """`work(rank, size, *args)` in each of `size` processes: what they return, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # which takes seconds to import
    results = [Path(folder) / f"{rank}.pt" for rank in range(size)]
    processes = [
        context.Process(target=_rank, args=(work, rank, size, backend, Path(folder) / "store", results[rank], args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    outcomes = [torch.load(path, weights_only=False) if path.exists() else "no result" for path in results]
    failures = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
    assert not failures and not stuck, "\n".join(failures)
    return outcomes


def _rank(work, rank, size, backend, store, result, args):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS / 2)
    )
    try:
        outcome = work(rank, size, *args)
    except Exception:
        outcome = traceback.format_exc()
    torch.save(outcome, result)
    dist.destroy_process_group()


def part(x, rank, size, dim=1):
    """The tokens of a rank."""
    return x.chunk(size, dim)[rank]
