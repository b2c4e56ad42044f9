"""PyTorch's scaled_dot_product_attention: cuDNN on the GPU, PyTorch's own kernel on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lite_attention.bench.contenders import Call
from lite_attention.bench.inputs import Inputs
from lite_attention.bench.shapes import Shape


class CuDNN:
    name = "cuDNN"

    def available(self) -> str | None:
        return None if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN"

    def identity(self) -> str:
        return f"{torch.backends.cudnn.version()}, through torch {torch.__version__}"

    def lacks(self, shape: Shape) -> str | None:
        if shape.fp8 != "none":
            return "no FP8 through PyTorch"
        return {"dense": None, "packed": "no packed sequences", "paged": "no paged KV"}[shape.layout]

    def prepare(self, inputs: Inputs) -> Call:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        square = inputs.shape.q_lens == inputs.shape.k_lens  # is_causal means top left, the same thing only there
        mask = None if square or not inputs.shape.causal else _lower_right(q, k)

        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = scaled_dot_product_attention(
                    q, k, v, mask, is_causal=inputs.shape.causal and square, enable_gqa=q.shape[1] != k.shape[1]
                )
            return out.transpose(1, 2)

        return call


class SDPA:
    """One sequence at a time, as it knows neither packed nor paged ones."""

    name = "SDPA"

    def available(self) -> str | None:
        return None

    def identity(self) -> str:
        return f"torch {torch.__version__}"

    def lacks(self, shape: Shape) -> str | None:
        return None

    def prepare(self, inputs: Inputs) -> Call:
        return lambda: torch.cat([_sequence(inputs, b) for b in range(inputs.shape.batch)])


def _sequence(inputs: Inputs, b: int) -> Tensor:
    """out of sequence b, (q_len, heads, head_dim)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.queries_of(b), *inputs.keys_of(b)))
    mask = _lower_right(q, k) if inputs.shape.causal and q.shape[2] > 1 else None
    out = scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _lower_right(q: Tensor, k: Tensor) -> Tensor:
    """The causal mask that ends bottom right, to be added to the scores: (seqlen_q, seqlen_k), dtype of q."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_(k.shape[2] - q.shape[2])
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(seen.logical_not_(), -math.inf)
