"""Lets vLLM's CPU platform serve with LITE_ATTENTION.

`CpuPlatform.get_attn_backend_cls` answers CPU_ATTN whatever was chosen. The wrapper answers for LITE_ATTENTION alone,
with the checks and the error that the CUDA platform has for a chosen backend, and leaves every other question to vLLM.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_plugin.register import CLASS_PATH, NAME

if TYPE_CHECKING:
    from vllm.platforms.interface import Platform


def install(platform: type[Platform]) -> None:
    """Wraps `get_attn_backend_cls` of the CPU platform in use, once."""
    original = platform.get_attn_backend_cls
    if hasattr(original, "serves_lite_attention"):
        return

    @functools.wraps(original.__func__)
    def wrapper(
        cls: type[Platform], selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if getattr(selected_backend, "name", None) != NAME:
            return original.__func__(cls, selected_backend, attn_selector_config, *args, **kwargs)
        from vllm_plugin.backend import LiteAttentionBackend

        reasons = LiteAttentionBackend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"Selected backend {NAME} is not valid for this configuration. Reason: {reasons}")
        return CLASS_PATH

    wrapper.serves_lite_attention = True
    platform.get_attn_backend_cls = classmethod(wrapper)
