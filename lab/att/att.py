import ctypes, statistics, torch
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.page_work import NeededPages
from lite_attention.bench.shapes import Shape
from lite_attention import flash_attn_with_kvcache
lib = ctypes.CDLL("lite_attention/_C.abi3.so")
def shape(b, t, h, hk, d): return Shape((1,)*b, (t,)*b, h, hk, d, causal=True, layout="paged", page_size=16, planned=True)
flush = torch.zeros(1 << 28, device="cuda"); total = torch.zeros((), device="cuda")
def read():
    a = (ctypes.c_ulonglong * (136*16))(); assert lib.la_att(a) == 0; return list(a)
names = "entry wait plan loader tma1 k1 last stored endlast endstored".split()
from lite_attention.bench.contenders import Ours
for name, s, plan in (("step b1-128k", shape(1, 131072, 32, 8, 128), NeededPages(0.1)), ("dense b1-8k", shape(1, 8192, 32, 8, 128), None), ("dense b4-4k", shape(4, 4096, 32, 8, 128), None), ("step b1-32k", shape(1, 32768, 32, 8, 128), NeededPages(0.1)),("step b8-128k", shape(8, 131072, 32, 8, 128), NeededPages(0.1))):
    inputs = make_inputs(s, torch.device("cuda"), 0)
    step = plan.prepare(inputs, 0) if plan else Ours().prepare(inputs)
    step(); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): step()
    for evict in (True, False):
     rows = []
     for _ in range(9):
        if evict: torch.sum(flush, dim=0, out=total)
        g.replay(); torch.cuda.synchronize()
        m = read(); t0 = min(m[b*16+1] for b in range(132))
        rows.append([[m[b*16+i] - t0 for i in range(10)] for b in range(132)])
     r = rows[4]
     print(name, "evicted" if evict else "not")
     for i, n in enumerate(names):
        v = sorted(x[i] for x in r)
        print(f"  {n:10s} min {v[0]/1e3:7.2f} median {v[66]/1e3:7.2f} max {v[131]/1e3:7.2f}")
    del step, inputs, g; torch.cuda.empty_cache()
