"""vLLM's offline engine on the CPU, decoding from listed pages: the same tokens whatever else the engine does.

In float32, so that rounding doesn't choose tokens. Texts are short, so lists are made short too: from 32 tokens on,
with only the newest 16 always read, and a mass of 0.5 left out, as attention of random weights is flat. What lists do
to text is in `test_vllm_llm.py`.
"""

from __future__ import annotations

import pytest
import random_model
from engine import GREEDY, SAMPLED, SMALL, generate_by_lists, greedy
from page_counts import NEARLY_ALL, expected
from texts import PROMPTS

LISTS = {"eps": 0.5, "min_context": 32, "newest": 16}
LAYERS, HEADS, HEADS_K, HEAD_SIZE = (SMALL[name] for name in ("layers", "heads", "kv_heads", "head_dim"))
PAGE_BYTES = 16 * HEADS_K * 2 * HEAD_SIZE * 4
STRANGERS = [f"{i}. {text[: 97 + 13 * i]}" for i, text in enumerate(reversed(PROMPTS))]


def sketch_bytes(bits: int) -> int:
    """Of a page and layer; the next page begins at a multiple of 256."""
    size = HEADS_K * {12: 112, 8: 80}[bits]
    return -(PAGE_BYTES + size) % 256 + size


def tokens(reported: dict) -> list:
    return [each["tokens"] for each in reported["rounds"]]


@pytest.fixture(scope="module")
def full(newest):
    """For what takes long, and what versions of vLLM don't differ in."""
    if not newest:
        pytest.skip("tested with the newest vLLM for the CPU")


@pytest.fixture(scope="module")
def alone(small, full):
    """What each prompt gets in an engine that serves no other at the time, greedily and sampled; and the counts."""
    rounds = [greedy([prompt]) for prompt in PROMPTS] + [{"prompts": PROMPTS[5:6], "sampling": SAMPLED}]
    reported = generate_by_lists(small, rounds, LISTS, enable_prefix_caching=False)
    reported["greedy"] = [each[0] for each in tokens(reported)[:-1]]
    reported["sampled"] = tokens(reported)[-1]
    return reported


def test_eps_0_is_dense_and_takes_no_memory(small, small_reference):
    """Token for token what vLLM's own attention generates."""
    reported = generate_by_lists(small, [greedy(PROMPTS)], {"eps": 0, "min_context": 32})
    assert tokens(reported) == [small_reference[0]]
    assert reported["pages"] == (1 << 30) // (LAYERS * PAGE_BYTES)
    assert reported["stats"] is None
    assert "listed pages" not in reported.log


def test_short_contexts_are_dense(small, small_reference):
    """All rows below `min_context`: attention over lists of all pages."""
    reported = generate_by_lists(small, [greedy(PROMPTS)], LISTS | {"min_context": 512})
    assert tokens(reported) == [small_reference[0]]
    stats = reported["stats"]
    assert stats["rows_listed"] == stats["left_out"] == 0
    assert stats["read"] == stats["visible"] > 0


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_among_strangers(small, alone, prefix_caching):
    """In one batch with others, in chunks, while others come and go; and again, which may come from the prefix cache.

    Between the rounds all sketches are poisoned, where no page is to be read again: what is reused is written anew.
    """
    together = greedy(STRANGERS + PROMPTS)
    again = [greedy(PROMPTS)] if prefix_caching else [{"poison": True}, greedy(PROMPTS)]
    reported = generate_by_lists(
        small,
        [together, *again, {"prompts": PROMPTS[5:6], "sampling": SAMPLED}],
        LISTS,
        enable_prefix_caching=prefix_caching,
        max_num_batched_tokens=512,
        max_num_seqs=12,
        num_gpu_blocks_override=400,
    )
    found, repeated, sampled = tokens(reported)
    assert found[len(STRANGERS) :] == repeated == alone["greedy"]
    assert sampled == alone["sampled"]
    assert reported["stats"]["read"] < 0.9 * reported["stats"]["visible"]
    if prefix_caching:
        assert all(cached >= 64 for cached in reported["rounds"][1]["cached"][4:])


def test_forks_of_one_prefix(tmp_path, full):
    """Four samples that share the prompt's pages, each continued by a request that finds its answer's pages cached.

    What follows is what each alone would get after its answer. It is the same without a prefix cache where the answers
    were decoded densely, as those of the first prompt, which end where lists begin. Lists, as those by which the second
    one's are decoded, show in an answer's keys and values: a prefill makes others of it.
    """
    new = 40
    short, long, *strangers = random_model.prompts(310, 470, 33, 300, 150)
    sampling = {"temperature": 0.8, "n": 4, "seed": 1234, "max_tokens": new, "ignore_eos": True, "detokenize": False}
    then = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    reported = generate_by_lists(
        random_model.write(tmp_path),
        [
            {"forks": {"prompt": prompt, "sampling": sampling, "then": then, "strangers": strangers}}
            for prompt in (short, long)
        ],
        {"eps": 0.3, "min_context": len(short) + new, "newest": 16},
        skip_tokenizer_init=True,
        max_model_len=1024,
        enable_prefix_caching=True,
    )
    for prompt, found in zip((short, long), reported["rounds"], strict=True):
        assert found["together"]["answers"] == found["alone"]["answers"]
        assert len({tuple(answer) for answer in found["alone"]["answers"]}) == 4
        assert min(found["together"]["cached"]) >= len(prompt) + new - 32
        assert found["together"]["follows"] == found["alone"]["after"]
    dense, listed = (found["alone"] for found in reported["rounds"])
    assert dense["anew"] == dense["after"]
    assert listed["anew"] != listed["after"]
    assert reported["stats"]["read"] < 0.9 * reported["stats"]["visible"]


@pytest.mark.parametrize(("dense_layers", "bits"), [([], 12), ([0, -1], 12), ([], 8)])
def test_sketches_are_in_the_memory_plan(small, dense_layers, bits):
    """As many pages fewer as their bytes say; layers that stay dense have none."""
    short = {"prompts": PROMPTS[:1], "sampling": GREEDY | {"max_tokens": 4}}
    settings = LISTS | {"dense_layers": dense_layers, "sketch_bits": bits}
    reported = generate_by_lists(small, [short], settings)
    listed = LAYERS - len(dense_layers)
    pages = (1 << 30) // (LAYERS * PAGE_BYTES + listed * sketch_bytes(bits))
    assert reported["pages"] == pages < (1 << 30) // (LAYERS * PAGE_BYTES)
    assert reported["stats"]["sketch_bytes"] == pages * listed * sketch_bytes(bits)
    assert f"sketch_bits {bits}; {listed} of {listed} layers" in reported.log


def test_what_is_counted(small):
    """Lists whose length is known: nearly all mass may be left out."""
    prompts, new = random_model.prompts(40, 111, 200), 20
    sampling = GREEDY | {"max_tokens": new, "detokenize": False}
    settings = {"eps": NEARLY_ALL, "min_context": 100, "newest": 24}
    stats = generate_by_lists(small, [{"prompts": prompts, "sampling": sampling}], settings)["stats"]
    due = [expected(len(prompt), new, min_context=100, newest=24) for prompt in prompts]
    for name in ("rows_listed", "rows_dense"):
        assert stats[name] == sum(each[name] for each in due)
    for name in ("read", "visible"):
        assert stats[name] == sum(each[name] for each in due) * LAYERS * HEADS_K
    assert set(stats["read_by_layers"].values()) == {stats["read"] / stats["visible"]}


def test_a_layer_has_its_own_eps(small):
    """Nearly all mass may be left out of each layer but the second, which lists everything."""
    prompts, new = random_model.prompts(111, 200), 20
    sampling = GREEDY | {"max_tokens": new, "detokenize": False}
    settings = {"eps": NEARLY_ALL, "min_context": 100, "newest": 24, "layer_eps": {"-2": 0}}
    reported = generate_by_lists(small, [{"prompts": prompts, "sampling": sampling}], settings)
    due = [expected(len(prompt), new, min_context=100, newest=24) for prompt in prompts]
    share = sum(each["read"] for each in due) / sum(each["visible"] for each in due)
    assert reported["stats"]["read_by_layers"] == {"first": share, "middle": 1, "last": share}
    assert f"eps {NEARLY_ALL:g} (layers with their own: 1, from 0 to 0), min_context 100" in reported.log
    assert reported["stats"]["sketch_bytes"] == reported["pages"] * LAYERS * sketch_bytes(12)


def test_layers_with_a_window_stay_dense(tmp_path, full):
    """Every other of four layers has one: the second and the last are listed, and no other is counted."""
    model, lengths, new = random_model.write(tmp_path, head_dim=64, window=48), (40, 111, 200), 20
    sampling = {"temperature": 0, "max_tokens": new, "ignore_eos": True, "detokenize": False}
    rounds = [{"prompts": random_model.prompts(*lengths), "sampling": sampling}]
    engine = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 200}
    settings = {"eps": 1e-4, "min_context": 60, "newest": 24}
    dense, nearly_all_read, few = (
        generate_by_lists(model, rounds, each, **engine) for each in (None, settings, settings | {"eps": NEARLY_ALL})
    )
    assert tokens(nearly_all_read) == tokens(dense)
    assert tokens(few) != tokens(dense)
    due = [expected(length, new, min_context=60, newest=24) for length in lengths]
    total = {name: sum(each[name] for each in due) for name in due[0]}
    for reported in (nearly_all_read, few):
        assert reported["stats"]["rows_listed"] == total["rows_listed"] > 0
        assert reported["stats"]["rows_dense"] == total["rows_dense"] > 0
        assert reported["stats"]["visible"] == total["visible"] * 2 * HEADS_K
        assert reported["stats"]["sketch_bytes"] == 200 * 2 * sketch_bytes(12)
    assert few["stats"]["read"] == total["read"] * 2 * HEADS_K
    share = total["read"] / total["visible"]
    assert few["stats"]["read_by_layers"] == {"first": share, "middle": 0, "last": share}


def test_fp8_kv_cache(tmp_path, full):
    """Sketches of keys as they are stored, with their scale in the selection."""
    engine = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "logprobs_mode": "raw_logits",
        "kv_cache_dtype": "fp8",
    }
    model = random_model.write(tmp_path)
    sampling = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False, "logprobs": 20}
    rounds = [{"prompts": random_model.prompts(700, 33, 300, 5), "sampling": sampling}]
    some = {"eps": 0.3, "min_context": 100, "newest": 16}
    dense, listed = (generate_by_lists(model, rounds, settings, **engine) for settings in (None, {"eps": 0.01}))
    few = generate_by_lists(model, rounds, some, **engine)
    assert [tokens for (tokens,) in listed["rounds"][0]["tokens"]] == [t for (t,) in dense["rounds"][0]["tokens"]]
    assert 0.1 < few["stats"]["read"] / few["stats"]["visible"] < 0.95
    assert few["stats"]["left_out"] > 0.02
    # With scales of each head the same is stored, and the same selected.
    by_head = generate_by_lists(random_model.write(tmp_path, by_head=True), rounds, some, **engine)
    assert tokens(by_head) == tokens(few)
    assert by_head["stats"]["read"] == few["stats"]["read"]
