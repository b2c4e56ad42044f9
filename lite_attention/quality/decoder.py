"""A Hugging Face causal LM over paged KV caches, prefilled densely and decoded from listed pages.

The model's code stays as it is: transformers' registry of attention functions hands every layer's queries, keys and
values to `_attention`, which keeps the cache itself. Any number of known tokens can be decoded in one call, each as a
decode step of its own: at every layer a step's queries, keys and values come from its own hidden state, and that from
the lists of the layer below, so that layer by layer for many steps is the same as step by step through many layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lite_attention import flash_attn_varlen_func
from lite_attention.checks import wrong
from lite_attention.pages import PAGE, decode_pages
from lite_attention.quality.paged import Batch, Chunk, PagedLayer
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.tally import Tally

NAME = "lite_attention_pages"  # in transformers' registry
PREFILL = 4096  # tokens of a sequence at once: bounds the memory of activations


class Decoder:
    """Sequences of one model, each with as many tokens as it has been given.

    A sequence can go back to a shorter length, to be continued in another way: the pages before are not touched.
    """

    def __init__(self, model: PreTrainedModel, batch: int, most_tokens: int, sketch_bits: int = 12) -> None:
        """`model` was loaded with `attn_implementation=NAME`; `sketch_bits` as `empty_sketch` has them."""
        if model.config._attn_implementation != NAME:
            raise wrong("model", f"attn_implementation {model.config._attn_implementation!r}", repr(NAME))
        self.model, self.sketch_bits = model, sketch_bits
        self.lengths = [0] * batch
        blocks = -(-most_tokens // PAGE)
        self._table = torch.arange(batch * blocks, dtype=torch.int32, device=model.device).view(batch, blocks)
        self._layers: dict[int, PagedLayer] = {}

    @torch.inference_mode()
    def prefill(self, row: int, tokens: Tensor) -> Tensor:
        """Appends tokens (n,) to sequence `row` by dense attention; returns the logits (vocab,) after the last."""
        for part in tokens.split(PREFILL):
            logits = self._forward([row], part[None], DENSE, None, keep=1)
        return logits[0, 0]

    @torch.inference_mode()
    def decode(self, rows: Sequence[int], tokens: Tensor, setting: Setting, tally: Tally | None = None) -> Tensor:
        """Appends tokens (rows, n), each by a decode step; returns logits (rows, n, vocab).

        With a `tally`, what the lists read and leave out is added to it, at the price of dense attention beside them.
        """
        return self._forward(rows, tokens, setting, tally, keep=0)

    def truncate(self, row: int, length: int) -> None:
        """Takes sequence `row` back to its first `length` tokens."""
        if not 0 <= length <= self.lengths[row]:
            raise wrong("length", length, f"0 to {self.lengths[row]}, the tokens that sequence {row} has")
        self.lengths[row] = length

    def _forward(self, rows: Sequence[int], tokens: Tensor, setting: Setting, tally: Tally | None, keep: int) -> Tensor:
        starts, room = [self.lengths[row] for row in rows], self._table.shape[1] * PAGE
        if max(starts) + tokens.shape[1] > room:
            raise wrong("tokens", f"{tokens.shape[1]} after {max(starts)}", f"{room} together, the room of a sequence")
        chunk = Chunk(self._table[list(rows)], starts, tokens.shape[1])
        depth = self.model.config.num_hidden_layers
        step = _Step(self._table.numel(), self.sketch_bits, self._layers, chunk, setting, tally, depth)
        logits = self.model(
            input_ids=tokens,
            position_ids=chunk.positions,
            use_cache=False,
            logits_to_keep=keep,
            lite_attention_step=step,
        ).logits
        for row in rows:
            self.lengths[row] += tokens.shape[1]
        return logits


@dataclass
class _Step:
    """What one forward pass of the model is to do at each layer."""

    blocks: int
    sketch_bits: int
    layers: dict[int, PagedLayer]
    chunk: Chunk
    setting: Setting
    tally: Tally | None
    depth: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Attention of q (rows * tokens, heads, head_dim) once k and v are appended; the same shape."""
        if layer not in self.layers:
            self.layers[layer] = PagedLayer(self.blocks, k, self.sketch_bits)
        cache, steps = self.layers[layer], self.chunk.steps
        cache.append(self.chunk, k, v)
        if window is not None or not self.setting.lists(layer, self.depth):
            cache.write_sketches(self.chunk)
            if self.tally is not None and window is None:
                self.tally.add_dense(layer, cache, steps, q.shape[1])
            return _dense(q, cache, self.chunk.whole, scale, window)[0]
        eps = self.setting.eps_of(layer, self.depth)
        out, lse, lists = decode_pages(
            q,
            cache.k,
            cache.v,
            cache.sketch,
            steps.cu_seqlens_q,
            steps.seqused_k,
            steps.block_table,
            1,
            eps=eps,
            filled=self.chunk.completed,
            newest=self.setting.newest,
            softmax_scale=scale,
            # An eps of 0 is to show what rounding alone does, and by parts of rows it would be dense attention to the
            # bit. Whole rows are computed from lists of everything.
            num_splits=1 if eps == 0 else 0,
        )
        if self.tally is not None:
            lse_dense = _dense(q, cache, self.chunk.whole, scale, None)[1]
            self.tally.add(layer, cache, steps, lists, lse, lse_dense, sketched=eps > 0)
        return out


def _dense(
    q: Tensor, cache: PagedLayer, batch: Batch, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Dense causal attention over the cache; `window` keys, the query's own among them, or all."""
    return flash_attn_varlen_func(
        q,
        cache.k,
        cache.v,
        batch.cu_seqlens_q,
        None,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        seqused_k=batch.seqused_k,
        block_table=batch.block_table,
        return_softmax_lse=True,
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    lite_attention_step: _Step | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """As transformers calls it: (rows, heads, tokens, head_dim) in, (rows, tokens, heads, head_dim) out."""
    if lite_attention_step is None:
        raise NotImplementedError(
            f"{type(module).__name__}: got no lite_attention_step; needs a model that hands the arguments of a call on "
            "to its attention, and a call by lite_attention.quality's Decoder"
        )
    for name, given in (("softcap", softcap), ("attention sinks (s_aux)", s_aux)):
        if given is not None:
            raise NotImplementedError(f"{type(module).__name__}: got {name}; lists of pages are measured without it")
    if not getattr(module, "is_causal", True) or key.shape != value.shape:
        raise NotImplementedError(
            f"{type(module).__name__}: got keys {tuple(key.shape)}, values {tuple(value.shape)}, "
            f"is_causal {getattr(module, 'is_causal', True)}; needs causal self-attention, keys and values of one shape"
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
    out = lite_attention_step.attend(module.layer_idx, q, k, v, scaling, sliding_window)
    return out.unflatten(0, (query.shape[0], -1)), None


# transformers makes no mask for a function that is only in this registry; `_attention` is causal by itself.
AttentionInterface.register(NAME, _attention)
