"""KV connectors beside pages that have sketches behind them.

A connector that copies pages by their distance in memory, or through the views of the layers, doesn't mind what lies
between them. One that takes a layer's pages for one piece of memory would write over the wrong ones, and most would not
notice. So those alone are accepted whose copies are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from vllm_plugin.settings import KEY

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

# Read in vLLM 0.26, 0.28, 0.32 and 0.33. The first copies through views; the others copy whole pages, or a page's keys
# and values alone, at the pages' distance.
ACCEPTED = ("ExampleConnector", "OffloadingConnector", "SimpleCPUOffloadConnector")
OF_OTHERS = "MultiConnector"  # hands everything on


def name_of(vllm_config: VllmConfig) -> str | None:
    """The connector of an engine, None where it has none."""
    transfer = vllm_config.kv_transfer_config
    return None if transfer is None else transfer.kv_connector


def check(vllm_config: VllmConfig) -> None:
    """Raises NotImplementedError for a connector that isn't known to leave sketches and other pages alone.

    In a worker, which has its connector by now.
    """
    if name_of(vllm_config) is None:
        return
    for transfer in _single(vllm_config.kv_transfer_config):
        if not _is_accepted(transfer):
            raise NotImplementedError(
                f"kv_transfer_config: got {transfer.kv_connector}, which isn't known to copy pages that have sketches "
                f"behind them; needs one of {', '.join(ACCEPTED)}, a subclass, {OF_OTHERS} of these, none, or "
                f"additional_config[{KEY!r}] with 'pages' false"
            )
    if _joins_layers() and not vllm_config.use_v2_model_runner:
        raise NotImplementedError(
            f"kv_transfer_config: got {name_of(vllm_config)}, for which vLLM's model runner V1 makes one KV cache of "
            "all layers, without room for sketches; needs VLLM_USE_V2_MODEL_RUNNER=1, another connector, or "
            f"additional_config[{KEY!r}] with 'pages' false"
        )


def _joins_layers() -> bool:
    """Whether this worker's connector asks for one cache of all layers: from 0.29 on none does."""
    return has_kv_transfer_group() and getattr(get_kv_transfer_group(), "prefer_cross_layer_blocks", False)


def _single(transfer: KVTransferConfig) -> list[KVTransferConfig]:
    if transfer.kv_connector != OF_OTHERS or transfer.kv_connector_module_path:
        return [transfer]
    children = transfer.kv_connector_extra_config.get("connectors", [])
    return [single for child in children for single in _single(_child(transfer, child))]


def _child(parent: KVTransferConfig, options: dict[str, Any]) -> KVTransferConfig:
    return type(parent)(**{"engine_id": parent.engine_id, **options})


def _is_accepted(transfer: KVTransferConfig) -> bool:
    """Whether it is one of vLLM's own that are accepted, or derived from one."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    classes = KVConnectorFactory.get_connector_class(transfer).__mro__
    return any(each.__name__ in ACCEPTED and each.__module__.startswith("vllm.") for each in classes)
