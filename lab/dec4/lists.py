import subprocess, time, torch
from lite_attention import flash_attn_func
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.shapes import Shape
from lite_attention.bench.skip_fixed import Pattern
def watch(name, call):
    call(); torch.cuda.synchronize()
    p = subprocess.Popen("exec nvidia-smi --query-gpu=clocks.sm,power.draw.instant --format=csv,noheader,nounits -lms 40", shell=True, stdout=subprocess.PIPE, text=True)
    e = [torch.cuda.Event(enable_timing=True) for _ in range(2)]; t0 = time.time(); n = 0; e[0].record()
    while time.time() - t0 < 1.2:
        for _ in range(3): call(); n += 1
        torch.cuda.synchronize()
    e[1].record(); torch.cuda.synchronize(); p.terminate(); us = e[0].elapsed_time(e[1]) / n * 1e3
    s = [[float(y) for y in x.split(",")] for x in p.stdout.read().strip().splitlines() if x.count(",") == 1]; s = s[len(s) // 2:]
    print(f"{name}: {us:.0f} us, {sum(x[0] for x in s)/len(s):.0f} MHz, {sum(x[1] for x in s)/len(s):.0f} W, Mclk {us*sum(x[0] for x in s)/len(s)/1e6:.2f}", flush=True)
for h in (40, 8):
    i = make_inputs(Shape((32768,), (32768,), h, h, 128, False), torch.device("cuda"), 0); out = torch.empty_like(i.q)
    watch(f"dense h{h}", lambda: flash_attn_func(i.q, i.k, i.v, out=out))
    for p in (0.0, 0.8, 0.9): watch(f"lists {p} h{h}", Pattern(p).prepare(i, 1))
x = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_()
watch("read 4 GiB (amax)", lambda: x.amax())
watch("read 4 GiB (sum)", lambda: x.view(torch.int32).view(-1, 4096).sum(1))
