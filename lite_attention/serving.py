"""What vLLM engines that this process has started have decoded from listed pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_plugin.metrics import DecodeStats


def stats() -> DecodeStats:
    """Totals since the engines began to serve, at most two seconds old; a server has the same at `/metrics`.

    Returns:
        Pages read and visible, mean share of softmax mass left out (an estimate), decode steps of requests by lists and
        densely, bytes of sketches; `vllm_plugin.metrics.DecodeStats` says what each is.

    Raises:
        RuntimeError: this process has started no vLLM engine that decodes from listed pages.
    """
    from vllm_plugin import metrics

    return metrics.stats()
