"""warm.py I: compiles FA4's kernel for row I of these and checks it; warm.py all: all rows, by kernels of the cache."""
import sys, time

import torch

began = time.monotonic()
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.peer_fa4 import FA4
from lite_attention.bench.shapes import Shape
from lite_attention import reference

peer = FA4()
if reason := peer.available():
    print("row: FA4 can't be used:", reason)
    sys.exit(1)
imported = time.monotonic() - began


def plain(inputs, visits=None):
    """The formula in float32 of the first sequence's last 128 queries."""
    q, (k, v) = inputs.queries()[inputs.rows_of(0)][-128:].float(), (x.float() for x in inputs.keys_of(0))
    group = inputs.shape.heads // inputs.shape.heads_k
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * inputs.softmax_scale
    n = len(k)
    if inputs.shape.causal:
        scores.masked_fill_(torch.ones(128, n, dtype=torch.bool, device="cuda").triu(n - 128 + 1), -torch.inf)
    if visits is not None:
        scores.masked_fill_(~visits[0, :, -1].repeat_interleave(128, -1)[:, None, :n], -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def one(number, kind):
    t = time.monotonic()
    if kind[0] == "sparse":
        shape = Shape((2048,), (2048,), 4, 4, 128, False)
        inputs = make_inputs(shape, torch.device("cuda"), 0)
        visits = torch.rand(1, 4, 16, 16, device="cuda") < 0.5
        visits[..., -1] = True
        out, expected = peer.prepare_lists(inputs, visits)(), plain(inputs, visits)
    else:
        head_dim, causal, heads, heads_k, k_len = kind
        q_len = 2048
        shape = Shape((q_len,), (k_len,), heads, heads_k, head_dim, causal)
        inputs = make_inputs(shape, torch.device("cuda"), 0)
        out, expected = peer.prepare(inputs)(), plain(inputs)
    error = (out.flatten(0, 1)[-128:].float() - expected).abs().max().item()
    print(f"row {number} {kind}: import {imported:.1f} s, first call {time.monotonic() - t:.1f} s, error {error:.4f}", flush=True)
    return error < 0.03


KINDS = [*((d, c, 2048 // d, 2048 // d, 2048) for d in (64, 128, 256) for c in (False, True)), ("sparse",), (128, True, 32, 8, 4096)]
chosen = range(len(KINDS)) if sys.argv[1] == "all" else [int(sys.argv[1])]
sys.exit(0 if all([one(i, KINDS[i]) for i in chosen]) else 1)
