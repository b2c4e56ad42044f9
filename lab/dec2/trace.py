"""trace.py LIB...: block timelines."""
import ctypes, os, sys, torch, numpy as np
import lite_attention
from lite_attention.bench.rows import *
from lite_attention.bench import rows as R
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.contenders import Ours
from lite_attention.bench.page_work import RandomPages, NeededPages
from lite_attention.bench.timing import graph_of
lib = ctypes.CDLL(sys.argv[1]); names = sys.argv[2:]
rows = {r.name: r for r in R.ROWS} if hasattr(R,'ROWS') else {r.name: r for r in R.all_rows()}
dev = torch.device('cuda')
def get():
    torch.cuda.synchronize(); a = np.zeros((132,64), dtype=np.uint64)
    assert lib.lite_trace128(a.ctypes.data_as(ctypes.c_void_p)) == 0
    return a
def show(title, a):
    t0 = a[:,0].astype(np.int64); end = a[:,63].astype(np.int64); c0 = a[:,1].astype(np.int64); c1 = a[:,62].astype(np.int64)
    ghz = np.median((c1-c0)/np.maximum(end-t0,1))
    base = t0.min()
    print(f"== {title}: {ghz:.3f} GHz, first entry to last exit {(end.max()-base)/1e3:.2f} us; entries spread {(t0.max()-base)/1e3:.2f}, exits {(end.min()-base)/1e3:.2f} .. {(end.max()-base)/1e3:.2f}")
    lab = {2:'barriers set',3:'waited',4:'work known',**{5+i:f'K tile {i} looked up' for i in range(8)},**{16+i:f'tile {i} K there' for i in range(24)},40:'store',41:'part stored',42:'arrived',43:'combined',62:'exit'}
    two = a[:,50] > 0
    if two.any(): print('  blocks of two items', two.sum(), 'exit med', round(float(np.median((end-base)[two]))/1e3,2), 'others', round(float(np.median((end-base)[~two]))/1e3,2))
    for s in sorted(lab):
        v = a[:,s].astype(np.int64); ok = v>0
        if not ok.any(): continue
        us = ((v-c0)[ok]/ghz + (t0-base)[ok])/1e3; own = (v-c0)[ok]/ghz/1e3
        print(f"  {lab[s]:20s} n {ok.sum():3d}  since first entry: min {us.min():6.2f} med {np.median(us):6.2f} max {us.max():6.2f}   since own: med {np.median(own):6.2f}")
    print("  tiles item0", [f'{k}:{v}' for k,v in zip(*np.unique(a[:,48],return_counts=True))][-12:], "item1", [f'{k}:{v}' for k,v in zip(*np.unique(a[:,50],return_counts=True))][-8:], "parts", np.unique(a[:,49]))
for name in names:
    if name.startswith('lists-'):
        _, b, k, pc = name.split('-'); base = rows['pages-step-b1-128k'] if b=='1' else rows['pages-step-b8-128k']
        shape = base.shape; inp = [make_inputs(shape, dev, 1)]; work = [RandomPages(float(pc)/100).prepare(inp[0], i) for i in range(1)]
        other = torch.zeros(1<<28, device=dev)
        calls = work
        flush = True
    elif name.startswith('pages-'):
        inp = [make_inputs(rows[name].shape, dev, 1)]; calls = [rows[name].skip.prepare(inp[0], 1)]; flush = False
    else:
        shape = rows[name].shape; inp = [make_inputs(shape, dev, i) for i in range(8 if 'b1-8k' in name or 'b4' in name else 3)]; calls = [Ours().prepare(i) for i in inp]; flush=False
    if flush:
        dst = torch.zeros((), device=dev)
        for _ in range(2):
            torch.sum(other, dim=0, out=dst); calls[0]()
        show(name + ' cold', get())
    replay = graph_of(calls, 2*len(calls) if len(calls)>1 else 8)
    for _ in range(3): replay()
    show(name, get())
    del inp, calls, replay; torch.cuda.empty_cache()
