"""trace.py [HEADS]: clocks of items' borders, and an item's clocks as tiles * slope + border (least squares over items)."""
import ctypes, sys
import numpy as np, torch
from lite_attention import flash_attn_func, ops
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.shapes import Shape
from lite_attention.bench.skip_fixed import Pattern

ITEMS, POINTS = 96, 32
lib = ctypes.CDLL(str(ops.EXTENSION))
heads = int(sys.argv[1]) if len(sys.argv) > 1 else 16


def d(x, y):
    return (x.astype(np.int64) - y.astype(np.int64) + (1 << 31)) % (1 << 32) - (1 << 31)


def med(x):
    x = np.asarray(x).ravel()
    return f"{np.median(x):7.0f} ({np.percentile(x, 10):6.0f} {np.percentile(x, 90):6.0f})" if x.size else "-"


def timed(call):
    e = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize(); e[0].record(); call(); e[1].record(); torch.cuda.synchronize()
    return e[0].elapsed_time(e[1]) * 1e3


def report(name, call, tiles=None):
    for _ in range(3): call()
    torch.cuda.synchronize(); lib.la_trace(None, 1); us = timed(call)
    a = np.zeros((132, 3, ITEMS, POINTS), np.uint32)
    assert lib.la_trace(a.ctypes.data_as(ctypes.c_void_p), 0) == 0
    done = (a[:, 1, :, 13] != 0).sum(1)
    busy = int(np.median(d(a[:, 1, :, 13].max(1), a[:, 1, 0, 0])))
    print(f"== {name}: {us:.0f} us; items a block {done.min()}..{done.max()}")
    w = a[:, 1]
    last = max(6, int(done.min()) - 2)
    I, B = slice(3, last), slice(2, last - 1)
    span = d(w[:, last - 1, 13], w[:, 2, 13])
    n = w[:, I, 14].astype(float) + 1
    L = d(w[:, I, 13], w[:, B, 13])
    if n.std() > 0.5:
        slope, border = np.polyfit(n.ravel(), L.ravel(), 1)
        print(f"   clocks of an item = {slope:.0f} * tiles + {border:.0f}; mean {L.mean():.0f} for {n.mean():.1f} tiles; steps {med(np.concatenate([d(w[:,I,16+k],w[:,I,15+k])[n>10].ravel() for k in range(1,8)]))}")
    else:
        print(f"   an item {med(L)} for {n.mean():.1f} tiles; steps {med(np.concatenate([d(w[:,I,16+k],w[:,I,15+k])[n>10].ravel() for k in range(1,8)]))}")
    names = {0: "end of item", 1: "got work", 3: "item made", 4: "Q", 5: "K", 6: "turn", 7: "issued", 8: "QK done", 9: "weighed", 10: "PV done", 11: "stored", 12: "operand", 16: "1st step", 17: "2nd", 18: "3rd"}
    ids = list(names)
    print("   " + "; ".join(f"{names[y]} {med(d(w[:,I,y], w[:,I,x])[n>4])}" for x, y in zip(ids, ids[1:])))
    print(f"   border: leaving tiles -> first step {med(d(w[:,I,12], w[:,B,13]))}; last tiles' time {med(d(w[:,I,13], w[:,I,12]) / n)} a tile")
    t, c = a[:, 0], a[:, 1]
    print("   planner: idle", med(d(t[:,I,0], t[:,I,4])), "next", med(d(t[:,I,1], t[:,I,0])), "open", med(d(t[:,I,2], t[:,I,1])), "put", med(d(t[:,I,3], t[:,I,2])))
    at = c[:, B, 13]
    print("   before the border: wanted", med(d(at, t[:,I,0])), "put", med(d(at, t[:,I,3])), "K got", med(d(at, t[:,I,12])), "K left", med(d(at, t[:,B,14])), "V got", med(d(at, t[:,I,16])), "V left", med(d(at, t[:,B,18])), "Q got", med(d(at, t[:,I,20])), "Q issued", med(d(at, t[:,I,21])))


for size, h in ((32768, heads),):
    for p, causal in ((0.0, False), (0.8, False), (0.9, False), (0.9, True)):
        s = Shape((size,), (size,), h, h, 128, causal)
        report(f"skip {p} causal {causal} {size} h{h}", Pattern(p).prepare(make_inputs(s, torch.device("cuda"), 0), 1))
for lens in ((2048,) * 8, (8192,) * 2, (32768,)):
    i = make_inputs(Shape(lens, lens, 16, 16, 128, False), torch.device("cuda"), 0)
    out = torch.empty_like(i.q)
    report(f"dense full {len(lens)} x {lens[0]}", lambda: flash_attn_func(i.q, i.k, i.v, out=out))
