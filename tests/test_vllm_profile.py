"""The table of kernels that benchmarks/vllm_profile.py makes of a trace."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from vllm_profile import kernels, read_trace, short, table

LAYERS, STEPS = 2, 4


def trace() -> list[dict]:
    """Steps of 100 us: a layer's kernels of 10 and 20 us, the second of which starts while the first runs."""
    events, ts = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000}], 0
    for step in range(STEPS):
        for layer in range(LAYERS):
            at = ts + 40 * layer
            events += [
                {"cat": "kernel", "name": "void vllm::reshape_and_cache_flash_kernel<x>(int)", "ts": at, "dur": 10},
                {"cat": "kernel", "name": "void sm90::attend<64>(Params)", "ts": at + 5, "dur": 25},
            ]
        ts += 100 if step != 1 else 1000  # a pause that is no step
    return events


def test_busy_and_idle_times_add_up_to_the_step(tmp_path):
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": trace()[::-1]}, file)
    found = kernels(read_trace(path), LAYERS)
    assert (found["steps"], found["step_us"], found["idle_us"]) == (2, 100, 40)
    assert found["kernels"]["sm90::attend<64>"] == {"launches": 2, "busy_us": 40, "us": 50, "idle_us": 0}
    assert sum(each["busy_us"] for each in found["kernels"].values()) + found["idle_us"] == found["step_us"]
    assert "| `sm90::attend<64>` | 2 | 40 | 20.0 | 25.0 | 0 |" in table({"engine": found})


def test_a_trace_of_one_step_is_refused():
    with pytest.raises(ValueError, match="of two steps"):
        kernels(trace()[1:5], LAYERS)


def test_names_are_short():
    assert short("void at::native::(anonymous namespace)::sum<float>(int, float*)") == "sum<float>"
    assert short("void sm90::forward<(int)64, true>(Params, f(x))") == "sm90::forward<(int)64, true>"
    assert len(short("x" * 200)) == 72
