"""The table of Nsight Compute's counters, from what it prints; and the simulation of a maximum that lags."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import counters
import lagging_max

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
PRINTED = f'''\
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","{STALL.format("wait")}","{STALL.format("barrier")}"
"","","nsecond","Kbyte","inst","inst"
"0","a::<unnamed>::plan_kernel(int *)","6,500","2","1.5","9.25"
"1","void a::fwd_kernel<a::Traits<int, 64>>(a::Params)","350,000","2,000","2.5","0"
"2","void at::elementwise<at::arange_cuda_out()>(int)","2000","0","1","1"
"3","void theirs(T1)","400,000","3,000","1","1"
"4","void at::elementwise<at::arange_cuda_out()>(int)","2000","0","1","1"'''


def test_each_kernel_is_told_of_the_call_before_its_border():
    names = [("dense", "ours"), ("dense", "FA3")]
    head, _, *lines = counters.table(names, PRINTED).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    us, dram = cells[0].index("us"), cells[0].index("DRAM read, MB")
    assert [line[:3] for line in cells[1:]] == [
        ["dense", "ours", "plan_kernel"],
        ["dense", "ours", "fwd_kernel"],
        ["dense", "FA3", "theirs"],
    ]
    assert [line[us] for line in cells[1:]] == ["6.5", "350.0", "400.0"]
    assert [line[dram] for line in cells[1:]] == ["0.0", "2.0", "3.0"]
    assert cells[1][-1] == "barrier 9.2, wait 1.5" and cells[1][cells[0].index("SM MHz")] == "-"


def test_calls_are_those_that_a_row_is_compared_by():
    rows = counters.select(["prefill-page16-4k-over-32k", "skip-full-32k-h40-0"])
    prefill, skip = (row.name for row in rows)
    assert counters.segments(rows, with_fa3=True) == [
        (prefill, "ours"),
        (prefill, "contiguous"),
        (prefill, "FA3"),
        (skip, "lists"),
    ]


def test_both_maxima_are_those_of_softmax():
    generator = torch.Generator().manual_seed(0)
    scores, v = torch.randn(2, 300, 300, generator=generator) * 4, torch.randn(2, 300, 8, generator=generator)
    expected = (scores * math.log(2)).softmax(-1) @ v
    for lag in (0.0, lagging_max.LAG):
        torch.testing.assert_close(lagging_max.attention(scores, v, lag), expected, atol=1e-5, rtol=1e-5)
