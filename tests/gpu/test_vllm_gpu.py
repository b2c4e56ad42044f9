"""vLLM on a Hopper GPU: LITE_ATTENTION against FLASH_ATTN with a real model, and Llama-8B shapes at long contexts.

Each engine runs in a process of its own, those of the small model side by side. Needs vLLM (0.26 or newer, with CUDA)
and LiteAttention's entry points in this environment, and SmolLM2-135M-Instruct, which LITE_ATTENTION_TEST_MODEL names
or tools/smollm2.py fetches.
"""

from __future__ import annotations

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lite_attention import __version__

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "vllm"), str(ROOT / "tools")]

import random_model  # noqa: E402
from agreement import agreement, rounding  # noqa: E402
from processes import run  # noqa: E402
from texts import PROMPTS  # noqa: E402
from vllm_missing import missing  # noqa: E402

LITE = "LITE_ATTENTION"
COMPUTES = f"{LITE} {__version__} computes attention by the kernel for NVIDIA"


pytestmark = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model() -> str:
    if chosen := os.environ.get("LITE_ATTENTION_TEST_MODEL"):
        return chosen
    from smollm2 import ensure_smollm2

    return str(ensure_smollm2())


# Model runner, and what is captured: decode steps alone, while prefill runs eagerly; or steps of every kind up to 256
# tokens, of which there are no others.
RUNS = [("V2", "FULL_DECODE_ONLY"), ("V1", "FULL_DECODE_ONLY"), ("V2", "FULL"), ("V1", "FULL")]
PEER = ("FLASH_ATTN", "V2", "FULL_DECODE_ONLY")


def smollm2(model: str, backend: str, runner: str, cudagraph_mode: str):
    """64 greedy tokens for every prompt, and the logits of the best five at each position.

    Prompts are longer than a step takes, so that prefill and decode meet in one. Without torch.compile, whose start-up
    takes a minute; with the KV cache's size given, so that no engine measures memory while another takes some.
    """
    sizes = [1, 2, 4, 8, 16] + [64, 256] * (cudagraph_mode == "FULL")
    engine = {
        "model": model,
        "attention_backend": backend,
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "seed": 0,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 1 << 30,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logits",
        "compilation_config": {"mode": 0, "cudagraph_mode": cudagraph_mode, "cudagraph_capture_sizes": sizes},
    }
    sampling = {"temperature": 0, "max_tokens": 64, "ignore_eos": True, "logprobs": 5}
    return run(
        "probe_engine.py",
        {"engine": engine, "rounds": [{"prompts": PROMPTS, "sampling": sampling}]},
        VLLM_USE_V2_MODEL_RUNNER="1" if runner == "V2" else "0",
    )


@pytest.fixture(scope="module")
def engines(model):
    """Runs of the small model by backend, runner and mode, as futures, so that one's failure is one's own."""
    with ThreadPoolExecutor(len(RUNS) + 1) as pool:
        choices = [PEER, *((LITE, *each) for each in RUNS)]
        yield {choice: pool.submit(smollm2, model, *choice) for choice in choices}


@pytest.mark.parametrize(("runner", "cudagraph_mode"), RUNS)
def test_smollm2_generates_what_flash_attn_generates(engines, runner, cudagraph_mode):
    """A first difference between the tokens is excused only where it is of the size of rounding."""
    reported = engines[LITE, runner, cudagraph_mode].result()
    assert COMPUTES in reported.log
    assert "is not supported with" not in reported.log  # else vLLM has chosen another mode
    found, flash_attn = reported["rounds"][0], engines[PEER].result()["rounds"][0]
    apart = rounding(found, flash_attn)
    print(f"logits are apart by {apart:.3f}")
    assert apart < 0.3
    assert all(len(tokens) == 64 for (tokens,) in found["tokens"])
    assert agreement(found, flash_attn) >= 64 * len(PROMPTS) // 4


# Lists: by name what additional_config says, the model runner, and what is captured. With lists vLLM makes of FULL what
# the name says of them: graphs of decode steps alone.
EVERYTHING = {"eps": 0.02, "min_context": 1 << 20}
BY_MASS = {"eps": 0.02, "min_context": 256}
LISTED = {
    "dense": (None, "V2", "FULL_DECODE_ONLY"),
    "everything V2": (EVERYTHING, "V2", "FULL_DECODE_ONLY"),
    "everything V1": (EVERYTHING, "V1", "FULL_DECODE_ONLY"),
    "by mass V2": (BY_MASS, "V2", "FULL_DECODE_ONLY"),
    "by mass V1": (BY_MASS, "V1", "FULL_DECODE_ONLY"),
    "by mass FULL": (BY_MASS, "V2", "FULL"),
    "by mass eager": (BY_MASS, "V2", "NONE"),
}
LONG = [(ROOT / name).read_text()[:22000] for name in ("README.md", "tests/vllm/test_vllm_backend.py")]


def smollm2_by_lists(model: str, settings: dict | None, runner: str, cudagraph_mode: str):
    """64 greedy tokens after short prompts and two of some 7000 tokens, with what was counted."""
    engine = {
        "model": model,
        "attention_backend": LITE,
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "seed": 0,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 1 << 30,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "logprobs_mode": "raw_logits",
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": cudagraph_mode,
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
        },
        "additional_config": {"lite_attention": settings} if settings else {},
    }
    sampling = {"temperature": 0, "max_tokens": 64, "ignore_eos": True, "logprobs": 5}
    return run(
        "probe_pages.py",
        {"engine": engine, "rounds": [{"prompts": PROMPTS + LONG, "sampling": sampling}]},
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # starts in half the time
        VLLM_USE_V2_MODEL_RUNNER="1" if runner == "V2" else "0",
    )


@pytest.fixture(scope="module")
def listed(model):
    with ThreadPoolExecutor(len(LISTED)) as pool:
        yield {name: pool.submit(smollm2_by_lists, model, *how) for name, how in LISTED.items()}


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_lists_of_all_pages_are_dense_attention(listed, runner):
    reported, dense = listed[f"everything {runner}"].result(), listed["dense"].result()
    assert "decodes from listed pages: eps 0.02, min_context 1048576" in reported.log
    assert agreement(reported["rounds"][0], dense["rounds"][0]) > 0
    stats = reported["stats"]
    assert stats["read"] == stats["visible"] > 0 == stats["rows_listed"]
    assert reported["pages"] < dense["pages"]


@pytest.mark.parametrize("how", ["V2", "V1", "FULL"])
def test_graphs_decode_from_lists_as_eager_steps_do(listed, how):
    """Most tokens are the same: rounding may turn a list or a token. What is read is the same up to that."""
    reported, eager, dense = (listed[name].result() for name in (f"by mass {how}", "by mass eager", "dense"))
    total = 64 * len(PROMPTS + LONG)
    for other in (eager, dense):
        assert agreement(reported["rounds"][0], other["rounds"][0], excuse=True) > total // 4
    stats, eager_stats = reported["stats"], eager["stats"]
    assert stats["rows_listed"] == eager_stats["rows_listed"] >= 63 * len(LONG)
    assert stats["rows_dense"] == eager_stats["rows_dense"] > 0
    shares = [each["read"] / each["visible"] for each in (stats, eager_stats)]
    assert 0.05 < shares[0] < 0.8
    assert abs(shares[0] - shares[1]) < 0.02
    assert 0 < stats["left_out"] < 0.02


FEW = {"eps": 0.3, "min_context": 100, "newest": 16}
RANDOM = {
    "plain": (LITE, "auto", None),
    "fp8": (LITE, "fp8", None),
    "FLASH_ATTN fp8": ("FLASH_ATTN", "fp8", None),
    "fp8 and all pages": (LITE, "fp8", {"eps": 0.01}),
    "fp8 and few pages": (LITE, "fp8", FEW),
    "fp8 by head": (LITE, "fp8", None),
    "fp8 by head and few pages": (LITE, "fp8", FEW),
}


def random_llama(model: str, backend: str, kv_cache_dtype: str, settings: dict | None):
    """A model of random weights: prefill in chunks, decode by full CUDA graphs."""
    engine = random_model.SMALL_ENGINE | {
        "model": model,
        "attention_backend": backend,
        "kv_cache_dtype": kv_cache_dtype,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4],
        },
        "additional_config": {"lite_attention": settings} if settings else {},
    }
    sampling = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False, "logprobs": 20}
    prompts = random_model.prompts(700, 33, 300, 5)
    rounds = [{"prompts": prompts, "sampling": sampling}]
    # In one process, which starts in half the time.
    reported = run("probe_pages.py", {"engine": engine, "rounds": rounds}, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert backend != LITE or COMPUTES in reported.log
    return reported


@pytest.fixture(scope="module")
def random_llamas(tmp_path_factory):
    plain, by_head = (random_model.write(tmp_path_factory.mktemp("random"), by_head=each) for each in (False, True))
    with ThreadPoolExecutor(len(RANDOM)) as pool:
        yield {
            name: pool.submit(random_llama, by_head if "by head" in name else plain, *how)
            for name, how in RANDOM.items()
        }


def test_fp8_kv_cache(random_llamas):
    """As close to a cache of bfloat16 as FLASH_ATTN's FP8, which rounds queries and probabilities to FP8 too."""
    names = "plain", "fp8", "FLASH_ATTN fp8"
    plain, fp8, theirs = (random_llamas[name].result()["rounds"][0] for name in names)
    ours_apart, theirs_apart = (random_model.logits_apart(plain, other) for other in (fp8, theirs))
    print(f"logits apart from those of a bfloat16 cache: {LITE} {ours_apart:.3f}, FLASH_ATTN {theirs_apart:.3f}")
    assert all(len(tokens) == 8 for (tokens,) in fp8["tokens"])
    assert 0.03 < ours_apart < 0.2
    assert ours_apart <= 1.2 * theirs_apart
    assert sum(a[0][:4] == b[0][:4] for a, b in zip(plain["tokens"], fp8["tokens"], strict=True)) >= 2


def test_lists_over_an_fp8_kv_cache(random_llamas):
    """Sketches of keys as they are stored, with their scale in the selection."""
    every, few = (random_llamas[f"fp8 and {what} pages"].result() for what in ("all", "few"))
    dense = random_llamas["fp8"].result()["rounds"][0]
    assert agreement(every["rounds"][0], dense) > 0
    print({name: few["stats"][name] for name in ("read", "visible", "left_out", "rows_listed", "rows_dense")})
    assert few["stats"]["rows_listed"] == 7 * 2
    assert few["stats"]["rows_dense"] == 7 * 2
    assert 0.1 < few["stats"]["read"] / few["stats"]["visible"] < 0.95
    assert few["stats"]["left_out"] > 0.02


def test_fp8_kv_cache_with_scales_of_each_head(random_llamas):
    """They bring keys and values of all heads to where those are that need none: the same is stored, and selected."""
    for name in ("fp8", "fp8 and few pages"):
        expected, found = (random_llamas[each].result() for each in (name, name.replace("fp8", "fp8 by head")))
        apart = random_model.logits_apart(found["rounds"][0], expected["rounds"][0])
        print(f"{name}: logits are apart by {apart:.5f}")
        assert apart < 0.005
        assert found["rounds"][0]["tokens"] == expected["rounds"][0]["tokens"]
        if expected["stats"] is not None:
            assert found["stats"]["read"] == expected["stats"]["read"] < 0.95 * expected["stats"]["visible"]


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def test_llama_8b_with_16_contexts_of_16k(tmp_path):
    """vLLM's defaults: torch.compile, CUDA graphs, chunked prefill. Weights are random: what counts is that it runs."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    batch, context, new = 16, 16384, 64
    prompts = [[(1000 + 7919 * i + 31 * t) % 120000 for t in range(context - new)] for i in range(batch)]
    engine = {
        "model": str(tmp_path),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "attention_backend": LITE,
        "dtype": "bfloat16",
        "max_model_len": context,
        "max_num_seqs": batch,
        "gpu_memory_utilization": 0.9,
    }
    sampling = {"temperature": 0, "max_tokens": new, "ignore_eos": True, "detokenize": False, "logprobs": 1}
    reported = run(
        "probe_engine.py", {"engine": engine, "rounds": [{"prompts": prompts, "sampling": sampling}]}, timeout=1500
    )
    assert COMPUTES in reported.log
    (found,) = reported["rounds"]
    assert [len(tokens) for (tokens,) in found["tokens"]] == [new] * batch
    assert all(math.isfinite(value) for (best,) in found["best"] for each in best for value in each.values())
    assert reported["counters"]["vllm:num_preemptions"] == 0
