"""The parts of decoding from lists: where sketches lie, which rows decode, which pages a step fills, the counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lite_attention.pages import empty_sketch, sketch_bytes, write_sketch

PAGE, KV_HEADS, HEADS, HEAD_SIZE, BLOCKS = 16, 2, 6, 24, 7
ORDERS = {"NHD": (0, 2, 1, 3), "HND": (0, 1, 2, 3)}


def cache(order: str, dtype: torch.dtype, gap: int = 0, bits: int = 12) -> torch.Tensor:
    """A cache as vLLM makes it: (blocks, heads, 16, 2 * head_size) in some order, each page followed by room."""
    shape = BLOCKS, KV_HEADS, PAGE, 2 * HEAD_SIZE
    permuted = [shape[i] for i in ORDERS[order]]
    item = torch.empty(0, dtype=dtype).element_size()
    page = KV_HEADS * PAGE * 2 * HEAD_SIZE + (KV_HEADS * sketch_bytes(HEAD_SIZE, bits) + gap) // item
    strides = [page, *torch.empty(permuted, device="meta").stride()[1:]]
    raw = torch.randint(0, 100, ((BLOCKS + 1) * page * item,), dtype=torch.uint8)
    made = raw.view(dtype).as_strided(permuted, strides, page)  # not the first layer of its allocation
    made.copy_(torch.randn(permuted).to(dtype))
    return made.permute([ORDERS[order].index(i) for i in range(4)])


@pytest.mark.parametrize("gap", [0, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [12, 8])
def test_sketches_lie_behind_their_page(bits, order, dtype, gap):
    from vllm_plugin import sketches

    kv_cache = cache(order, dtype, gap, bits)
    before = kv_cache.clone()
    keys = kv_cache.transpose(1, 2)[..., :HEAD_SIZE]
    pages = torch.tensor([4, -1, 0, 6, -1], dtype=torch.int32)
    view = sketches.view(kv_cache, HEAD_SIZE, bits)
    untouched = view.clone()
    write_sketch(keys, view, pages)
    expected = empty_sketch(keys.contiguous(), bits)
    write_sketch(keys.contiguous(), expected, pages)
    assert torch.equal(view[[0, 4, 6]], expected[[0, 4, 6]])
    assert torch.equal(view[[1, 2, 3, 5]], untouched[[1, 2, 3, 5]])
    assert torch.equal(kv_cache.view(torch.uint8), before.view(torch.uint8))


def test_pages_without_room_are_not_written():
    from vllm_plugin import sketches

    with pytest.raises(RuntimeError, match="no room for 2 sketches"):
        sketches.view(torch.zeros(BLOCKS, KV_HEADS, PAGE, 2 * HEAD_SIZE), HEAD_SIZE, 12)


@pytest.fixture
def split():
    from vllm_plugin.decoding import DecodingSplit

    scheduler = SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8)
    return DecodingSplit(2, SimpleNamespace(scheduler_config=scheduler), torch.device("cpu"))


def batch(query_lens: list[int], prefilling: list[bool] | None = None, causal: bool = True):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    rows, tokens = len(query_lens), sum(query_lens)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.arange(100, 100 + rows).int(),
        num_reqs=rows,
        num_actual_tokens=tokens,
        max_query_len=max(query_lens),
        max_seq_len=100 + rows,
        block_table_tensor=torch.arange(rows * 10).int().view(rows, 10),
        slot_mapping=torch.arange(tokens),
        causal=causal,
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )


def test_filled_pages_are_told_by_their_last_slot(split):
    slots = torch.tensor([31, 15, 14, 16 * 9 + 15, -1, 0, 47])
    filled = split.room(slots)
    split.find_filled(slots, filled)
    assert filled.tolist() == [1, 0, -1, 9, -1, -1, 2]
    split.find_filled(slots[1:4], split.room(slots[:3]))
    assert filled.tolist() == [0, -1, 9, 9, -1, -1, 2]  # at one address, where CUDA graphs read it


def test_rows_at_the_head_decode_and_the_others_are_a_step(split):
    from vllm_plugin.decoding import after

    common = batch([1, 2, 1, 9, 30])
    decoding = split.leading(common)
    assert (decoding.tokens, decoding.max_query_len) == (4, 2)
    assert decoding.query_start_loc.tolist() == [0, 1, 3, 4]
    assert decoding.seq_lens.tolist() == [100, 101, 102]
    assert torch.equal(decoding.block_table, common.block_table_tensor[:3])
    others = after(common, decoding)
    assert (others.num_reqs, others.num_actual_tokens) == (2, 39)
    assert others.query_start_loc.tolist() == others.query_start_loc_cpu.tolist() == [0, 9, 39]
    assert others.seq_lens.tolist() == [103, 104]
    assert torch.equal(others.block_table_tensor, common.block_table_tensor[3:])
    assert common.num_reqs == 5  # as it was


def test_steps_of_one_kind(split):
    from vllm_plugin.decoding import after

    decode = batch([1, 2, 0, 0])  # with rows that pad a CUDA graph's batch
    assert split.leading(decode).seq_lens.shape == (4,)
    assert after(decode, split.leading(decode)) is None
    assert split.leading(batch([9, 1])) is None
    assert split.leading(batch([1, 1], causal=False)) is None


def test_parts_of_prompts_are_whole_however_short(split):
    first = split.leading(batch([1, 2, 1, 9], [False, True, False, True])).whole
    assert first.tolist() == [False, True, False]
    assert split.leading(batch([1, 1], [False, False])).whole.tolist() == [False, False]
    again = split.leading(batch([1, 1, 1, 1], [True, False])).whole  # told of two rows of four: the others are padding
    assert again.tolist() == [True, False, False, False]
    assert again.data_ptr() == first.data_ptr()


def test_the_tally_adds_steps():
    from vllm_plugin.decoding import Decoding
    from vllm_plugin.tally import Tally

    tally = Tally([0, 0, 1, 2], 8, HEADS, KV_HEADS, 50, 999, torch.device("cpu"))

    def step(seq_lens: list[int], whole: list[bool]) -> None:
        for slot in range(4):
            counts, left_out = tally.of_layer(slot, len(seq_lens))
            counts.copy_(torch.tensor([slot + 1 if n else 0 for n in seq_lens])[:, None])
            left_out.copy_(torch.tensor([0.5 if n else 0.0 for n in seq_lens])[:, None])
        rows = torch.tensor(seq_lens, dtype=torch.int32)
        tally.add(Decoding(len(seq_lens), 1, rows, rows, rows, torch.tensor(whole)))

    step([33, 50, 64, 0], [False, False, True, False])  # below min_context, listed, part of a prompt, padding
    assert tally.snapshot()["rows_listed"] == 0  # that was to warm up
    tally.start()  # by a prompt of the warm-up
    step([33, 50, 64, 0], [False, False, True, False])
    tally.warmed_up()
    assert not tally.serving
    tally.start()
    assert tally.snapshot()["rows_listed"] == 0  # also before a step is done
    tally.warmed_up()  # of another engine
    for _ in range(2):
        step([33, 50, 64, 0], [False, False, True, False])
    found = tally.snapshot()
    pages = 2 * (3 + 4 + 4)
    assert found == {
        "pages_read": [2 * 3 * KV_HEADS * (1 + 2), 2 * 3 * KV_HEADS * 3, 2 * 3 * KV_HEADS * 4],
        "pages_visible": [2 * KV_HEADS * pages, KV_HEADS * pages, KV_HEADS * pages],
        "left_out_mass": [2 * 2 * 3 * HEADS * 0.5, 2 * 3 * HEADS * 0.5, 2 * 3 * HEADS * 0.5],
        "decisions": [2 * 6 * HEADS, 6 * HEADS, 6 * HEADS],
        "rows_listed": 2,
        "rows_dense": 4,
        "sketch_bytes": 999,
    }


def test_the_end_of_the_warm_up_is_told(monkeypatch):
    from vllm.v1.worker import gpu_worker

    from vllm_plugin import metrics, warmup

    told = []
    monkeypatch.setattr(metrics, "warmed_up", lambda: told.append(len(told)))
    monkeypatch.setattr(gpu_worker.Worker, "compile_or_warm_up_model", lambda self: "times")
    for _ in range(2):
        warmup.install()
    assert gpu_worker.Worker.compile_or_warm_up_model(object()) == "times"
    assert told == [0]


NIXL = SimpleNamespace(kv_connector="NixlConnector", kv_connector_module_path=None)


def engine(**changes) -> SimpleNamespace:
    values = {
        "additional_config": {},
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(use_ubatching=False, decode_context_parallel_size=1),
        "speculative_config": None,
        "model_config": SimpleNamespace(get_total_num_hidden_layers=lambda: 4, max_model_len=64),
        "scheduler_config": SimpleNamespace(max_num_seqs=2),
        "device_config": SimpleNamespace(device_type="cpu"),
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    ("changes", "decode_len", "message"),
    [
        (
            {"kv_transfer_config": NIXL},
            1,
            "kv_transfer_config: got NixlConnector, which .* needs one of ExampleConnector",
        ),
        ({"parallel_config": SimpleNamespace(use_ubatching=True)}, 1, "enable_dbo: got micro batches.* needs none"),
        ({}, 22, "got 22 tokens a step and 3 query heads to a KV head; needs a product of at most 64"),
    ],
)
def test_what_lists_can_not(monkeypatch, changes, decode_len, message):
    from vllm_plugin import listing
    from vllm_plugin.settings import PageSettings

    made = listing.Listing(PageSettings(eps=0.1), engine(), HEADS, KV_HEADS, HEAD_SIZE)
    monkeypatch.setattr(listing, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    made.check(engine(), 21)
    with pytest.raises(NotImplementedError, match=message):
        made.check(engine(**changes), decode_len)


def test_a_layer_decodes_with_its_own_eps(monkeypatch):
    """Through `decode`: which listing gives `decode_pages` which eps."""
    from vllm_plugin import listing
    from vllm_plugin.decoding import Decoding
    from vllm_plugin.settings import PageSettings
    from vllm_plugin.tally import Tally

    given = []
    monkeypatch.setattr(listing, "decode_pages", lambda *args, eps, **kwargs: given.append(eps))
    settings = PageSettings(eps=0.1, layer_eps={1: 0, -1: 0.25})
    layers = [listing.Listing(settings, engine(), HEADS, KV_HEADS, HEAD_SIZE) for _ in range(4)]
    tally = Tally([0, 0, 1, 2, 2], 2, HEADS, KV_HEADS, 0, 0, torch.device("cpu"))
    for index, each in enumerate(layers):
        each.join(tally, index, index)
    kv_cache, table = cache("NHD", torch.bfloat16), torch.zeros(1, 4, dtype=torch.int32)
    rows = Decoding(1, 1, torch.tensor([0, 1]), torch.ones(1), table, torch.zeros(1, dtype=torch.bool))
    for each in layers:
        each.decode(None, None, None, kv_cache, rows, None, filled=None, scale=1.0, sinks=None, num_splits=0)
    assert given == [0.1, 0.0, 0.1, 0.25]


def test_layers_by_index():
    from vllm_plugin.listing import Listing
    from vllm_plugin.settings import PageSettings

    made = Listing(PageSettings(eps=0.1, dense_layers=(0, -1)), engine(), HEADS, KV_HEADS, HEAD_SIZE)
    assert [made.wants(f"model.layers.{i}.self_attn.attn") for i in range(4)] == [False, True, True, False]
    assert not made.wants("model.layers.4.self_attn.attn")  # of a draft model
    assert not made.wants("draft_model.model.layers.1.self_attn.attn")
