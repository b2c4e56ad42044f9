"""prof.py ROW...: kernels of a graph replay, by the profiler."""
import sys, torch
from collections import defaultdict
import numpy as np
from lite_attention.bench import rows as R
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.contenders import Ours
from lite_attention.bench.timing import graph_of
from torch.profiler import profile, ProfilerActivity
rows = {r.name: r for r in R.ROWS}; dev = torch.device('cuda')
for name in sys.argv[1:]:
    row = rows[name]; n = 4 if 'b1-8k' in name or 'b4' in name else 1
    inp = [make_inputs(row.shape, dev, i) for i in range(n)]
    calls = [row.skip.prepare(i, 1) for i in inp] if row.skip else [Ours().prepare(i) for i in inp]
    replay = graph_of(calls, 8)
    for _ in range(3): replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(3): replay()
        torch.cuda.synchronize()
    ev = sorted([e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA and 'kernel' in e.name], key=lambda e: e.time_range.start)
    import re
    short = lambda s: re.sub(r'.*::(\w+_kernel).*', r'\1', s) if '_kernel' in s else s[:30]
    seq = [(short(e.name), e.time_range.start, e.time_range.end) for e in ev]
    first = seq[0][0]; groups = []; 
    for s in seq:
        if s[0] == first: groups.append([])
        groups[-1].append(s)
    groups = groups[2:]
    L = max(set(map(len, groups)), key=list(map(len, groups)).count); groups = [g for g in groups if len(g) == L]
    starts = [g[0][1] for g in groups]
    print(f'== {name}: step {np.median(np.diff(starts)) if len(starts)>1 else 0:.1f} us')
    for k in range(L):
        print(f'   {groups[0][k][0]:20s} from {np.median([g[k][1]-g[0][1] for g in groups]):7.2f} to {np.median([g[k][2]-g[0][1] for g in groups]):7.2f}  own {np.median([g[k][2]-g[k][1] for g in groups]):6.2f}  after end of before {np.median([g[k][2]-g[k-1][2] for g in groups]) if k else 0:6.2f}')
    del inp, calls, replay; torch.cuda.empty_cache()
