"""Which part of the model this process has, for lines of the log that one worker writes for others like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def told(vllm_config: VllmConfig) -> str | None:
    """The model's layers, and with pipeline parallelism the stage, in words; None where this process is to be silent.

    The first worker of each stage speaks: stages have other layers, and the workers of one the same, of which each has
    its KV heads. vLLM's `info_once` leaves all stages out but the first of a machine. Before the KV cache is planned
    none speaks: vLLM makes builders then, too, over a few pages, to measure CUDA graphs.
    """
    if vllm_config.cache_config.num_gpu_blocks is None:
        return None
    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    stage, worker = divmod(parallel.rank, parallel.tensor_parallel_size * parallel.prefill_context_parallel_size)
    if worker:
        return None
    layers = f"the model has {vllm_config.model_config.get_total_num_hidden_layers()}"
    return layers if stages == 1 else f"{layers}, and this is pipeline stage {stage % stages + 1} of {stages}"
