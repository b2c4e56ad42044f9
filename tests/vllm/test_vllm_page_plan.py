"""The plan of the rows that decode from lists, and what a layer hands on of it: made as on a GPU, where none is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lite_attention.pages import sketch_bytes

HEADS, KV_HEADS, HEAD_SIZE, PAGE = 6, 2, 24, 16
MIN_CONTEXT = 48


def engine() -> SimpleNamespace:
    return SimpleNamespace(
        additional_config={},
        kv_transfer_config=None,
        speculative_config=None,
        num_speculative_tokens=0,
        parallel_config=SimpleNamespace(
            use_ubatching=False,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            rank=0,
        ),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2, max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64),
        cache_config=SimpleNamespace(num_gpu_blocks=9),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(mixed_mode=lambda: None)),
        device_config=SimpleNamespace(device_type="cpu"),
    )


@pytest.fixture
def group(monkeypatch):
    """Makes a builder, as on a GPU, for two layers with lists; it notes plans in `plans` and makes none."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_plugin import listing, metadata, metrics, schedule, sketches, warmup
    from vllm_plugin.impl import LiteAttentionImpl
    from vllm_plugin.listing import Listing
    from vllm_plugin.settings import PageSettings

    platform = SimpleNamespace(is_cpu=lambda: False, get_device_name=lambda: "NVIDIA H100")
    for module in (listing, metadata):
        monkeypatch.setattr(module, "current_platform", platform)
    monkeypatch.setattr(metadata.logger, "info", lambda text, *values: make.told.append(text % values))
    monkeypatch.setattr(metrics, "publish", lambda *args: None)
    monkeypatch.setattr(warmup, "install", lambda: None)
    names = ["model.layers.0.attn", "model.layers.1.attn"]

    def plan(*args, out, **kwargs):
        make.plans.append((args, kwargs, out))
        return out

    def make(kv_cache_dtype="auto", apart=False, config=None, **changes):
        config = config or engine()
        settings = PageSettings(**{"eps": 0.1, "min_context": MIN_CONTEXT} | changes)
        layers = {}
        for name in names:
            impl = LiteAttentionImpl(HEADS, HEAD_SIZE, 1.0, KV_HEADS, kv_cache_dtype=kv_cache_dtype)
            impl.listing = Listing(settings, config, HEADS, KV_HEADS, HEAD_SIZE)
            layers[name] = SimpleNamespace(impl=impl, layer_name=name)
        if apart:
            layers[names[1]].impl.head_size = 2 * HEAD_SIZE
        for module in (metadata, schedule):
            monkeypatch.setattr(module, "get_layers_from_vllm_config", lambda *args: layers)
        make.layers, make.impl = list(layers.values()), layers[names[0]].impl
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float32)
        spec = sketches.with_room(spec, names[0], settings.sketch_bits)
        return metadata.LiteAttentionMetadataBuilder(spec, names, config, torch.device("cpu"))

    def size(batch, tokens, longest, *heads_and_device):
        assert (batch, tokens) == (4, 64)
        return {1: 30, 3: 40, 64: 20}[longest]

    make.plans, make.told = [], []
    monkeypatch.setattr(schedule, "get_scheduler_metadata", plan)
    monkeypatch.setattr(schedule, "scheduler_metadata_size", size)
    return make


def batch(query_lens: list[int], prefilling: list[bool] | None = None):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    rows, tokens = len(query_lens), sum(query_lens)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([60, 40, 0, 33][:rows], dtype=torch.int32),  # the third as of padding
        num_reqs=rows,
        num_actual_tokens=tokens,
        max_query_len=max(query_lens),
        max_seq_len=64,
        block_table_tensor=torch.arange(rows * 4).int().view(rows, 4) % 9,
        slot_mapping=torch.arange(tokens) + 13,
        causal=True,
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )


@pytest.mark.parametrize(("kv_cache_dtype", "kv_dtype"), [("auto", None), ("fp8", torch.float8_e4m3fn)])
def test_decoding_rows_are_planned_as_layers_call(group, kv_cache_dtype, kv_dtype):
    builder = group(kv_cache_dtype)
    common = batch([1, 1, 1], [False, True, False])
    step = builder.build(0, common)
    assert group.plans == []  # not before the first layer
    step.lead()
    decoding = step.decoding
    ((args, kwargs, out),) = group.plans
    assert decoding.scheduler_metadata is out is builder.decoding_schedule.metadata
    assert out.numel() == 30
    assert args == (3, 1, 4 * PAGE, HEADS, KV_HEADS, HEAD_SIZE)
    assert kwargs.pop("cu_seqlens_q") is decoding.query_start_loc
    assert kwargs.pop("seqused_k") is decoding.seq_lens
    assert kwargs.pop("whole") is decoding.whole and decoding.whole.tolist() == [False, True, False]
    assert kwargs == {
        "total_q": 3,
        "causal": True,
        "num_splits": 0,
        "page_size": PAGE,
        "kv_dtype": kv_dtype,
        "min_context": MIN_CONTEXT,
    }


@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_a_step_has_both_plans_at_addresses_of_their_own(group, dense_layers):
    """The dense one of the other rows, or of all rows where a layer is dense."""
    builder = group(dense_layers=dense_layers)
    step = builder.build(0, batch([1, 1, 1, 9]))
    step.lead()
    assert step.decoding.scheduler_metadata is builder.decoding_schedule.metadata
    dense = step if dense_layers else step.others
    assert dense.scheduler_metadata is builder.schedule.metadata
    assert builder.schedule.metadata.data_ptr() != builder.decoding_schedule.metadata.data_ptr()
    rows = {out.data_ptr(): args[0] for args, _, out in group.plans}
    assert rows[builder.decoding_schedule.metadata.data_ptr()] == 3
    assert rows[builder.schedule.metadata.data_ptr()] == (4 if dense_layers else 1)
    assert len(group.plans) == 2


def test_a_step_without_decoding_rows_has_the_dense_plan_alone(group):
    builder = group()
    step = builder.build(0, batch([9, 1]))
    assert step.decoding is None and len(group.plans) == 1
    assert step.scheduler_metadata is builder.schedule.metadata


@pytest.mark.parametrize("why", ["layers differ", "batch invariance"])
def test_where_there_is_no_plan_of_decoding(group, why, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int(why == "batch invariance")))
    builder = group(apart=why == "layers differ")
    assert builder.decoding_schedule is None
    assert builder.build(0, batch([1, 1])).decoding.scheduler_metadata is None
    assert group.plans == []


# Memory, and what is told at start


class Allocations(TorchDispatchMode):
    """Notes the bytes of every `torch.empty`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        if func is torch.ops.aten.empty.memory_format:
            self.sizes.append(made.nbytes)
        return made


def taken_where_memory_is_measured(group, serving=False, **changes) -> list[int]:
    """What each of the two layers allocates in a run without metadata; `serving`: with a builder before it."""
    group(**changes)
    taken, query = [], torch.zeros(16, HEADS, HEAD_SIZE)
    for layer in group.layers:
        if not serving:
            layer.impl.listing.tally = None
        with Allocations() as made:
            assert not layer.impl.forward(layer, query, None, None, None, None, query.clone() + 1).any()
        taken.append(sum(made.sizes))
    return taken


def speculating(tokens: int) -> SimpleNamespace:
    config = engine()
    config.speculative_config = SimpleNamespace(num_speculative_tokens=tokens, parallel_drafting=False)
    return config


def test_scratch_is_taken_where_vllm_measures_memory(group):
    """Of four requests of four pages, by two KV heads with one quad of heads each: 8 lists."""
    whole = 4 * (8 * 4 * 4 + 2 * 8 * 1 * 4 + 8 * 4)
    assert taken_where_memory_is_measured(group) == [whole, whole]
    assert taken_where_memory_is_measured(group, dense_layers=(0,)) == [0, whole]
    assert taken_where_memory_is_measured(group, min_context=4 * PAGE + 1) == [0, 0]  # no request is as long
    three = 4 * (3 * (8 * 4 * 4 + 2 * 8 * 1 * 4) + 8 * 4)
    assert taken_where_memory_is_measured(group, config=speculating(2)) == [three, three]
    assert taken_where_memory_is_measured(group, serving=True) == [0, 0]  # an idle replica's step


def test_nothing_is_taken_on_the_cpu(group, monkeypatch):
    from vllm_plugin import listing

    monkeypatch.setattr(listing, "current_platform", SimpleNamespace(is_cpu=lambda: True))
    assert taken_where_memory_is_measured(group) == [0, 0]


def test_memory_of_a_worker_is_told(group):
    config = engine()
    config.model_config = SimpleNamespace(get_total_num_hidden_layers=lambda: 2, max_model_len=2**17)
    config.scheduler_config.max_num_seqs = 4
    group(config=config)
    lists = 4 * KV_HEADS * 8192 * (4 + 1 / 8)  # indices and bits
    scratch = 22 * 4 * KV_HEADS * 8192
    assert (
        f"lists {lists / 2**20:.1f} MiB, and while they are made up to {scratch / 2**20:.1f} MiB more." in group.told[1]
    )
    assert "On each worker sketches take 0.0 MiB" in group.told[1]


@pytest.mark.parametrize(
    ("rank", "stages", "workers", "place"),
    [
        (0, 1, 1, "the model has 2"),
        (0, 1, 2, "the model has 2"),
        (1, 1, 2, None),
        (0, 2, 2, "the model has 2, and this is pipeline stage 1 of 2"),
        (1, 2, 2, None),
        (2, 2, 2, "the model has 2, and this is pipeline stage 2 of 2"),
        (3, 2, 2, None),
        (6, 2, 2, "the model has 2, and this is pipeline stage 2 of 2"),  # ranks go on over replicas
    ],
)
def test_one_worker_of_each_stage_tells(group, rank, stages, workers, place):
    config = engine()
    config.parallel_config.rank = rank
    config.parallel_config.pipeline_parallel_size = stages
    config.parallel_config.tensor_parallel_size = workers
    group(config=config)
    if place is None:
        assert group.told == []
    else:
        computes, decodes = group.told
        assert f": 2 layers from model.layers.0.attn ({place}); on each worker {KV_HEADS} KV heads" in computes
        assert f"; 2 of 2 layers, from model.layers.0.attn ({place}). On each worker sketches" in decodes


def test_builders_that_measure_graphs_tell_nothing(group):
    """vLLM makes them over a cache of a few pages, before it knows how many there will be."""
    config = engine()
    config.cache_config.num_gpu_blocks = None
    group(config=config)
    assert group.told == []


# Layers


def kv_cache() -> torch.Tensor:
    """A cache as vLLM makes it, (blocks, heads, 16, 2 * head_size), each page followed by room for its sketches."""
    page = KV_HEADS * PAGE * 2 * HEAD_SIZE
    raw = torch.randn(9, page + KV_HEADS * sketch_bytes(HEAD_SIZE) // 4)
    return raw.as_strided((9, KV_HEADS, PAGE, 2 * HEAD_SIZE), (raw.shape[1], PAGE * 2 * HEAD_SIZE, 2 * HEAD_SIZE, 1))


def test_sketches_are_written_once_by_what_reads_them_first(group, monkeypatch):
    from vllm_plugin import impl, listing

    calls = []
    for name in ("write_sketch", "decode_pages"):
        monkeypatch.setattr(listing, name, lambda *args, name=name, **kwargs: calls.append((name, args, kwargs)))
    monkeypatch.setattr(impl, "flash_attn_varlen_func", lambda *args, **kwargs: calls.append(("dense", args, kwargs)))
    builder, query = group(), torch.zeros(16, HEADS, HEAD_SIZE)

    def names_of(query_lens):
        calls.clear()
        step = builder.build(0, batch(query_lens))
        group.impl.forward(None, query, None, None, kv_cache(), step, torch.empty_like(query))
        return step, [name for name, *_ in calls]

    step, names = names_of([9, 1])
    assert names == ["write_sketch", "dense"] and calls[0][1][2] is step.filled
    step, names = names_of([1, 1])
    assert names == ["decode_pages"] and calls[0][2]["filled"] is step.filled
    step, names = names_of([1, 1, 1, 9])
    assert names == ["decode_pages", "dense"]
    (_, args, given), (_, _, dense) = calls
    assert step.filled.tolist() == [-1, -1, 0, *[-1] * 9]  # of all rows
    assert given["filled"] is step.filled and given["scheduler_metadata"] is step.decoding.scheduler_metadata
    assert dense["scheduler_metadata"] is step.others.scheduler_metadata
    assert args[0].shape[0] == 3 and given["out"].shape[0] == 3
    assert args[4] is step.decoding.query_start_loc and args[5] is step.decoding.seq_lens and args[7] == 1
    assert (given["eps"], given["min_context"], given["newest"]) == (0.1, MIN_CONTEXT, 64)
    assert given["whole"] is step.decoding.whole and given["num_splits"] == 0


@pytest.mark.parametrize("bits", [12, 8])
def test_a_layer_computes_a_step_by_lists(group, bits):
    """All of it on the CPU: a decoding row that fills a page, and part of a prompt that fills another."""
    from lite_attention import flash_attn_varlen_func
    from lite_attention.pages import empty_sketch, write_sketch
    from vllm_plugin import sketches

    builder, cache, query = group(sketch_bits=bits), kv_cache(), torch.randn(16, HEADS, HEAD_SIZE)
    common = batch([1, 1, 1, 12])
    common.slot_mapping = torch.tensor([79, 5, -1, *range(120, 132)])  # the last slots of pages 4 and 7
    step, output = builder.build(0, common), torch.full_like(query, torch.nan)
    view = sketches.view(cache, HEAD_SIZE, bits)
    view.zero_()
    group.impl.forward(None, query, None, None, cache, step, output)
    keys, values = (x.contiguous() for x in cache.transpose(1, 2).split(HEAD_SIZE, -1))
    expected = empty_sketch(keys, bits).zero_()
    write_sketch(keys, expected, torch.tensor([4, 7], dtype=torch.int32))
    assert torch.equal(view, expected)
    dense = flash_attn_varlen_func(
        query[:15], keys, values, common.query_start_loc, None, 12, 64, softmax_scale=1.0, causal=True,
        seqused_k=common.seq_lens, block_table=common.block_table_tensor,
    )  # fmt: skip
    torch.testing.assert_close(output[1:15], dense[1:], rtol=1e-5, atol=1e-5)  # all but the row that has a list
    assert output[0].isfinite().all() and output[15].isnan().all()
