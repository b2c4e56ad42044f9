"""One attention layer: writes the step's keys and values to the KV cache, and attends to all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm.envs
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from lite_attention import flash_attn_varlen_func
from vllm_plugin import settings, sketches
from vllm_plugin.listing import Listing
from vllm_plugin.quantised import FP8, is_fp8, quantise
from vllm_plugin.register import NAME

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer

    from vllm_plugin.metadata import LiteAttentionMetadata


def num_splits() -> int:
    """1, rows computed whole, where vLLM is asked for batch invariance; else 0, as the scheduler likes.

    The variable is all that vLLM 0.26 to 0.33 have in common here: its module on the subject moves.
    """
    return 1 if vllm.envs.VLLM_BATCH_INVARIANT else 0


class LiteAttentionImpl(AttentionImpl["LiteAttentionMetadata"]):
    """vLLM makes one for each layer when it builds the model, so that what it refuses is refused at start."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        for argument, value in extra.items():
            if value is not None:
                raise NotImplementedError(
                    f"{NAME} does not support this model: its attention needs {argument}={value}. Choose another "
                    "attention backend."
                )
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"{NAME} computes decoder self-attention, not attn_type={attn_type!r}.")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.fp8_kv = is_fp8(kv_cache_dtype)
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        # vLLM counts the query's own token into the window; FlashAttention's left counts the keys before it.
        self.window_left = -1 if sliding_window is None else sliding_window - 1
        self._parameter = sinks  # loaded after this
        self.sinks = sinks
        self.softcap = float(logits_soft_cap or 0.0)
        # On the device from now on: a copy in `forward` would wait, and fail in the capture of a CUDA graph.
        self.alibi_slopes = (
            None
            if alibi_slopes is None
            else torch.tensor(alibi_slopes, dtype=torch.float32, device=current_platform.device_type)
        )
        self.listing = self._listing()
        self.num_splits = num_splits()  # read once: a plan must have that of the calls
        self._write = _write_by_index if current_platform.is_cpu() else _write_by_kernel

    def _listing(self) -> Listing | None:
        """What decodes from lists, where the operator asks for it; not in a layer with a window or another's KV cache.

        Raises:
            NotImplementedError: scores that lists have no estimate for.
        """
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or not settings.of(vllm_config).enabled:
            return None
        if self.window_left >= 0 or self.kv_sharing_target_layer_name is not None:
            return None
        if self.softcap or self.alibi_slopes is not None:
            raise NotImplementedError(
                f"additional_config[{settings.KEY!r}]: got pages for a model with softcap or ALiBi slopes, with which "
                f"{NAME} can't decode from listed pages; needs 'pages' false"
            )
        sketches.install()
        shape = self.num_heads, self.num_kv_heads, self.head_size
        return Listing(settings.of(vllm_config), vllm_config, *shape)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Makes the sinks float32. After a reload they stay where they are, as CUDA graphs read them there."""
        if self._parameter is None or self._parameter.dtype == torch.float32:
            return
        if self.sinks is self._parameter:
            self.sinks = self._parameter.detach().float()
        else:
            self.sinks.copy_(self._parameter.detach())

    def _keys_and_values(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (num_blocks, block_size, num_kv_heads, head_size) of the two halves of vLLM's cache."""
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return key_cache, value_cache

    def _cache(self, kv_cache: torch.Tensor) -> list[torch.Tensor]:
        """The same two as kernels take them."""
        # A tensor may have any stride in a dimension of size one; the kernel's tensor maps need one of a whole row.
        cache = [canonicalize_singleton_dim_strides(each) for each in self._keys_and_values(kv_cache)]
        return [each.view(FP8) for each in cache] if self.fp8_kv else cache

    def write_sketches(self, kv_cache: torch.Tensor, pages: torch.Tensor) -> None:
        """Writes the sketches of full pages of a layer that decodes from lists; int32, negative for none."""
        self.listing.write_sketches(self._cache(kv_cache)[0], kv_cache, pages)

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores key and value (num_tokens, num_kv_heads, head_size) in the slots named; negative slots are padding.

        vLLM does not call it for a layer that shares the KV cache of an earlier one.
        """
        key_cache, value_cache = self._keys_and_values(kv_cache)
        self._write(layer, key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LiteAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query (num_tokens, num_heads, head_size) to the KV cache, into output of the same shape.

        The step's keys and values are in the cache by now. Rows of padding are left as they are.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{NAME} does not quantise its output: output_scale must be None.")
        if attn_metadata is None:  # the run that measures memory, or, once builders are made, an idle replica's step
            if self.listing is not None and self.listing.tally is None:
                self.listing.take_scratch(layer.layer_name, query.device)
            return output.fill_(0)
        step, tokens = attn_metadata, attn_metadata.num_actual_tokens
        cache = self._cache(kv_cache)
        scales = {"k_descale": layer._k_scale, "v_descale": layer._v_scale} if self.fp8_kv else {}
        if self.listing is None or self.listing.tally is None:
            self._attend(query[:tokens], cache, step, output[:tokens], scales)
            return output
        if self.listing.leads:
            step.lead()
        if step.arrived is not None:
            self.listing.write_sketches(cache[0], kv_cache, step.arrived)
        split = 0
        if step.decoding is None:
            self.listing.write_sketches(cache[0], kv_cache, step.filled)
        else:
            split = step.decoding.tokens
            self.listing.decode(
                query[:split],
                *cache,
                kv_cache,
                step.decoding,
                output[:split],
                filled=step.filled,
                scale=self.scale,
                sinks=self.sinks,
                num_splits=self.num_splits,
                **scales,
            )
        if step.others is not None:
            self._attend(query[split:tokens], cache, step.others, output[split:tokens], scales)
        return output

    def _attend(
        self,
        query: torch.Tensor,
        cache: list[torch.Tensor],
        step: LiteAttentionMetadata,
        output: torch.Tensor,
        scales: dict[str, torch.Tensor],
    ) -> None:
        """Attention of all rows of a step, densely."""
        flash_attn_varlen_func(
            query,
            *cache,
            step.query_start_loc,
            None,
            step.max_query_len,
            step.max_seq_len,
            softmax_scale=self.scale,
            causal=step.causal,
            # Where there is no causal mask, a window reaches as far ahead as it reaches back.
            window_size=(self.window_left, 0 if step.causal else self.window_left),
            alibi_slopes=self.alibi_slopes,
            softcap=self.softcap,
            sinks=self.sinks,
            seqused_k=step.seq_lens,
            block_table=step.block_table,
            scheduler_metadata=step.scheduler_metadata,
            num_splits=self.num_splits,
            out=output,
            **scales,
        )


def _write_by_kernel(
    layer: AttentionLayer,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
) -> None:
    from vllm import _custom_ops

    # key and value are padded, slot_mapping is not: the kernel goes by its length.
    _custom_ops.reshape_and_cache_flash(
        key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, layer._k_scale, layer._v_scale
    )


def _write_by_index(
    layer: AttentionLayer,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
) -> None:
    if is_fp8(kv_cache_dtype):
        key, value = quantise(key, layer._k_scale), quantise(value, layer._v_scale)
        key_cache, value_cache = key_cache.view(FP8), value_cache.view(FP8)
    tokens = torch.nonzero(slot_mapping >= 0).flatten()
    slots = slot_mapping[tokens].long()
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, offset] = key[tokens]
    value_cache[block, offset] = value[tokens]
