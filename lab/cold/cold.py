"""Clocks of the cut and the plan, first time (cold) and again (warm), L2 evicted before each step."""
import ctypes, statistics
import torch
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.page_work import NeededPages
from lite_attention.bench.shapes import Shape
lib = ctypes.CDLL("lite_attention/_C.abi3.so")
def shape(b, t, h, hk, d): return Shape((1,)*b, (t,)*b, h, hk, d, causal=True, layout="paged", page_size=16, planned=True)
flush = torch.zeros(1 << 28, device="cuda"); total = torch.zeros((), device="cuda")
def read(f, n):
    a = (ctypes.c_ulonglong * n)(); assert getattr(lib, f)(a) == 0; return list(a)
for name, s, plan in (("b1-128k", shape(1, 131072, 32, 8, 128), NeededPages(0.1)), ("b64-32k", shape(64, 32768, 32, 8, 128), NeededPages(0.1)), ("qwen", shape(128, 28672, 14, 2, 64), NeededPages(0.2))):
    step = plan.prepare(make_inputs(s, torch.device("cuda"), 0), 0)
    step(); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): step()
    for evict in (True, False):
        cut, pl = [], []
        for _ in range(9):
            if evict: torch.sum(flush, dim=0, out=total)
            g.replay(); torch.cuda.synchronize()
            m = read("la_marks", 16 * 64); cut.append(m[:64]); pl.append(read("la_plan", 64))
        print(name, "evicted" if evict else "not evicted")
        for p in (0, 1):
            row = [[c[1 + 20 * p + i] - c[1 + 20 * p] for i in range(20)] for c in cut]
            print("  cut pass", p, [int(statistics.median(r[i] for r in row)) for i in range(20) if row[0][i] >= 0 and row[0][i] < 10**7])
        for p in (0, 1):
            row = [[c[20 * p + i] - c[20 * p] for i in range(10)] for c in pl]
            print("  plan pass", p, [int(statistics.median(r[i] for r in row)) for i in range(10) if 0 <= row[0][i] < 10**7])
    del step, g; torch.cuda.empty_cache()
