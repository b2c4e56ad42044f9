import sys, torch
from statistics import median
from lite_attention.bench.contenders import Ours
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.rows import ROWS
from lite_attention.bench.timing import CudaClock, graph_of
rows = {r.name: r for r in ROWS}
clock, found = CudaClock(), {}
for name in ("dense-hd128-full-2k-b8", "dense-hd128-causal-2k-b8", "dense-hd64-causal-2k-b8", "decode-b1-8k", "decode-b4-4k", "decode-b8-32k", "decode-q8-b16-16k", "decode-group16-b16-16k"):
    shape = rows[name].shape
    inputs = [make_inputs(shape, torch.device("cuda"), i) for i in range(2)]
    calls = [Ours().prepare(one) for one in inputs]
    for call in calls: call()
    n = 8
    graph = graph_of(calls, n)
    for _ in range(2): clock(graph)
    found[name] = round(median(clock(graph) for _ in range(11)) / n, 2)
    del inputs, calls, graph
print(sys.argv[1], found, flush=True)
