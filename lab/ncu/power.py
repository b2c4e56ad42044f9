"""power.py FA3.so ROW...: time, SM clock and power of a row's calls in loops of 1.3 s."""
import subprocess, sys, time, zlib
import torch
from pathlib import Path
from lite_attention.bench.contenders import Ours, OwnContiguous
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.peer_fa3 import FA3
from lite_attention.bench.rows import select
from lite_attention.bench.targets import OWN_CONTIGUOUS

def watch(name, call, flops):
    call(); torch.cuda.synchronize()
    p = subprocess.Popen("exec nvidia-smi --query-gpu=clocks.sm,power.draw.instant,clocks_event_reasons.active --format=csv,noheader,nounits -lms 40", shell=True, stdout=subprocess.PIPE, text=True)
    e = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    t0 = time.time(); n = 0; e[0].record()
    while time.time() - t0 < 1.5:
        call(); n += 1; torch.cuda.synchronize()
    e[1].record(); torch.cuda.synchronize(); p.terminate()
    ms = e[0].elapsed_time(e[1]) / n
    s = [[float(y) if i < 2 else y.strip() for i, y in enumerate(x.split(","))] for x in p.stdout.read().strip().splitlines() if x.count(",") == 2]
    s = s[len(s) // 2:]
    mhz = sum(x[0] for x in s) / max(1, len(s)); w = sum(x[1] for x in s) / max(1, len(s))
    print(f"{name}: {ms*1e3:.0f} us, {flops/ms/1e9:.0f} TFLOP/s, {mhz:.0f} MHz, {w:.0f} W, {set(x[2] for x in s)}; megaclocks {ms*mhz/1e3:.2f}; of the peak at this clock {flops/(ms*1e-3)/(132*4096*mhz*1e6):.3f}", flush=True)

for name in sys.argv[2:]:
    (row,) = select([name]); s = row.shape
    inputs = make_inputs(s, torch.device("cuda"), zlib.crc32(name.encode()))
    who = [Ours(), FA3(Path(sys.argv[1]))] + ([OwnContiguous()] if row.needs(OWN_CONTIGUOUS) else [])
    for each in who:
        each.available() if isinstance(each, FA3) else None
        watch(f"{name} {each.name}", each.prepare(inputs), s.flops)
    del inputs; torch.cuda.empty_cache()
