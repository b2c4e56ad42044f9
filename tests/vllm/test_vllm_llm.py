"""vLLM's offline engine on the CPU with a real model: the same tokens as with CPU_ATTN, whatever the scheduler does.

All runs are in float32, where the rounding of two correct implementations is far below the distance between the two
best tokens. In bfloat16 the next token may rightly differ.
"""

from __future__ import annotations

import pytest
from engine import SAMPLED, generate, greedy
from texts import PROMPTS

CHOSEN = {"backend": "LITE_ATTENTION"}


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


def test_preemption(model, newest, reference):
    """A KV cache of 48 pages of 16 tokens for requests that need three times as many; chunks and prefixes, too."""
    rounds = [greedy(PROMPTS * 2)]
    if not newest:  # all in one engine. Its prompts must be no longer than a step: vLLM's CPU runner can't chunk a seed
        rounds.append({"prompts": PROMPTS[:4], "sampling": SAMPLED})
    found = generate(
        model,
        rounds,
        attention_backend="LITE_ATTENTION",
        block_size=16,
        num_gpu_blocks_override=48,
        max_num_batched_tokens=256,
        max_num_seqs=16,
    )
    assert found["counters"]["vllm:num_preemptions"] > 0
    assert found["rounds"][0]["tokens"] == reference[0] * 2
    if not newest:
        assert found["rounds"][1]["tokens"] == reference[1]
