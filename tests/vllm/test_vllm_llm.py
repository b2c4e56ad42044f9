"""vLLM's offline engine on the CPU: the same tokens as with CPU_ATTN, whatever the scheduler does; and lists for text.

All runs are in float32, where the rounding of two correct implementations is far below the distance between the two
best tokens. In bfloat16 the next token may rightly differ.
"""

from __future__ import annotations

import pytest
from engine import GREEDY, SAMPLED, generate, generate_by_lists, greedy
from texts import PROMPTS

CHOSEN = {"backend": "LITE_ATTENTION"}
LISTS = {"eps": 0.1, "min_context": 32, "newest": 16}
SOME, NEW = (1, 5, 6), 32  # one that repeats itself, and two that are answered otherwise from lists
WRITTEN = {"prompts": [PROMPTS[i] for i in SOME], "sampling": GREEDY | {"max_tokens": NEW}}


def test_greedy_and_parallel_sampling(model, newest, reference):
    """With the engine in a process of its own, and the model traced by torch.compile."""
    if not newest:
        pytest.skip("tested with the newest vLLM for the CPU")
    rounds = [greedy(PROMPTS), {"prompts": PROMPTS[:4], "sampling": SAMPLED}]
    compiled = {"VLLM_CPU_CI_ENV": "1"}  # traces, and compiles nothing: that takes minutes
    found = generate(model, rounds, compiled, apart=True, attention_config=CHOSEN, enforce_eager=False)
    assert [each["tokens"] for each in found["rounds"]] == reference


def test_chunked_prefill_and_prefix_cache(small, newest, small_reference):
    """Prompts in chunks of at most 48 tokens, mixed with decodes; then all again, from the prefix cache."""
    if not newest:
        pytest.skip("tested with the newest vLLM for the CPU")
    first, second = generate(
        small,
        [greedy(PROMPTS), greedy(PROMPTS)],
        attention_backend="LITE_ATTENTION",
        block_size=16,
        max_num_batched_tokens=48,
        max_num_seqs=6,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
    )["rounds"]
    assert first["tokens"] == second["tokens"] == small_reference[0]
    assert all(cached >= 64 for cached in second["cached"][4:])


def test_preemption(small, newest, small_reference):
    """A KV cache of 48 pages of 16 tokens for requests that need three times as many; chunks and prefixes, too."""
    rounds = [greedy(PROMPTS * 2)]
    if not newest:  # all in one engine. Its prompts must be no longer than a step: vLLM's CPU runner can't chunk a seed
        rounds.append({"prompts": PROMPTS[:4], "sampling": SAMPLED})
    found = generate(
        small,
        rounds,
        attention_backend="LITE_ATTENTION",
        block_size=16,
        num_gpu_blocks_override=48,
        max_num_batched_tokens=256,
        max_num_seqs=16,
    )
    assert found["counters"]["vllm:num_preemptions"] > 0
    assert found["rounds"][0]["tokens"] == small_reference[0] * 2
    if not newest:
        assert found["rounds"][1]["tokens"] == small_reference[1]


# Decoding from listed pages


@pytest.fixture(scope="module")
def listed(model, newest):
    """What is generated from lists for some prompts, in one batch."""
    if not newest:
        pytest.skip("tested with the newest vLLM for the CPU")
    return generate_by_lists(model, [WRITTEN], LISTS)


def agreeing(reported: dict, other: dict) -> float:
    """The share of tokens that are the same at the same place in two runs of WRITTEN."""
    (found,), (expected,) = (each["rounds"] for each in (reported, other))
    both = zip(found["tokens"], expected["tokens"], strict=True)
    same = [a == b for (x,), (y,) in both for a, b in zip(x, y, strict=True)]
    return sum(same) / len(same)


def dense(reference: list) -> list:
    """What is generated without lists for the same prompts."""
    return [[reference[0][i][0][:NEW]] for i in SOME]


def test_lists_leave_pages_out(listed, reference):
    """Else nothing here would test them. What is generated is another text than the dense one, for some prompts."""
    stats = listed["stats"]
    assert 0.2 < stats["read"] / stats["visible"] < 0.9
    assert 0.01 < stats["left_out"] < 0.1
    assert stats["rows_listed"] > 60
    assert listed["rounds"][0]["tokens"] != dense(reference)
    settings = "eps 0.1, min_context 32, newest 16, dense_layers [], sketch_bits 12"
    assert f"decodes from listed pages: {settings}; 30 of 30 layers" in listed.log


def test_preemption_with_lists(model, listed):
    """A KV cache with too little room for all. What was decoded is computed again as a prompt would be, densely."""
    few = {"num_gpu_blocks_override": 12, "max_model_len": 144}
    reported = generate_by_lists(model, [WRITTEN], LISTS, **few)
    assert reported["counters"]["vllm:num_preemptions"] > 0
    assert agreeing(reported, listed) >= 0.6  # one of three may go another way


def test_speculative_decoding_with_lists(model, listed, reference):
    """Several tokens a step: those of dense attention, where all pages are listed."""
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    whole = generate_by_lists(model, [WRITTEN], LISTS | {"min_context": 512}, speculative_config=speculative)
    assert whole["rounds"][0]["tokens"] == dense(reference)
    assert whole["counters"]["vllm:spec_decode_num_accepted_tokens"] > 10
    found = generate_by_lists(model, [WRITTEN], LISTS, speculative_config=speculative)
    assert found["stats"]["read"] < 0.9 * found["stats"]["visible"]
    assert agreeing(found, listed) >= 0.5
