"""Times of calls that take turns, so that clocks and temperature hit all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

EVICTED = 1 << 30  # bytes read before each call: many times the L2 cache, and some 0.25 ms of the GPU's time
READS = 3  # of them: Python takes 0.1 ms to launch a call, and now and then several times as long
GRAPH_BELOW = 200.0  # microseconds: what takes less is timed by the replay of a graph
GRAPH_LASTS = 2000.0  # microseconds a graph is to take: some 10 of them are its launch
MOST_CALLS = 128  # in a graph
LEAST_CALLS = 4

Clock = Callable[[Callable[[], object]], float]
"""Microseconds that a call takes."""


@dataclass(frozen=True)
class Time:
    """Microseconds of one call, over all repetitions."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, samples: Sequence[float], calls: int = 1) -> Time:
        """`samples` took `calls` calls each."""
        return cls(median(samples) / calls, min(samples) / calls, max(samples) / calls)


class CudaClock:
    """CUDA events, behind a read of memory that leaves nothing of a call's inputs in L2.

    While the GPU reads, Python launches the call: its time is that of the GPU, not of what leads up to the launch. It
    is a read because what is written would still be on its way to memory when the call begins.
    """

    def __init__(self) -> None:
        self.memory = torch.zeros(EVICTED // 4, device="cuda")
        self.sum = torch.zeros((), device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(READS):
            torch.sum(self.memory, dim=0, out=self.sum)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def cpu_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def interleaved(
    calls: Mapping[str, Sequence[Callable[[], object]]], repetitions: int, clock: Clock
) -> dict[str, list[float]]:
    """Microseconds of every repetition. In each, all take one turn, another of them first each time.

    A contender's calls compute the same on different inputs, and come round robin.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            call = calls[name][repetition % len(calls[name])]
            samples[name].append(clock(call))
    return samples


def calls_in_graph(microseconds: float, inputs: int) -> int:
    """How many calls of that length go into a graph: all of the `inputs` equally often."""
    wanted = min(max(round(GRAPH_LASTS / microseconds), LEAST_CALLS), MOST_CALLS)
    return -(-wanted // inputs) * inputs


def graph_of(calls: Sequence[Callable[[], object]], count: int) -> Callable[[], None]:
    """A replay of `count` calls, round robin."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up at the first call on a stream can't be captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    return graph.replay
