import time, cProfile, pstats, sys, torch, threading, gc
import lite_attention
from lite_attention.bench.timing import CudaClock
torch.cuda.init()
def inputs(b, s, h, d): return [torch.randn(b, s, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
q, k, v = inputs(8, 2048, 32, 64); out = torch.empty_like(q)
f = lambda: lite_attention.flash_attn_func(q, k, v, causal=True, out=out)
g = lambda: torch.nn.functional.scaled_dot_product_attention(q.transpose(1,2), k.transpose(1,2), v.transpose(1,2), is_causal=True)
clock = CudaClock()
def show(title):
    for _ in range(10): f()
    torch.cuda.synchronize(); host = []
    for _ in range(100):
        t = time.perf_counter(); f(); host.append((time.perf_counter()-t)*1e6); torch.cuda.synchronize()
    host.sort(); ev = sorted(clock(f) for _ in range(30))
    def mixed():
        r = []
        for _ in range(20):
            r.append(clock(f)); clock(g)
            if fa4: clock(fa4)
        return sorted(r)
    m = mixed()
    print(f"{title}: host median {host[50]:.0f} us, 90% {host[90]:.0f}; clock alone {ev[15]:.1f} (lowest {ev[0]:.1f}); in turns {m[10]:.1f} ({m[0]:.1f}..{m[-1]:.1f}); threads {threading.active_count()}, gc {gc.get_count()}, objects {len(gc.get_objects())}", flush=True)
fa4 = None
show("before")
import flash_attn.cute.interface as I
fa4 = lambda: I._flash_attn_fwd(q, k, v, causal=True)[0]
show("imported")
fa4(); torch.cuda.synchronize()
show("after FA4 ran")
gc.freeze()
show("gc frozen")
p = cProfile.Profile(); p.enable()
for _ in range(300): f()
p.disable(); torch.cuda.synchronize(); pstats.Stats(p).sort_stats("tottime").print_stats(25)
print("trace", sys.gettrace(), sys.getprofile())
