"""Pages that a request begins with: a KV connector has brought their keys, and as a rule no sketches.

Nothing tells the pages of a connector from those of the prefix cache, and a request may find in the prefix cache what
a connector brought for another one that has not run yet. So in the first step of a request, or the first one after a
preemption, the sketches of all pages that it begins with are written, from their keys. A page that has its sketch gets
the same one again: it depends on nothing but the page's keys. Pages that a request computes are no concern of this
module, and so are those that it computes again after a failed load: they are told by the step's slots.

When keys are there depends on how a step runs. Where Python runs the layers, each writes before it attends, after vLLM
has waited for the connector's copy of the layer. A full CUDA graph has no such place; vLLM takes none with connectors
that copy layer by layer, so that the keys of all layers are there when the graph is replayed, and all sketches are
written then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.forward_context import get_forward_context, is_forward_context_available

from lite_attention.pages import PAGE

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass
class Arrived:
    """What the requests that begin in the present step begin with."""

    pages: dict[str, torch.Tensor]  # by layer, int32 (n,), on its device
    layers: dict[str, Any]  # the model's attention layers
    loads_first: bool  # whether the connector starts what it loads before the step runs, and not after

    def write(self) -> None:
        for name, pages in self.pages.items():
            layer = self.layers[name]
            layer.impl.write_sketches(layer.kv_cache, pages)


_step: Arrived | None = None


def of_step(layer_name: str) -> torch.Tensor | None:
    """The pages whose sketches a layer has to write in this step, besides those that the step fills; None for none."""
    return None if _step is None else _step.pages.get(layer_name)


def install() -> None:
    """Wraps `Worker.execute_model`, once, to know what begins in each step of this process's worker."""
    from vllm.v1.worker.gpu_worker import Worker  # the CPU's too is one

    original = Worker.execute_model
    if hasattr(original, "tells_of_arrivals"):
        return

    @functools.wraps(original)
    def wrapper(self: Any, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        global _step
        if not has_kv_transfer_group():
            return original(self, scheduler_output, *args, **kwargs)
        _watch(get_kv_transfer_group())
        _step = arrived(self, scheduler_output)
        try:
            return original(self, scheduler_output, *args, **kwargs)
        finally:
            _step = None

    wrapper.tells_of_arrivals = True
    Worker.execute_model = wrapper


def begun(scheduler_output: SchedulerOutput) -> Iterator[tuple[tuple[list[int], ...], int]]:
    """Of each request that begins or goes on after a preemption: its pages by KV-cache group, tokens that they have."""
    for request in scheduler_output.scheduled_new_reqs:
        yield request.block_ids, request.num_computed_tokens
    cached = scheduler_output.scheduled_cached_reqs
    if not cached.resumed_req_ids:
        return
    for request_id, pages, tokens in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        if request_id in cached.resumed_req_ids:
            yield pages, tokens


def arrived(worker: Any, scheduler_output: SchedulerOutput) -> Arrived | None:
    """What arrives in a step of `worker`, for its layers that decode from lists."""
    began = [(pages, tokens // PAGE) for pages, tokens in begun(scheduler_output) if tokens >= PAGE]
    if not began:
        return None
    layers = worker.vllm_config.compilation_config.static_forward_context
    pages: dict[str, torch.Tensor] = {}
    for group, each in enumerate(worker.model_runner.kv_cache_config.kv_cache_groups):
        if names := [name for name in each.layer_names if _is_listed(layers[name])]:
            numbers = dict.fromkeys(page for by_group, full in began for page in by_group[group][:full])
            pages |= dict.fromkeys(names, _on_device(list(numbers), worker.device))
    # Before 0.32 all connectors start what they load before the step.
    return Arrived(pages, layers, getattr(scheduler_output, "has_sync_kv_loads", True))


def _is_listed(layer: Any) -> bool:
    listing = getattr(getattr(layer, "impl", None), "listing", None)
    return listing is not None and listing.tally is not None


def _on_device(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Without waiting for the device."""
    made = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def _watch(connector: Any) -> None:
    """Has all sketches written where a full CUDA graph follows on what this worker's connector loads; once for each."""
    if hasattr(connector, "is_watched"):
        return
    connector.is_watched = True
    connector.bind_connector_metadata = _then_write(connector.bind_connector_metadata, loads_first=False)
    connector.start_load_kv = _then_write(connector.start_load_kv, loads_first=True)


def _then_write(method: Callable[..., None], loads_first: bool) -> Callable[..., None]:
    """The method, and all sketches after it in steps that start their loads before they run, or in the others."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        method(*args, **kwargs)
        if _step is not None and _step.loads_first == loads_first and _is_replayed():
            _step.write()

    return wrapper


def _is_replayed() -> bool:
    """Whether the step is a full CUDA graph, for which model runner V2 has no forward context, or an empty one."""
    if not is_forward_context_available() or get_forward_context().attn_metadata is None:
        return True
    return get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL
