"""Generation over an FP8 KV cache: close to what it is without, and no more than that."""

from __future__ import annotations

import random_model
from engine import generate

SAMPLING = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False, "logprobs": 20}


def test_a_model_of_random_weights_serves_from_an_fp8_cache(tmp_path):
    """Chunked prefill, and decode steps of requests of different lengths."""
    rounds = [{"prompts": random_model.prompts(700, 33, 300, 5), "sampling": SAMPLING}]
    engine = {
        "model": random_model.write(tmp_path),
        "skip_tokenizer_init": True,
        "attention_backend": "LITE_ATTENTION",
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "logprobs_mode": "raw_logits",
    }
    (plain,), (fp8,) = (
        generate(**engine, rounds=rounds, kv_cache_dtype=kv_cache_dtype)["rounds"] for kv_cache_dtype in ("auto", "fp8")
    )
    assert all(len(tokens) == 8 for (tokens,) in fp8["tokens"])
    # Logits have a spread of 3. bfloat16's own rounding moves them by 0.015, E4M3's of keys and values by 0.1.
    assert 0.03 < random_model.logits_apart(plain, fp8) < 0.2
    assert sum(a[0][:4] == b[0][:4] for a, b in zip(plain["tokens"], fp8["tokens"], strict=True)) >= 2
