"""Generation over an FP8 KV cache: close to what it is without, and no more than that."""

from __future__ import annotations

import pytest
import random_model
from engine import generate

SAMPLING = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False, "logprobs": 20}


def served(model: str, kv_cache_dtype: str) -> dict:
    """Chunked prefill, and decode steps of requests of different lengths."""
    rounds = [{"prompts": random_model.prompts(700, 33, 300, 5), "sampling": SAMPLING}]
    engine = {
        "model": model,
        "skip_tokenizer_init": True,
        "attention_backend": "LITE_ATTENTION",
        "kv_cache_dtype": kv_cache_dtype,
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "logprobs_mode": "raw_logits",
    }
    (found,) = generate(**engine, rounds=rounds)["rounds"]
    assert all(len(tokens) == 8 for (tokens,) in found["tokens"])
    return found


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return served(random_model.write(tmp_path_factory.mktemp("model")), "fp8")


def test_a_model_of_random_weights_serves_from_an_fp8_cache(tmp_path, fp8):
    plain = served(random_model.write(tmp_path), "auto")
    # Logits have a spread of 3. bfloat16's own rounding moves them by 0.015, E4M3's of keys and values by 0.1.
    assert 0.03 < random_model.logits_apart(plain, fp8) < 0.2
    assert sum(a[0][:4] == b[0][:4] for a, b in zip(plain["tokens"], fp8["tokens"], strict=True)) >= 2


def test_scales_of_each_head(tmp_path, fp8):
    """They bring keys and values of all heads to where those are that need none, so that the same is stored."""
    by_head = served(random_model.write(tmp_path, by_head=True), "fp8")
    assert random_model.logits_apart(fp8, by_head) < 0.005
    assert by_head["tokens"] == fp8["tokens"]
