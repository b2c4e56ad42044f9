"""What tests of vLLM on a GPU need of the environment."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def missing() -> str | None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # tests/vllm looks like a package without code
        return "vLLM is not installed in this environment"
    if not importlib.metadata.entry_points(group="vllm.platform_plugins", name="lite_attention"):
        return "vLLM finds no entry points of LiteAttention in this environment"
    return None
