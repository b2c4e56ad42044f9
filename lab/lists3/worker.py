"""One library in one process: does what the driver asks, a line a command."""
import json, os, sys
from statistics import median
import torch
import lite_attention
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.shapes import Shape
from lite_attention.bench.skip_fixed import Pattern
from lite_attention.bench.timing import CudaClock
DEV = os.environ.get("LA_DEV", "cuda")
K = 1024 if DEV == "cuda" else 32
def cases():
    f32 = lambda causal: Shape((32 * K,), (32 * K,), 16, 16, 128, causal)
    out = {}
    for c in (False, True):
        m = "causal" if c else "full"
        out[f"dense {m} 8x2k"] = (Shape((2 * K,) * 8, (2 * K,) * 8, 16, 16, 128, c), None)
        out[f"dense {m} 2x8k"] = (Shape((8 * K,) * 2, (8 * K,) * 2, 16, 16, 128, c), None)
        out[f"dense {m} 32k"] = (f32(c), None)
        for p in (0.0, 0.5, 0.8, 0.9):
            out[f"skip {m} {p:.1f}"] = (f32(c), Pattern(p))
    return out
fa3 = sys.argv[1] == "fa3"
if DEV == "cpu":
    from lite_attention.bench.timing import cpu_clock as clock
    torch.cuda.synchronize = lambda: None
else: clock = CudaClock()
allc = cases()
made = {}
inputs_cache = {}
def prepare(name):
    shape, pattern = allc[name]
    key = shape
    if key not in inputs_cache:
        inputs_cache.clear()
        inputs_cache[key] = make_inputs(shape, torch.device(DEV), 0)
    inputs = inputs_cache[key]
    if pattern is not None:
        lists = pattern.prepare(inputs, 1)
        return lists, lists.visited
    if fa3:
        from pathlib import Path
        from lite_attention.bench.peer_fa3 import FA3
        peer = FA3(Path(os.environ["LITE_ATTENTION_FA3"])); assert peer.available() is None, peer.available()
        return peer.prepare(inputs), 1.0
    from lite_attention import flash_attn_func
    q, k, v = inputs.q, inputs.k, inputs.v
    out = torch.empty_like(q)
    return (lambda: flash_attn_func(q, k, v, causal=shape.causal, out=out)), 1.0
print("ready", flush=True)
now = {}
for line in sys.stdin:
    cmd, name, n = line.rstrip("\n").split("|")
    try:
        if cmd == "prepare":
            now = {name: prepare(name)}
            call = now[name][0]
            for _ in range(2): call()
            torch.cuda.synchronize()
            print(json.dumps({"visited": now[name][1]}), flush=True)
        else:
            call = now[name][0]
            call()
            print(json.dumps([clock(call) for _ in range(int(n))]), flush=True)
    except Exception as e:
        print(json.dumps({"error": repr(e)[:300]}), flush=True)
