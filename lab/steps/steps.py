"""When the kernels of a page step begin and end: medians over replays of its graph, with L2 evicted before each."""
import dataclasses, statistics, sys, collections
import torch
from torch.profiler import ProfilerActivity, profile
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.page_work import NeededPages
from lite_attention.bench.rows import ROWS
from lite_attention.bench.shapes import Shape
rows = {r.name: r for r in ROWS}
def shape(b, t, h, hk, d): return Shape((1,)*b, (t,)*b, h, hk, d, causal=True, layout="paged", page_size=16, planned=True)
work = [(n, rows[n].shape, rows[n].skip) for n in ("pages-step-b1-128k", "pages-step-b8-128k", "pages-step-b64-32k", "pages-short-b64-4k")]
work += [("qwen-b128-28k", shape(128, 28672, 14, 2, 64), NeededPages(0.2)), ("llama-b24-32k", shape(24, 32768, 32, 8, 128), NeededPages(0.15)), ("b1-32k", shape(1, 32768, 32, 8, 128), NeededPages(0.1))]
import os
flush = torch.zeros(1 << int(os.environ.get("FLUSH", "28")), device="cuda"); total = torch.zeros((), device="cuda")
import os
if os.environ.get("ONLY"): work = [w for w in work if w[0] in os.environ["ONLY"].split()]
for name, s, plan in work:
    inputs = make_inputs(s, torch.device("cuda"), 0)
    step = plan.prepare(inputs, 0)
    step(); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): step()
    N = 12
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(N):
            torch.sum(flush, dim=0, out=total); g.replay()
        torch.cuda.synchronize()
    ev = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Memcpy" not in e.name and "Memset" not in e.name]
    ev.sort(key=lambda e: e.time_range.start)
    steps, now = [], None
    for e in ev:
        if "reduce" in e.name: now = []; steps.append(now)
        elif now is not None: now.append((e.name, e.time_range.start, e.time_range.end))
    steps = [x for x in steps[2:] if len(x) == len(steps[-1])]
    print(f"{name}: visited {step.visited:.3f}, {len(steps)} replays, min_context {plan.min_context}")
    for i in range(len(steps[0])):
        n = steps[0][i][0]; n = n.split("(")[0].split("::")[-1][:40]
        b = statistics.median(x[i][1] - x[0][1] for x in steps); e = statistics.median(x[i][2] - x[0][1] for x in steps)
        print(f"   {n:40s} {b:8.1f} -> {e:8.1f}")
    del inputs, step, g; torch.cuda.empty_cache()
