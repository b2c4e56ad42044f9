"""The backend against the interface of the vLLM at hand: what it declares, refuses, writes and computes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch

from lite_attention import ops

NAME = "LITE_ATTENTION"
HEADS, KV_HEADS, HEAD_SIZE, PAGE = 4, 2, 32, 16


@pytest.fixture(scope="module", autouse=True)
def plugins():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture
def backend():
    from vllm_plugin.backend import LiteAttentionBackend

    return LiteAttentionBackend


@pytest.fixture
def hopper(monkeypatch):
    """Makes the backend believe that vLLM runs on a Hopper GPU. Nothing is computed there."""
    from vllm_plugin import backend, impl, metadata

    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, device_type="meta", get_device_name=lambda: "NVIDIA H100"
    )
    for module in (backend, impl, metadata):
        monkeypatch.setattr(module, "current_platform", platform)
    monkeypatch.setattr(ops, "EXTENSION_MISSING", None)


def overridden():
    from vllm.v1.attention import backend as base

    from vllm_plugin.backend import LiteAttentionBackend
    from vllm_plugin.impl import LiteAttentionImpl
    from vllm_plugin.metadata import LiteAttentionMetadataBuilder

    pairs = (
        (LiteAttentionBackend, base.AttentionBackend),
        (LiteAttentionImpl, base.AttentionImpl),
        (LiteAttentionMetadataBuilder, base.AttentionMetadataBuilder),
    )
    for ours, theirs in pairs:
        assert not ours.__abstractmethods__
        for name in vars(ours):
            method = getattr(theirs, name, None)
            if inspect.isfunction(method) or inspect.ismethod(method):
                yield getattr(ours, name), method


def test_methods_take_all_that_this_vllm_passes():
    compared = []
    for ours, theirs in overridden():
        have, want = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        kinds = {parameter.kind for parameter in have.values()}
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        assert takes_any or set(want) <= {*have, "args", "kwargs"}, f"{ours.__qualname__} lacks {set(want) - set(have)}"
        named = [name for name, parameter in have.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        assert named[: len(want)] == list(want)[: len(named)], f"{ours.__qualname__} has another order"
        compared.append(ours.__name__)
    assert {"supports_head_size", "supports_combination", "forward", "build", "__init__"} <= set(compared)


def test_kv_cache_strides_are_those_of_flash_attn(backend):
    if not hasattr(backend.__mro__[1], "get_kv_cache_stride_order"):
        pytest.skip("from vLLM 0.29 on a layout is chosen among supported_kv_cache_layouts")
    from vllm.v1.attention.backends import utils
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    assert backend.get_kv_cache_shape(7, 16, 3, 64) == FlashAttentionBackend.get_kv_cache_shape(7, 16, 3, 64)
    try:
        for layout in ("NHD", "HND"):
            utils.set_kv_cache_layout(layout)
            assert backend.indexes_kv_by_block_stride()
            for with_layers in (False, True):
                order = backend.get_kv_cache_stride_order(with_layers)
                assert order == FlashAttentionBackend.get_kv_cache_stride_order(with_layers)
    finally:
        utils.set_kv_cache_layout(None)


# What is declared


def configuration(**changes):
    values = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "attn_type": "decoder",
    }
    return values | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_size": 64},
        {"head_size": 40},
        {"head_size": 80},
        {"head_size": 256},
        {"dtype": torch.float16},
        {"kv_cache_dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e4m3", "dtype": torch.float16, "head_size": 80},
        {"kv_cache_dtype": "fp8", "use_per_head_quant_scales": True},
        {"block_size": 16},
        {"block_size": 48},
        {"has_sliding_window": True},
        {"use_non_causal": True},
        {"has_sink": True},
        {"use_batch_invariant": True},
    ],
)
def test_supported_on_hopper(backend, hopper, changes):
    from vllm.platforms.interface import DeviceCapability

    assert backend.validate_configuration(device_capability=DeviceCapability(9, 0), **configuration(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 20}, "head_size not supported"),
        ({"head_size": 264}, "head_size not supported"),
        ({"dtype": torch.float32}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        (
            {"kv_cache_dtype": "float16"},
            "kv_cache_dtype float16 not supported with torch.bfloat16: both must be the same",
        ),
        (
            {"kv_cache_dtype": "fp8", "head_size": 72},
            "kv_cache_dtype fp8 not supported with head_size 72: needs a multiple of 16",
        ),
        ({"block_size": 8}, "block_size not supported"),
        ({"block_size": 24}, "block_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
    ],
)
def test_refused_on_hopper_with_the_reason(backend, hopper, changes, reason):
    from vllm.platforms.interface import DeviceCapability

    found = backend.validate_configuration(device_capability=DeviceCapability(9, 0), **configuration(**changes))
    assert found == [reason]


def test_refused_without_the_compiled_kernels(backend, hopper, monkeypatch):
    from vllm.platforms.interface import DeviceCapability

    monkeypatch.setattr(ops, "EXTENSION_MISSING", "no nvcc when it was built")
    found = backend.validate_configuration(device_capability=DeviceCapability(9, 0), **configuration())
    assert found == ["LiteAttention's CUDA extension is not there: no nvcc when it was built"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_refused_on_other_gpus(backend, hopper, capability):
    from vllm.platforms.interface import DeviceCapability

    found = backend.validate_configuration(device_capability=DeviceCapability(*capability), **configuration())
    assert found == ["compute capability not supported"]


def select(**changes):
    """What the CPU platform answers where LITE_ATTENTION, or another backend, is chosen."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    chosen = changes.pop("chosen", NAME)
    member = None if chosen is None else AttentionBackendEnum[chosen]
    return current_platform.get_attn_backend_cls(member, AttentionSelectorConfig(**configuration(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float32},
        {"head_size": 80},
        {"has_sink": True},
        {"kv_cache_dtype": "fp8", "head_size": 72},
        {"kv_cache_dtype": "fp8", "use_per_head_quant_scales": True},
    ],
)
def test_the_cpu_platform_serves_with_it_where_chosen(changes):
    assert select(**changes) == "vllm_plugin.backend.LiteAttentionBackend"


@pytest.mark.parametrize("chosen", [None, "CPU_ATTN", "FLASH_ATTN"])
def test_the_cpu_platform_serves_as_before_where_not(chosen):
    assert select(chosen=chosen).endswith("CPUAttentionBackend")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
    ],
)
def test_the_cpu_platform_refuses_with_the_reason(changes, reason):
    with pytest.raises(ValueError, match=f"{NAME} is not valid for this configuration.*{reason}"):
        select(**changes)


# What vLLM does not ask about, a layer refuses when it is made


def layer_impl(**changes):
    from vllm_plugin.impl import LiteAttentionImpl

    values = {"num_heads": HEADS, "head_size": HEAD_SIZE, "scale": HEAD_SIZE**-0.5, "num_kv_heads": KV_HEADS}
    return LiteAttentionImpl(**values | changes)


@pytest.fixture(params=["cpu", "hopper"])
def platform(request):
    if request.param == "hopper":
        request.getfixturevalue("hopper")
    return request.param


def test_layers_with_other_scores_are_made(platform):
    sinks = torch.zeros(HEADS)
    impl = layer_impl(alibi_slopes=[0.5] * HEADS, logits_soft_cap=30.0, sinks=sinks)
    assert impl.softcap == 30.0
    assert impl.sinks is sinks
    # On the layer's device at once: `meta` stands in for the GPU that isn't here.
    assert impl.alibi_slopes.device.type == {"cpu": "cpu", "hopper": "meta"}[platform]
    assert impl.alibi_slopes.dtype == torch.float32


@pytest.mark.parametrize("cap", [0.0, None])
def test_a_soft_cap_of_zero_is_none(platform, cap):
    assert layer_impl(logits_soft_cap=cap).softcap == 0.0


@pytest.mark.parametrize("changes", [{"chunk_lookback": 4}, {"attn_type": "encoder"}])
def test_layers_of_unknown_kinds_are_refused(platform, changes):
    with pytest.raises(NotImplementedError, match=f"{NAME} .*{next(iter(changes))}="):
        layer_impl(**changes)


def test_sinks_are_read_once_they_are_loaded():
    """vLLM's parameter, in the model's dtype: float32 after each load, and at one address, which CUDA graphs hold."""
    parameter = torch.nn.Parameter(torch.zeros(HEADS, dtype=torch.bfloat16), requires_grad=False)
    impl = layer_impl(sinks=parameter)
    places = set()
    for values in ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]):
        parameter.data.copy_(torch.tensor(values))
        impl.process_weights_after_loading(torch.bfloat16)
        assert impl.sinks.dtype == torch.float32
        assert impl.sinks.tolist() == values
        places.add(impl.sinks.data_ptr())
    assert len(places) == 1
    layer_impl().process_weights_after_loading(torch.bfloat16)  # which has none


def test_sinks_in_float32_are_the_parameter():
    parameter = torch.nn.Parameter(torch.zeros(HEADS), requires_grad=False)
    impl = layer_impl(sinks=parameter)
    impl.process_weights_after_loading(torch.bfloat16)
    assert impl.sinks is parameter


def test_vllm_has_layers_process_their_weights():
    """The name by which it calls the layer's implementation after loading."""
    from vllm.model_executor.layers.attention import Attention

    seen = []
    impl = SimpleNamespace(process_weights_after_loading=seen.append)
    layer = SimpleNamespace(impl=impl, quant_config=None)
    with contextlib.suppress(AttributeError):  # of the rest, which wants a whole layer
        Attention.process_weights_after_loading(layer, torch.bfloat16)
    assert seen == [torch.bfloat16]


# Batch invariance, and the plan of a step


@pytest.fixture(params=[(None, 0), ("0", 0), ("1", 1)], ids=["unset", "0", "1"])
def splits(request, monkeypatch):
    """num_splits, as VLLM_BATCH_INVARIANT has it."""
    value, expected = request.param
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    return expected


def test_layers_follow_vllm_batch_invariant(builder, monkeypatch, splits):
    from vllm_plugin import impl

    calls = []
    monkeypatch.setattr(impl, "flash_attn_varlen_func", lambda *args, **kwargs: calls.append(kwargs))
    layer, query = layer_impl(), torch.zeros(30, HEADS, HEAD_SIZE)
    layer.forward(None, query, query, query, empty_cache(9, True), builder.build(0, batch()), query.clone())
    assert [call["num_splits"] for call in calls] == [splits]


@pytest.fixture
def step_builder(hopper, monkeypatch):
    """Makes a builder, as on a GPU, for two layers of a window; it notes plans in `plans` and makes none."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_plugin import schedule
    from vllm_plugin.metadata import LiteAttentionMetadataBuilder

    layers = {f"layers.{i}.attn": SimpleNamespace(impl=layer_impl(sliding_window=7)) for i in range(2)}
    spec = FullAttentionSpec(block_size=48, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16)

    def plan(*args, **kwargs):
        make.plans.append((args, kwargs))
        return kwargs["out"]

    def size(batch, tokens, longest, *heads_and_device):
        assert (batch, tokens) == (4, 64)
        return make.room[longest]

    def make(mode="NONE", speculative=0):
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64),
            compilation_config=SimpleNamespace(
                cudagraph_mode=CUDAGraphMode[mode],
                cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32],
                max_cudagraph_capture_size=32,
                compile_sizes=[],
                cudagraph_specialize_lora=False,
                is_attention_compiled_piecewise=lambda: True,
            ),
            num_speculative_tokens=speculative,
            cache_config=SimpleNamespace(num_gpu_blocks=None),
            lora_config=None,
            additional_config={},
        )
        return LiteAttentionMetadataBuilder(spec, list(layers), config, torch.device("cpu"))

    make.plans, make.room, make.layers = [], {1: 30, 64: 30}, layers
    monkeypatch.setattr(schedule, "get_layers_from_vllm_config", lambda *args: layers)
    monkeypatch.setattr(schedule, "get_scheduler_metadata", plan)
    monkeypatch.setattr(schedule, "scheduler_metadata_size", size)
    return make


@pytest.mark.parametrize(("kv_cache_dtype", "kv_dtype"), [("auto", None), ("fp8", torch.float8_e4m3fn)])
def test_a_step_is_planned_as_layers_call(splits, step_builder, kv_cache_dtype, kv_dtype):
    impl = layer_impl(sliding_window=7, kv_cache_dtype=kv_cache_dtype)
    step_builder.layers.update({name: SimpleNamespace(impl=impl) for name in step_builder.layers})
    common = batch()
    for room in ({1: 30, 64: 20}, {1: 20, 64: 30}):
        step_builder.room = room
        builder = step_builder()
        metadata = builder.build(0, common)
        assert metadata.scheduler_metadata is builder.schedule.metadata
        assert metadata.scheduler_metadata.numel() == 30  # room for either plan
        args, kwargs = step_builder.plans.pop()
        assert args == (3, 20, 33, HEADS, KV_HEADS, HEAD_SIZE)
        assert (kwargs["num_splits"], kwargs["page_size"], kwargs["kv_dtype"]) == (splits, 48, kv_dtype)
        assert (kwargs["causal"], kwargs["window_size"], kwargs["total_q"]) == (True, (6, 0), 26)
        assert kwargs["cu_seqlens_q"] is common.query_start_loc
        assert kwargs["seqused_k"] is common.seq_lens
        other = builder.update_block_table(metadata, common.block_table_tensor, common.slot_mapping)
        assert other.scheduler_metadata is metadata.scheduler_metadata


def test_layers_that_differ_plan_for_themselves(step_builder):
    step_builder.layers["layers.1.attn"] = SimpleNamespace(impl=layer_impl())
    builder = step_builder()
    metadata = builder.build(0, batch())
    assert (builder.schedule, metadata.scheduler_metadata, step_builder.plans) == (None, None, [])
    assert builder.update_block_table(metadata, metadata.block_table, metadata.slot_mapping).scheduler_metadata is None


# CUDA graphs keep the tile that they were captured with


def padded(query_lens, tokens, requests):
    """The step's metadata as the runners pad it for a graph: requests without queries, tokens of no request."""
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
    starts = torch.cat([starts, starts[-1:].expand(requests - len(query_lens))])
    common = batch()
    return dataclasses.replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.full((requests,), 33, dtype=torch.int32),
        num_reqs=requests,
        num_actual_tokens=tokens,
        max_query_len=max(query_lens),
    )


def captured(descriptor, decode_len):
    """The query lengths that the runners V1 and V2 capture a graph with: V1 says of a mixed one that a query has all
    tokens, V2 deals them to all requests."""
    tokens, requests = descriptor.num_tokens, descriptor.num_reqs
    if descriptor.uniform:
        return [decode_len] * requests, [decode_len] * requests
    even, rest = divmod(tokens, requests)
    return [tokens], [even] * (requests - rest) + [even + 1] * rest


@pytest.mark.parametrize("speculative", [0, 3])
@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_a_graph_is_replayed_with_the_tile_it_was_captured_with(step_builder, mode, speculative):
    """Over all that vLLM's own dispatcher sends to a full graph: lengths of 1 to 4 requests."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    decode_len, full = 1 + speculative, CUDAGraphMode.FULL
    builder = step_builder(mode, speculative)

    def tile(query_lens, descriptor):
        metadata = builder.build(0, padded(query_lens, descriptor.num_tokens, descriptor.num_reqs))
        args, kwargs = step_builder.plans.pop()
        assert metadata.max_query_len == args[1]  # what the layers call with
        assert kwargs["total_q"] == descriptor.num_tokens
        return metadata.max_query_len

    dispatcher = CudagraphDispatcher(builder.vllm_config)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode[mode], decode_len)
    graphs = {}
    for _, descriptors in dispatcher.get_capture_descs():
        for descriptor in descriptors:
            if descriptor.num_reqs is not None:  # else attention is outside of the graph
                (graphs[descriptor],) = {tile(lens, descriptor) for lens in captured(descriptor, decode_len)}
    replayed = set()
    for requests in range(1, 5):
        for query_lens in itertools.product([1, 2, 3, 4, 5, 8, 23], repeat=requests):
            tokens = sum(query_lens)
            uniform = set(query_lens) == {decode_len}
            runtime, descriptor = dispatcher.dispatch(tokens, uniform_decode=uniform)
            if runtime == full:
                assert tile(query_lens, descriptor) == graphs[descriptor], query_lens
                replayed.add(descriptor)
    assert replayed == set(graphs)


def test_graphs_of_mixed_batches_have_the_tile_for_most_of_their_steps(step_builder):
    """That of decoding where each request can have one token, that of prefill beyond; eager steps have their own."""
    from vllm.v1.attention.backend import AttentionCGSupport

    builder = step_builder("FULL")
    assert builder.get_cudagraph_support(builder.vllm_config, None) == AttentionCGSupport.ALWAYS
    found = [
        builder.build(0, padded(query_lens, tokens, 4)).max_query_len
        for query_lens, tokens in (([1, 1, 1], 4), ([4], 4), ([2, 1, 1, 1], 8), ([29, 1], 32), ([30, 1, 1, 1], 33))
    ]
    assert found == [1, 1, 8, 32, 30]


def test_layers_with_caches_of_different_types_plan_for_themselves(monkeypatch):
    from vllm_plugin import schedule

    layers = {x: SimpleNamespace(impl=layer_impl(kv_cache_dtype=x)) for x in ("fp8", "auto")}
    monkeypatch.setattr(schedule, "get_layers_from_vllm_config", lambda *args: layers)
    assert schedule.StepSchedule.for_layers(list(layers), 16, None, torch.device("cpu")) is None


# What a layer writes and computes, on the CPU


def empty_cache(blocks: int, by_token: bool) -> torch.Tensor:
    """vLLM's view (blocks, kv_heads, page, 2 * head_size), in memory by token or by head, all NaN."""
    order = (0, 2, 1, 3)
    shape = (blocks, KV_HEADS, PAGE, 2 * HEAD_SIZE)
    if by_token:
        return torch.full([shape[i] for i in order], torch.nan).permute(order)
    return torch.full(shape, torch.nan)


@pytest.mark.parametrize("by_token", [True, False])
def test_keys_and_values_land_in_their_slots_and_padding_nowhere(by_token):
    torch.manual_seed(0)
    cache = empty_cache(4, by_token)
    slots = torch.tensor([33, -1, 17, 16, -1])
    key, value = torch.randn(2, 7, KV_HEADS, HEAD_SIZE).unbind()  # longer than slots: vLLM pads tokens, not slots
    layer_impl().do_kv_cache_update(None, key, value, cache, slots)
    expected = empty_cache(4, by_token)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // PAGE, :, slot % PAGE, :HEAD_SIZE] = key[token]
            expected[slot // PAGE, :, slot % PAGE, HEAD_SIZE:] = value[token]
    torch.testing.assert_close(cache, expected, equal_nan=True, rtol=0, atol=0)


def batch(causal: bool = True):
    """Three requests of 1, 5 and 20 new tokens, whose pages are shuffled and whose unused page numbers are huge."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    query_lens, seq_lens = [1, 5, 20], [33, 21, 20]
    pages = torch.tensor([[7, 2, 5], [1, 8, 1 << 30], [3, 6, 1 << 30]], dtype=torch.int32)
    starts = torch.tensor([0, 1, 6, 26], dtype=torch.int32)
    positions = [torch.arange(s - q, s) for q, s in zip(query_lens, seq_lens, strict=True)]
    slots = [pages[i, p // PAGE] * PAGE + p % PAGE for i, p in enumerate(positions)]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=26,
        max_query_len=20,
        max_seq_len=33,
        block_table_tensor=pages,
        slot_mapping=torch.cat(slots).long(),
        causal=causal,
    )


@pytest.fixture
def builder():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_plugin.metadata import LiteAttentionMetadataBuilder

    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float32)
    config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=None))
    return LiteAttentionMetadataBuilder(spec, ["layers.0.attn"], config, torch.device("cpu"))


def expected_output(query, keys, values, common, *, window=None, softcap=0.0, slopes=None, sinks=None):
    """Attention of each request in float64, written out from the definition."""
    output = []
    for i, length in enumerate(common.seq_lens.tolist()):
        q = query[common.query_start_loc[i] : common.query_start_loc[i + 1]].double()
        k, v = (x[i][:length].double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, k) * HEAD_SIZE**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(length) - torch.arange(length - len(q), length)[:, None]
        if slopes is not None:
            scores -= slopes.double()[:, None, None] * distance.abs()
        visible = distance <= 0 if common.causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            visible &= (distance > -window) & (distance < window)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        output.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(output).float()


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize(
    ("layer", "causal"),
    [
        ({}, True),
        ({}, False),
        ({"window": 6}, True),
        ({"window": 6}, False),
        ({"softcap": 2.0}, True),
        ({"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}, True),
        ({"sinks": torch.tensor([1.0, -1.0, 3.0, 0.0])}, True),
    ],
)
def test_a_step_is_computed(builder, layer, causal, by_token):
    torch.manual_seed(0)
    common = batch(causal)
    names = {"window": "sliding_window", "softcap": "logits_soft_cap", "slopes": "alibi_slopes", "sinks": "sinks"}
    impl = layer_impl(**{names[key]: value.tolist() if key == "slopes" else value for key, value in layer.items()})
    keys, values = torch.randn(2, 3, 33, KV_HEADS, HEAD_SIZE).unbind()
    query = torch.randn(30, HEADS, HEAD_SIZE)
    cache = empty_cache(9, by_token)
    new_keys, new_values = torch.full((2, 30, KV_HEADS, HEAD_SIZE), torch.nan).unbind()
    for i, length in enumerate(common.seq_lens.tolist()):
        first, last = common.query_start_loc[i : i + 2].tolist()
        context = length - (last - first)
        for position in range(context):
            page, offset = common.block_table_tensor[i, position // PAGE], position % PAGE
            cache[page, :, offset, :HEAD_SIZE], cache[page, :, offset, HEAD_SIZE:] = (
                keys[i, position],
                values[i, position],
            )
        new_keys[first:last], new_values[first:last] = keys[i, context:length], values[i, context:length]
    metadata = builder.build(0, common)
    output = torch.full_like(query, 7.0)

    impl.do_kv_cache_update(None, new_keys, new_values, cache, metadata.slot_mapping)
    impl.forward(None, query, new_keys, new_values, cache, metadata, output)

    torch.testing.assert_close(output[:26], expected_output(query, keys, values, common, **layer))
    assert (output[26:] == 7.0).all()


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize(
    ("kv_cache_dtype", "k_scale", "v_scale"),
    [("fp8", 0.25, [0.01]), ("fp8_e4m3", 0.25, [0.01]), ("fp8", [0.25, 0.002], [0.01, 3.0])],
    ids=["fp8", "fp8_e4m3", "by head"],
)
def test_a_step_over_an_fp8_cache(builder, kv_cache_dtype, k_scale, v_scale, by_token):
    """Bytes are written under the layer's scales and read with them; what is out of range becomes the largest."""
    torch.manual_seed(0)
    common, impl = batch(), layer_impl(kv_cache_dtype=kv_cache_dtype)
    layer = SimpleNamespace(_k_scale=torch.tensor(k_scale), _v_scale=torch.tensor(v_scale))
    keys, values = torch.randn(2, 3, 33, KV_HEADS, HEAD_SIZE).unbind()
    values[0, 3] = torch.linspace(-9.0, 9.0, HEAD_SIZE)  # 448 * 0.01 at most
    cache = torch.full((9, PAGE, KV_HEADS, 2 * HEAD_SIZE), 0x7F, dtype=torch.uint8).transpose(1, 2)  # NaN
    cache = cache if by_token else cache.contiguous()
    lengths = common.seq_lens.tolist()
    slots = [common.block_table_tensor[i, p // PAGE] * PAGE + p % PAGE for i, n in enumerate(lengths) for p in range(n)]
    written = [torch.cat([x[i, :n] for i, n in enumerate(lengths)]) for x in (keys, values)]
    impl.do_kv_cache_update(layer, *written, cache, torch.tensor(slots))
    assert int((cache == 0x7F).sum()) == cache.numel() - 2 * sum(lengths) * KV_HEADS * HEAD_SIZE
    query = torch.randn(30, HEADS, HEAD_SIZE)
    output = torch.full_like(query, 7.0)
    impl.forward(layer, query, query, query, cache, builder.build(0, common), output)
    stored = []
    for x, scale in ((keys, layer._k_scale), (values, layer._v_scale)):
        scales = scale.expand(KV_HEADS)[:, None]  # of each head
        stored.append((x / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales)
    assert stored[1][..., 0, :].max() == pytest.approx(4.48)
    torch.testing.assert_close(output[:26], expected_output(query, *stored, common), rtol=1e-5, atol=1e-5)
    assert (output[26:] == 7.0).all()


def test_the_profiling_run_gives_zeros():
    query = torch.randn(3, HEADS, HEAD_SIZE)
    output = torch.full_like(query, torch.nan)
    layer_impl().forward(None, query, query, query, torch.empty(0), None, output)
    assert (output == 0).all()


def test_quantised_output_is_refused():
    query = torch.randn(3, HEADS, HEAD_SIZE)
    with pytest.raises(NotImplementedError, match="output_scale"):
        layer_impl().forward(None, query, query, query, torch.empty(0), None, query, output_scale=torch.ones(1))


def test_a_causal_mask_of_each_request_is_refused(builder):
    common = batch()
    common.causal = torch.tensor([True, False, True])
    with pytest.raises(NotImplementedError, match="causal must be True or False"):
        builder.build(0, common)


def test_another_group_gets_its_own_pages(builder):
    metadata = builder.build(0, batch())
    pages, slots = torch.ones(3, 4, dtype=torch.int32), torch.arange(26)
    other = builder.update_block_table(metadata, pages, slots)
    assert other.block_table is pages
    assert other.slot_mapping is slots
    assert other.seq_lens is metadata.seq_lens
    assert metadata.block_table is not pages
    plan = torch.zeros(8, dtype=torch.int32)
    metadata.scheduler_metadata, metadata.planned_for = plan, (8, 2, 64, -1)
    for shape, expected in (((8, 2, 64, -1), plan), ((8, 2, 64, 511), None)):
        builder.schedule = SimpleNamespace(shape=shape)
        assert builder.update_block_table(metadata, pages, slots).scheduler_metadata is expected
