import ctypes, numpy as np, torch
from lite_attention import ops
from lite_attention.bench.contenders import Ours
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.rows import select
lib = ctypes.CDLL(str(ops.EXTENSION))
for name in ("decode-b8-32k", "decode-b64-4k", "decode-b64-32k", "decode-b256-512-32k", "decode-b128-2k", "decode-b1-32k"):
    (row,) = select([name]); call = Ours().prepare(make_inputs(row.shape, torch.device("cuda"), 0))
    for k in range(3):
        call(); torch.cuda.synchronize()
        a = np.zeros((132, 2), np.uint64); lib.la_ends(a.ctypes.data_as(ctypes.c_void_p))
        a = a[a[:, 1] > 0]; t0 = a[:, 0].min(); e = np.sort((a[:, 1] - t0).astype(np.int64)) / 1e3; b = (a[:, 0] - t0).astype(np.int64) / 1e3
    print(name, len(a), "starts to", b.max(), "ends us: min %.1f 10%% %.1f median %.1f 90%% %.1f max %.1f mean %.1f; mean/max %.3f" % (e[0], np.percentile(e, 10), np.median(e), np.percentile(e, 90), e[-1], e.mean(), e.mean() / e[-1]), flush=True)
