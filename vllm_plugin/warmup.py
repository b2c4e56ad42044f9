"""The end of vLLM's warm-up on a GPU.

Once graphs are captured, model runner V2 serves requests that it makes up, prompts and all: nothing in their steps
tells them from a client's.
"""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Wraps the warm-up of the GPU workers of this process, once, so that what it ran is not counted."""
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.compile_or_warm_up_model
    if hasattr(original, "is_not_counted"):
        return

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_plugin import metrics

        result = original(self, *args, **kwargs)
        metrics.warmed_up()
        return result

    wrapper.is_not_counted = True
    Worker.compile_or_warm_up_model = wrapper
