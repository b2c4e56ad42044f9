"""Errors against the formula in float64, beside those of FlashAttention-3 on the same inputs.

FA3 is found inside an installed vLLM; LITE_ATTENTION_FA3 names a library elsewhere.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import accuracy
import pytest
import torch

from lite_attention import flash_attn_varlen_func
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.peer_fa3 import FA3, find_fa3
from lite_attention.bench.shapes import Shape

ALLOWED = 1.1  # times FA3's error
LENGTHS = (1500, 777)
SEEDS = range(4)


@pytest.fixture(scope="module")
def fa3():
    named = os.environ.get("LITE_ATTENTION_FA3")
    peer = FA3(Path(named) if named else find_fa3())
    if reason := peer.available():
        pytest.skip(f"no FA3: {reason}")
    return peer


def errors(inputs, out):
    """Absolute differences from float64 of all elements."""
    found = []
    for b in range(inputs.shape.batch):
        place = inputs.rows_of(b)
        q, (k, v) = inputs.queries()[place], inputs.keys_of(b)
        exact, _ = accuracy.plain_attention(
            q.double(), k.double(), v.double(), inputs.softmax_scale, inputs.shape.causal, (-1, -1)
        )
        found.append((out[place].double() - exact).abs().flatten())
    return torch.cat(found)


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_errors_are_no_larger_than_those_of_fa3(fa3, record_property, head_dim, dtype, causal, spread):
    """`spread` widens the scores: with 4 few keys have nearly all the weight."""
    shape = Shape(LENGTHS, LENGTHS, 8, 2, head_dim, causal, "packed")
    ours, theirs = [], []
    for seed in SEEDS:
        inputs = make_inputs(shape, torch.device("cuda"), seed)
        q, k, v = ((x.float() * scale).to(dtype) for x, scale in ((inputs.q, spread), (inputs.k, 1), (inputs.v, 1)))
        inputs = dataclasses.replace(inputs, q=q, k=k, v=v)
        starts = inputs.cu_seqlens_q
        out = flash_attn_varlen_func(q, k, v, starts, starts, max(LENGTHS), max(LENGTHS), causal=causal)
        ours.append(errors(inputs, out))
        theirs.append(errors(inputs, fa3.prepare(inputs)()))
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    largest, mean = (float(ours.max() / theirs.max()), float(ours.mean() / theirs.mean()))
    record_property("largest_error_over_fa3", round(largest, 4))
    record_property("mean_error_over_fa3", round(mean, 4))
    assert largest <= ALLOWED, f"largest error {ours.max():.3e}, FA3 {theirs.max():.3e}"
    assert mean <= ALLOWED, f"mean error {ours.mean():.3e}, FA3 {theirs.mean():.3e}"
