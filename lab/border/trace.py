"""trace.py [HEAD_DIM...]: an item's clocks as tiles * slope + border (least squares over items of several calls)."""
import ctypes, sys
import numpy as np, torch
from lite_attention import flash_attn_func, ops
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.shapes import Shape
from lite_attention.bench.skip_fixed import Pattern

lib = ctypes.CDLL(str(ops.EXTENSION))

def items(call, hd):
    f = getattr(lib, f"la_trace_{hd}")
    for _ in range(2): call()
    torch.cuda.synchronize(); f(None, 1); call(); torch.cuda.synchronize()
    a = np.zeros((132, 2, 96, 2), np.uint32); assert f(a.ctypes.data_as(ctypes.c_void_p), 0) == 0
    c = (a[..., 0][:, :, 1:].astype(np.int64) - a[..., 0][:, :, :-1] + (1 << 31)) % (1 << 32) - (1 << 31)
    ok = (a[..., 0][:, :, 1:] != 0) & (a[..., 0][:, :, :-1] != 0)
    ok[:, :, 0] = False
    return a[..., 1][:, :, 1:][ok].astype(float), c[ok].astype(float)

def fit(name, sets):
    n, c = (np.concatenate(x) for x in zip(*sets))
    slope, border = np.polyfit(n, c, 1)
    print(f"{name}: {slope:.0f} a tile + {border:.0f} an item (equals {border/slope:.2f} tiles);", "; ".join(f"{np.mean(m):.1f} tiles {np.median(x):.0f}" for m, x in sets), flush=True)

for hd in [int(x) for x in sys.argv[1:]] or [128]:
    for causal in (False, True):
        sets = []
        for lens in ((1024,) * 16, (2048,) * 8, (4096,) * 4, (8192,) * 2):
            i = make_inputs(Shape(lens, lens, 2048 // hd, 2048 // hd, hd, causal), torch.device("cuda"), 0); out = torch.empty_like(i.q)
            sets.append(items(lambda: flash_attn_func(i.q, i.k, i.v, out=out, causal=causal), hd))
        fit(f"dense hd{hd} {'causal' if causal else 'full'}", sets)
    if hd == 128:
        for causal in (False, True):
            sets = [items(Pattern(p).prepare(make_inputs(Shape((16384,), (16384,), 16, 16, 128, causal), torch.device("cuda"), 0), 1), hd) for p in (0.0, 0.8, 0.9)]
            fit(f"lists {'causal' if causal else 'full'}", sets)
