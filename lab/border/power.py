"""power.py FA3.so : time, SM clock and power of FA3 and ours in loops of 1.2 s, random data and zeros."""
import subprocess, sys, threading, time
import torch
from lite_attention import flash_attn_func
torch.ops.load_library(sys.argv[1]); fa3 = torch.ops._vllm_fa3_C; dev = "cuda"

def run_fa3(q, k, v, causal):
    b, s = q.shape[:2]
    cu = torch.arange(0, b + 1, device=dev, dtype=torch.int32) * s
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return lambda: fa3.fwd(q, k, v, None, None, None, None, cu, cu, None, None, None, s, s, None, None, None, None, None, None,
                           None, None, None, q.shape[-1] ** -0.5, causal, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None)

def watch(name, call, flops):
    call(); torch.cuda.synchronize()
    p = subprocess.Popen("exec nvidia-smi --query-gpu=clocks.sm,power.draw.instant,clocks_event_reasons.active --format=csv,noheader,nounits -lms 40", shell=True, stdout=subprocess.PIPE, text=True)
    e = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    t0 = time.time(); n = 0; e[0].record()
    while time.time() - t0 < 1.3:
        for _ in range(5): call(); n += 1
        torch.cuda.synchronize()
    e[1].record(); torch.cuda.synchronize(); p.terminate()
    ms = e[0].elapsed_time(e[1]) / n
    s = [[float(y) if i < 2 else y.strip() for i, y in enumerate(x.split(","))] for x in p.stdout.read().strip().splitlines() if x.count(",") == 2]
    s = s[len(s) // 2:]
    mhz = sum(x[0] for x in s) / max(1, len(s)); w = sum(x[1] for x in s) / max(1, len(s))
    print(f"{name}: {ms*1e3:.0f} us, {flops/ms/1e9:.0f} TFLOP/s, {mhz:.0f} MHz, {w:.0f} W, {set(x[2] for x in s)}; of the peak at this clock {flops/(ms*1e-3)/(132*4096*mhz*1e6):.3f}", flush=True)

for shape, causal in (((1, 16384, 16, 128), False), ((8, 2048, 16, 128), False)):
    b, s, h, d = shape
    for zero in (False, True):
        q, k, v = (torch.randn(shape, device=dev).bfloat16() * (0 if zero else 1) for _ in range(3))
        out = torch.empty_like(q); f = 4 * b * h * d * s * s
        watch(f"ours {shape} zeros {zero}", lambda: flash_attn_func(q, k, v, out=out, causal=causal), f)
        watch(f"FA3  {shape} zeros {zero}", run_fa3(q, k, v, causal), f)
a, c = (torch.randn(8192, 8192, device=dev).bfloat16() for _ in range(2))
watch("product 8192", lambda: a @ c, 2 * 8192**3)
