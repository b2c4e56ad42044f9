"""Which pages arrive in a step, when their sketches are written, and which KV connectors may bring them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def step(new: list = (), cached: list = (), resumed: list = (), **others) -> SimpleNamespace:
    """A scheduler's output: new requests as (pages by group, tokens), the others as (name, pages by group, tokens)."""
    names, pages, tokens = (list(each) for each in zip(*cached, strict=True)) if cached else ([], [], [])
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=pages, num_computed_tokens=tokens) for pages, tokens in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=names, new_block_ids=pages, num_computed_tokens=tokens, resumed_req_ids=set(resumed)
        ),
        **others,
    )


def layer(listed: bool, written: list) -> SimpleNamespace:
    listing = SimpleNamespace(tally=object()) if listed else None
    impl = SimpleNamespace(listing=listing, write_sketches=lambda cache, pages: written.append((cache, pages.tolist())))
    return SimpleNamespace(impl=impl, kv_cache="cache")


@pytest.fixture
def written() -> list:
    return []


@pytest.fixture
def worker(written):
    """Two groups, of which the second has a layer that decodes from lists, and one that doesn't."""
    layers = {"a": layer(False, written), "b": layer(True, written), "c": layer(False, written), "d": SimpleNamespace()}
    groups = [SimpleNamespace(layer_names=["a", "d"]), SimpleNamespace(layer_names=["b", "c"])]
    return SimpleNamespace(
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers)),
        model_runner=SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=groups)),
        device=torch.device("cpu"),
    )


def test_requests_that_begin_bring_pages(worker):
    """Full ones, of the layer's group, each once; also after a preemption, and not of requests that go on."""
    from vllm_plugin import arrivals

    found = arrivals.arrived(
        worker,
        step(
            new=[(([1, 2, 3], [11, 12, 13]), 47), (([1, 4], [11, 14]), 16), (([5], [15]), 0)],
            cached=[("on", None, 64), ("again", ([6, 7], [16, 17]), 33)],
            resumed=["again"],
        ),
    )
    assert {name: pages.tolist() for name, pages in found.pages.items()} == {"b": [11, 12, 16, 17]}
    assert found.pages["b"].dtype == torch.int32
    assert arrivals.arrived(worker, step(new=[(([1], [11]), 15)], cached=[("on", ([8], [18]), 64)])) is None


GRAPH, LAYERS = "graph", "layers"


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("loads", [None, True, False])  # before the step, after it; versions before 0.32 don't say
@pytest.mark.parametrize("runs", [GRAPH, LAYERS])
def test_sketches_are_written_when_keys_are_there(worker, written, monkeypatch, runner, loads, runs):
    """Before a full CUDA graph, after the loads on which it waits; else the layers have the pages to write."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker import gpu_worker

    from vllm_plugin import arrivals

    done = []
    connector = SimpleNamespace(
        bind_connector_metadata=lambda metadata: done.append("bind"), start_load_kv=lambda context: done.append("load")
    )
    mode = CUDAGraphMode.FULL if runs == GRAPH else CUDAGraphMode.PIECEWISE
    context = SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=mode)
    # Where model runner V2 replays a full graph, it has no forward context, and an empty one to load in.
    empty = SimpleNamespace(attn_metadata=None, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    bare = runner == "V2" and runs == GRAPH
    monkeypatch.setattr(arrivals, "is_forward_context_available", lambda: not bare or done[-1] == "load")
    monkeypatch.setattr(arrivals, "get_forward_context", lambda: empty if bare else context)
    monkeypatch.setattr(arrivals, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(arrivals, "get_kv_transfer_group", lambda: connector)

    def execute_model(worker, scheduler_output):
        connector.bind_connector_metadata(None)
        if loads is not False:
            connector.start_load_kv(None)
        done.append(("run", len(written), arrivals.of_step("b")))
        if loads is False:
            connector.start_load_kv(None)
        return "output"

    monkeypatch.setattr(gpu_worker.Worker, "execute_model", execute_model)
    arrivals.install()
    arrivals.install()
    begins = step(new=[(([1], [11]), 16)], **({} if loads is None else {"has_sync_kv_loads": loads}))
    goes_on = step(cached=[("on", None, 17)])
    for _ in range(2):  # the connector stays
        for each in (begins, goes_on):
            assert gpu_worker.Worker.execute_model(worker, each) == "output"
    first, second, *_ = [each for each in done if isinstance(each, tuple)]
    assert first[1] == (runs == GRAPH) and first[2].tolist() == [11]
    assert second[2] is None and arrivals.of_step("b") is None
    assert written == [("cache", [11])] * 2 * (runs == GRAPH)


def test_a_layer_writes_what_arrived_before_it_attends():
    from vllm_plugin.impl import LiteAttentionImpl

    impl, done = LiteAttentionImpl(6, 24, 1.0, 2), []
    impl.listing = SimpleNamespace(
        tally=object(),
        leads=False,
        write_sketches=lambda keys, cache, pages: done.append((keys.shape, pages)),
        decode=lambda *args, filled, **kwargs: done.append(filled),
    )
    decoding, query = SimpleNamespace(tokens=1), torch.zeros(1, 6, 24)
    metadata = SimpleNamespace(num_actual_tokens=1, filled="filled", arrived="arrived", decoding=decoding, others=None)
    impl.forward(None, query, None, None, torch.zeros(5, 2, 16, 48), metadata, query.clone())
    assert done == [((5, 16, 2, 24), "arrived"), "filled"]


def transfer(connector: str, module: str | None = None, **extra):
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=connector, kv_connector_module_path=module, kv_role="kv_both", kv_connector_extra_config=extra
    )


def several(*connectors: str):
    return transfer("MultiConnector", connectors=[{"kv_connector": each, "kv_role": "kv_both"} for each in connectors])


def test_connectors_that_are_known_are_accepted():
    from vllm_plugin import connectors

    accepted = [transfer(name) for name in connectors.ACCEPTED]
    accepted += [several(*connectors.ACCEPTED), transfer("PageStore", "page_store"), None]
    for each in accepted:
        connectors.check(SimpleNamespace(kv_transfer_config=each))


def test_a_cache_of_all_layers_is_refused(monkeypatch):
    from vllm_plugin import connectors

    monkeypatch.setattr(connectors, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(connectors, "get_kv_transfer_group", lambda: SimpleNamespace(prefer_cross_layer_blocks=True))
    config = {"kv_transfer_config": transfer("OffloadingConnector")}
    connectors.check(SimpleNamespace(**config, use_v2_model_runner=True))
    with pytest.raises(NotImplementedError, match=r"got OffloadingConnector.* needs VLLM_USE_V2_MODEL_RUNNER=1"):
        connectors.check(SimpleNamespace(**config, use_v2_model_runner=False))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (lambda: transfer("NixlConnector"), "NixlConnector"),
        (lambda: several("ExampleConnector", "NixlConnector"), "NixlConnector"),
        (
            lambda: transfer("KVConnectorBase_V1", "vllm.distributed.kv_transfer.kv_connector.v1.base"),
            "KVConnectorBase",
        ),
    ],
)
def test_others_are_refused_by_name(given, named):
    from vllm_plugin import connectors

    with pytest.raises(NotImplementedError, match=f"kv_transfer_config: got {named}.* needs one of ExampleConnector, "):
        connectors.check(SimpleNamespace(kv_transfer_config=given()))
