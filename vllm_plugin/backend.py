"""What LITE_ATTENTION tells vLLM about itself: what it computes, on which device, with which KV cache.

vLLM asks the `supports_*` methods before it loads a model and refuses with the reason; `impl` refuses, at the same
time, what they have no question for. The interface is the one of vLLM 0.26 to 0.33: methods that only some of these
versions call are marked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf

from lite_attention import hopper, ops
from vllm_plugin.quantised import FP8_KV_CACHE
from vllm_plugin.register import NAME

if TYPE_CHECKING:
    from vllm.platforms.interface import DeviceCapability

    from vllm_plugin.impl import LiteAttentionImpl
    from vllm_plugin.metadata import LiteAttentionMetadataBuilder

HOPPER_CAPABILITY = (9, 0)


class LiteAttentionBackend(AttentionBackend):
    """Decoder self-attention over vLLM's paged KV cache by `lite_attention`, on Hopper GPUs and on the CPU."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *FP8_KV_CACHE]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[LiteAttentionImpl]:
        from vllm_plugin.impl import LiteAttentionImpl

        return LiteAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LiteAttentionMetadataBuilder]:
        from vllm_plugin.metadata import LiteAttentionMetadataBuilder

        return LiteAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(1 if current_platform.is_cpu() else hopper.PAGE_MULTIPLE)]

    # The KV cache: (num_blocks, num_kv_heads, block_size, 2 * head_size), K then V. Strides are read from the tensor,
    # so that the memory may be laid out as vLLM or a KV connector likes: from 0.29 on `supported_kv_cache_layouts` says
    # that by its default.

    @staticmethod
    def get_kv_cache_shape(  # 0.26 - 0.28
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:  # 0.26 - 0.28
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        by_token = get_kv_cache_layout() == "NHD"  # else "HND": heads outside of tokens
        if include_num_layers_dimension:
            return (1, 0, 3, 2, 4) if by_token else (1, 2, 0, 3, 4)
        return (0, 2, 1, 3) if by_token else (0, 1, 2, 3)

    # What is supported

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return current_platform.is_cpu() or hopper.head_dim_supported(head_size)

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in hopper.DTYPES or (dtype == torch.float32 and current_platform.is_cpu())

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability | None) -> bool:
        if current_platform.is_cpu():
            return True
        return current_platform.is_cuda() and tuple(capability) == HOPPER_CAPABILITY

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """Of an FP8 KV cache: what writes it and what reads it, here and on the CPU, take a factor for each KV head."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """By `num_splits=1` in the kernels. On the CPU the BLAS may round a row otherwise in another batch."""
        return not current_platform.is_cpu()

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:  # 0.33
        """No: grids are sized by the longest query that the host knows of."""
        return False

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *args: object, **kwargs: object
    ) -> str | None:
        """The reason why a combination of supported values isn't supported, or None."""
        if kv_cache_dtype in ("float16", "bfloat16") and getattr(torch, kv_cache_dtype) != dtype:
            return f"kv_cache_dtype {kv_cache_dtype} not supported with {dtype}: both must be the same"
        fp8 = kv_cache_dtype in FP8_KV_CACHE
        if fp8 and not current_platform.is_cpu() and not hopper.head_dim_supported(head_size, fp8_kv=True):
            return f"kv_cache_dtype {kv_cache_dtype} not supported with head_size {head_size}: needs a multiple of 16"
        if not current_platform.is_cpu() and ops.EXTENSION_MISSING is not None:
            return f"LiteAttention's CUDA extension is not there: {ops.EXTENSION_MISSING}"
        return None
